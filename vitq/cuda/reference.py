"""The operators of `vitq.cuda.ops` in torch, for CPU tensors: integers exactly, float32 roundings where the kernels have them.

They say what the kernels compute; they are not fast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vitq.cuda import checks
from vitq.cuda.layout import even_first_undone, exchange_bytes, permute_rows, unpack_transform, unpack_weight, widen
from vitq.formats import RANGE_MIN, ActivationFormat, Kronecker, int_range, pack_int4, to_float16, unpack_int4
from vitq.ops.cached_attention import RowCodes, causal, rotated
from vitq.ops.common import activate, fma32
from vitq.ops.gated import gated
from vitq.ops.linear import int_matmul
from vitq.ops.quantize import ReferenceQuantize


def linear(out: Tensor, codes: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, *, weight_bits: int = 8,
           input_bits: int = 8, row_scale: Tensor | None = None, residual: Tensor | None = None, column_sums: Tensor | None = None,
           row_shift: Tensor | None = None, segment_ends: tuple[int, ...] = (), codes_fp: Tensor | None = None,
           weight_fp: Tensor | None = None, activation: str = "", out_scale: float = 1.0, out_zero_point: int = 0,
           out_bits: int = 8, multiplier: Tensor | None = None, group_zero: Tensor | None = None, group_columns: int = 0,
           config: str = "") -> None:
    m, n = checks.linear(out, codes, weight, scale, bias, weight_bits, input_bits, row_scale, residual, column_sums, row_shift,
                         segment_ends, codes_fp, weight_fp, activation, out_bits, multiplier, group_zero, group_columns)
    if input_bits == 4:
        codes = unpack_int4(codes, 2 * codes.shape[1])
    k = codes.shape[1]
    w = unpack_weight(weight, weight_bits, n, k, plain=input_bits == 4)
    if multiplier is not None:
        times, less = (0 if t is None else _of_columns(t, n, k, group_columns).int() for t in (multiplier, group_zero))
        w = ((w - less) * times).to(torch.int8)
    ends = [*segment_ends[:-1], k]
    scale = scale.view(len(ends), -1)[:, :n]
    r = torch.ones(m, 1) if row_scale is None else row_scale.view(m, 1)
    y = torch.zeros(m, n) if bias is None else bias[:n].expand(m, n)
    if column_sums is not None:
        y = fma32(row_shift.view(m, 1), column_sums[:n], y)
    start = 0
    for s, end in enumerate(ends):
        acc = int_matmul(codes[:, start:end], w[:, start:end])
        y = fma32(acc.float() * r, scale[s], y)
        start = end
    if codes_fp is not None:
        y = (y.double() + codes_fp.double() @ unpack_weight(weight_fp, 8, n, weight_fp.shape[1]).double().T).float()
    if out.dtype == torch.int8:
        if activation:
            y = activate(y.double(), activation).float()
            y = fma32(y, torch.tensor(1.0 / out_scale), torch.tensor(float(out_zero_point)))
        y = torch.round(y).clamp(*int_range(out_bits))
    else:
        y = activate(y.double(), activation or None).float()
        if residual is not None:
            y = y + residual.reshape(m, n).float()
    out.copy_(y.view(out.shape))


def _of_columns(constants: Tensor, n: int, k: int, group_columns: int) -> Tensor:
    """[G, N'] in the kernels' order -> [N, K] in logical order."""
    return even_first_undone(constants).T[:n].repeat_interleave(group_columns, 1)[:, :k]


def weight_only(out: Tensor, x: Tensor, weight: Tensor, scale: Tensor, *, zero: Tensor | None = None, bias: Tensor | None = None,
                weight_bits: int = 4, group_columns: int, config: str = "") -> None:
    m, n, k = checks.weight_only(out, x, weight, scale, zero, bias, weight_bits, group_columns)
    y = x.double() @ _floats(weight, scale, zero, weight_bits, group_columns, n, k).double().T
    out.copy_((y if bias is None else y + bias[:n]).float())


def dequantize(out: Tensor, weight: Tensor, scale: Tensor, *, zero: Tensor | None = None, weight_bits: int = 4, group_columns: int) -> None:
    checks.dequantize(out, weight, scale, zero, weight_bits, group_columns)
    out.copy_(_floats(weight, scale, zero, weight_bits, group_columns, *out.shape))


def _floats(weight: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_columns: int, n: int, k: int) -> Tensor:
    codes = unpack_weight(exchange_bytes(weight) if bits == 4 else weight, bits, n, k).float()
    return (codes if zero is None else codes - _of_columns(zero, n, k, group_columns)) * _of_columns(scale, n, k, group_columns)


def attention(out: Tensor, q: Tensor, k: Tensor, v: Tensor, *, logit_scale: Sequence[float], v_scale: Sequence[float], q_zero: Sequence[int] = (0,),
              v_zero: Sequence[int] = (0,), p_bits: int = 8, bias: Tensor | None = None, mask: Tensor | None = None,
              window: tuple[int, ...] = (), pad: Tensor | None = None, out_scale: float = 1.0, out_zero_point: int = 0,
              out_bits: int = 8) -> None:
    checks.attention(out, q, k, v, (logit_scale, v_scale, q_zero, v_zero), bias, mask, window, pad, p_bits)
    batch, tokens, heads, dim = q.shape
    place = None
    if window:
        place, mask = windows(*window)
        filled = torch.zeros(3, heads, dim, dtype=torch.int8) if pad is None else pad
        # One more token holds what lies beyond the image; place names it by -1.
        q, k, v = (torch.cat((t, f.expand(batch, 1, heads, dim)), 1)[:, place].flatten(0, 1) for t, f in zip((q, k, v), filled))
    y = softmax_matmul(q, k, v, logit_scale, v_scale, q_zero, v_zero, p_bits, bias, mask)
    if place is not None:
        y, inside = y.view(batch, place.numel(), heads * dim), place.flatten() >= 0
        whole = y.new_empty(batch, tokens, heads * dim)
        whole[:, place.flatten()[inside]] = y[:, inside]
        y = whole
    if out.dtype == torch.int8:
        y = (torch.round(y.float() / torch.tensor(out_scale)) + out_zero_point).clamp(*int_range(out_bits))
    out.copy_(y)


def softmax_matmul(q: Tensor, k: Tensor, v: Tensor, logit_scale: Sequence[float], v_scale: Sequence[float], q_zero: Sequence[int],
                   v_zero: Sequence[int], p_bits: int, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """float64 [B, N, H·D]; a row that sees nothing is zeros. Scales and zero points: one, or one a head."""
    q, k, v = (t.transpose(1, 2).double() for t in (q, k, v))
    logit_scale, v_scale, q_zero, v_zero = (torch.tensor(c, dtype=torch.float64, device=q.device).view(-1, 1, 1)
                                            for c in (logit_scale, v_scale, q_zero, v_zero))
    logits = (q - q_zero) @ k.transpose(-2, -1) * logit_scale
    if bias is not None:
        logits = logits + bias.double()
    if mask is not None:
        logits = logits + mask.double().repeat(q.shape[0] // mask.shape[0], 1, 1).unsqueeze(1)
    maximum = logits.amax(-1, keepdim=True)
    e = torch.exp(logits - torch.where(torch.isinf(maximum), 0.0, maximum))
    top, total = 2.0**p_bits - 1, e.sum(-1, keepdim=True)
    y = torch.round(e * top) @ (v - v_zero) * v_scale / (top * total)
    return torch.where(total > 0, y, 0.0).transpose(1, 2).flatten(2)


def windows(height: int, width: int, window_h: int, window_w: int, shift_h: int, shift_w: int) -> tuple[Tensor, Tensor | None]:
    """Which token of the image each place of each window holds, int64 [W, N], -1 beyond it; and the mask float32 [W, N, N] of
    −100 between tokens that the shift brought together from apart, None without a shift. The image is shifted, then padded."""
    def axis(size: int, window: int, shift: int) -> tuple[Tensor, Tensor]:
        padded = size + -size % window
        at = torch.arange(padded)
        token = torch.where(at < size, (at + shift) % size, -1)
        region = (at >= padded - window).int() + (at >= padded - shift).int() if shift else torch.zeros(padded, dtype=torch.int32)
        return token.view(-1, window), region.view(-1, window)

    (rows, row_region), (columns, column_region) = axis(height, window_h, shift_h), axis(width, window_w, shift_w)
    rows, row_region = rows[:, None, :, None], row_region[:, None, :, None]
    columns, column_region = columns[None, :, None, :], column_region[None, :, None, :]
    place = torch.where((rows >= 0) & (columns >= 0), rows * width + columns, -1).reshape(-1, window_h * window_w)
    if not shift_h and not shift_w:
        return place, None
    region = (3 * row_region + column_region).reshape(-1, window_h * window_w)
    return place, torch.where(region[:, :, None] != region[:, None, :], -100.0, 0.0)


def rows(out: Tensor, x: Tensor, *, residual: Tensor | None = None, sum: Tensor | None = None, norm: str = "",
         weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 0.0, order: Tensor | None = None,
         scale: float = 1.0, zero_point: int = 0, bits: int = 8, row_scale: Tensor | None = None, row_shift: Tensor | None = None,
         fp_order: Tensor | None = None, fp_out: Tensor | None = None, counted: Tensor | None = None,
         starts: Tensor | None = None, merge: bool = False) -> None:
    m, columns, out_columns = checks.rows(out, x, residual, sum, norm, weight, bias, order, scale, bits, row_scale, row_shift,
                                          fp_order, fp_out, counted, starts, merge)
    y = x.float()
    if residual is not None:
        y = y + residual.float()
    if sum is not None:
        sum.copy_(y)
    if merge:
        y = F.pad(y, (0, 0, 0, y.shape[-2] % 2, 0, y.shape[-3] % 2))
        y = torch.cat([y[..., i::2, j::2, :] for j in (0, 1) for i in (0, 1)], -1)
    y = y.reshape(m, columns)
    if norm == "layer_norm" and columns:
        y = F.layer_norm(y.double(), (columns,), None if weight is None else weight.double(),
                         None if bias is None else bias.double(), eps).float()
    elif norm == "rms_norm" and columns:
        y = y.double() * torch.rsqrt(y.double().square().mean(-1, keepdim=True) + eps)
        y = (y if weight is None else y * weight.double()).float()
    if out.is_floating_point():
        out.copy_(y.view(out.shape))
        return
    if fp_out is not None:
        fp_out.copy_(to_float16(y[:, fp_order.clamp_min(0).long()]).masked_fill(fp_order < 0, 0.0).view(fp_out.shape))
    qmin, qmax = int_range(bits)
    ordered = y if order is None else y[:, order.clamp_min(0).long()].masked_fill(order < 0, 0.0)
    if row_shift is not None:
        there = slice(None) if order is None else order >= 0
        lo = ordered[:, there].amin(-1, keepdim=True)
        span = ordered[:, there].amax(-1, keepdim=True) - lo
        step = span.clamp_min(RANGE_MIN) / torch.tensor(float(qmax - qmin))
        row_scale.copy_(step.view(row_scale.shape))
        row_shift.copy_((lo - qmin * step).view(row_shift.shape))
        q = torch.zeros_like(ordered)
        q[:, there] = torch.round(torch.minimum((ordered[:, there] - lo).clamp_min(0.0), span) / step) + qmin
    elif row_scale is not None:
        amax = ordered.abs().amax(-1) if out_columns else torch.zeros(m)
        row_scale.copy_((amax.clamp_min(RANGE_MIN) / torch.tensor(float(qmax))).view(row_scale.shape))
        q = torch.round(ordered / row_scale.view(m, 1))
    else:
        q = torch.round(ordered / torch.tensor(scale)) + zero_point
    q = q.clamp(qmin, qmax).to(torch.int8)
    out.copy_((pack_int4(q) if out.dtype == torch.uint8 else q).view(out.shape))


def transformed_rows(out: Tensor, x: Tensor, row_scale: Tensor, *, row_shift: Tensor | None = None, gate: str = "", norm: str = "",
                     weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 0.0, left: Tensor | None = None,
                     right: Tensor | None = None, left_size: int = 0, right_size: int = 0, clip: Tensor | None = None, bits: int = 8,
                     fragments: bool = False) -> None:
    m, columns = checks.transformed_rows(out, x, row_scale, row_shift, gate, norm, weight, bias, left, right, left_size, right_size, clip, bits)
    if not m:
        return
    y = gated(x, gate) if gate else x
    if norm:
        y = y.double() - (y.double().mean(-1, keepdim=True) if norm == "layer_norm" else 0.0)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
        y = (y * (1.0 if weight is None else weight.double()) + (0.0 if bias is None else bias.double())).float()
    matrices = (None if left is None else unpack_transform(left, left_size, False), None if right is None else unpack_transform(right, right_size, True))
    transform = None if left is None and right is None else Kronecker(*matrices)
    q = ReferenceQuantize().run(ActivationFormat(bits, dynamic=True, symmetric=row_shift is None, transform=transform, clip=clip), y)
    out.copy_(q.codes)
    row_scale.copy_(q.scale.view(row_scale.shape))
    if row_shift is not None:
        row_shift.copy_(q.shift.view(row_shift.shape))


def patches(out: Tensor, images: Tensor, patch_h: int, patch_w: int, scale: float, zero_point: int, bits: int) -> None:
    checks.patches(out, images, patch_h, patch_w, scale)
    cut = F.unfold(images.float(), (patch_h, patch_w), stride=(patch_h, patch_w)).transpose(1, 2) if out.numel() else out
    out.copy_((torch.round(cut / torch.tensor(scale)) + zero_point).clamp(*int_range(bits)).reshape(out.shape))


def widen_int4(out: Tensor, packed: Tensor, multiplier: Tensor | None = None, zero: Tensor | None = None,
               group: Tensor | None = None) -> None:
    checks.widen_int4(out, packed, multiplier, zero, group)
    codes = widen(packed)
    if multiplier is not None:
        times, less = (0 if t is None else permute_rows(even_first_undone(t).T)[:, group.long()] for t in (multiplier, zero))
        codes = (codes - less) * times
    out.copy_(codes)


def append_rows(keys: Tensor, values: Tensor, state: Tensor, k: Tensor, v: Tensor, *, key_bits: int = 16, key_symmetric: bool = True,
                value_bits: int = 16, value_symmetric: bool = True, key_clip: Tensor | None = None, value_clip: Tensor | None = None,
                cos: Tensor | None = None, sin: Tensor | None = None, right: Tensor | None = None, q: Tensor | None = None,
                inverse: Tensor | None = None, q_out: Tensor | None = None, k_out: Tensor | None = None, v_out: Tensor | None = None,
                out_before: bool = False, out_turned: bool = False, advance: bool = True) -> None:
    checks.append_rows(keys, values, state, k, v, key_bits, key_symmetric, value_bits, value_symmetric, key_clip, value_clip, cos, sin, right, q, inverse,
                       q_out, k_out, v_out, out_before, out_turned)
    if cos is not None:
        k, q = (x if x is None else rotated(x, cos, sin) for x in (k, q))
    if k_out is not None and out_before:
        k_out.copy_(k)
    if right is not None:
        k = Kronecker(None, right).apply(k).to(k.dtype)
    if q is not None:
        q_out.copy_((q if inverse is None or out_turned else q.float() @ inverse).transpose(1, 2))
    start, tokens = int(state[0]), k.shape[2]
    there = max(min(tokens, keys.shape[2] - start), 0)
    for rows, new, bits, symmetric, clip, out in ((keys, k, key_bits, key_symmetric, key_clip, None if out_before else k_out),
                                                  (values, v, value_bits, value_symmetric, value_clip, v_out)):
        new = new[:, :, :there]
        codes = RowCodes(bits, symmetric, clip)
        packed = codes.pack(new) if bits != 16 else new if rows.dtype != torch.uint8 else new.contiguous().view(torch.uint8)
        rows[:, :, start : start + there] = packed
        if out is not None:
            there_for = new if bits == 16 else codes.unpack(packed, new.shape[-1], new.dtype)
            out[:, :, :there] = there_for.float() @ inverse.T if out_turned and out is k_out else there_for
    if advance:
        state[0] += tokens


def cached_attention(out: Tensor, q: Tensor, keys: Tensor, values: Tensor, state: Tensor, *, key_bits: int = 16, key_symmetric: bool = True,
                     value_bits: int = 16, value_symmetric: bool = True, mask: Tensor | None = None, scale: float = 1.0, window: int = 0,
                     workspace: Tensor | None = None) -> None:
    batch, heads, query_heads, tokens, dim = checks.cached_attention(out, q, keys, values, state, key_bits, key_symmetric, value_bits, value_symmetric,
                                                                     mask, window, workspace)
    length = min(int(state[0]), keys.shape[2])
    k, v = (_numbers(rows[:, :, :length], bits, symmetric, dim, q.dtype).repeat_interleave(query_heads // heads, 1)
            for rows, bits, symmetric in ((keys, key_bits, key_symmetric), (values, value_bits, value_symmetric)))
    seen = causal(torch.tensor(length - tokens), tokens, length, window)
    if mask is not None:
        seen = seen & F.pad(mask, (0, max(length - mask.shape[2], 0)))[:, None, :, :length]
    logits = (q.double() @ k.transpose(-2, -1) * scale).masked_fill(~seen, -torch.inf)
    p = torch.softmax(logits, -1).masked_fill(~seen, 0.0)  # a row that sees nothing is zeros
    out.copy_((p @ v).transpose(1, 2))


def _numbers(rows: Tensor, bits: int, symmetric: bool, dim: int, dtype: torch.dtype) -> Tensor:
    """float64, what rows of a cache stand for."""
    if bits != 16:
        return RowCodes(bits, symmetric).unpack(rows, dim, torch.float32).double()
    return (rows.contiguous().view(dtype) if rows.dtype == torch.uint8 else rows).double()
