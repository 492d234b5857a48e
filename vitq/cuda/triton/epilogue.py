"""Everything that follows an int8 GEMM, in one pass over its int32 accumulators.

    y = act(fma(acc·sx[m], scale[n], bias[n])) + residual

then cast, or requantized; without an activation the output format is in scale and bias, and y only needs rounding
(`vitq.ops.linear.fold`). Other multiply-adds are not fused: a float result, and so a code at a tie, would differ from the
reference's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitq.cuda.triton.common import activate, on_device, rint, to_codes
from vitq.formats import int_range
from vitq.ops.common import OutputFormat


TILE = (16, 64, 4)  # rows, columns, warps: on an H200 the best by 5 % of eight for DeiT-S


@dataclass(frozen=True, eq=False)
class Epilogue:
    """A layer's constants on the GPU. scale, bias: float32 [N] of `vitq.ops.linear.fold`; folded: the output format is in
    them; output: its tensors on the GPU too."""

    scale: Tensor
    bias: Tensor
    folded: bool
    activation: str | None
    output: OutputFormat | None


@triton.jit(do_not_specialize=["m"])  # batch sizes come and go, kernels should not
def _epilogue(acc, out, scale, bias, row_scale, residual, out_scale, out_zero, m, n, acc_stride, out_stride,
              residual_stride, qmin, qmax, HAS_ROW_SCALE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
              ACTIVATION: tl.constexpr, REQUANTIZE: tl.constexpr, FOLDED: tl.constexpr, PER_COLUMN: tl.constexpr,
              ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tiles = tl.cdiv(n, COLUMNS)
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % tiles) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    real = column < n
    inside = (row < m) & real
    y = tl.load(acc + row * acc_stride + column, mask=inside, other=0).to(tl.float32)
    if HAS_ROW_SCALE:
        y = y * tl.load(row_scale + row, mask=row < m, other=0.0)
    y = tl.fma(y, tl.load(scale + column, mask=real, other=0.0), tl.load(bias + column, mask=real, other=0.0))
    y = activate(y, ACTIVATION)
    if HAS_RESIDUAL:
        y = y + tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
    place = out + row * out_stride + column
    if FOLDED:
        tl.store(place, tl.minimum(tl.maximum(rint(y), qmin), qmax).to(tl.int8), mask=inside)
    elif REQUANTIZE:
        if PER_COLUMN:
            s_out = tl.load(out_scale + column, mask=real, other=1.0)
            z_out = tl.load(out_zero + column, mask=real, other=0).to(tl.float32)
        else:
            s_out = tl.load(out_scale)
            z_out = tl.load(out_zero).to(tl.float32)
        tl.store(place, to_codes(y, s_out, z_out, qmin, qmax), mask=inside)
    else:
        tl.store(place, y.to(out.dtype.element_ty), mask=inside)


def epilogue(constants: Epilogue, acc: Tensor, out: Tensor, row_scale: Tensor | None = None,
             residual: Tensor | None = None) -> None:
    """Fill `out` [M, N] (int8 codes where `constants.output` is given, else float) from acc int32 [M, >= N].

    row_scale: float32, M elements, for dynamic inputs; residual: float [M, N], and may be `out` itself. All have unit
    column stride.
    """
    m, n = out.shape
    if not m or not n:
        return
    output = constants.output
    qmin, qmax = (0, 0) if output is None else int_range(output.bits)
    height, width, warps = TILE
    with on_device(acc):
        _epilogue[(triton.cdiv(m, height) * triton.cdiv(n, width),)](
            acc, out, constants.scale, constants.bias, row_scale, residual,
            None if output is None else output.scale, None if output is None else output.zero_point, m, n, acc.stride(0),
            out.stride(0), 0 if residual is None else residual.stride(0), float(qmin), float(qmax),
            HAS_ROW_SCALE=row_scale is not None, HAS_RESIDUAL=residual is not None, ACTIVATION=constants.activation,
            REQUANTIZE=output is not None, FOLDED=constants.folded,
            PER_COLUMN=output is not None and output.scale.ndim > 0, ROWS=height, COLUMNS=width, num_warps=warps,
            enable_fp_fusion=False)
