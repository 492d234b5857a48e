"""weight_only on CUDA: one kernel for few rows, else the weight as floats in a scratch tensor and torch's own product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitq.cuda import loader
from vitq.cuda import ops as _ops  # noqa: F401  (registers torch.ops.vitq)
from vitq.cuda.layout import even_first, exchange_bytes, pack_weight, pad_columns, unpack_weight
from vitq.ops.common import even_groups
from vitq.ops.dispatch import register
from vitq.ops.weight_only import DequantizedLinear
from vitq.plan import LinearParams

# Bytes of the weight as floats that may exist at once; larger weights go in parts.
SCRATCH = 1 << 29


@dataclass(frozen=True, eq=False)
class PackedWeightOnly:
    """weight: `layout.pack_weight`, 4 bits by `exchange_bytes`; scale float32 and zero int8 [G, N'] by
    `even_first`, each group of group_columns columns; bias float32
    [N'], 0 where there is none."""

    weight: Tensor
    bits: int
    n: int
    k: int
    scale: Tensor
    zero: Tensor | None
    bias: Tensor
    group_columns: int


@register("weight_only", "cuda")
class CudaWeightOnly:
    """The weight stays packed. Up to FEW_ROWS rows nothing else of its size is read or written; the sums are float32."""

    name = "cuda-weight-only"

    def supports(self, spec: LinearParams) -> str | None:
        return loader.why_unavailable() or why_not(spec)

    def pack(self, spec: LinearParams, device: torch.device) -> PackedWeightOnly:
        n, k = spec.codes.shape
        bits = 4 if spec.weight_bits <= 4 else 8
        weight = pack_weight(spec.codes.detach(), bits)
        scale, zero = (None if t is None else even_first(t.reshape(-1, n)) for t in (spec.weight_scale.float(), spec.weight_zero))
        bias = torch.zeros(n) if spec.bias is None else spec.bias
        return PackedWeightOnly(
            weight=(exchange_bytes(weight) if bits == 4 else weight).to(device), bits=bits, n=n, k=k, scale=scale.to(device),
            zero=None if zero is None else zero.to(torch.int8).to(device), bias=pad_columns(bias).to(device),
            group_columns=even_groups(spec.column_group, k))

    def unpack(self, packed: PackedWeightOnly) -> Tensor:
        weight = exchange_bytes(packed.weight) if packed.bits == 4 else packed.weight
        return unpack_weight(weight, packed.bits, packed.n, packed.k)

    def run(self, packed: PackedWeightOnly, x: Tensor, *, dtype: torch.dtype) -> Tensor:
        """x [.., K] float -> [.., N] in `dtype`."""
        flat = x.reshape(-1, packed.k)
        constants = dict(zero=packed.zero, weight_bits=packed.bits, group_columns=packed.group_columns)
        if len(flat) > loader.FEW_ROWS or x.dtype == torch.float32:
            return self._dequantized(packed, x, constants).to(dtype)
        if flat.stride(1) != 1 or flat.stride(0) % 8:
            flat = F.pad(flat, (0, -packed.k % 8)).contiguous()[:, : packed.k]
        out = torch.empty((len(flat), packed.n), dtype=dtype, device=x.device)
        torch.ops.vitq.weight_only(out, flat, packed.weight, packed.scale, bias=packed.bias, **constants)
        return out.view(*x.shape[:-1], packed.n)

    def _dequantized(self, packed: PackedWeightOnly, x: Tensor, constants: dict) -> Tensor:
        n, k = packed.n, packed.k
        step = max(SCRATCH // (k * x.element_size()) // 32 * 32, 32)
        bias, parts = packed.bias[:n].to(x.dtype), []
        for start in range(0, n, step):
            rows = slice(start, start + step)
            weight = torch.empty((min(step, n - start), k), dtype=x.dtype, device=x.device)
            part = {**constants, "zero": None if packed.zero is None else packed.zero[:, rows]}
            torch.ops.vitq.dequantize(weight, packed.weight[rows], packed.scale[:, rows], **part)
            parts.append(F.linear(x, weight, bias[rows]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def why_not(spec: LinearParams) -> str | None:
    """None where the kernels take a weight, else the reason."""
    n, k = spec.codes.shape
    if not n or not k:
        return f"the weight is empty ({n} x {k})"
    if even_groups(spec.column_group, k) is None:
        return "groups of columns that are not neighbours, as many in each, in multiples of 32"
    if spec.weight_zero is not None and not bool((spec.weight_zero.abs() <= 1 << spec.weight_bits - 1).all()):
        return "zero points beyond the codes"
    return None


register("weight_only", "cuda")(DequantizedLinear)  # the second choice
