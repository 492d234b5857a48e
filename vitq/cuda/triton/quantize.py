"""Float rows to int8 codes, static per tensor or dynamic per row; and packed int4 to int8."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitq.cuda.triton.common import on_device, power_of_2, rows, to_codes
from vitq.formats import RANGE_MIN, int_range

# Floats of one row that a program keeps in registers: 128 a thread with 8 warps. Longer rows are read twice.
ROW_IN_REGISTERS = 32768
ELEMENTS = 4096  # that one program takes where rows do not say otherwise


@triton.jit
def _static(x, codes, scale, zero_point, total, columns, row_stride, qmin, qmax, CONTIGUOUS: tl.constexpr,
            BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < total
    source = index
    if not CONTIGUOUS:
        source = (index // columns) * row_stride + index % columns
    value = tl.load(x + source, mask=inside).to(tl.float32)
    out = to_codes(value, tl.load(scale), tl.load(zero_point).to(tl.float32), qmin, qmax)
    tl.store(codes + index, out, mask=inside)


@triton.jit(do_not_specialize=["m"])  # batch sizes come and go, kernels should not
def _dynamic(x, codes, scales, m, columns, row_stride, qmin, qmax, smallest, ONE_BLOCK: tl.constexpr,
             ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    if ONE_BLOCK:
        inside = (row < m) & (column < columns)
        value = tl.load(x + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
        amax = tl.max(tl.abs(value), axis=1)[:, None]
        scale = tl.div_rn(tl.maximum(amax, smallest), tl.zeros_like(amax) + qmax)
        tl.store(codes + row * columns + column, to_codes(value, scale, 0.0, qmin, qmax), mask=inside)
    else:
        amax = tl.zeros([ROWS, 1], dtype=tl.float32)
        for start in range(0, columns, BLOCK):
            inside = (row < m) & (start + column < columns)
            value = tl.load(x + row * row_stride + start + column, mask=inside, other=0.0).to(tl.float32)
            amax = tl.maximum(amax, tl.max(tl.abs(value), axis=1)[:, None])
        scale = tl.div_rn(tl.maximum(amax, smallest), tl.zeros_like(amax) + qmax)
        for start in range(0, columns, BLOCK):
            inside = (row < m) & (start + column < columns)
            value = tl.load(x + row * row_stride + start + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(codes + row * columns + start + column, to_codes(value, scale, 0.0, qmin, qmax), mask=inside)
    tl.store(scales + row, scale, mask=row < m)


@triton.jit
def _unpack_int4(packed, codes, total, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    both = tl.load(packed + index, mask=index < total, other=0).to(tl.int32)
    low = (((both & 15) ^ 8) - 8).to(tl.int8)
    high = (((both >> 4) ^ 8) - 8).to(tl.int8)
    out = tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    tl.store(codes + out, tl.interleave(low, high), mask=out < 2 * total)


def quantize_static(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """int8 codes in x's shape. x float [..., K], rows of any stride; scale float32 and zero_point int32, each one element."""
    flat = rows(x)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    if total := x.numel():
        qmin, qmax = int_range(bits)
        block = ELEMENTS
        with on_device(x):
            _static[(triton.cdiv(total, block),)](
                flat, codes, scale, zero_point, total, flat.shape[1], flat.stride(0), float(qmin), float(qmax),
                CONTIGUOUS=flat.is_contiguous(), BLOCK=block, num_warps=4)
    return codes


def quantize_dynamic(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """int8 codes in x's shape and float32 scales [..., 1], one a row."""
    flat = rows(x)
    m, columns = flat.shape
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if m:
        qmin, qmax = int_range(bits)
        block = min(power_of_2(columns, 64), ROW_IN_REGISTERS)
        height = max(1, ELEMENTS // block)
        with on_device(x):
            _dynamic[(triton.cdiv(m, height),)](
                flat, codes, scales, m, columns, flat.stride(0), float(qmin), float(qmax), RANGE_MIN,
                ONE_BLOCK=columns <= block, ROWS=height, BLOCK=block, num_warps=4 if block <= 4096 else 16)
    return codes, scales


def unpack_int4(packed: Tensor) -> Tensor:
    """uint8 [N, K/2] (`vitq.formats.pack_int4`) to a new int8 [N, K] on the GPU."""
    codes = torch.empty((packed.shape[0], packed.shape[1] * 2), dtype=torch.int8, device=packed.device)
    if total := packed.numel():
        block = ELEMENTS
        with on_device(packed):
            _unpack_int4[(triton.cdiv(total, block),)](packed, codes, total, BLOCK=block, num_warps=4)
    return codes
