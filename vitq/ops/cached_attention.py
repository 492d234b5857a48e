"""Attention of new tokens to a static cache of quantized keys and values, or of floats: they enter it, then attend to what it holds.

    q, k = rotated(q, k);  k' = k·right,  q' = q·right⁻ᵀ  where keys are transformed;  rows[length + t] = codes of k'[t], v[t]
    y = softmax(scale·q'·K'ᵀ + mask)·V   of the numbers that the rows stand for, the new ones among them
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from vitq.formats import ActivationFormat, Kronecker, QTensor, pack_nibbles, unpack_int4
from vitq.ops.dispatch import register
from vitq.quantizers.activation import fake_activation
from vitq.quantizers.uniform import quantize_per_token, quantize_per_token_asymmetric

MOST_TOKENS = 8  # new ones that attend to rows as they are; more are a prompt's, and attend to floats


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


@dataclass(frozen=True, eq=False)
class CachePart:
    """Key and value heads that are quantized alike. heads: how many, None for all; keys, values: their codes, None for floats; transform: of keys,
    right alone; inverse: what queries are multiplied with then, float32 [D, D]."""

    heads: int | None
    keys: RowCodes | None
    values: RowCodes | None
    transform: Kronecker | None = None
    inverse: Tensor | None = None


@dataclass(frozen=True, eq=False)
class CachedAttentionSpec:
    """head_dim: numbers of a head; parts: of all heads, in order."""

    head_dim: int
    parts: tuple[CachePart, ...]


@dataclass(frozen=True, eq=False)
class PackedCache:
    """keys, values: codes of all heads."""

    head_dim: int
    parts: tuple[CachePart, ...]
    keys: RowCodes | HeadCodes | None
    values: RowCodes | HeadCodes | None


@register("cached_attention", "reference")
class CachedAttention:
    """In torch: the rows become floats, all of them."""

    name = "torch"

    def supports(self, spec: CachedAttentionSpec) -> str | None:
        return None

    def pack(self, spec: CachedAttentionSpec, device: torch.device) -> PackedCache:
        return PackedCache(spec.head_dim, spec.parts, *(codes_of([(part.heads, getattr(part, side)) for part in spec.parts]) for side in ("keys", "values")))

    def run(self, packed: PackedCache, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, state: Tensor, mask: Tensor | None, scale: float,
            rotary: tuple[Tensor, Tensor] | None = None, window: int = 0, first: bool = False, exact: bool = False) -> Tensor:
        """q [B, H, T, D], k and v [B, G, T, D] of new tokens -> y [B, T, H·D].

        keys, values: the cache's rows, [B, heads, N, bytes] or floats [B, G, N, D]; new ones are written behind the state[0] that are there. state:
        int64 [2], how many tokens the cache holds, which grows by T, and a 0 that kernels count with. mask: bool [B, 1, T, N or less], True where a token
        is attended to; None: all up to itself, of a window the last `window`. rotary: cos and sin [B or 1, T, D], as transformers rotates halves. first: it
        holds none, the mask is of T columns, or more that are not read; exact: then tokens attend to one another's floats, not to what their codes stand for.
        """
        if rotary is not None:
            q, k = (rotated(x, *rotary) for x in (q, k))
        floats = q, k, v
        q, k = transformed(packed.parts, q, k)
        mask = mask_of(mask, state, q.shape[2], keys.shape[2], window, first)
        columns = q.shape[2] if first else mask.shape[-1]
        write(keys, k, packed.keys, state[0])
        write(values, v, packed.values, state[0])
        state[0] += q.shape[2]
        if first and exact:
            return attended(*floats, mask, scale)
        return attended(q, *numbers(packed, keys, values, columns, q.dtype), mask, scale)


def mask_of(mask: Tensor | None, state: Tensor, tokens: int, columns: int, window: int, first: bool) -> Tensor | None:
    """What `attended` takes of the arguments of `run`."""
    if first:
        mask = mask if mask is None else mask[..., :tokens]
        return causal(state[0], tokens, tokens, window) if mask is None and 0 < window < tokens else mask
    return causal(state[0], tokens, columns, window) if mask is None else mask


def numbers(packed: PackedCache, keys: Tensor, values: Tensor, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[B, G, columns, D], what the first rows stand for."""
    k, v = (rows[:, :, :columns] if codes is None else codes.unpack(rows[:, :, :columns], packed.head_dim, dtype)
            for rows, codes in ((keys, packed.keys), (values, packed.values)))
    return k, v


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """q [B, H, T, D], k and v [B, G, N, D] -> [B, T, H·D]. mask: bool; None: T is N, and each attends to all up to itself."""
    if mask is not None and k.shape[1] < q.shape[1]:  # torch's fused kernels take grouped heads without a mask alone
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=k.shape[1] < q.shape[1])
    return y.transpose(1, 2).flatten(2)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, heads, T, D] with rotary positions, each step rounded to x's dtype."""
    a, b = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-b, a), dim=-1) * sin.unsqueeze(1)


def transformed(parts: Sequence[CachePart], q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Queries [B, H, T, D] and keys [B, G, T, D] in the bases of the keys' codes."""
    if all(part.transform is None for part in parts):
        return q, k
    counts = [k.shape[1]] if len(parts) == 1 else [part.heads for part in parts]
    queries, keys = [], []
    for part, some_q, some_k in zip(parts, q.split([n * (q.shape[1] // k.shape[1]) for n in counts], dim=1), k.split(counts, dim=1)):
        queries.append(some_q if part.transform is None else (some_q.float() @ part.inverse).to(q.dtype))
        keys.append(some_k if part.transform is None else part.transform.apply(some_k).to(k.dtype))
    return torch.cat(queries, dim=1), torch.cat(keys, dim=1)


def causal(length: Tensor, tokens: int, columns: int, window: int = 0) -> Tensor:
    """bool [tokens, columns]: what new tokens behind `length` others attend to."""
    at = torch.arange(columns, device=length.device)
    own = length + torch.arange(tokens, device=length.device)[:, None]
    seen = at <= own
    return seen & (at > own - window) if window else seen


def write(rows: Tensor, new: Tensor, codes: RowCodes | HeadCodes | None, start: Tensor) -> Tensor:
    """What rows [B, heads, N, bytes] hold of new numbers [B, G, T, D], written behind the first `start` tokens."""
    new = new if codes is None else codes.pack(new)
    rows.index_copy_(2, torch.arange(new.shape[2], device=rows.device) + start, new)
    return new
