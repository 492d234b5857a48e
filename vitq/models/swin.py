"""timm's SwinTransformer: window attention with relative position bias, cyclic shift, patch merging."""

from __future__ import annotations

from torch import nn

from vitq.models.adapter import UnsupportedModelError, check_children, float_part, is_plain_layer_norm, kind
from vitq.models.attention import RelativePositionBias, TappedAttention
from vitq.models.sites import AttentionSite, BlockSite, LinearSite, MergeSite, Prepared, StemSite
from vitq.models.vit import is_plain_embed, mlp, patch_embed


def fill(prepared: Prepared) -> None:
    """Find the sites of `prepared.model` and put `TappedAttention` in place of timm's WindowAttention."""
    model = prepared.model
    patch_embed(prepared, "patch_embed")
    prepared.joint_heads = "a Swin block runs quantized as a whole, and each of its heads has relative position biases of its own"
    if is_plain_embed(model.patch_embed) and model.patch_embed.output_fmt == "NHWC":
        prepared.stem = StemSite("image")
    for i, stage in enumerate(model.layers):
        if hasattr(stage.downsample, "reduction"):
            at = f"layers.{i}.downsample"
            prepared.stages.append(at)
            norm = f"{at}.norm" if is_plain_layer_norm(stage.downsample.norm) else None
            prepared.linears.append(LinearSite(f"{at}.reduction", "reduction", norm))
            if norm is not None and kind(stage.downsample) == "PatchMerging":
                prepared.merges.append(MergeSite(at))
        for j, block in enumerate(stage.blocks):
            _block(prepared, f"layers.{i}.blocks.{j}", block, strict=model.patch_embed.strict_img_size)
            prepared.stages.append(f"layers.{i}.blocks.{j}")
    if isinstance(getattr(model.head, "fc", None), nn.Linear):
        prepared.linears.append(LinearSite("head.fc", "head"))


def _block(prepared: Prepared, name: str, block: nn.Module, strict: bool) -> None:
    if kind(block) != "SwinTransformerBlock":
        raise UnsupportedModelError(f"vitq does not know the block {name!r} ({kind(block)}); "
                                    "known: SwinTransformerBlock")
    attn = block.attn
    if kind(attn) != "WindowAttention":
        raise UnsupportedModelError(f"vitq does not know the attention {name + '.attn'!r} ({kind(attn)}); "
                                    "known: WindowAttention")
    check_children(f"{name}.attn", attn, {"qkv", "attn_drop", "proj", "proj_drop", "softmax", "relative_position_bias_table"})
    head_dim = attn.qkv.out_features // (3 * attn.num_heads)
    block.attn = TappedAttention(
        num_heads=attn.num_heads, head_dim=head_dim, scale=attn.scale, qkv=attn.qkv, proj=attn.proj,
        position_bias=RelativePositionBias(attn.relative_position_bias_table, attn.relative_position_index))
    float_part(prepared, f"{name}.attn.position_bias", "relative position bias")
    pads = not strict or any(size % window for size, window in zip(block.input_resolution, block.window_size))
    norms = [f"{name}.{leaf}" if is_plain_layer_norm(getattr(block, leaf)) else None for leaf in ("norm1", "norm2")]
    prepared.linears += [LinearSite(f"{name}.attn.qkv", "qkv", norms[0], zero_padded=pads),
                         LinearSite(f"{name}.attn.proj", "proj")]
    prepared.attentions.append(AttentionSite(f"{name}.attn"))
    if mlp(prepared, f"{name}.mlp", block.mlp, norm=norms[1]) and all(norms):
        prepared.blocks.append(BlockSite(name, "window"))
