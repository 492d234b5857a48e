"""Keys and values that are quantized as they enter the cache of a language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitq.formats import ActivationFormat, QTensor, pack_nibbles, unpack_int4
from vitq.nn.packed import Row
from vitq.quantizers.activation import fake_activation
from vitq.quantizers.uniform import quantize_per_token, quantize_per_token_asymmetric
from vitq.recipe import QuantSpec


@dataclass(frozen=True)
class RowCodes:
    """A row of D numbers, a token's in one head, as bytes: its scale, its shift unless symmetric, both float32, then D codes, a byte each, or
    up to 4 bits two to a byte."""

    bits: int
    symmetric: bool

    def size(self, features: int) -> int:
        """Bytes of a row."""
        return self._constants() + ((features + 1) // 2 if self.bits <= 4 else features)

    def pack(self, x: Tensor) -> Tensor:
        """Float [..., D] -> uint8 [..., size(D)]."""
        codes, *constants = quantize_per_token(x, self.bits) if self.symmetric else quantize_per_token_asymmetric(x, self.bits)
        codes = pack_nibbles(codes) if self.bits <= 4 else codes.view(torch.uint8)
        return torch.cat((torch.cat(constants, dim=-1).view(torch.uint8), codes), dim=-1)

    def unpack(self, rows: Tensor, features: int, dtype: torch.dtype) -> Tensor:
        """The numbers [..., D] of what `pack` made."""
        constants, codes = rows[..., : self._constants()].contiguous().view(torch.float32), rows[..., self._constants():]
        codes = unpack_int4(codes, features) if self.bits <= 4 else codes.view(torch.int8)
        return QTensor(codes, constants[..., :1], 0, None if self.symmetric else constants[..., 1:]).dequantize(dtype)

    def fake(self, x: Tensor) -> Tensor:
        """`unpack(pack(x))` in x's dtype, bit for bit, without the bytes between."""
        return fake_activation(x, ActivationFormat(self.bits, dynamic=True, symmetric=self.symmetric)).to(x.dtype)

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


def codes_of(parts: Sequence[tuple[int | None, QuantSpec | None]]) -> RowCodes | HeadCodes | None:
    """Of keys or values whose heads are in parts: (heads, how they are quantized or None)."""
    codes = [None if spec is None else RowCodes(spec.bits, spec.symmetric) for _, spec in parts]
    if len(set(codes)) == 1:
        return codes[0]
    return HeadCodes(tuple((heads, one) for (heads, _), one in zip(parts, codes)))


class QuantKeyValues(nn.Module):
    """Quantizes new keys and values, before they are attended to, whether there is a cache or not.

    parts: (key and value heads, how keys are quantized, how values are), None where they stay in float; one part of all heads (None), or those of an
    attention in parts. A cache keeps their codes: the layers of an empty `DynamicCache` of transformers are made those of a `QuantizedCache` as
    they fill.
    """

    def __init__(self, head_dim: int, parts: Sequence[tuple[int | None, QuantSpec | None, QuantSpec | None]]):
        super().__init__()
        self.head_dim, self.heads = head_dim, sum(heads or 0 for heads, *_ in parts)
        self.codes = tuple(codes_of([(heads, specs[i]) for heads, *specs in parts]) for i in (0, 1))

    def forward(self, k: Tensor, v: Tensor, cache: Any, layer: int, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """As the canonical form's. Raises TypeError or ValueError for a cache that does not keep these codes."""
        if cache is None:
            return tuple(x if codes is None else codes.fake(x) for x, codes in zip((k, v), self.codes))
        from vitq.nn.quantized_cache import take_codes

        take_codes(cache, layer, self.codes)
        return cache.update(k, v, layer, **arguments)

    def row(self, layer: str) -> Row:
        def name(codes: RowCodes | HeadCodes | None) -> str:
            if isinstance(codes, HeadCodes):
                return "/".join(name(part) for _, part in codes.parts)
            return "16" if codes is None else f"{codes.bits}{'' if codes.symmetric else ' asymmetric'}"

        heads, what = (self.heads, "token") if any(isinstance(codes, HeadCodes) for codes in self.codes) else (1, "token and head")
        size = sum(codes.size(self.head_dim) if isinstance(codes, HeadCodes) else heads * (2 * self.head_dim if codes is None else codes.size(
            self.head_dim)) for codes in self.codes)
        note = f"in a cache {size} bytes a {what}, {4 * heads * self.head_dim} in 16-bit floats"
        return Row(layer, "kv", "K{} V{}".format(*map(name, self.codes)), "torch", "cache", 0, 0, note)

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
