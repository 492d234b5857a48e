"""What the operators of `vitq.cuda.ops` take. Every refusal names the operator, the argument, what was given and what is
allowed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitq.cuda import loader
from vitq.cuda.layout import COLUMNS, round_up
from vitq.formats import int_range

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def refuse(op: str, argument: str, given: Any, allowed: str, error: type[Exception] = ValueError) -> None:
    raise error(f"vitq::{op}: {argument} is {given}; it must be {allowed}")


def linear(out, codes, weight, scale, bias, weight_bits, input_bits, row_scale, residual, column_sums, row_shift, segment_ends, codes_fp,
                 weight_fp, activation, out_bits, multiplier, group_zero, group_columns) -> tuple[int, int]:
    """M and N; ValueError or TypeError that names the argument."""
    if out.ndim not in (2, 3) or out.stride(-1) != 1 and out.shape[-1] > 1:
        refuse("linear", "out", f"{list(out.shape)} with strides {list(out.stride())}",
               "[M, N] or [G, R, N] with contiguous columns")
    n = out.shape[-1]
    m = out.shape[0] if out.ndim == 2 else out.shape[0] * out.shape[1]
    if out.dtype != torch.int8 and out.dtype not in FLOATS:
        refuse("linear", "out", out.dtype, "int8, float16, bfloat16 or float32", TypeError)
    for name, bits, tensor in (("weight", weight_bits, weight), ("codes", input_bits, codes)):
        if bits not in COLUMNS:
            refuse("linear", "weight_bits" if name == "weight" else "input_bits", bits, "8 or 4")
        if tensor.dtype != (torch.int8 if bits == 8 else torch.uint8):
            refuse("linear", name, tensor.dtype, "int8 with 8 bits, uint8 (two codes a byte) with 4", TypeError)
        if tensor.ndim != 2 or tensor.stride(1) != 1 and tensor.shape[1] > 1:
            refuse("linear", name, f"{list(tensor.shape)} with strides {list(tensor.stride())}",
                   "a matrix with contiguous columns")
    n_pad = round_up(n, 32)
    k, columns = weight.shape[1] * (8 // weight_bits), codes.shape[1] * (8 // input_bits)
    if codes.shape[0] != m:
        refuse("linear", "codes", f"of {codes.shape[0]} rows", f"of out's {m}")
    if weight.shape[0] != n_pad or k % COLUMNS[weight_bits] or columns > k or not weight.is_contiguous():
        refuse("linear", "weight", f"{list(weight.shape)}",
               f"as layout.pack_weight makes it for N={n} and at least {columns} columns")
    segments = len(segment_ends) or 1
    if segment_ends:
        inner = segment_ends[:-1]
        if segments > loader.MAX_SEGMENTS or any(e % 32 for e in inner) or list(segment_ends) != sorted(set(segment_ends)) or (
                segment_ends[0] <= 0 or segment_ends[-1] > k or segment_ends[-1] < columns):
            refuse("linear", "segment_ends", list(segment_ends),
                   f"up to {loader.MAX_SEGMENTS} ascending ends, multiples of 32 but for the last, beyond the {columns} columns")
    if scale.numel() != segments * n_pad:
        refuse("linear", "scale", list(scale.shape), f"[{segments}, {n_pad}]")
    if (column_sums is None) != (row_shift is None):
        refuse("linear", "row_shift" if column_sums is None else "column_sums", "given alone", "given with the other of column_sums and row_shift")
    if (codes_fp is None) != (weight_fp is None):
        refuse("linear", "codes_fp" if weight_fp is None else "weight_fp", "given alone", "given with the other of the two")
    if activation not in loader.ACTIVATIONS:
        refuse("linear", "activation", repr(activation), ", ".join(map(repr, loader.ACTIVATIONS)))
    f32 = torch.float32
    for name, tensor, dtype, size in (("scale", scale, f32, segments * n_pad), ("column_sums", column_sums, f32, n_pad),
                                      ("bias", bias, f32, n_pad), ("row_scale", row_scale, f32, m),
                                      ("row_shift", row_shift, f32, m)):
        if tensor is None:
            continue
        if tensor.dtype != dtype or tensor.numel() != size or not tensor.is_contiguous():
            refuse("linear", name, f"{tensor.dtype} {list(tensor.shape)}", f"contiguous {dtype} of {size} elements")
    if weight_fp is not None:
        shape = m, weight_fp.shape[1]
        if codes_fp.dtype != torch.float16 or codes_fp.ndim != 2 or codes_fp.shape != shape or codes_fp.stride(0) % 8:
            refuse("linear", "codes_fp", f"{codes_fp.dtype} {list(codes_fp.shape)}", f"float16 [{m}, {weight_fp.shape[1]}]")
        if weight_fp.dtype != torch.float16 or weight_fp.shape[0] != n_pad or shape[1] % 16 or not weight_fp.is_contiguous():
            refuse("linear", "weight_fp", f"{weight_fp.dtype} {list(weight_fp.shape)}", f"float16 [{n_pad}, a multiple of 16]")
    if residual is not None:
        if residual.dtype not in FLOATS or residual.shape != out.shape or residual.stride(-1) != 1 and n > 1:
            refuse("linear", "residual", f"{residual.dtype} {list(residual.shape)}",
                   f"float {list(out.shape)} with contiguous columns")
        if out.dtype == torch.int8:
            refuse("linear", "residual", "given", "left out where codes are written")
    int_range(out_bits)
    if multiplier is None and group_zero is not None:
        refuse("linear", "group_zero", "given without multiplier", "with it, or None")
    if multiplier is not None:
        if (weight_bits, input_bits) != (4, 8) or (m > loader.FEW_ROWS and group_columns % loader.PACKED_GROUP):
            refuse("linear", "multiplier", f"given with W{weight_bits}A{input_bits}, groups of {group_columns} and {m} rows",
                   f"with 4-bit weights, 8-bit inputs and, beyond {loader.FEW_ROWS} rows, groups of a multiple of {loader.PACKED_GROUP}: widen_int4 serves others")
        if segments > 1:
            refuse("linear", "multiplier", "given with segments", "without them")
        _groups("linear", columns, n_pad, group_columns, ("multiplier", multiplier, torch.int8), ("group_zero", group_zero, torch.int8))
    _same_device("linear", out, codes, weight, scale, bias, row_scale, residual, column_sums, row_shift, codes_fp, weight_fp, multiplier, group_zero)
    return m, n


def _groups(op: str, columns: int, n_pad: int, group_columns: int, *constants: tuple[str, Any, torch.dtype]) -> None:
    """Constants of groups of columns, [G, N'], rows alike far apart."""
    if group_columns < 32 or group_columns % 32:
        refuse(op, "group_columns", group_columns, "a multiple of 32")
    stride = constants[0][1].stride(0)
    for name, tensor, dtype in constants:
        if tensor is None:
            continue
        if tensor.dtype != dtype or tensor.ndim != 2 or tensor.stride(1) != 1 or (
                tensor.shape[0] * group_columns < columns or tensor.shape[1] != n_pad):
            refuse(op, name, f"{tensor.dtype} {list(tensor.shape)}",
                   f"{dtype} [{-(-columns // group_columns)} or more, {n_pad}] with contiguous columns")
        if len(tensor) > 1 and (tensor.stride(0) % 32 or tensor.stride(0) != (n_pad if op == "linear" else stride)):
            refuse(op, name, f"of row stride {tensor.stride(0)}", "contiguous" if op == "linear" else "of the others' row stride, a multiple of 32")


def weight_only(out, x, weight, scale, zero, bias, weight_bits, group_columns) -> tuple[int, int, int]:
    """M, N and K; ValueError or TypeError that names the argument."""
    if out.dtype not in FLOATS or out.ndim != 2 or out.stride(1) != 1 and out.shape[1] > 1:
        refuse("weight_only", "out", f"{out.dtype} {list(out.shape)}", "float [M, N] with contiguous columns", TypeError)
    m, n = out.shape
    if x.dtype not in (torch.float16, torch.bfloat16) or x.ndim != 2 or x.stride(1) != 1 and x.shape[1] > 1:
        refuse("weight_only", "x", f"{x.dtype} {list(x.shape)}", "float16 or bfloat16 [M, K] with contiguous columns", TypeError)
    if len(x) != m or m > loader.FEW_ROWS:
        refuse("weight_only", "x", f"of {len(x)} rows", f"of out's {m}, and up to {loader.FEW_ROWS}: dequantize serves more")
    _weight("weight_only", weight, weight_bits, n, x.shape[1])
    _groups("weight_only", x.shape[1], weight.shape[0], group_columns, ("scale", scale, torch.float32), ("zero", zero, torch.int8))
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != weight.shape[:1] or not bias.is_contiguous()):
        refuse("weight_only", "bias", f"{bias.dtype} {list(bias.shape)}", f"contiguous float32 [{weight.shape[0]}]")
    _same_device("weight_only", out, x, weight, scale, zero, bias)
    return m, n, x.shape[1]


def dequantize(out, weight, scale, zero, weight_bits, group_columns) -> None:
    """ValueError or TypeError that names the argument."""
    if out.dtype not in FLOATS or out.ndim != 2 or not out.is_contiguous():
        refuse("dequantize", "out", f"{out.dtype} {list(out.shape)}", "contiguous float [N, K]", TypeError)
    _weight("dequantize", weight, weight_bits, *out.shape)
    _groups("dequantize", out.shape[1], weight.shape[0], group_columns, ("scale", scale, torch.float32), ("zero", zero, torch.int8))
    _same_device("dequantize", out, weight, scale, zero)


def _weight(op: str, weight, bits: int, n: int, columns: int) -> None:
    if bits not in COLUMNS or weight.dtype != (torch.int8 if bits == 8 else torch.uint8):
        refuse(op, "weight, weight_bits", f"{weight.dtype}, {bits}", "int8 with 8 bits, uint8 (two codes a byte) with 4", TypeError)
    k = weight.shape[-1] * (8 // bits)
    if weight.ndim != 2 or weight.shape[0] != round_up(n, 32) or k % COLUMNS[bits] or columns > k or not weight.is_contiguous():
        refuse(op, "weight", f"{list(weight.shape)}", f"as layout.pack_weight makes it for N={n} and at least {columns} columns")


def attention(out, q, k, v, constants, bias, mask, window, pad, p_bits) -> None:
    """ValueError or TypeError that names the argument. constants: logit_scale, v_scale, q_zero and v_zero."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dtype != torch.int8 or tensor.ndim != 4 or tensor.stride(3) != 1 and tensor.shape[3] > 1:
            refuse("attention", name, f"{tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())}",
                   "int8 [B, tokens, H, D] with unit stride in D")
    batch, tokens, heads, dim = q.shape
    if k.shape != v.shape or (k.shape[0], *k.shape[2:]) != (batch, heads, dim):
        refuse("attention", "k, v", f"{list(k.shape)}, {list(v.shape)}", f"[{batch}, tokens, {heads}, {dim}] both, as q is")
    for name, values in zip(("logit_scale", "v_scale", "q_zero", "v_zero"), constants):
        if len(values) not in (1, heads):
            refuse("attention", name, f"{len(values)} numbers", f"one, or one for each of the {heads} heads")
    if out.dtype != torch.int8 and out.dtype not in FLOATS:
        refuse("attention", "out", out.dtype, "int8, float16, bfloat16 or float32", TypeError)
    if out.shape != (batch, tokens, heads * dim) or not out.is_contiguous():
        refuse("attention", "out", f"{list(out.shape)} with strides {list(out.stride())}",
               f"contiguous [{batch}, {tokens}, {heads * dim}]")
    if not 2 <= p_bits <= 8:
        refuse("attention", "p_bits", p_bits, "2 to 8")
    queries, keys = tokens, k.shape[1]
    if window:
        if len(window) != 6 or window[0] * window[1] != tokens or min(window[:4]) < 1 or min(window[4:]) < 0 or (
                window[4] >= window[2] or window[5] >= window[3]) or keys != tokens:
            refuse("attention", "window", list(window),
                   f"[height, width, window_h, window_w, shift_h, shift_w] of images of {tokens} tokens, shifts below the window")
        queries = keys = window[2] * window[3]
        if pad is None and (window[0] % window[2] or window[1] % window[3]):
            refuse("attention", "pad", None, "given where the image is not made of whole windows")
        if mask is not None:
            refuse("attention", "mask", "given", "left out with window, which masks what a shift brought together")
    for name, tensor, leading in (("bias", bias, (1, heads)), ("mask", mask, None)):
        if tensor is None:
            continue
        if tensor.dtype != torch.float32 or tensor.ndim != 3 or tensor.shape[1:] != (queries, keys) or (
                leading is not None and tensor.shape[0] not in leading) or tensor.stride(2) != 1 and keys > 1:
            refuse("attention", name, f"{tensor.dtype} {list(tensor.shape)}", f"float32 [{heads} or 1, {queries}, {keys}]"
                   if leading else f"float32 [windows, {queries}, {keys}]")
    if mask is not None and (not mask.shape[0] or batch % mask.shape[0]):
        refuse("attention", "mask", f"of {mask.shape[0]} windows", f"a divisor of the batch of {batch}")
    if pad is not None and (pad.dtype != torch.int8 or pad.shape != (3, heads, dim) or not pad.is_contiguous()):
        refuse("attention", "pad", f"{pad.dtype} {list(pad.shape)}", f"contiguous int8 [3, {heads}, {dim}]")
    _same_device("attention", out, q, k, v, bias, mask, pad)


def rows(out, x, residual, sum, norm, weight, bias, order, scale, bits, row_scale, row_shift, fp_order, fp_out,
         counted, starts, merge) -> tuple[int, int, int]:
    """Rows, features and code columns; ValueError or TypeError that names the argument."""
    if x.dtype not in FLOATS:
        refuse("rows", "x", x.dtype, "float16, bfloat16 or float32", TypeError)
    if out.dtype not in (torch.int8, torch.uint8, *FLOATS):
        refuse("rows", "out", out.dtype, "int8, uint8 (packed int4) or float", TypeError)
    if norm not in loader.NORMS:
        refuse("rows", "norm", repr(norm), ", ".join(map(repr, loader.NORMS)))
    if x.ndim < 1 or x.stride(-1) != 1 and x.shape[-1] > 1:
        refuse("rows", "x", f"{list(x.shape)} with strides {list(x.stride())}", "[.., K] with contiguous columns")
    columns, m = x.shape[-1], x.numel() // max(x.shape[-1], 1)
    if not columns:
        m = out.shape[:-1].numel()
    if merge:
        if x.ndim < 3 or not x.is_contiguous():
            refuse("rows", "x", f"{list(x.shape)} with strides {list(x.stride())}", "contiguous [.., H, W, C] for merge")
        if residual is not None or sum is not None:
            refuse("rows", "residual", "given", "left out with merge")
        columns, m = 4 * columns, x.shape[:-3].numel() * ((x.shape[-3] + 1) // 2) * ((x.shape[-2] + 1) // 2)
    out_columns = columns if order is None else order.numel()
    width = (out_columns + 1) // 2 if out.dtype == torch.uint8 else out_columns
    if out.ndim < 1 or out.shape[-1] != width or out.shape[:-1].numel() != m or not _even_rows(out):
        refuse("rows", "out", f"{list(out.shape)} with strides {list(out.stride())}",
               f"{m} evenly spaced rows of {width} elements")
    if out.dtype == torch.uint8 and bits > 4:
        refuse("rows", "bits", bits, "at most 4 where two codes share a byte")
    int_range(bits)
    if out.dtype in FLOATS and (not norm or order is not None or row_scale is not None):
        refuse("rows", "out", out.dtype, "int8 or uint8, or the float result of a norm without order and row_scale")
    if not 2.0**-100 <= scale <= 2.0**100:
        refuse("rows", "scale", scale, "2^-100 to 2^100")
    for name, tensor in (("residual", residual), ("sum", sum)):
        if tensor is None:
            continue
        if tensor.dtype not in FLOATS or tensor.shape != x.shape or tensor.stride(-1) != 1 and columns > 1:
            refuse("rows", name, f"{tensor.dtype} {list(tensor.shape)}", f"float {list(x.shape)} with contiguous columns")
    if row_shift is not None and (row_scale is None or not out_columns):
        refuse("rows", "row_shift", "given without row_scale, or without columns", "given with row_scale, for at least one column")
    if (counted is None) != (order is None or row_scale is None):
        refuse("rows", "counted", None if counted is None else "given", "given with order and row_scale, else left out")
    if starts is not None and counted is None:
        refuse("rows", "starts", "given without counted", "given with it, or left out")
    if (fp_order is None) != (fp_out is None):
        refuse("rows", "fp_order" if fp_out is None else "fp_out", "given alone", "given with the other of the two")
    f32, i32 = torch.float32, torch.int32
    for name, tensor, dtype, size in (("weight", weight, f32, columns), ("bias", bias, f32, columns),
                                      ("order", order, i32, out_columns), ("row_scale", row_scale, f32, m),
                                      ("row_shift", row_shift, f32, m), ("fp_order", fp_order, i32, None),
                                      ("counted", counted, torch.uint8, (columns + 7) // 8), ("starts", starts, i32, columns // 8),
                                      ("fp_out", fp_out, torch.float16, None if fp_order is None else m * fp_order.numel())):
        if tensor is None:
            continue
        if tensor.dtype != dtype or size is not None and tensor.numel() != size or not tensor.is_contiguous():
            refuse("rows", name, f"{tensor.dtype} {list(tensor.shape)}",
                   f"contiguous {dtype}" + ("" if size is None else f" of {size} elements"))
    _same_device("rows", out, x, residual, sum, weight, bias, order, row_scale, row_shift, fp_order, fp_out, counted, starts)
    return m, columns, out_columns


def transformed_rows(out, x, row_scale, row_shift, gate, norm, weight, bias, left, right, left_size, right_size, clip, bits) -> tuple[int, int]:
    """Rows and columns; ValueError or TypeError that names the argument."""
    op = "transformed_rows"
    if x.dtype not in FLOATS or x.ndim != 2 or x.stride(1) != 1 and x.shape[1] > 1:
        refuse(op, "x", f"{x.dtype} {list(x.shape)} with strides {list(x.stride())}",
               "float16, bfloat16 or float32 [M, K] with contiguous columns", TypeError)
    if gate not in loader.GATES:
        refuse(op, "gate", repr(gate), ", ".join(map(repr, loader.GATES)))
    if norm not in loader.NORMS or norm and gate:
        refuse(op, "norm", repr(norm) + " with a gate" * bool(gate), ", ".join(map(repr, loader.NORMS)) + ", '' with a gate")
    if bias is not None and norm != "layer_norm" or weight is not None and not norm:
        refuse(op, "weight, bias", f"given with norm {norm!r}", "those of a norm, of which 'rms_norm' has no bias")
    if gate and x.shape[1] % 2:
        refuse(op, "x", list(x.shape), "[M, 2 K] with a gate")
    m, columns = x.shape[0], x.shape[1] // (2 if gate else 1)
    if out.dtype != torch.int8 or out.shape != (m, columns) or out.stride(1) != 1 and columns > 1 or not columns:
        refuse(op, "out", f"{out.dtype} {list(out.shape)}", f"int8 [{m}, {columns}] with contiguous columns, at least one")
    int_range(bits)
    for name, matrix, size, step in (("left", left, left_size, 16), ("right", right, right_size, 32)):
        shape = (round_up(size, step) // 16, round_up(size, 16) // 16, 32, 8)
        if (matrix is None) != (size == 0) or not 0 <= size <= loader.TRANSFORM_SIZE or size and columns % size:
            refuse(op, f"{name}_size", size, f"up to {loader.TRANSFORM_SIZE}, a divisor of {columns}, or 0 without {name}")
        if matrix is not None and (matrix.dtype != torch.float16 or matrix.shape != shape or not matrix.is_contiguous()):
            refuse(op, name, f"{matrix.dtype} {list(matrix.shape)}", f"as layout.pack_transform makes it for {size} numbers: float16 {list(shape)}")
    if left is not None and right is not None and left_size * right_size != columns:
        refuse(op, "left_size, right_size", f"{left_size}, {right_size}", f"factors of {columns}")
    for name, tensor, size in (("row_scale", row_scale, m), ("row_shift", row_shift, m), ("weight", weight, columns), ("bias", bias, columns),
                               ("clip", clip, 2)):
        if tensor is not None and (tensor.dtype != torch.float32 or tensor.numel() != size or not tensor.is_contiguous()):
            refuse(op, name, f"{tensor.dtype} {list(tensor.shape)}", f"contiguous float32 of {size} elements")
    _same_device(op, out, x, row_scale, row_shift, weight, bias, left, right, clip)
    return m, columns


def patches(out, images, patch_h, patch_w, scale) -> None:
    """ValueError or TypeError that names the argument."""
    if images.dtype not in FLOATS or images.ndim != 4 or not images.is_contiguous():
        refuse("patches", "images", f"{images.dtype} {list(images.shape)}", "contiguous float [B, C, H, W]")
    if patch_h < 1 or patch_w < 1:
        refuse("patches", "patch_h, patch_w", (patch_h, patch_w), "1 or more")
    batch, channels, height, width = images.shape
    shape = (batch * (height // patch_h) * (width // patch_w), channels * patch_h * patch_w)
    if out.dtype != torch.int8 or out.shape != shape or out.stride(1) != 1 and shape[1] > 1:
        refuse("patches", "out", f"{out.dtype} {list(out.shape)}", f"int8 {list(shape)} with contiguous columns")
    if not scale > 0:
        refuse("patches", "scale", scale, "above 0")
    _same_device("patches", out, images)


def widen_int4(out, packed, multiplier, zero, group) -> None:
    """ValueError that names the argument."""
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] % 32 or not packed.is_contiguous():
        refuse("widen_int4", "packed", f"{packed.dtype} {list(packed.shape)}", "contiguous uint8 [N', K/2], K a multiple of 64")
    if out.dtype != torch.int8 or out.shape != (packed.shape[0], 2 * packed.shape[1]) or not out.is_contiguous():
        refuse("widen_int4", "out", f"{out.dtype} {list(out.shape)}",
               f"contiguous int8 [{packed.shape[0]}, {2 * packed.shape[1]}]")
    groups = 2 if multiplier is None or not 2 <= len(multiplier) <= 256 else len(multiplier)
    for name, tensor, dtype, shape in (("multiplier", multiplier, torch.int8, (groups, out.shape[0])),
                                       ("zero", zero, torch.int8, (groups, out.shape[0])), ("group", group, torch.uint8, (out.shape[1],))):
        if (multiplier is None) != (group is None):
            refuse("widen_int4", "multiplier and group", "one of them", "both or none")
        if zero is not None and multiplier is None:
            refuse("widen_int4", "zero", "given without multiplier", "with it, or None")
        if tensor is not None and (tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous()):
            refuse("widen_int4", name, f"{tensor.dtype} {list(tensor.shape)}", f"contiguous {str(dtype)[6:]} {list(shape)}")
    _same_device("widen_int4", out, packed, multiplier, zero, group)


def append_rows(keys, values, state, k, v, key_bits, key_symmetric, value_bits, value_symmetric, key_clip, value_clip, cos, sin, right, q, inverse,
                q_out, k_out, v_out, out_before, out_turned) -> tuple[int, int, int, int]:
    """B, G, T and D; ValueError or TypeError that names the argument."""
    if k.dtype not in FLOATS or k.ndim != 4 or k.stride(3) != 1:
        refuse("append_rows", "k", f"{k.dtype} {list(k.shape)} with strides {list(k.stride())}", "float [B, G, T, D] with unit stride in D", TypeError)
    batch, heads, tokens, dim = k.shape
    if dim % 4 or not 4 <= dim <= 256:
        refuse("append_rows", "k", f"of {dim} numbers a head", "of a multiple of 4, up to 256")
    _cache_rows("append_rows", "keys", keys, batch, heads, dim, key_bits, key_symmetric, k.dtype)
    _cache_rows("append_rows", "values", values, batch, heads, dim, value_bits, value_symmetric, k.dtype)
    _state("append_rows", state)
    if keys.shape[2] != values.shape[2] or tokens > keys.shape[2]:
        refuse("append_rows", "keys, values", f"of {keys.shape[2]} and {values.shape[2]} rows", f"of one number, {tokens} or more")
    if (q is None) != (q_out is None) or inverse is not None and q is None:
        refuse("append_rows", "q, q_out, inverse", "given in part", "q and q_out both or none, inverse with them")
    if out_turned and (out_before or k_out is None or right is None or inverse is None):
        refuse("append_rows", "out_turned", "given", "with k_out, right and inverse, and without out_before")
    if (cos is None) != (sin is None) or cos is not None and (cos.shape != sin.shape or cos.stride() != sin.stride()):
        refuse("append_rows", "cos, sin", "given in part, or not alike", "both of one shape and stride, or none")
    query_heads = 0 if q is None else q.shape[1]
    if query_heads % max(heads, 1):
        refuse("append_rows", "q", f"of {query_heads} heads", f"of a multiple of the {heads} of k")
    for name, tensor, shape in (("v", v, k.shape), ("q", q, (batch, query_heads, tokens, dim)), ("q_out", q_out, (batch, tokens, query_heads, dim)),
                                ("k_out", k_out, k.shape), ("v_out", v_out, k.shape),
                                ("cos", cos, (batch if cos is not None and len(cos) > 1 else 1, tokens, dim))):
        if tensor is not None and (tensor.dtype != k.dtype or tensor.shape != shape or tensor.stride(-1) != 1):
            refuse("append_rows", name, f"{tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())}",
                   f"{k.dtype} {list(shape)} with unit stride in the last")
    for name, tensor in (("q_out", q_out), ("k_out", k_out), ("v_out", v_out)):
        if tensor is not None and not tensor.is_contiguous():
            refuse("append_rows", name, f"of strides {list(tensor.stride())}", "contiguous")
    for name, tensor, dtype, shape in (("right", right, torch.float16, (dim, dim)), ("inverse", inverse, torch.float32, (dim, dim)),
                                       ("key_clip", key_clip, torch.float32, (2,)), ("value_clip", value_clip, torch.float32, (2,))):
        if tensor is not None and (tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous()):
            refuse("append_rows", name, f"{tensor.dtype} {list(tensor.shape)}", f"contiguous {dtype} {list(shape)}")
    if (right is not None or inverse is not None) and (dim % 8 or dim > loader.MOST_MIXED):
        refuse("append_rows", "right, inverse", f"given for heads of {dim}", f"for heads of a multiple of 8, up to {loader.MOST_MIXED}")
    _same_device("append_rows", keys, values, state, k, v, key_clip, value_clip, cos, sin, right, q, inverse, q_out, k_out, v_out)
    return batch, heads, tokens, dim


def cached_attention(out, q, keys, values, state, key_bits, key_symmetric, value_bits, value_symmetric, mask, window,
                     workspace) -> tuple[int, int, int, int, int]:
    """B, G, H, T and D; ValueError or TypeError that names the argument."""
    op = "cached_attention"
    if q.dtype not in (torch.float16, torch.bfloat16) or q.ndim != 4 or q.stride(3) != 1:
        refuse(op, "q", f"{q.dtype} {list(q.shape)} with strides {list(q.stride())}", "float16 or bfloat16 [B, H, T, D] with unit stride in D", TypeError)
    batch, query_heads, tokens, dim = q.shape
    if dim not in loader.CACHED_HEADS:
        refuse(op, "q", f"of {dim} numbers a head", f"of {', '.join(map(str, loader.CACHED_HEADS))}")
    heads, room = keys.shape[1:3] if keys.ndim == 4 else (0, 0)
    if not heads or query_heads % heads:
        refuse(op, "keys", list(keys.shape), f"[{batch}, a divisor of {query_heads}, N, bytes]")
    _cache_rows(op, "keys", keys, batch, heads, dim, key_bits, key_symmetric, q.dtype)
    _cache_rows(op, "values", values, batch, heads, dim, value_bits, value_symmetric, q.dtype)
    _state(op, state)
    if values.shape[2] != room or room % 16 or tokens > room:
        refuse(op, "keys, values", f"of {room} and {values.shape[2]} rows", f"of one number, a multiple of 16, {tokens} or more")
    if out.dtype != q.dtype or out.shape != (batch, tokens, query_heads, dim) or out.stride(3) != 1:
        refuse(op, "out", f"{out.dtype} {list(out.shape)}", f"{q.dtype} [{batch}, {tokens}, {query_heads}, {dim}] with unit stride in the last")
    if mask is not None and (mask.dtype != torch.bool or mask.ndim != 3 or mask.shape[0] not in (1, batch) or mask.shape[1] != tokens or
                             not tokens <= mask.shape[2] <= room or mask.stride(2) != 1):
        refuse(op, "mask", f"{mask.dtype} {list(mask.shape)}", f"bool [{batch} or 1, {tokens}, up to {room}] with unit stride in the last")
    if window < 0:
        refuse(op, "window", window, "0 for none, or a number of tokens")
    blocks = batch * heads * -(-query_heads // heads * tokens // 8)
    if workspace is not None:
        shape = (blocks, min(max(workspace.shape[1], 1), loader.MOST_SPLITS) if workspace.ndim == 4 else 1, 8, dim + 2)
        if workspace.dtype != torch.float32 or workspace.shape != shape or not workspace.is_contiguous():
            refuse(op, "workspace", f"{workspace.dtype} {list(workspace.shape)}",
                   f"contiguous float32 [{blocks}, 1 to {loader.MOST_SPLITS}, 8, {dim + 2}]")
    _same_device(op, out, q, keys, values, state, mask, workspace)
    return batch, heads, query_heads, tokens, dim


def _cache_rows(op: str, name: str, rows: Tensor, batch: int, heads: int, dim: int, bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    if bits != 16:
        int_range(bits)
    floats = bits == 16 and rows.dtype == dtype
    size = (dim if floats else dim * dtype.itemsize) if bits == 16 else (4 if symmetric else 8) + (dim // 2 if bits <= 4 else dim)
    if rows.dtype != torch.uint8 and not floats or rows.ndim != 4 or rows.shape != (batch, heads, rows.shape[2], size) or rows.stride(3) != 1 or any(
            s * rows.element_size() % 4 for s in rows.stride()[:3]):
        refuse(op, name, f"{rows.dtype} {list(rows.shape)} with strides {list(rows.stride())}",
               f"uint8{f' or {dtype}' if bits == 16 else ''} [{batch}, {heads}, N, {size}], rows by 4 bytes")


def _state(op: str, state: Tensor) -> None:
    if state.dtype != torch.int64 or state.shape != (2,) or not state.is_contiguous():
        refuse(op, "state", f"{state.dtype} {list(state.shape)}", "contiguous int64 [2]")


def _even_rows(x: Tensor) -> bool:
    """Whether the rows of [.., K] lie at one stride, columns contiguous."""
    if x.is_contiguous():
        return True
    strides, shape = x.stride(), x.shape
    return strides[-1] == 1 and all(shape[i] == 1 or strides[i] == strides[i + 1] * shape[i + 1] for i in range(x.ndim - 2))


def _same_device(op: str, out: Tensor, *others: Tensor | None) -> None:
    device = out.device
    for tensor in others:
        if tensor is not None and tensor.device != device:
            refuse(op, "an argument", f"on {tensor.device}", f"on out's device, {device}")
