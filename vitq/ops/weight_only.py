"""weight_only: a linear layer whose weight is integer codes and whose input and product are in floating point.

    y[m, n] = Σ_k x[m, k] · (qw[n, k] − zw[n, g])·sw[n, g] + b[n],    g the group of column k
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitq.formats import pack_int4, unpack_int4
from vitq.ops.dispatch import register
from vitq.plan import LinearParams

# Weights made floats at once: their temporaries stay small however large the layer is.
CHUNK = 1 << 22


class PackedWeight(NamedTuple):
    """codes: uint8 [N, ⌈K/2⌉] up to 4 bits, else int8 [N, K]; scale and zero float32 [N, G], zero None for symmetric weights; group
    int64 [K], None for one group; bias float32 [N] or None."""

    codes: Tensor
    features: int
    scale: Tensor
    zero: Tensor | None
    group: Tensor | None
    bias: Tensor | None

    def rows(self, start: int, stop: int) -> Tensor:
        """The weights of some outputs, float32 [stop - start, K]."""
        codes = self.codes[start:stop]
        codes = unpack_int4(codes, self.features) if codes.dtype == torch.uint8 else codes
        scale, zero = (None if t is None else t[start:stop] if self.group is None else t[start:stop].index_select(1, self.group)
                       for t in (self.scale, self.zero))
        return (codes.float() if zero is None else codes.float().sub_(zero)).mul_(scale)


class _Dequantize:
    def supports(self, spec: LinearParams) -> str | None:
        return None

    def pack(self, spec: LinearParams, device: torch.device) -> PackedWeight:
        n, k = spec.codes.shape
        codes = pack_int4(spec.codes) if spec.weight_bits <= 4 else spec.codes
        scale, zero = (None if t is None else t.float().reshape(-1, n).T.contiguous().to(device) for t in (spec.weight_scale, spec.weight_zero))
        group = None if spec.column_group is None else spec.column_group.long().to(device)
        return PackedWeight(codes.to(device), k, scale, zero, group, None if spec.bias is None else spec.bias.to(device, torch.float32))


@register("weight_only", "reference")
class ReferenceWeightOnly(_Dequantize):
    """All in float32."""

    name = "torch-float32"

    def run(self, packed: PackedWeight, x: Tensor, *, dtype: torch.dtype) -> Tensor:
        """x [.., K] float -> [.., N] in `dtype`."""
        return F.linear(x.float(), packed.rows(0, len(packed.codes)), packed.bias).to(dtype)


class DequantizedLinear(_Dequantize):
    """Some rows of the weight at a time are made numbers of the input's dtype, which torch multiplies. The weight stays packed."""

    name = "dequantize+torch"

    def run(self, packed: PackedWeight, x: Tensor, *, dtype: torch.dtype) -> Tensor:
        rows = len(packed.codes)
        step = max(1, CHUNK // packed.features)
        bias = None if packed.bias is None else packed.bias.to(x.dtype)
        parts = [F.linear(x, packed.rows(start, min(start + step, rows)).to(x.dtype), None if bias is None else bias[start : start + step])
                 for start in range(0, rows, step)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).to(dtype)


register("weight_only", "cpu")(DequantizedLinear)
register("weight_only", "cuda")(DequantizedLinear)
