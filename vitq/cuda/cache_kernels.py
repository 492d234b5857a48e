"""Attention to a static cache of quantized keys and values, or of floats, on CUDA, as `vitq.ops.dispatch` sees it: two or three launches for all that happens
between the products before and after."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitq.cuda import loader
from vitq.cuda import ops as _ops  # noqa: F401  (registers torch.ops.vitq)
from vitq.formats import Kronecker
from vitq.ops.cached_attention import (MOST_TOKENS, CachedAttention, CachedAttentionSpec, CachePart, HeadCodes, PackedCache, RowCodes, attended, mask_of,
                                       numbers)
from vitq.ops.dispatch import register

QUERIES = 8  # of a block of csrc/cached_attention.cuh
BLOCK_TOKENS = 128  # of its step
BLOCKS, SHARED = 2, 225_000  # of a multiprocessor at once: how many, and bytes that they share


@register("cached_attention", "cuda")
class CudaCachedAttention:
    """The cache's bytes are read as they are, those of a key and value head once for all its queries. A prompt's tokens become rows in the same way and
    attend, by torch's kernels, to the numbers that these stand for, which are written beside them."""

    name = "cuda-cached-attention"

    def supports(self, spec: CachedAttentionSpec) -> str | None:
        if spec.head_dim not in loader.CACHED_HEADS:
            return f"it takes heads of {', '.join(map(str, loader.CACHED_HEADS))} numbers, these have {spec.head_dim}"
        return loader.why_unavailable()

    def pack(self, spec: CachedAttentionSpec, device: torch.device) -> PackedCache:
        parts = [part if part.transform is None else replace(part, transform=Kronecker(None, part.transform.right.contiguous()),
                                                             inverse=part.inverse.contiguous()) for part in spec.parts]
        return CachedAttention().pack(replace(spec, parts=tuple(parts)), device)

    def run(self, packed: PackedCache, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, state: Tensor, mask: Tensor | None, scale: float,
            rotary: tuple[Tensor, Tensor] | None = None, window: int = 0, first: bool = False, exact: bool = False) -> Tensor:
        """As `CachedAttention.run`."""
        tokens = q.shape[2]
        few = tokens <= MOST_TOKENS and not (first and exact)
        if q.dtype == torch.float32 or few and (keys.shape[2] % 16 or mask is not None and mask.shape[1] > 1 or not fits(packed, q)):
            return CachedAttention().run(packed, q, k, v, keys, values, state, mask, scale, rotary, window, first, exact)
        if few:
            return self._few(packed, self._append(packed, q, k, v, keys, values, state, rotary), keys, values, state, mask, scale, window)
        mask = mask_of(mask, state, tokens, keys.shape[2], window, first)  # of what is there before
        if not first or packed.keys is None and packed.values is None:
            parts = self._append(packed, q, k, v, keys, values, state, rotary)
            found = numbers(packed, keys, values, tokens if first else mask.shape[-1], q.dtype)
        else:
            parts = self._append(packed, q, k, v, keys, values, state, rotary, "before" if exact else "numbers")
            found = joined([part.k for part in parts]), v if exact else joined([part.v for part in parts])
        return attended(joined([part.q for part in parts]), *found, mask, scale)

    def _append(self, packed: PackedCache, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, state: Tensor,
                rotary: tuple[Tensor, Tensor] | None, wanted: str = "") -> list[Appended]:
        """The new tokens become rows. wanted: what k and v of the parts are: "numbers", which the rows stand for, "before", the keys as they were rotated,
        queries too; or nothing."""
        heads, dim = k.shape[1], k.shape[3]
        cos, sin = (None, None) if rotary is None else rotary
        counts = [heads] if len(packed.parts) == 1 else [part.heads for part in packed.parts]
        rows = [heads_of(kept, codes, counts, dim, q.dtype) for kept, codes in ((keys, packed.keys), (values, packed.values))]
        found = []
        for part, some_q, some_k, some_v, part_keys, part_values in zip(
                packed.parts, q.split([n * (q.shape[1] // heads) for n in counts], 1), k.split(counts, 1), v.split(counts, 1), *rows):
            k_out = v_out = None
            turned = torch.empty_like(some_q.transpose(1, 2), memory_format=torch.contiguous_format)
            if wanted:
                k_out = torch.empty_like(some_k, memory_format=torch.contiguous_format)
                v_out = None if wanted == "before" else torch.empty_like(k_out)
            torch.ops.vitq.append_rows(
                part_keys, part_values, state, some_k, some_v, **options(part), key_clip=None if part.keys is None else part.keys.clip,
                value_clip=None if part.values is None else part.values.clip, cos=cos, sin=sin,
                right=None if part.transform is None else part.transform.right, q=some_q, inverse=None if wanted == "before" else part.inverse,
                q_out=turned, k_out=k_out, v_out=v_out, out_before=wanted == "before",
                out_turned=wanted == "numbers" and part.inverse is not None and whole(some_q, some_k, some_v, cos, sin), advance=part is packed.parts[-1])
            found.append(Appended(part, turned.transpose(1, 2), k_out, v_out, part_keys, part_values))
        return found

    def _few(self, packed: PackedCache, parts: list[Appended], keys: Tensor, values: Tensor, state: Tensor, mask: Tensor | None, scale: float,
             window: int) -> Tensor:
        batch, _, tokens, dim = parts[0].q.shape
        mask = None if mask is None else mask[:, 0] if mask.stride(3) == 1 else mask[:, 0].contiguous()
        out = torch.empty(batch, tokens, sum(part.q.shape[1] for part in parts), dim, dtype=parts[0].q.dtype, device=keys.device)
        for part, y in zip(parts, out.split([part.q.shape[1] for part in parts], 2)):
            units = batch * part.keys.shape[1] * -(-part.q.shape[1] // part.keys.shape[1] * tokens // QUERIES)
            count = splits(units, keys.shape[2], block_bytes(part.part, dim), keys.device)
            workspace = torch.empty(units, count, QUERIES, dim + 2, dtype=torch.float32, device=keys.device) if count > 1 else None
            torch.ops.vitq.cached_attention(y, part.q, part.keys, part.values, state, **options(part.part), mask=mask, scale=scale, window=window,
                                            workspace=workspace)
        return out.flatten(2)


@dataclass(frozen=True, eq=False)
class Appended:
    """Of a part: q [B, H, T, D] to be multiplied with keys as they are stored, k and v [B, G, T, D] if they were asked for; keys, values: its rows."""

    part: CachePart
    q: Tensor
    k: Tensor | None
    v: Tensor | None
    keys: Tensor
    values: Tensor


def whole(*tensors: Tensor | None) -> bool:
    """Whether all lie so that 16 bytes can be read at once, as turning keys back takes."""
    return tensors[0].shape[2] > MOST_TOKENS and all(
        t is None or t.storage_offset() % 8 == 0 and all(s % 8 == 0 for s in t.stride()[:-1]) for t in tensors)


def joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def options(part: CachePart) -> dict[str, int | bool]:
    """How the operators name the codes of a part."""
    found: dict[str, int | bool] = {}
    for name, codes in (("key", part.keys), ("value", part.values)):
        found |= {f"{name}_bits": 16 if codes is None else codes.bits, f"{name}_symmetric": codes is None or codes.symmetric}
    return found


def heads_of(rows: Tensor, codes: RowCodes | HeadCodes | None, counts: list[int], dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Rows of the heads of each part, [B, heads, N, bytes], views of the cache's."""
    if not isinstance(codes, HeadCodes):
        return [rows]
    sizes = [HeadCodes((part,)).size(dim, dtype.itemsize) for part in codes.parts]
    return [part.unflatten(-1, (count, -1)).transpose(1, 2) for part, count in zip(rows[:, 0].split(sizes, -1), counts)]


def block_bytes(part: CachePart, dim: int) -> int:
    """Of shared memory, or a little more than a block takes: its queries, and the rows of two steps."""
    row = HeadCodes(((1, part.keys), (1, part.values))).size(dim)  # of a key and a value
    return 2 * BLOCK_TOKENS * (row + 32) + QUERIES * (2 * dim + 16)


def fits(packed: PackedCache, q: Tensor) -> bool:
    """Whether blocks have the shared memory for a few tokens, which those of 99 KB (sm_86, sm_89) lack for float keys and values of 96 numbers and more."""
    return q.device.type == "cpu" or max(block_bytes(part, packed.head_dim) for part in packed.parts) <= most_shared(q.device.index)


def splits(units: int, room: int, shared: int, device: torch.device) -> int:
    """Into how many parts the tokens are divided, so that all multiprocessors have work and none waits for a second round. It is of the room that there
    is, not of the tokens: a CUDA graph serves all lengths. shared: bytes of a block."""
    if device.type == "cpu":
        return 1
    blocks = max(1, min(BLOCKS, SHARED // (shared + 1024)))
    return max(1, min(blocks * processors(device.index) // units, -(-room // BLOCK_TOKENS), loader.MOST_SPLITS))


@functools.cache
def processors(device: int | None) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def most_shared(device: int | None) -> int:
    """Bytes of shared memory that a block may have; sm_86 and sm_89, which have the least, 101,376."""
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 101_376)
