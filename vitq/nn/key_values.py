"""Keys and values as they enter the cache of a language model, quantized or not, and attention to a static one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitq.formats import ActivationFormat
from vitq.nn.packed import PackedModule, Row
from vitq.nn.rows import RowBuffers
from vitq.ops import dispatch
from vitq.ops.cached_attention import CachedAttentionSpec, CachePart, HeadCodes, RowCodes, codes_of, transformed
from vitq.plan import CacheParams
from vitq.recipe import QuantSpec


class QuantKeyValues(PackedModule):
    """Quantizes new keys and values, where the recipe says so, before they are attended to, whether there is a cache or not; attends by itself where the
    cache is static.

    parts: (key and value heads, how keys are quantized, how values are), None where they stay in float; one part of all heads (None), or those of an
    attention in parts. A cache keeps their codes: the layers of an empty `DynamicCache` or `StaticCache` of transformers are made those of a
    `QuantizedCache` or `StaticQuantizedCache` as they fill. Buffers, of part i: keys_i_right float16 [D, D] where keys are transformed, keys_i_clip and
    values_i_clip float32 [2] where ranges are clipped. Queries are transformed by the inverse transpose, so that they can be multiplied with keys as these are.
    """

    def __init__(self, head_dim: int, parts: Sequence[tuple[int | None, QuantSpec | None, QuantSpec | None]], *, backend: str):
        super().__init__(backend)
        self.head_dim, self.heads = head_dim, sum(heads or 0 for heads, *_ in parts)
        self.counts = [heads for heads, *_ in parts]
        self._kernels: dict[torch.device, tuple[dispatch.Choice, Any]] = {}
        self.specs = [specs for _, *specs in parts]
        self.quantizes = any(spec is not None for specs in self.specs for spec in specs)
        self.buffers_of = [[None if spec is None else RowBuffers(self, f"{name}_{i}", spec, right=None if spec.transform == "none" else head_dim)
                            for name, spec in zip(("keys", "values"), specs)] for i, specs in enumerate(self.specs)]

    def set_params(self, params: Sequence[CacheParams]) -> None:
        """Of each part."""
        for buffers, of in zip(self.buffers_of, params):
            for rows, fmt in zip(buffers, (of.k, of.v)):
                if rows is not None:
                    rows.fill(fmt)
        self.invalidate()

    def derive(self) -> dict[str, Tensor]:
        found = {}
        for i, (rows, _) in enumerate(self.buffers_of):
            if (fmt := self._format(i, 0)) is not None and fmt.transform is not None:
                found[f"queries_{i}"] = fmt.transform.inverse_transposed(torch.eye(self.head_dim, device=fmt.transform.right.device))
        return found

    @property
    def codes(self) -> tuple[RowCodes | HeadCodes | None, RowCodes | HeadCodes | None]:
        """Of keys and of values, None for those that stay in float."""
        return tuple(codes_of([(part.heads, getattr(part, side)) for part in self._parts()]) for side in ("keys", "values"))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cache: Any, layer: int, arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """As the canonical form's. Raises TypeError or ValueError for a cache that does not keep these codes."""
        q, k = transformed(self._parts(), q, k)
        if cache is None:
            return (q, *(x if of is None else of.fake(x) for x, of in zip((k, v), self.codes)))
        self._layer_of(cache, layer)
        return (q, *cache.update(k, v, layer, **arguments))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cache: Any, layer: int, scale: float,
               rotary: tuple[Tensor, Tensor] | None, window: int) -> Tensor | None:
        """As the canonical form's: to a static cache, whose rows a kernel writes and, for a few tokens, reads as they are."""
        if cache is None or mask is not None and not (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.ndim == 4) or self._forward_hooks:
            return None
        kept = self._layer_of(cache, layer)
        if not hasattr(kept, "begin") or cache.offloading:
            return None
        first = kept.begin(k, v)
        choice, packed = self._choice(q.device)
        return choice.kernel.run(packed, q, k, v, kept.keys, kept.values, kept.state, mask, scale, rotary, window, first, kept.float_prefill)

    def _layer_of(self, cache: Any, layer: int) -> Any:
        """The cache's layer, for these codes; without codes that of a static cache, or None. Raises TypeError or ValueError for one that keeps others."""
        from vitq.nn.quantized_cache import static_layer, take_codes

        return take_codes(cache, layer, self.codes) if self.quantizes else static_layer(cache, layer)

    def invalidate(self) -> None:
        super().invalidate()
        self._kernels = {}

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_kernels": {}}

    def _choice(self, device: torch.device) -> tuple[dispatch.Choice, Any]:
        """What attends on this device, and its constants: a module without buffers does not know where it is."""
        if device not in self._kernels:
            spec = CachedAttentionSpec(self.head_dim, self._parts())
            choice = dispatch.choose("cached_attention", self.backend, spec, device)
            self._kernels[device] = choice, choice.kernel.pack(spec, device)
        return self._kernels[device]

    def _parts(self) -> tuple[CachePart, ...]:
        found = []
        for i, heads in enumerate(self.counts):
            keys, values = (self._format(i, side) for side in (0, 1))
            codes = (None if fmt is None else RowCodes(fmt.bits, fmt.symmetric, fmt.clip) for fmt in (keys, values))
            found.append(CachePart(heads, *codes, None if keys is None else keys.transform, self.derived(f"queries_{i}")))
        return tuple(found)

    def _format(self, part: int, side: int) -> ActivationFormat | None:
        spec, rows = self.specs[part][side], self.buffers_of[part][side]
        return None if spec is None else rows.format(ActivationFormat(spec.bits, dynamic=True, symmetric=spec.symmetric))

    def row(self, layer: str, device: torch.device) -> Row | None:
        if not self.quantizes:
            return None

        def name(codes: RowCodes | HeadCodes | None) -> str:
            if isinstance(codes, HeadCodes):
                return "/".join(name(part) for _, part in codes.parts)
            return "16" if codes is None else f"{codes.bits}{'' if codes.symmetric else ' asymmetric'}"

        heads, what = (self.heads, "token") if any(isinstance(codes, HeadCodes) for codes in self.codes) else (1, "token and head")
        size = sum(codes.size(self.head_dim) if isinstance(codes, HeadCodes) else heads * (2 * self.head_dim if codes is None else codes.size(
            self.head_dim)) for codes in self.codes)
        transformed = "; keys times {0} x {0}, queries times its inverse".format(self.head_dim) if self._derived else ""
        choice, _ = self._choice(device)
        note = f"in a cache {size} bytes a {what}, {4 * heads * self.head_dim} in 16-bit floats{transformed}"
        return Row(layer, "kv", "K{} V{}".format(*map(name, self.codes)), choice.backend, choice.kernel.name, self.own_bytes(), self.held_bytes(), note)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={codes}" for name, codes in zip("kv", self.codes))


def quantized_cache(model: nn.Module, *, max_length: int | None = None, batch_size: int = 1, float_prefill: bool = False) -> Any:
    """An empty cache for a converted model whose recipe quantizes keys and values: `model.generate(..., cache=cache)`; `cache.nbytes`
    says what it takes. Where it is given none, the model makes one by itself.

    max_length: one of that many tokens, prompt and answer, with all its memory now; on a GPU `generate` then runs each new token as a
    CUDA graph. batch_size: its sequences, beams counted. float_prefill: the tokens that fill it first attend to one another's keys and values in
    float, while their codes are kept; by default they attend to what these stand for, as all later ones do.

    Raises TypeError for a model that vitq did not convert, ValueError for one whose recipe leaves keys and values in float, or for sizes below 1.
    """
    if getattr(model, "vitq", None) is None:
        raise TypeError(f"expected a model that vitq.convert or vitq.load returned, got {type(model).__name__}")
    if not any(isinstance(module, QuantKeyValues) and module.quantizes for module in model.modules()):
        own = "DynamicCache" if max_length is None else "StaticCache (cache_implementation=\"static\")"
        raise ValueError(f"the recipe {model.vitq.recipe.name!r} leaves keys and values in float: convert with kv.bits=8, or use transformers' {own}")
    from vitq.nn.quantized_cache import QuantizedCache, StaticQuantizedCache

    if max_length is None:
        if batch_size != 1 or float_prefill:
            raise ValueError("batch_size and float_prefill are of a cache with a max_length; without one it takes the batch that comes")
        return QuantizedCache(config=model.config)
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in (max_length, batch_size)):
        raise TypeError(f"max_length {max_length!r}, batch_size {batch_size!r}: give integers")
    if min(max_length, batch_size) < 1:
        raise ValueError(f"max_length {max_length}, batch_size {batch_size}: give 1 or more")
    attentions = {module.layer_idx: module for module in model.modules() if hasattr(module, "kv") and hasattr(module, "layer_idx")}
    device, dtype = model.get_input_embeddings().weight.device, model.vitq.dtype
    shapes = [(at.kv.codes, (batch_size, at.widths[1] // at.head_dim, 0, at.head_dim)) for _, at in sorted(attentions.items())]
    return StaticQuantizedCache([(codes, torch.empty(shape, dtype=dtype, device=device)) for codes, shape in shapes], max_length, float_prefill)
