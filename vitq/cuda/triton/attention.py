"""Attention on int8 codes in one kernel, with the probabilities requantized as `vitq.ops.attention` says.

The true maximum of a row has to be known before its first probability is rounded, so the softmax takes two passes over
the keys: up to ONE_BLOCK keys the whole row of logits stays in registers, beyond that q·k is computed a second time.

Zero points: of (q − zq)·(k − zk) the terms that do not depend on the key cancel in the softmax, which leaves q·k − zq·Σk.
Probabilities 0..255 do not fit s8, so p − 128 is multiplied and 128·Σv added back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vitq.cuda.triton.common import on_device, power_of_2, to_codes
from vitq.formats import int_range
from vitq.ops.attention import AttentionSpec
from vitq.ops.common import OutputFormat

ONE_BLOCK = 256
WIDEST_HEAD = 256
LOG2E = 1.4426950408889634


@dataclass(frozen=True, eq=False)
class Constants:
    """scales: float32 [2, 1 or H], sq·sk·(softmax scale)·log2(e) and the scale of the values, of every head or of each; zeros: int32 likewise,
    the zero points of q and v; any_q_zero, any_v_zero: whether one is not 0; output: tensors on the GPU, all."""

    scales: Tensor
    zeros: Tensor
    any_q_zero: bool
    any_v_zero: bool
    p_bits: int
    output: OutputFormat | None

    @classmethod
    def of(cls, spec: AttentionSpec, device: torch.device) -> Constants:
        found = spec.constants()
        scales = torch.tensor([found["logit_scale"], found["v_scale"]], dtype=torch.float64) * torch.tensor([[LOG2E], [1.0]])
        zeros = torch.tensor([found["q_zero"], found["v_zero"]], dtype=torch.int32)
        q_zero, v_zero = zeros.ne(0).any(1).tolist()
        return cls(scales.float().to(device), zeros.to(device), q_zero, v_zero, spec.params.p_bits,
                   None if spec.output is None else spec.output.to(device))


@triton.jit
def _logits(query, k, bias, mask, key, n_keys, k_token, column, inside_d, in_row, c, q_zero, HAS_BIAS: tl.constexpr,
            HAS_MASK: tl.constexpr, HAS_Q_ZERO: tl.constexpr):
    """[BLOCK_M, BLOCK_N] logits, -inf beyond the last key: base-2 logits with a bias or a mask, and without either the
    integers that `c` still has to multiply."""
    valid = key < n_keys
    codes = tl.load(k + key[:, None] * k_token + column[None, :], mask=valid[:, None] & inside_d[None, :], other=0)
    acc = tl.dot(query, tl.trans(codes), out_dtype=tl.int32)
    if HAS_Q_ZERO:
        acc = acc - (q_zero * tl.sum(codes.to(tl.int32), axis=1))[None, :]
    logit = acc.to(tl.float32)
    if HAS_BIAS or HAS_MASK:
        # The launcher padded bias and mask with -inf columns, so no mask along the keys splits these loads into bytes.
        logit = logit * c
        if HAS_BIAS:
            logit += tl.load(bias + key[None, :], mask=in_row, other=0.0) * 1.4426950408889634
        if HAS_MASK:
            logit += tl.load(mask + key[None, :], mask=in_row, other=0.0) * 1.4426950408889634
    else:
        logit = tl.where(valid[None, :], logit, float("-inf"))
    return logit


@triton.jit
def _finite(maximum):
    """A row with every key masked has maximum -inf; with 0 there its exponentials are 0, not NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _weigh(logit, maximum, v, key, n_keys, v_token, column, inside_d, c, acc, SCALED: tl.constexpr,
           P_BITS: tl.constexpr):
    """One block of keys: codes times values added to acc; the sums of its exponentials and, for the offsets, of its
    values and codes."""
    difference = logit - maximum[:, None]
    if not SCALED:
        difference = difference * c  # of integers, so exact up to here however large the logits are
    e = tl.exp2(difference)
    # The rounding trick of common.rint; the integer then sits in the low bits of the float, offset included.
    OFFSET: tl.constexpr = 128 if P_BITS == 8 else 0
    p = (e * (2.0**P_BITS - 1.0) + (12582912.0 - OFFSET)).to(tl.int32, bitcast=True).to(tl.int8)
    codes = tl.load(v + key[:, None] * v_token + column[None, :], mask=(key < n_keys)[:, None] & inside_d[None, :],
                    other=0)
    acc = tl.dot(p, codes, acc, out_dtype=tl.int32)
    return acc, tl.sum(e, axis=1), tl.sum(codes.to(tl.int32), axis=0), tl.sum(p.to(tl.int32) + OFFSET, axis=1)


@triton.jit
def _attention(q, k, v, out, bias, mask, scales, zeros, out_scale, out_zero, q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch,
               v_token, v_head, bias_head, bias_token, mask_window, mask_token, heads, n_queries, n_keys, windows,
               scale_row, scale_head, qmin, qmax, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
               BLOCK_N: tl.constexpr, ONE_BLOCK: tl.constexpr, P_BITS: tl.constexpr, HAS_BIAS: tl.constexpr,
               HAS_MASK: tl.constexpr, HAS_Q_ZERO: tl.constexpr, HAS_V_ZERO: tl.constexpr, REQUANTIZE: tl.constexpr,
               PER_COLUMN: tl.constexpr):
    blocks = tl.cdiv(n_queries, BLOCK_M)
    pair = tl.program_id(0) // blocks  # programs of one head run side by side, so that its keys stay in L2
    batch = (pair // heads).to(tl.int64)
    head = pair % heads
    c = tl.load(scales + head * scale_head)
    v_scale = tl.load(scales + scale_row + head * scale_head)
    q_zero = tl.load(zeros + head * scale_head)
    v_zero = tl.load(zeros + scale_row + head * scale_head)
    row = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    inside_d = column < D
    in_row = (row < n_queries)[:, None]
    SCALED: tl.constexpr = HAS_BIAS or HAS_MASK

    query = tl.load(q + batch * q_batch + head * q_head + row[:, None] * q_token + column[None, :],
                    mask=in_row & inside_d[None, :], other=0)
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    bias_rows = bias
    mask_rows = mask
    if HAS_BIAS:
        bias_rows = bias + head.to(tl.int64) * bias_head + row[:, None] * bias_token
    if HAS_MASK:
        mask_rows = mask + (batch % windows) * mask_window + row[:, None] * mask_token
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.int32)
    key = tl.arange(0, BLOCK_N)
    if ONE_BLOCK:
        logit = _logits(query, k, bias_rows, mask_rows, key, n_keys, k_token, column, inside_d, in_row, c, q_zero, HAS_BIAS,
                        HAS_MASK, HAS_Q_ZERO)
        acc, total, v_sum, p_sum = _weigh(logit, _finite(tl.max(logit, axis=1)), v, key, n_keys, v_token, column, inside_d,
                                          c, acc, SCALED, P_BITS)
    else:
        maximum = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        for start in range(0, n_keys, BLOCK_N):
            logit = _logits(query, k, bias_rows, mask_rows, start + key, n_keys, k_token, column, inside_d, in_row, c,
                            q_zero, HAS_BIAS, HAS_MASK, HAS_Q_ZERO)
            maximum = tl.maximum(maximum, tl.max(logit, axis=1))
        maximum = _finite(maximum)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        v_sum = tl.zeros([BLOCK_D], dtype=tl.int32)
        p_sum = tl.zeros([BLOCK_M], dtype=tl.int32)
        for start in range(0, n_keys, BLOCK_N):
            logit = _logits(query, k, bias_rows, mask_rows, start + key, n_keys, k_token, column, inside_d, in_row, c,
                            q_zero, HAS_BIAS, HAS_MASK, HAS_Q_ZERO)
            acc, e_sum, values, codes = _weigh(logit, maximum, v, start + key, n_keys, v_token, column, inside_d, c, acc,
                                               SCALED, P_BITS)
            total += e_sum
            v_sum += values
            p_sum += codes

    if P_BITS == 8:
        acc += (v_sum * 128)[None, :]
    if HAS_V_ZERO:
        acc -= (p_sum * v_zero)[:, None]
    share = tl.div_rn(tl.zeros_like(total) + v_scale, tl.where(total > 0.0, total * (2.0**P_BITS - 1.0), 1.0))
    y = tl.where((total > 0.0)[:, None], acc.to(tl.float32) * share[:, None], 0.0)
    feature = head * D + column
    place = out + (batch * n_queries + row[:, None]) * (heads * D) + feature[None, :]
    inside = in_row & inside_d[None, :]
    if REQUANTIZE:
        if PER_COLUMN:
            s_out = tl.load(out_scale + feature, mask=inside_d, other=1.0)[None, :]
            z_out = tl.load(out_zero + feature, mask=inside_d, other=0).to(tl.float32)[None, :]
        else:
            s_out = tl.load(out_scale)
            z_out = tl.load(out_zero).to(tl.float32)
        tl.store(place, to_codes(y, s_out, z_out, qmin, qmax), mask=inside)
    else:
        tl.store(place, y.to(out.dtype.element_ty), mask=inside)


def attention(constants: Constants, q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype, bias: Tensor | None = None,
              mask: Tensor | None = None) -> Tensor:
    """int8 q [B, N, H, D], k and v [B, M, H, D], any strides but unit ones in D -> [B, N, H·D] in `dtype`, or int8 codes
    where `constants.output` is given. bias [H, N, M] or [1, N, M]; mask [W, N, M], row b uses mask[b % W]."""
    (b, n_queries, heads, d), n_keys = q.shape, k.shape[1]
    output = constants.output
    out = torch.empty((b, n_queries, heads * d), dtype=dtype if output is None else torch.int8, device=q.device)
    if not out.numel():
        return out
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    windows = 1 if mask is None else mask.shape[0]
    block_m, block_n, warps = tile(n_queries, n_keys)
    width = triton.cdiv(n_keys, block_n) * block_n
    bias = None if bias is None else _padded(bias, width).expand(heads, n_queries, width)
    mask = None if mask is None else _padded(mask, width).expand(windows, n_queries, width)
    qmin, qmax = (0, 0) if output is None else int_range(output.bits)
    with on_device(q):
        _attention[(triton.cdiv(n_queries, block_m) * b * heads,)](
            q, k, v, out, bias, mask, constants.scales, constants.zeros, None if output is None else output.scale,
            None if output is None else output.zero_point, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *(0, 0) if bias is None else bias.stride()[:2], *(0, 0) if mask is None else mask.stride()[:2], heads,
            n_queries, n_keys, windows, constants.scales.shape[1], int(constants.scales.shape[1] > 1), float(qmin), float(qmax),
            D=d, BLOCK_D=power_of_2(d, 32), BLOCK_M=block_m, BLOCK_N=block_n,
            ONE_BLOCK=n_keys <= block_n, P_BITS=constants.p_bits, HAS_BIAS=bias is not None, HAS_MASK=mask is not None,
            HAS_Q_ZERO=constants.any_q_zero, HAS_V_ZERO=constants.any_v_zero, REQUANTIZE=output is not None,
            PER_COLUMN=output is not None and output.scale.ndim > 0, num_warps=warps)
    return out


def tile(n_queries: int, n_keys: int) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_N, warps), a function of the shape alone so that equal calls give equal bits."""
    if n_keys > ONE_BLOCK:
        return 64, 64, 4
    # Measured on an H200: at 197 keys, 131 µs with 32 rows against 163 with 64, for DeiT-S at batch 200; at 49 keys the
    # other way round.
    block_n = power_of_2(n_keys, 32)
    return 32 if block_n > 128 else 64, block_n, 4


def _padded(x: Tensor, width: int) -> Tensor:
    """float32 [.., N, width], the added columns -inf. Small beside the codes: one a layer, shared by the batch."""
    x = x.float()
    if x.shape[-1] == width and x.stride(-1) == 1 and x.stride(-2) % 4 == 0 and x.storage_offset() % 4 == 0:
        return x
    return F.pad(x, (0, width - x.shape[-1]), value=float("-inf")).contiguous()
