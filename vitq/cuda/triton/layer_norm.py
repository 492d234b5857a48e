"""LayerNorm over the last dimension in float32, quantized before it is stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitq.cuda.triton.common import on_device, power_of_2, rows, to_codes
from vitq.formats import RANGE_MIN, ActivationFormat

WIDEST = 32768  # one row stays in one program's registers
ELEMENTS = 4096  # of the rows that one program takes where they are short


@triton.jit(do_not_specialize=["m"])  # batch sizes come and go, kernels should not
def _layer_norm(x, codes, weight, bias, scale, zero_point, row_scales, m, columns, row_stride, eps, qmin, qmax, smallest,
                HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, DYNAMIC: tl.constexpr, ROWS: tl.constexpr,
                BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < m) & (column < columns)
    value = tl.load(x + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(value, axis=1)[:, None] / columns
    # The squares of the differences, not E[x²] − E[x]²: a ViT's residual stream has channels far from zero.
    centred = tl.where(column < columns, value - mean, 0.0)
    variance = tl.sum(centred * centred, axis=1)[:, None] / columns
    y = centred * tl.div_rn(tl.full(variance.shape, 1.0, tl.float32), tl.sqrt_rn(variance + eps))
    if HAS_WEIGHT:
        y = y * tl.load(weight + column, mask=column < columns, other=0.0)
    if HAS_BIAS:
        y = y + tl.load(bias + column, mask=column < columns, other=0.0)
    if DYNAMIC:
        amax = tl.max(tl.abs(y), axis=1)[:, None]
        row_scale = tl.div_rn(tl.maximum(amax, smallest), tl.zeros_like(amax) + qmax)
        out = to_codes(y, row_scale, 0.0, qmin, qmax)
        tl.store(row_scales + row, row_scale, mask=row < m)
    else:
        out = to_codes(y, tl.load(scale), tl.load(zero_point).to(tl.float32), qmin, qmax)
    tl.store(codes + row * columns + column, out, mask=inside)


def layer_norm_quantize(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
                        output: ActivationFormat) -> tuple[Tensor, Tensor | None]:
    """int8 codes in x's shape; and float32 scales [..., 1] if `output` is dynamic, else None.

    x: float [..., C], C up to WIDEST, rows of any stride; weight, bias: float32 [C] or None on x's device.
    """
    flat = rows(x)
    m, columns = flat.shape
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device) if output.dynamic else None
    if m and columns:
        block = power_of_2(columns, 32)
        height = max(1, ELEMENTS // block)
        with on_device(x):
            _layer_norm[(triton.cdiv(m, height),)](
                flat, codes, weight, bias, output.scale, output.zero_point, scales, m, columns, flat.stride(0), eps,
                float(output.qmin), float(output.qmax), RANGE_MIN, HAS_WEIGHT=weight is not None,
                HAS_BIAS=bias is not None, DYNAMIC=output.dynamic, ROWS=height, BLOCK=block,
                num_warps=4 if block <= 4096 else 16)
    return codes, scales
