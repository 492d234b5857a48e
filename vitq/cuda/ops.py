"""torch.ops.vitq.*: the CUDA library's functions as PyTorch operators.

Each fills tensors that the caller allocated, so CUDA graphs, `torch.compile` and `torch.export` see every allocation. On CUDA an
operator is one call of the library on the tensors' device and current stream; on CPU tensors it is the torch reference of
`vitq.cuda.reference`, which the kernels are tested against. Registration needs neither a GPU nor the library.

Shapes, for all: M rows, K input features, N output features; columns are contiguous, rows of any stride.
"""

from __future__ import annotations

import contextlib
from ctypes import byref, c_float, c_int32
from typing import Any

import torch
from torch import Tensor

from vitq.cuda import checks, loader, reference, tuning
from vitq.cuda.checks import refuse
from vitq.cuda.layout import round_up
from vitq.formats import RANGE_MIN, int_range

SCHEMAS = {
    # y = act(Σ_s r·acc_s·scale_s + bias + row_shift·column_sums + fp) + residual, cast to out's dtype or requantized to int8.
    # out [M, N] or [G, R, N] with G·R = M; residual as out, may be out itself; codes int8 [M, K], rows of 16-byte multiples, or
    # uint8 [M, K/2] with input_bits=4; weight as layout.pack_weight makes it (plain with input_bits=4); scale float32 [N']
    # or [S, N'], bias, column_sums [N'], N' the next multiple of 32 of N; row_scale, row_shift float32 [M]; codes_fp fp16 [M, F],
    # weight_fp fp16 [N', F]. int8 out: without an activation scale, column_sums and bias hold 1/out_scale and the zero point already.
    # multiplier, group_zero int8 [G, N'], with 4-bit weights: (code - group_zero)·multiplier, an int8, of each row, in the order of
    # layout.even_first, and its group of group_columns columns, in place of the code; beyond FEW_ROWS rows on Hopper, and of multiples of
    # PACKED_GROUP columns.
    "linear": "(Tensor(a!) out, Tensor codes, Tensor weight, Tensor scale, Tensor? bias, *, int weight_bits=8, int input_bits=8, "
              "Tensor? row_scale=None, Tensor? residual=None, Tensor? column_sums=None, Tensor? row_shift=None, int[] segment_ends=[], "
              "Tensor? codes_fp=None, Tensor? weight_fp=None, str activation='', float out_scale=1.0, int out_zero_point=0, "
              "int out_bits=8, Tensor? multiplier=None, Tensor? group_zero=None, int group_columns=0, str config='') -> ()",
    # y = Σ_k x·(code - zero)·scale + bias, summed in float32. out float [M, N], M up to FEW_ROWS; x fp16 or bf16 [M, K], rows of 16-byte
    # multiples; weight as layout.pack_weight makes it, 4-bit ones by exchange_bytes; scale float32 and zero int8 [G, N'], within the codes' range,
    # of each row, in the order of layout.even_first, and its group of group_columns columns; bias float32 [N'].
    "weight_only": "(Tensor(a!) out, Tensor x, Tensor weight, Tensor scale, *, Tensor? zero=None, Tensor? bias=None, int weight_bits=4, "
                   "int group_columns, str config='') -> ()",
    # The weights of weight_only in logical order, out float [N, K] contiguous.
    "dequantize": "(Tensor(a!) out, Tensor weight, Tensor scale, *, Tensor? zero=None, int weight_bits=4, int group_columns) -> ()",
    # softmax((q − q_zero)·kᵀ·logit_scale + bias + mask)·(v − v_zero)·v_scale, these four one number or one a head. q, k, v
    # int8 [B, tokens, H, D], unit stride in D; out [B, tokens, H·D] contiguous; bias float32 [H or 1, N, M], mask float32
    # [W, N, M], row b uses mask[b % W]; window [] or [height, width, window_h, window_w, shift_h, shift_w] of images in row
    # order; pad int8 [3, H, D]: the codes of q, k, v where an image is padded.
    "attention": "(Tensor(a!) out, Tensor q, Tensor k, Tensor v, *, float[] logit_scale, float[] v_scale, int[] q_zero=[0], "
                 "int[] v_zero=[0], int p_bits=8, Tensor? bias=None, Tensor? mask=None, int[] window=[], Tensor? pad=None, "
                 "float out_scale=1.0, int out_zero_point=0, int out_bits=8) -> ()",
    # (x + residual) -> norm -> columns in `order` -> codes. x, residual, sum float [.., K]; out int8 [.., K'], uint8 [.., ⌈K'/2⌉]
    # (packed int4), or float (the norm's result); row_scale float32 [M]: dynamic; with row_shift float32 [M]: and asymmetric; order int32
    # [K'], -1 the value 0, with counted, uint8 [⌈K/8⌉] as `layout.bits_of` makes it, where the scale is dynamic, and starts int32 [K/8],
    # `layout.starts_of`, where order and fp_order ascend and share all features; fp_order int32 [F], fp_out fp16 [M, F]. merge: x [.., H, W, K/4], rows are its 2 x 2 neighbours (Swin), 0
    # beyond odd sizes.
    "rows": "(Tensor(a!) out, Tensor x, *, Tensor? residual=None, Tensor(b!)? sum=None, str norm='', Tensor? weight=None, "
            "Tensor? bias=None, float eps=0.0, Tensor? order=None, float scale=1.0, int zero_point=0, int bits=8, "
            "Tensor(c!)? row_scale=None, Tensor(d!)? row_shift=None, Tensor? fp_order=None, Tensor(e!)? fp_out=None, "
            "Tensor? counted=None, Tensor? starts=None, bool merge=False) -> ()",
    # act(gate)·up or a norm, or neither -> leftᵀ·X·right of each row as a matrix X [A, B] -> dynamic codes, as `Kronecker.apply` and
    # `quantize_per_token` with `clip` have it. x float [M, K], with a gate [M, 2 K]; out int8 [M, K]; row_scale float32 [M]; with row_shift float32 [M]
    # asymmetric; weight, bias float32 [K]; left and right as layout.pack_transform makes them of A = left_size and B = right_size numbers, up to
    # TRANSFORM_SIZE; clip float32 [2]. fragments: by kronecker.cu, where another kernel would take it.
    "transformed_rows": "(Tensor(a!) out, Tensor x, Tensor(b!) row_scale, *, Tensor(c!)? row_shift=None, str gate='', str norm='', "
                        "Tensor? weight=None, Tensor? bias=None, float eps=0.0, Tensor? left=None, Tensor? right=None, int left_size=0, "
                        "int right_size=0, Tensor? clip=None, int bits=8, bool fragments=False) -> ()",
    # images float [B, C, H, W], contiguous -> int8 [B·(H/ph)·(W/pw), C·ph·pw], features as a convolution's weight has them.
    "patches": "(Tensor(a!) out, Tensor images, int patch_h, int patch_w, float scale, int zero_point, int bits) -> ()",
    # uint8 [N', K/2] -> int8 [N', K], in the same row order. multiplier and zero int8 [G, N'] (even_first) and group uint8 [K], below
    # G: each code, less the zero point, times the multiplier that its row has for its column's group.
    "widen_int4": "(Tensor(a!) out, Tensor packed, Tensor? multiplier=None, Tensor? zero=None, Tensor? group=None) -> ()",
    # New keys and values behind the state[0] tokens whose rows are there, which grow by T if advance is set. keys, values: rows of a cache, uint8
    # [B, G, N, bytes] as `RowCodes` has them with bits up to 8, of 16 bits the numbers, as bytes or [B, G, N, D]; state int64 [2], the second a 0; k, v, q
    # float [B, heads, T, D], unit stride in D, q to q_out [B, T, H, D]. Before, k and q are rotated by cos and sin [1 or B, T, D], then k multiplied
    # by right fp16 [D, D] (`Kronecker`), q by inverse float32 [D, D]. clips float32 [2]. k_out and v_out [B, G, T, D]: the numbers that the new rows
    # stand for; with out_before k_out is k as it was rotated, with out_turned it is multiplied by inverseᵀ in place of q (see the header for what that takes).
    "append_rows": "(Tensor(a!) keys, Tensor(b!) values, Tensor(c!) state, Tensor k, Tensor v, *, int key_bits=16, bool key_symmetric=True, "
                   "int value_bits=16, bool value_symmetric=True, Tensor? key_clip=None, Tensor? value_clip=None, Tensor? cos=None, "
                   "Tensor? sin=None, Tensor? right=None, Tensor? q=None, Tensor? inverse=None, Tensor(d!)? q_out=None, Tensor(e!)? k_out=None, "
                   "Tensor(f!)? v_out=None, bool out_before=False, bool out_turned=False, bool advance=True) -> ()",
    # softmax(scale·q·Kᵀ + mask)·V of the last T of the state[0] tokens that the rows hold, softmax in float32. q fp16 or bf16 [B, H, T, D], D 64, 80, 96
    # or 128, out [B, T, H, D] alike; rows as above, N a multiple of 16; mask bool [B or 1, T, all that may be there or more], of what a token sees up to itself;
    # window: the last so many alone, or 0. workspace float32 [B·G·⌈H/G·T/8⌉, splits, 8, D + 2]: in how many parts the tokens are divided; none: one.
    "cached_attention": "(Tensor(a!) out, Tensor q, Tensor keys, Tensor values, Tensor state, *, int key_bits=16, bool key_symmetric=True, "
                        "int value_bits=16, bool value_symmetric=True, Tensor? mask=None, float scale=1.0, int window=0, "
                        "Tensor(b!)? workspace=None) -> ()",
}

_current_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_library = torch.library.Library("vitq", "DEF")


def _linear(out: Tensor, codes: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, *, weight_bits: int = 8,
            input_bits: int = 8, row_scale: Tensor | None = None, residual: Tensor | None = None, column_sums: Tensor | None = None,
            row_shift: Tensor | None = None, segment_ends: tuple[int, ...] = (), codes_fp: Tensor | None = None,
            weight_fp: Tensor | None = None, activation: str = "", out_scale: float = 1.0, out_zero_point: int = 0,
            out_bits: int = 8, multiplier: Tensor | None = None, group_zero: Tensor | None = None, group_columns: int = 0,
            config: str = "") -> None:
    m, n = checks.linear(out, codes, weight, scale, bias, weight_bits, input_bits, row_scale, residual, column_sums, row_shift,
                         segment_ends, codes_fp, weight_fp, activation, out_bits, multiplier, group_zero, group_columns)
    if not m or not n:
        return
    a_columns, k = codes.shape[1] * (8 // input_bits), weight.shape[1] * (8 // weight_bits)
    if codes.stride(0) % 16 and m > 1:
        refuse("linear", "codes", f"of row stride {codes.stride(0)} bytes", "of a row stride that is a multiple of 16")
    if codes.data_ptr() % 16:  # a view that starts inside of another tensor's row, which no layer of vitq makes
        codes = codes.clone() if codes.is_contiguous() else codes.new_empty(m, codes.stride(0))[:, : codes.shape[1]].copy_(codes)
    ends = (*segment_ends[:-1], k) if segment_ends else (k,)
    grouped = out.ndim == 3
    codes_out = out.dtype == torch.int8
    qmin, qmax = int_range(out_bits) if codes_out else (0, 0)
    k_fp = 0 if weight_fp is None else weight_fp.shape[1]
    kernel, index = tuning.split(config) if config else tuning.pick(
        tuning.Case(m, n, a_columns, weight_bits, input_bits, len(ends), k_fp, column_sums is not None, codes_out, activation,
                    residual is not None, group_columns if multiplier is not None else 0), out.device.index)
    arguments = loader.Linear(
        a=codes.data_ptr(), lda=codes.stride(0) if m > 1 else round_up(codes.shape[1], 16), weight=weight.data_ptr(), m=m, n=n,
        k=k, a_columns=a_columns, a_bits=input_bits, weight_bits=weight_bits, segments=len(ends), segment_ends=ends,
        scale=scale.data_ptr(), column_sums=_pointer(column_sums), row_shift=_pointer(row_shift), bias=_pointer(bias),
        row_scale=_pointer(row_scale), a_fp=_pointer(codes_fp), lda_fp=0 if codes_fp is None else codes_fp.stride(0),
        weight_fp=_pointer(weight_fp), k_fp=k_fp, rows_per_group=out.shape[1] if grouped else m,
        residual=_matrix(residual, grouped), out=_matrix(out, grouped), activation=loader.ACTIVATIONS[activation],
        out_inverse=1.0 / out_scale, out_zero=out_zero_point, qmin=qmin, qmax=qmax,
        multiplier=_pointer(multiplier), group_zero=_pointer(group_zero), group_columns=group_columns, config=index)
    code = _launch(getattr(loader.library(), f"vitq_linear_{kernel}"), arguments, out.device)
    if code:
        loader.check("linear", code, f"M={m} N={n} K={a_columns}, W{weight_bits}A{input_bits}, {len(ends)} segments, "
                                     f"out {out.dtype}, activation {activation or 'none'}, {kernel}:{index}")


def _weight_only(out: Tensor, x: Tensor, weight: Tensor, scale: Tensor, *, zero: Tensor | None = None, bias: Tensor | None = None,
                 weight_bits: int = 4, group_columns: int, config: str = "") -> None:
    m, n, k = checks.weight_only(out, x, weight, scale, zero, bias, weight_bits, group_columns)
    if not m or not n:
        return
    if x.stride(0) % 8 and m > 1:
        refuse("weight_only", "x", f"of row stride {x.stride(0)}", "of a row stride that is a multiple of 8")
    if x.data_ptr() % 16:
        x = x.clone() if x.is_contiguous() else x.new_empty(m, x.stride(0))[:, :k].copy_(x)
    arguments = _weight_arguments(out, weight, scale, zero, weight_bits, group_columns, n, k)
    arguments.x, arguments.ldx, arguments.x_dtype = x.data_ptr(), x.stride(0) if m > 1 else round_up(k, 8), loader.DTYPES[x.dtype]
    arguments.m, arguments.bias = m, _pointer(bias)
    if config:
        kernel, arguments.config = tuning.split(config)
        if kernel != "few":
            refuse("weight_only", "config", repr(config), "of the kernel few")
    if code := _launch(loader.library().vitq_weight_only, arguments, out.device):
        loader.check("weight_only", code, f"M={m} N={n} K={k}, W{weight_bits}, groups of {group_columns}, {x.dtype}, out {out.dtype}")


def _dequantize(out: Tensor, weight: Tensor, scale: Tensor, *, zero: Tensor | None = None, weight_bits: int = 4, group_columns: int) -> None:
    checks.dequantize(out, weight, scale, zero, weight_bits, group_columns)
    if not out.numel():
        return
    arguments = _weight_arguments(out, weight, scale, zero, weight_bits, group_columns, *out.shape)
    if code := _launch(loader.library().vitq_dequantize, arguments, out.device):
        loader.check("dequantize", code, f"{list(out.shape)}, W{weight_bits}, groups of {group_columns}, {out.dtype}")


def _weight_arguments(out: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, weight_bits: int, group_columns: int,
                      n: int, k: int) -> loader.WeightOnly:
    return loader.WeightOnly(
        x_columns=k, weight=weight.data_ptr(), n=n, k=weight.shape[1] * (8 // weight_bits),
        weight_bits=weight_bits, scale=scale.data_ptr(), zero=_pointer(zero), scale_stride=scale.stride(0) if len(scale) > 1 else 0,
        group_columns=group_columns,
        out=out.data_ptr(), out_stride=out.stride(0), out_dtype=loader.DTYPES[out.dtype], config=-1)


def _attention(out: Tensor, q: Tensor, k: Tensor, v: Tensor, *, logit_scale: tuple[float, ...], v_scale: tuple[float, ...],
               q_zero: tuple[int, ...] = (0,), v_zero: tuple[int, ...] = (0,), p_bits: int = 8, bias: Tensor | None = None,
               mask: Tensor | None = None, window: tuple[int, ...] = (), pad: Tensor | None = None, out_scale: float = 1.0,
               out_zero_point: int = 0, out_bits: int = 8) -> None:
    checks.attention(out, q, k, v, (logit_scale, v_scale, q_zero, v_zero), bias, mask, window, pad, p_bits)
    batch, tokens, heads, dim = q.shape
    if not out.numel():
        return
    scales = max(map(len, (logit_scale, v_scale, q_zero, v_zero)))
    each = {name: (kind * scales)(*(tuple(values) * (scales // len(values)))) for name, kind, values in (
        ("logit_scale", c_float, logit_scale), ("v_scale", c_float, v_scale), ("q_zero", c_int32, q_zero), ("v_zero", c_int32, v_zero))}
    queries, keys = (window[2] * window[3],) * 2 if window else (tokens, k.shape[1])
    qmin, qmax = int_range(out_bits) if out.dtype == torch.int8 else (0, 0)
    height, width, window_h, window_w, shift_h, shift_w = window or (0,) * 6
    arguments = loader.Attention(
        q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), q_strides=q.stride()[:3], k_strides=k.stride()[:3],
        v_strides=v.stride()[:3], batch=batch, heads=heads, queries=queries, keys=keys, dim=dim, **each,
        scales=scales, p_bits=p_bits, bias=_pointer(bias),
        bias_head=0 if bias is None or bias.shape[0] == 1 else bias.stride(0), bias_row=0 if bias is None else bias.stride(1),
        mask=_pointer(mask), mask_window=0 if mask is None else mask.stride(0), mask_row=0 if mask is None else mask.stride(1),
        mask_windows=1 if mask is None else mask.shape[0], height=height, width=width, window_h=window_h, window_w=window_w,
        shift_h=shift_h, shift_w=shift_w, pad=_pointer(pad), out=out.data_ptr(), out_dtype=loader.DTYPES[out.dtype],
        out_scale=out_scale, out_zero=out_zero_point, qmin=qmin, qmax=qmax)
    code = _launch(loader.library().vitq_attention, arguments, out.device)
    if code:
        shape = f"{batch} x {queries} queries, {keys} keys, {heads} heads of {dim}, window {list(window)}"
        loader.check("attention", code, shape)


def _rows(out: Tensor, x: Tensor, *, residual: Tensor | None = None, sum: Tensor | None = None, norm: str = "",
          weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 0.0, order: Tensor | None = None,
          scale: float = 1.0, zero_point: int = 0, bits: int = 8, row_scale: Tensor | None = None, row_shift: Tensor | None = None,
          fp_order: Tensor | None = None, fp_out: Tensor | None = None, counted: Tensor | None = None,
          starts: Tensor | None = None, merge: bool = False) -> None:
    m, columns, out_columns = checks.rows(out, x, residual, sum, norm, weight, bias, order, scale, bits, row_scale, row_shift,
                                          fp_order, fp_out, counted, starts, merge)
    if not m or not columns:
        if row_scale is not None:
            row_scale.fill_(RANGE_MIN / int_range(bits)[1])
        return
    if merge:
        rows, rows_per_group = loader.Matrix(x.data_ptr(), columns // 4, 0, loader.DTYPES[x.dtype]), m
        other = total = loader.Matrix()
    else:
        grouped = x.ndim >= 3
        views = [None if t is None else _three(t, "rows") if grouped else t for t in (x, residual, sum)]
        rows, other, total = (_matrix(t, grouped) for t in views)
        rows_per_group = views[0].shape[1] if grouped else m
    coded = out.dtype in (torch.int8, torch.uint8)
    qmin, qmax = int_range(bits) if coded else (0, 0)
    arguments = loader.Rows(
        x=rows, rows_per_group=rows_per_group, m=m, columns=columns, merge_height=x.shape[-3] if merge else 0,
        merge_width=x.shape[-2] if merge else 0, residual=other, sum=total, norm=loader.NORMS[norm], weight=_pointer(weight),
        bias=_pointer(bias), eps=eps, order=_pointer(order), out_columns=out_columns, counted=_pointer(counted), starts=_pointer(starts),
        out=out.data_ptr(),
        out_stride=out.stride(-2) if out.ndim > 1 and m > 1 else out.shape[-1], out_dtype=loader.DTYPES[out.dtype],
        scale=scale, zero=zero_point, qmin=qmin, qmax=qmax, row_scale=_pointer(row_scale), row_shift=_pointer(row_shift),
        fp_order=_pointer(fp_order),
        fp_columns=0 if fp_order is None else fp_order.numel(), fp_out=_pointer(fp_out))
    code = _launch(loader.library().vitq_rows, arguments, out.device)
    if code:
        loader.check("rows", code, f"{m} rows of {columns} {x.dtype}, norm {norm or 'none'}, out {out.dtype}")


def _transformed_rows(out: Tensor, x: Tensor, row_scale: Tensor, *, row_shift: Tensor | None = None, gate: str = "", norm: str = "",
                      weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 0.0, left: Tensor | None = None,
                      right: Tensor | None = None, left_size: int = 0, right_size: int = 0, clip: Tensor | None = None, bits: int = 8,
                      fragments: bool = False) -> None:
    m, columns = checks.transformed_rows(out, x, row_scale, row_shift, gate, norm, weight, bias, left, right, left_size, right_size, clip, bits)
    if not m:
        return
    qmin, qmax = int_range(bits)
    arguments = loader.TransformedRows(
        x=x.data_ptr(), x_stride=x.stride(0) if m > 1 else 0, x_dtype=loader.DTYPES[x.dtype], m=m, columns=columns, gate=loader.GATES[gate],
        norm=loader.NORMS[norm], weight=_pointer(weight), bias=_pointer(bias), eps=eps, left=_pointer(left), right=_pointer(right),
        left_size=left_size, right_size=right_size, clip=_pointer(clip), qmin=qmin, qmax=qmax, out=out.data_ptr(),
        out_stride=out.stride(0) if m > 1 else 0, row_scale=row_scale.data_ptr(), row_shift=_pointer(row_shift), fragments=fragments)
    if code := _launch(loader.library().vitq_transformed_rows, arguments, out.device):
        loader.check("transformed_rows", code, f"{m} rows of {columns} {x.dtype}, gate {gate or 'none'}, norm {norm or 'none'}, "
                                               f"matrices of {left_size or 'no'} and {right_size or 'no'} numbers")


def _patches(out: Tensor, images: Tensor, patch_h: int, patch_w: int, scale: float, zero_point: int, bits: int) -> None:
    checks.patches(out, images, patch_h, patch_w, scale)
    if not out.numel():
        return
    batch, channels, height, width = images.shape
    qmin, qmax = int_range(bits)
    arguments = loader.Patches(
        images=images.data_ptr(), dtype=loader.DTYPES[images.dtype], batch=batch, channels=channels, height=height, width=width,
        patch_h=patch_h, patch_w=patch_w, scale=scale, zero=zero_point, qmin=qmin, qmax=qmax, out=out.data_ptr(),
        out_stride=out.stride(0))
    code = _launch(loader.library().vitq_patches, arguments, out.device)
    if code:
        loader.check("patches", code, f"images {list(images.shape)}, patches {patch_h} x {patch_w}")


def _widen_int4(out: Tensor, packed: Tensor, multiplier: Tensor | None = None, zero: Tensor | None = None,
                group: Tensor | None = None) -> None:
    checks.widen_int4(out, packed, multiplier, zero, group)
    if not out.numel():
        return
    rows, k = out.shape
    function = loader.library().vitq_widen_int4
    with _guard(out.device):
        code = function(packed.data_ptr(), _pointer(multiplier), _pointer(zero), _pointer(group), 0 if multiplier is None else len(multiplier),
                        out.data_ptr(), rows, k, _stream(out.device))
    if code:
        loader.check("widen_int4", code, f"{rows} x {k}")


def _append_rows(keys: Tensor, values: Tensor, state: Tensor, k: Tensor, v: Tensor, *, key_bits: int = 16, key_symmetric: bool = True,
                 value_bits: int = 16, value_symmetric: bool = True, key_clip: Tensor | None = None, value_clip: Tensor | None = None,
                 cos: Tensor | None = None, sin: Tensor | None = None, right: Tensor | None = None, q: Tensor | None = None,
                 inverse: Tensor | None = None, q_out: Tensor | None = None, k_out: Tensor | None = None, v_out: Tensor | None = None,
                 out_before: bool = False, out_turned: bool = False, advance: bool = True) -> None:
    batch, heads, tokens, dim = checks.append_rows(keys, values, state, k, v, key_bits, key_symmetric, value_bits, value_symmetric, key_clip, value_clip,
                                                   cos, sin, right, q, inverse, q_out, k_out, v_out, out_before, out_turned)
    if not batch * heads * tokens:
        return
    nothing = (0, 0, 0)
    arguments = loader.AppendRows(
        keys=_cache_rows(keys, key_bits, key_symmetric), values=_cache_rows(values, value_bits, value_symmetric), state=state.data_ptr(),
        k=k.data_ptr(), v=v.data_ptr(), q=_pointer(q), k_strides=k.stride()[:3], v_strides=v.stride()[:3],
        q_strides=nothing if q is None else q.stride()[:3], dtype=loader.DTYPES[k.dtype], batch=batch, query_heads=0 if q is None else q.shape[1],
        heads=heads, tokens=tokens, dim=dim, room=keys.shape[2], key_clip=_pointer(key_clip), value_clip=_pointer(value_clip),
        cos=_pointer(cos), sin=_pointer(sin), rotary_strides=(0, 0) if cos is None else (cos.stride(0) if len(cos) > 1 else 0, cos.stride(1)),
        right=_pointer(right), inverse=_pointer(inverse), q_out=_pointer(q_out), k_out=_pointer(k_out), v_out=_pointer(v_out),
        out_before=out_before, out_turned=out_turned, advance=advance)
    if code := _launch(loader.library().vitq_append_rows, arguments, keys.device):
        loader.check("append_rows", code, f"{batch} x {heads} heads x {tokens} tokens of {dim} {k.dtype}, K{key_bits} V{value_bits}")


def _cached_attention(out: Tensor, q: Tensor, keys: Tensor, values: Tensor, state: Tensor, *, key_bits: int = 16, key_symmetric: bool = True,
                      value_bits: int = 16, value_symmetric: bool = True, mask: Tensor | None = None, scale: float = 1.0, window: int = 0,
                      workspace: Tensor | None = None) -> None:
    batch, heads, query_heads, tokens, dim = checks.cached_attention(out, q, keys, values, state, key_bits, key_symmetric, value_bits, value_symmetric,
                                                                     mask, window, workspace)
    if not out.numel():
        return
    arguments = loader.CachedAttention(
        keys=_cache_rows(keys, key_bits, key_symmetric), values=_cache_rows(values, value_bits, value_symmetric), state=state.data_ptr(),
        q=q.data_ptr(), q_strides=q.stride()[:3], dtype=loader.DTYPES[q.dtype], batch=batch, query_heads=query_heads, heads=heads, tokens=tokens,
        dim=dim, room=keys.shape[2], mask=_pointer(mask), mask_batch=0 if mask is None or len(mask) == 1 else mask.stride(0),
        mask_row=0 if mask is None else mask.stride(1), scale=scale, window=window, out=out.data_ptr(), out_strides=out.stride()[:3],
        workspace=_pointer(workspace), splits=1 if workspace is None else workspace.shape[1])
    if code := _launch(loader.library().vitq_cached_attention, arguments, out.device):
        loader.check("cached_attention", code, f"{batch} x {query_heads} heads of {dim}, {tokens} tokens, {heads} heads x {keys.shape[2]} rows, "
                                               f"K{key_bits} V{value_bits}, {q.dtype}")


def _cache_rows(rows: Tensor, bits: int, symmetric: bool) -> loader.CacheRows:
    return loader.CacheRows(rows.data_ptr(), tuple(s * rows.element_size() for s in rows.stride()[:3]), bits, symmetric)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _matrix(tensor: Tensor | None, grouped: bool) -> loader.Matrix:
    if tensor is None:
        return loader.Matrix()
    strides = tensor.stride()
    return loader.Matrix(tensor.data_ptr(), strides[-2] if len(strides) > 1 else 0, strides[0] if grouped else 0,
                         loader.DTYPES[tensor.dtype])


def _three(x: Tensor, op: str) -> Tensor:
    """[.., R, K] as [G, R, K], a view."""
    try:
        return x if x.ndim == 3 else x.view(-1, *x.shape[-2:])
    except RuntimeError:
        refuse(op, "x", f"{list(x.shape)} with strides {list(x.stride())}", "rows in evenly spaced groups")


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if _current_raw_stream is None else _current_raw_stream(device.index)


def _guard(device: torch.device) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)


def _launch(function: Any, arguments: Any, device: torch.device) -> int:
    if device.index == torch.cuda.current_device():
        return function(byref(arguments), _stream(device))
    with torch.cuda.device(device):
        return function(byref(arguments), _stream(device))


def _register() -> None:
    cuda = {"linear": _linear, "weight_only": _weight_only, "dequantize": _dequantize, "attention": _attention, "rows": _rows,
            "transformed_rows": _transformed_rows, "patches": _patches, "widen_int4": _widen_int4, "append_rows": _append_rows,
            "cached_attention": _cached_attention}
    for name, schema in SCHEMAS.items():
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
        _library.impl(name, cuda[name], "CUDA")
        _library.impl(name, getattr(reference, name), "CPU")
        torch.library.register_fake(f"vitq::{name}", lambda *args, **kwargs: None, lib=_library)


_register()
