"""Keys and values that are quantized as they enter the cache of a language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vitq.formats import ActivationFormat, QTensor, pack_nibbles, unpack_int4
from vitq.nn.packed import PackedModule, Row
from vitq.nn.rows import RowBuffers
from vitq.plan import CacheParams
from vitq.quantizers.activation import fake_activation
from vitq.quantizers.uniform import quantize_per_token, quantize_per_token_asymmetric
from vitq.recipe import QuantSpec


@dataclass(frozen=True)
class RowCodes:
    """A row of D numbers, a token's in one head, as bytes: its scale, its shift unless symmetric, both float32, then D codes, a byte each, or
    up to 4 bits two to a byte. clip: float32 [2], as of an `ActivationFormat`; it says nothing of the bytes, so those with another are the same codes."""

    bits: int
    symmetric: bool
    clip: Tensor | None = field(default=None, compare=False, repr=False)

    def size(self, features: int) -> int:
        """Bytes of a row."""
        return self._constants() + ((features + 1) // 2 if self.bits <= 4 else features)

    def pack(self, x: Tensor) -> Tensor:
        """Float [..., D] -> uint8 [..., size(D)]."""
        if self.symmetric:
            codes, *constants = quantize_per_token(x, self.bits, clip=self.clip)
        else:
            codes, *constants = quantize_per_token_asymmetric(x, self.bits, self.clip)
        codes = pack_nibbles(codes) if self.bits <= 4 else codes.view(torch.uint8)
        return torch.cat((torch.cat(constants, dim=-1).view(torch.uint8), codes), dim=-1)

    def unpack(self, rows: Tensor, features: int, dtype: torch.dtype) -> Tensor:
        """The numbers [..., D] of what `pack` made."""
        constants, codes = rows[..., : self._constants()].contiguous().view(torch.float32), rows[..., self._constants():]
        codes = unpack_int4(codes, features) if self.bits <= 4 else codes.view(torch.int8)
        return QTensor(codes, constants[..., :1], 0, None if self.symmetric else constants[..., 1:]).dequantize(dtype)

    def fake(self, x: Tensor) -> Tensor:
        """`unpack(pack(x))` in x's dtype, bit for bit, without the bytes between."""
        return fake_activation(x, ActivationFormat(self.bits, dynamic=True, symmetric=self.symmetric, clip=self.clip)).to(x.dtype)

    def _constants(self) -> int:
        return 4 if self.symmetric else 8


@dataclass(frozen=True)
class HeadCodes:
    """Heads whose rows have different codes: a token's bytes of all heads side by side. parts: of so many heads each, None for floats, whose
    bytes are their own."""

    parts: tuple[tuple[int, RowCodes | None], ...]

    def size(self, features: int, float_bytes: int = 2) -> int:
        """Bytes of a token, all heads together."""
        return sum(heads * (float_bytes * features if codes is None else codes.size(features)) for heads, codes in self.parts)

    def pack(self, x: Tensor) -> Tensor:
        """Float [B, heads, T, D] -> uint8 [B, 1, T, size(D)]."""
        rows = [some.contiguous().view(torch.uint8) if codes is None else codes.pack(some) for codes, some in self._split(x)]
        return torch.cat([part.transpose(1, 2).flatten(2) for part in rows], dim=-1).unsqueeze(1)

    def unpack(self, rows: Tensor, features: int, dtype: torch.dtype) -> Tensor:
        """The numbers [B, heads, T, D] of what `pack` made."""
        sizes = [HeadCodes((part,)).size(features, dtype.itemsize) for part in self.parts]
        found = []
        for (heads, codes), part in zip(self.parts, rows[:, 0].split(sizes, dim=-1)):
            part = part.unflatten(-1, (heads, -1)).transpose(1, 2)
            found.append(part.contiguous().view(dtype) if codes is None else codes.unpack(part, features, dtype))
        return torch.cat(found, dim=1)

    def fake(self, x: Tensor) -> Tensor:
        """`unpack(pack(x))` in x's dtype, bit for bit."""
        return torch.cat([some if codes is None else codes.fake(some) for codes, some in self._split(x)], dim=1)

    def _split(self, x: Tensor) -> list[tuple[RowCodes | None, Tensor]]:
        return [(codes, some) for (_, codes), some in zip(self.parts, x.split([heads for heads, _ in self.parts], dim=1))]

    def __str__(self) -> str:
        return " and ".join(f"{heads} heads of {codes or 'floats'}" for heads, codes in self.parts)


def codes_of(parts: Sequence[tuple[int | None, RowCodes | None]]) -> RowCodes | HeadCodes | None:
    """Of keys or values whose heads are in parts: (heads, their codes or None)."""
    return parts[0][1] if len(parts) == 1 else HeadCodes(tuple(parts))


class QuantKeyValues(PackedModule):
    """Quantizes new keys and values, before they are attended to, whether there is a cache or not.

    parts: (key and value heads, how keys are quantized, how values are), None where they stay in float; one part of all heads (None), or those of an
    attention in parts. A cache keeps their codes: the layers of an empty `DynamicCache` of transformers are made those of a `QuantizedCache` as
    they fill. Buffers, of part i: keys_i_right float16 [D, D] where keys are transformed, keys_i_clip and values_i_clip float32 [2] where ranges are
    clipped. Queries are transformed by the inverse transpose, so that they can be multiplied with keys as these are.
    """

    def __init__(self, head_dim: int, parts: Sequence[tuple[int | None, QuantSpec | None, QuantSpec | None]], *, backend: str):
        super().__init__(backend)
        self.head_dim, self.heads = head_dim, sum(heads or 0 for heads, *_ in parts)
        self.counts = [heads for heads, *_ in parts]
        self.specs = [specs for _, *specs in parts]
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
        return tuple(codes_of([(heads, None if (fmt := self._format(i, side)) is None else RowCodes(fmt.bits, fmt.symmetric, fmt.clip))
                               for i, heads in enumerate(self.counts)]) for side in (0, 1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cache: Any, layer: int, arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """As the canonical form's. Raises TypeError or ValueError for a cache that does not keep these codes."""
        q, k = self._transformed(q, k)
        codes = self.codes
        if cache is None:
            return (q, *(x if of is None else of.fake(x) for x, of in zip((k, v), codes)))
        from vitq.nn.quantized_cache import take_codes

        take_codes(cache, layer, codes)
        return (q, *cache.update(k, v, layer, **arguments))

    def _transformed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys in the bases of the keys' codes."""
        if not any(rows is not None and rows.sizes["right"] for rows, _ in self.buffers_of):
            return q, k
        counts = [k.shape[1]] if len(self.counts) == 1 else self.counts
        queries, keys = [], []
        for i, (some_q, some_k) in enumerate(zip(q.split([n * (q.shape[1] // k.shape[1]) for n in counts], dim=1), k.split(counts, dim=1))):
            inverse, fmt = self.derived(f"queries_{i}"), self._format(i, 0)
            queries.append(some_q if inverse is None else (some_q.float() @ inverse).to(q.dtype))
            keys.append(some_k if inverse is None else fmt.transform.apply(some_k).to(k.dtype))
        return torch.cat(queries, dim=1), torch.cat(keys, dim=1)

    def _format(self, part: int, side: int) -> ActivationFormat | None:
        spec, rows = self.specs[part][side], self.buffers_of[part][side]
        return None if spec is None else rows.format(ActivationFormat(spec.bits, dynamic=True, symmetric=spec.symmetric))

    def row(self, layer: str) -> Row:
        def name(codes: RowCodes | HeadCodes | None) -> str:
            if isinstance(codes, HeadCodes):
                return "/".join(name(part) for _, part in codes.parts)
            return "16" if codes is None else f"{codes.bits}{'' if codes.symmetric else ' asymmetric'}"

        heads, what = (self.heads, "token") if any(isinstance(codes, HeadCodes) for codes in self.codes) else (1, "token and head")
        size = sum(codes.size(self.head_dim) if isinstance(codes, HeadCodes) else heads * (2 * self.head_dim if codes is None else codes.size(
            self.head_dim)) for codes in self.codes)
        transformed = "; keys times {0} x {0}, queries times its inverse".format(self.head_dim) if self._derived else ""
        note = f"in a cache {size} bytes a {what}, {4 * heads * self.head_dim} in 16-bit floats{transformed}"
        return Row(layer, "kv", "K{} V{}".format(*map(name, self.codes)), "torch", "cache", self.own_bytes(), self.held_bytes(), note)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={codes}" for name, codes in zip("kv", self.codes))


def quantized_cache(model: nn.Module) -> Any:
    """An empty cache for a converted model whose recipe quantizes keys and values: `model.generate(..., past_key_values=cache)`; `cache.nbytes`
    says what it takes. Where it is given none, the model makes one by itself.

    Raises TypeError for a model that vitq did not convert, ValueError for one whose recipe leaves keys and values in float.
    """
    if getattr(model, "vitq", None) is None:
        raise TypeError(f"expected a model that vitq.convert or vitq.load returned, got {type(model).__name__}")
    if not any(isinstance(module, QuantKeyValues) for module in model.modules()):
        raise ValueError(f"the recipe {model.vitq.recipe.name!r} leaves keys and values in float: convert with kv.bits=8, or use transformers' "
                         "DynamicCache")
    from vitq.nn.quantized_cache import QuantizedCache

    return QuantizedCache(config=model.config)
