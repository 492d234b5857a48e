"""weight_only: a linear layer whose weight is integer codes and whose input and product are in floating point.

    y[m, n] = Σ_k x[m, k] · (qw[n, k] − zw[n, g])·sw[n, g] + b[n],    g the group of column k
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitq.formats import pack_int4, unpack_int4
from vitq.ops.common import even_groups
from vitq.ops.dispatch import register
from vitq.plan import LinearParams

# Weights made floats at once: their temporaries stay small however large the layer is.
CHUNK = 1 << 22
# torch's int4 product takes as much longer as there are rows: 2048 x 2048 took 0.3 ms at one and 23 at 64, the weight as floats 38 at any.
INT4_ROWS = 64


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

    def unpack(self, packed: PackedWeight) -> Tensor:
        return unpack_int4(packed.codes, packed.features) if packed.codes.dtype == torch.uint8 else packed.codes


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


class PackedInt4(NamedTuple):
    """codes: as torch's int4 product wants them; constants: bfloat16 [K / size, N, 2], scale and -zero·scale; weight: for what it does not take."""

    codes: Tensor
    constants: Tensor
    size: int
    weight: PackedWeight


@register("weight_only", "cpu")
class Int4Linear(DequantizedLinear):
    """torch's product of bfloat16 rows and 4-bit weights, which never become floats in memory, for few rows; scales are rounded to bfloat16."""

    name = "torch-int4"

    def supports(self, spec: LinearParams) -> str | None:
        k = spec.codes.shape[1]
        if not all(hasattr(torch.ops.aten, name) for name in ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu")):
            return "this torch has no int4 product on CPUs"
        if spec.weight_bits > 4:
            return f"weights of {spec.weight_bits} bits"
        if not spec.codes.numel() or even_groups(spec.column_group, k) is None or k % 32:
            return f"{k} features in groups that are not whole, of multiples of 32"
        return None

    def pack(self, spec: LinearParams, device: torch.device) -> PackedInt4:
        weight = super().pack(spec, device)
        n, k = spec.codes.shape
        even = even_groups(spec.column_group, k)
        size = next(size for size in (256, 128, 64, 32) if even % size == 0 and k % size == 0)
        group = torch.arange(0, k, size, device=device) // even
        scale = F.pad(weight.scale.index_select(1, group), (0, 0, 0, -n % 16))
        zero = torch.zeros_like(scale) if weight.zero is None else F.pad(weight.zero.index_select(1, group), (0, 0, 0, -n % 16))
        codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(F.pad(spec.codes.int() + 8, (0, 0, 0, -n % 16)), 1)
        return PackedInt4(codes, torch.stack((scale, -zero * scale), -1).transpose(0, 1).to(torch.bfloat16).contiguous(), size, weight)

    def unpack(self, packed: PackedInt4) -> Tensor:
        return super().unpack(packed.weight)

    def run(self, packed: PackedInt4, x: Tensor, *, dtype: torch.dtype) -> Tensor:
        flat = x.reshape(-1, packed.weight.features)
        if x.dtype != torch.bfloat16 or not 0 < len(flat) <= INT4_ROWS:
            return super().run(packed.weight, x, dtype=dtype)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat.contiguous(), packed.codes, packed.size, packed.constants)
        y = y[:, : len(packed.weight.codes)].reshape(*x.shape[:-1], -1)
        return (y if packed.weight.bias is None else y + packed.weight.bias.to(y.dtype)).to(dtype)


register("weight_only", "cpu")(DequantizedLinear)
