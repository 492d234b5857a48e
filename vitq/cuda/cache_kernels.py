"""Attention to a static cache of quantized keys and values on CUDA, as `vitq.ops.dispatch` sees it: two or three launches for all that happens between
the products before and after."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from vitq.cuda import loader
from vitq.cuda import ops as _ops  # noqa: F401  (registers torch.ops.vitq)
from vitq.formats import Kronecker
from vitq.ops.cached_attention import CachedAttention, CachedAttentionSpec, CachePart, HeadCodes, PackedCache, RowCodes
from vitq.ops.dispatch import register

QUERIES = 8  # of a block of csrc/cached_attention.cuh
BLOCK_TOKENS = 128  # of its step
BLOCKS, SHARED = 4, 225_000  # of a multiprocessor at once: how many, and bytes that they share


@register("cached_attention", "cuda")
class CudaCachedAttention:
    """The cache's bytes are read as they are, those of a key and value head once for all its queries."""

    name = "cuda-cached-attention"

    def supports(self, spec: CachedAttentionSpec) -> str | None:
        if spec.head_dim not in loader.CACHED_HEADS:
            return f"it takes heads of {', '.join(map(str, loader.CACHED_HEADS))} numbers, these have {spec.head_dim}"
        return loader.why_unavailable()

    def pack(self, spec: CachedAttentionSpec, device: torch.device) -> PackedCache:
        parts = [part if part.transform is None else replace(part, transform=Kronecker(None, part.transform.right.contiguous()),
                                                             inverse=part.inverse.contiguous()) for part in spec.parts]
        return CachedAttention().pack(replace(spec, parts=tuple(parts)), device)

    def run(self, packed: PackedCache, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, state: Tensor, mask: Tensor | None,
            scale: float, rotary: tuple[Tensor, Tensor] | None = None, window: int = 0) -> Tensor:
        """As `CachedAttention.run`."""
        if q.dtype == torch.float32 or keys.shape[2] % 16 or mask is not None and mask.shape[1] > 1:
            return CachedAttention().run(packed, q, k, v, keys, values, state, mask, scale, rotary, window)
        batch, heads, tokens, dim = k.shape
        cos, sin = (None, None) if rotary is None else rotary
        mask = None if mask is None else mask[:, 0] if mask.stride(3) == 1 else mask[:, 0].contiguous()
        out = torch.empty(batch, tokens, q.shape[1], dim, dtype=q.dtype, device=q.device)
        counts = [heads] if len(packed.parts) == 1 else [part.heads for part in packed.parts]
        group = q.shape[1] // heads
        rows = [heads_of(kept, codes, counts, dim, q.dtype) for kept, codes in ((keys, packed.keys), (values, packed.values))]
        pieces = zip(packed.parts, q.split([n * group for n in counts], 1), k.split(counts, 1), v.split(counts, 1), *rows,
                     out.split([n * group for n in counts], 2))
        calls = []
        for part, some_q, some_k, some_v, part_keys, part_values, y in pieces:
            codes = options(part)
            turned = torch.empty(some_q.shape, dtype=q.dtype, device=q.device)
            torch.ops.vitq.append_rows(
                part_keys, part_values, state, some_k, some_v, **codes, key_clip=None if part.keys is None else part.keys.clip,
                value_clip=None if part.values is None else part.values.clip, cos=cos, sin=sin,
                right=None if part.transform is None else part.transform.right, q=some_q, inverse=part.inverse, q_out=turned,
                advance=part is packed.parts[-1])
            calls.append((y, turned, part_keys, part_values, codes))
        for y, turned, part_keys, part_values, codes in calls:
            units = batch * part_keys.shape[1] * -(-group * tokens // QUERIES)
            parts = splits(units, keys.shape[2], part_keys.shape[3] * part_keys.element_size() + part_values.shape[3] * part_values.element_size(), q.device)
            workspace = torch.empty(units, parts, QUERIES, dim + 2, dtype=torch.float32, device=q.device) if parts > 1 else None
            torch.ops.vitq.cached_attention(y, turned, part_keys, part_values, state, **codes, mask=mask, scale=scale, window=window, workspace=workspace)
        return out.flatten(2)


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


def splits(units: int, room: int, row_bytes: int, device: torch.device) -> int:
    """Into how many parts the tokens are divided, so that all multiprocessors have work and none waits for a second round. It is of the room that there
    is, not of the tokens: a CUDA graph serves all lengths. row_bytes: of a key's row and a value's."""
    if device.type == "cpu":
        return 1
    blocks = max(1, min(BLOCKS, SHARED // (2 * BLOCK_TOKENS * (row_bytes + 16) + 4096)))
    return max(1, min(blocks * processors(device.index) // units, -(-room // BLOCK_TOKENS), loader.MOST_SPLITS))


@functools.cache
def processors(device: int | None) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
