"""The converted model: the source's own class with integer modules inside, and a guard on what would break them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from vitq import graphs
from vitq.formats import QTensor
from vitq.nn.block import QuantBlock
from vitq.nn.packed import PackedModule, check_keeps_dtype, is_packed, link_all, pack_all
from vitq.ops.patches import nan_guard
from vitq.recipe import Recipe


@dataclass
class ModelInfo:
    """What `vitq.save` and `vitq.explain` know of a converted model beside its tensors. stem: the adapter's StemSite, if any;
    version counts how often the tensors were replaced."""

    recipe: Recipe
    roles: dict[str, str]
    notes: dict[str, str]
    floats: dict[str, str]
    dtype: torch.dtype
    backend: str
    calibration: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    stem: Any = None
    version: int = 0


class Quantized:
    """Mixed into the class of the source model. Keeps its surface; refuses what integers cannot follow."""

    vitq: ModelInfo

    def train(self, mode: bool = True):
        if mode:
            raise RuntimeError("a quantized model cannot be trained: its weights are integer codes. Fine-tune the float "
                               "model, then convert it again")
        return super().train(mode)

    def load_state_dict(self, *args: Any, **kwargs: Any):
        packed = is_packed(self)
        result = super().load_state_dict(*args, **kwargs)
        self._refresh(packed)
        return result

    def _apply(self, fn, recurse: bool = True):
        check_keeps_dtype(fn)
        packed = is_packed(self)
        super()._apply(fn, recurse)
        self._refresh(packed)
        return self

    def _refresh(self, pack: bool) -> None:
        """After buffers have moved or changed: output formats are copies of the consumers' buffers, packed forms of all."""
        link_all(self)
        if pack:
            pack_all(self)
        self.vitq.version += 1

    def __reduce_ex__(self, protocol):
        raise TypeError("a quantized model is not pickled: use vitq.save(model, folder) and vitq.load(folder)")

    def __deepcopy__(self, memo: dict) -> nn.Module:
        import copy

        clone = self.__class__.__new__(self.__class__)
        memo[id(self)] = clone
        clone.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        if is_packed(self):
            pack_all(clone)
        return clone


class QuantizedDecoder(Quantized):
    """A language model of transformers: its own code runs, `generate` and all."""

    def get_compiled_call(self, compile_config: Any) -> Callable[..., Any]:
        """What `generate` calls for each new token where the cache is static and the model on a GPU: this model, as CUDA graphs. transformers' own,
        `torch.compile`, where a `compile_config` is asked for, and for its static layers of a sliding window, which count on the host."""
        if compile_config is not None:
            return super().get_compiled_call(compile_config)

        def call(**inputs: Any) -> Any:
            cache = inputs.get("cache", inputs.get("past_key_values"))
            if any(layer.is_sliding for layer in cache.layers):
                return super(QuantizedDecoder, self).get_compiled_call(None)(**inputs)
            return graphs.step(self, inputs)

        return call

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of parameters, of buffers and of what kernels made of these, which hold most of a weight; of parameters alone without `return_buffers`."""
        buffers = (m.held_bytes() if isinstance(m, PackedModule) else sum(b.nbytes for b in m.buffers(recurse=False)) for m in self.modules())
        return sum(p.nbytes for p in self.parameters()) + (sum(buffers) if return_buffers else 0)

    def save_pretrained(self, save_directory: str | os.PathLike, *, max_shard_size: int | str = "50GB", push_to_hub: bool = False,
                        **hub: Any) -> None:
        """Write a folder that `AutoModelForCausalLM.from_pretrained` opens after `import vitq.hf`, and `vitq.load` too: what `vitq.save` writes.

        push_to_hub: upload it as well, with what `vitq.push_to_hub` takes (repo_id, by default the folder's name; private, token, commit_message).
        Raises as these two do, TypeError for other arguments of transformers' own method.
        """
        import vitq  # its public names, as a user has them: modules know nothing of checkpoints

        if hub and not push_to_hub:
            raise TypeError(f"save_pretrained of a quantized model takes max_shard_size, and with push_to_hub=True repo_id, private, token and "
                            f"commit_message; got {', '.join(hub)}")
        folder = vitq.save(self, save_directory, max_shard_size=max_shard_size)
        if push_to_hub:
            vitq.push_to_hub(self, hub.pop("repo_id", folder.name), max_shard_size=max_shard_size, **hub)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """As `vitq.push_to_hub`."""
        import vitq

        return vitq.push_to_hub(self, repo_id, **options)


class QuantizedModel(Quantized):
    """A model of images."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Images float [B, C, H, W] -> logits float32. An image with NaN or infinity gives NaN, as in the float model.

        Raises TypeError for images that are not floating point.
        """
        x = floating(x)
        return with_guard(super().forward(x, *args, **kwargs), nan_guard(x))


class QuantizedVit(QuantizedModel):
    """A ViT with a `StemSite`: the patch embedding's GEMM adds the position embedding and writes between the prefix tokens.

    Where the head reads the prefix tokens alone (the class token), `forward` computes no other after the last attention.
    All are there for `forward_features` and where a hook is registered. `forward_intermediates` is timm's own and rounds to
    the 16-bit dtype once more before the position embedding is added; so does a model with hooks on its stem.
    """

    _prefix: Tensor | None = None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """As `QuantizedModel.forward`. Raises ValueError for images of another size than the model's."""
        masks = {} if attn_mask is None and not is_causal else {"attn_mask": attn_mask, "is_causal": is_causal}
        if self._hooks_left_out():
            return super().forward(x, **masks)
        kept = watched(self)
        head_only = self.global_pool == "token" and self.attn_pool is None and not kept
        x, broken = self._tokens(floating(x), masks, kept, self.num_prefix_tokens if head_only else None)
        return with_guard(self.forward_head(self.norm(x)), broken)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images -> tokens [B, N, C], normalised."""
        masks = {} if attn_mask is None and not is_causal else {"attn_mask": attn_mask, "is_causal": is_causal}
        if self._hooks_left_out():
            return super().forward_features(x, **masks)
        return self.norm(self._tokens(floating(x), masks, watched(self))[0])

    def _tokens(self, images: Tensor, masks: dict[str, Any], kept: bool, first: int | None = None) -> tuple[Tensor, Tensor]:
        """The (first) tokens after the last block, and what `nan_guard` says of the images. kept: no block writes over its
        input."""
        codes, broken = quantized_patches(self.patch_embed, images)
        proj, stem, count = self.patch_embed.proj, self.vitq.stem, self._prefix.shape[1]
        x = torch.empty(images.shape[0], count + self.patch_embed.num_patches, self.embed_dim, dtype=proj.dtype,
                        device=images.device)
        x[:, :count] = self._prefix
        position = getattr(self, stem.position)
        position = position if stem.patches_only else position[:, count:]
        proj(codes, residual=position.expand(images.shape[0], -1, -1), out=x[:, count:])
        del codes
        x = self.norm_pre(x)
        *blocks, last = self.blocks
        for block in blocks:
            x = run_block(block, x, kept, **masks)
        return run_block(last, x, kept, first, **masks), broken

    def _hooks_left_out(self) -> bool:
        """Whether there are hooks on modules that only timm's own code calls."""
        return hooked(self.patch_embed, self.pos_drop, self.patch_drop, self.blocks)

    def _refresh(self, pack: bool) -> None:
        super()._refresh(pack)
        stem, tokens = self.vitq.stem, [getattr(self, name).detach() for name in self.vitq.stem.prefix]
        position = getattr(self, stem.position).detach()
        prefix = torch.cat(tokens, dim=1) if tokens else position[:, :0]
        self._prefix = prefix if stem.patches_only else prefix + position[:, : prefix.shape[1]]


class QuantizedSwin(QuantizedModel):
    """A Swin with a `StemSite`: the pixels are read once, for their codes and for what is not finite among them."""

    def forward(self, x: Tensor) -> Tensor:
        """As `QuantizedModel.forward`. Raises ValueError for images of another size than the model's."""
        stages = list(self.layers)
        # Modules that only timm's own code calls.
        if hooked(self.patch_embed, self.layers, *stages, *(stage.blocks for stage in stages)):
            return super().forward(x)
        kept = watched(self)
        codes, broken = quantized_patches(self.patch_embed, floating(x))
        x = self.patch_embed.norm(self.patch_embed.proj(codes).permute(0, 2, 3, 1))
        del codes
        for stage in stages:
            x = stage.downsample(x)
            for block in stage.blocks:
                x = run_block(block, x, kept)
        return with_guard(self.forward_head(self.norm(x)), broken)


def quantized_patches(embed: nn.Module, images: Tensor) -> tuple[QTensor, Tensor]:
    """Codes of the patches of images that fit timm's `embed`, and what `nan_guard` says of the images."""
    proj = embed.proj
    expected = (proj.in_features // (proj.kernel_size[0] * proj.kernel_size[1]), *embed.img_size)
    if images.shape[1:] != expected:
        raise ValueError(f"images must be [batch, {', '.join(str(n) for n in expected)}], got {list(images.shape)}")
    return proj.patches(images)


def run_block(block: nn.Module, x: Tensor, kept: bool, first: int | None = None, **masks: Any) -> Tensor:
    """block(x), written over x unless that is kept; only the first tokens of the result if `first` is given."""
    if isinstance(block, QuantBlock):
        return block(x, **masks, first=first, inplace=not kept)
    return block(x, **masks)[:, :first]


def hooked(*modules: nn.Module) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def watched(model: nn.Module) -> bool:
    """Whether hooks look at what goes into or out of a part of the model: then everything is computed and kept for them."""
    return hooked(*(m for m in model.modules() if m is not model))


def floating(x: Tensor) -> Tensor:
    """Images in float32 or a 16-bit float. Raises TypeError for others than floating point."""
    if not x.is_floating_point():
        raise TypeError(f"images must be floating point and preprocessed as the model expects, got {x.dtype}")
    return x.float() if x.dtype == torch.float64 else x


def with_guard(y: Tensor, broken: Tensor) -> Tensor:
    """Codes have no NaN, so a broken image would come out as a plausible class: add its NaN, or 0, to float32 logits [B, ...]."""
    return y.float() + broken.view(-1, *(1,) * (y.ndim - 1))


@lru_cache(maxsize=None)
def quantized_class(source: type, base: type) -> type:
    """The class of a converted `source`: an instance of both `base`, a QuantizedModel, and `source`."""
    return type(f"Quantized{source.__name__}", (base, source), {"__module__": __name__})


@lru_cache(maxsize=None)
def casting_class(source: type) -> type:
    """`source` whose forward casts its input to the dtype of its weights: images come in float32, a float stem computes in
    its own dtype; a float head is float32 and reads 16-bit features."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        parameter = next(self.parameters(), None)
        return source.forward(self, x if parameter is None else x.to(parameter.dtype), *args, **kwargs)

    return type(source.__name__, (source,), {"forward": forward, "__module__": __name__})
