"""timm's VisionTransformer and VisionTransformerDistilled: ViT, DeiT, DeiT-3, registers, qk-norm, CLIP, DINOv2 …"""

from __future__ import annotations

from torch import nn

from vitq.models.adapter import (UnsupportedModelError, activation_name, check_children, float_part, fold_layer_scale,
                                 is_plain_layer_norm, kind, plain_linears)
from vitq.models.attention import TappedAttention
from vitq.models.sites import AttentionSite, BlockSite, HeadSite, LinearSite, MlpSite, Prepared, StemSite


def fill(prepared: Prepared) -> None:
    """Find the sites of `prepared.model` and put `TappedAttention` in place of timm's Attention."""
    model = prepared.model
    patch_embed(prepared, "patch_embed")
    prepared.stem = _stem(model)
    float_part(prepared, "", "tokens and position embeddings")
    for i, block in enumerate(model.blocks):
        _block(prepared, f"blocks.{i}", block)
        prepared.stages.append(f"blocks.{i}")
    if getattr(model, "attn_pool", None) is not None:
        plain_linears(prepared, "attn_pool", "pool")
        float_part(prepared, "attn_pool", "attention pooling: its matmuls and latent query")
    for name in ("head", "head_dist"):
        if isinstance(getattr(model, name, None), nn.Linear):
            prepared.linears.append(LinearSite(name, "head"))


def _stem(model: nn.Module) -> StemSite | None:
    """What timm's patch_embed and _pos_embed amount to, or None where they do more than a StemSite says."""
    embed, position = model.patch_embed, model.pos_embed
    if not is_plain_embed(embed) or not embed.flatten or position is None or not isinstance(embed.norm, nn.Identity):
        return None
    if not isinstance(model.patch_drop, nn.Identity) or getattr(model.pos_drop, "p", 0):
        return None
    # VisionTransformerDistilled leaves register tokens out.
    names = ("cls_token", "dist_token") if hasattr(model, "dist_token") else ("cls_token", "reg_token")
    prefix = tuple(name for name in names if getattr(model, name) is not None)
    tokens = sum(getattr(model, name).shape[1] for name in prefix)
    covered = embed.num_patches + (0 if model.no_embed_class else tokens)
    fits = tokens == model.num_prefix_tokens and position.shape[1] == covered
    return StemSite("tokens", prefix, "pos_embed", model.no_embed_class) if fits else None


def is_plain_embed(embed: nn.Module) -> bool:
    """timm's PatchEmbed for images of one size, which neither resamples nor pads."""
    return kind(embed) == "PatchEmbed" and embed.strict_img_size and embed.img_size is not None and not embed.dynamic_img_pad


def patch_embed(prepared: Prepared, name: str) -> None:
    """timm's PatchEmbed is one GEMM (kernel = stride); a convolutional stem in front of it stays in float."""
    embed = prepared.model.get_submodule(name)
    proj = getattr(embed, "proj", None)
    if hasattr(embed, "backbone"):
        float_part(prepared, f"{name}.backbone", "convolutional stem")
    if isinstance(proj, nn.Conv2d):
        simple = proj.kernel_size == proj.stride and proj.padding == (0, 0) and proj.groups == 1
        if simple and proj.dilation == (1, 1):
            prepared.linears.append(LinearSite(f"{name}.proj", "patch_embed"))
        else:
            float_part(prepared, f"{name}.proj", "overlapping convolution")
    elif proj is not None and not isinstance(proj, nn.Identity):
        raise UnsupportedModelError(f"vitq does not know {name}.proj ({type(proj).__name__})")


def _block(prepared: Prepared, name: str, block: nn.Module) -> None:
    found = kind(block)
    if found == "Block":
        attention_done = _attention(prepared, f"{name}.attn", block.attn, norm=_norm(block.norm1, f"{name}.norm1"))
        fold_layer_scale(block, "ls1", block.attn.proj)
        mlp_done = mlp(prepared, f"{name}.mlp", block.mlp, norm=_norm(block.norm2, f"{name}.norm2"))
        fold_layer_scale(block, "ls2", block.mlp.fc2)
        if attention_done and mlp_done and is_plain_layer_norm(block.norm1) and is_plain_layer_norm(block.norm2):
            prepared.blocks.append(BlockSite(name))
    elif found == "ResPostBlock":  # the norm comes after the branch: nothing to fold
        _attention(prepared, f"{name}.attn", block.attn)
        mlp(prepared, f"{name}.mlp", block.mlp)
    elif found == "ParallelThingsBlock":
        for i, branch in enumerate(block.attns):
            at = f"{name}.attns.{i}"
            _attention(prepared, f"{at}.attn", branch.attn, norm=_norm(branch.norm, f"{at}.norm"))
            fold_layer_scale(branch, "ls", branch.attn.proj)
        for i, branch in enumerate(block.ffns):
            at = f"{name}.ffns.{i}"
            mlp(prepared, f"{at}.mlp", branch.mlp, norm=_norm(branch.norm, f"{at}.norm"))
            fold_layer_scale(branch, "ls", branch.mlp.fc2)
    elif found in ("ParallelScalingBlock", "DiffParallelScalingBlock"):
        roles = {"in_proj": "qkv", "out_proj": "proj", "attn_out_proj": "proj", "mlp_out_proj": "fc2"}
        for leaf, role in roles.items():
            if isinstance(getattr(block, leaf, None), nn.Linear):
                prepared.linears.append(LinearSite(f"{name}.{leaf}", role))
        float_part(prepared, name, f"attention matmuls of {found}")
        prepared.joint_heads = f"{name!r} is a {found}, whose attention is not a module of its own"
    else:
        raise UnsupportedModelError(
            f"vitq does not know the block {name!r} ({found}); known: Block, ResPostBlock, ParallelThingsBlock, "
            "ParallelScalingBlock, DiffParallelScalingBlock")


def _norm(module: nn.Module, name: str) -> str | None:
    return name if is_plain_layer_norm(module) else None


def _attention(prepared: Prepared, name: str, attn: nn.Module, norm: str | None = None) -> bool:
    """Replace timm's Attention; differential attention keeps its float matmuls. Returns whether it was replaced."""
    found = kind(attn)
    if found == "DiffAttention":
        prepared.linears += [LinearSite(f"{name}.qkv", "qkv", norm), LinearSite(f"{name}.proj", "proj")]
        float_part(prepared, name, "attention matmuls of DiffAttention")
        prepared.joint_heads = f"{name!r} is a DiffAttention, whose heads come in pairs"
        return False
    if found != "Attention":
        raise UnsupportedModelError(f"vitq does not know the attention {name!r} ({found}); known: Attention, DiffAttention")
    check_children(name, attn, {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"})
    gate = getattr(attn, "gate", None)
    head_dim = attn.head_dim
    tapped = TappedAttention(num_heads=attn.num_heads, head_dim=head_dim, scale=attn.scale, qkv=attn.qkv,
                             proj=attn.proj, q_norm=attn.q_norm, k_norm=attn.k_norm,
                             norm=getattr(attn, "norm", None), gate=gate)
    parent, _, leaf = name.rpartition(".")
    setattr(prepared.model.get_submodule(parent), leaf, tapped)
    # With a gate the norm feeds two linears, so nothing may be folded into one of them alone.
    prepared.linears.append(LinearSite(f"{name}.qkv", "qkv", None if gate is not None else norm))
    if gate is not None:
        prepared.linears.append(LinearSite(f"{name}.gate", "qkv"))
    prepared.linears.append(LinearSite(f"{name}.proj", "proj"))
    prepared.attentions.append(AttentionSite(name))
    if gate is None and isinstance(tapped.norm, nn.Identity):
        prepared.heads.append(HeadSite(name, f"{name}.qkv", f"{name}.proj", attn.num_heads, (head_dim,) * 3, head_dim))
    else:
        prepared.joint_heads = f"{name!r} has a {'norm' if gate is None else 'gate'} over all heads together"
    return True


def mlp(prepared: Prepared, name: str, module: nn.Module, norm: str | None = None, zero_padded: bool = False) -> bool:
    """Mlp, GluMlp and SwiGLU. Returns whether it is the plain fc1 -> activation -> fc2 that can be fused."""
    found = kind(module)
    if found == "Mlp":
        prepared.linears += [LinearSite(f"{name}.fc1", "fc1", norm, zero_padded), LinearSite(f"{name}.fc2", "fc2")]
        inner = getattr(module, "norm", nn.Identity())
        if isinstance(inner, nn.Identity):
            prepared.mlps.append(MlpSite(name, activation_name(module.act)))
            return True
        return False
    if found == "GluMlp":
        prepared.linears += [LinearSite(f"{name}.fc1", "fc1", norm), LinearSite(f"{name}.fc2", "fc2")]
        return False
    if found == "SwiGLU":  # the norm feeds both halves
        prepared.linears += [LinearSite(f"{name}.fc1_g", "fc1"), LinearSite(f"{name}.fc1_x", "fc1"),
                             LinearSite(f"{name}.fc2", "fc2")]
        return False
    raise UnsupportedModelError(f"vitq does not know the MLP {name!r} ({found}); known: Mlp, GluMlp, SwiGLU")
