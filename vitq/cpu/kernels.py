"""The C kernels as functions of torch tensors.

Codes leave these functions as uint8 = signed code + 128, the form in which oneDNN's int8
linear takes its input; zero points and code ranges are given in signed units. All functions
run on `torch.get_num_threads()` threads and give the same bits for any number of them.

NaN inputs get the code `qmin`; infinities clamp. With per-row scales a row holding a NaN or
an infinity gets that as its scale, as `amax` does in torch, so it shows in the result.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vitq.cpu import loader

MAX_HEAD_DIM = 256  # the q.k sums stay below 2**24, exact in fp32
MAX_TOKENS = 32768  # the p.v sums stay below 2**31

_OFFSET = 128  # uint8 code - signed code
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}  # enum vitq_dtype in csrc/common.h


def layer_norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: float | None,
    zero_point: int,
    qmin: int,
    qmax: int,
) -> tuple[Tensor, Tensor | None]:
    """LayerNorm over the last dimension in float32, then quantization.

    `x` is float32 or bfloat16, `weight` and `bias` float32 or None. Returns uint8 codes of
    x's shape and, when `scale` is None, the float32 scale of each row [..., 1].
    """
    rows = _rows("x", x)
    columns = rows.shape[1]
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            _check_tensor(name, parameter, (torch.float32,))
            if parameter.shape != (columns,) or not parameter.is_contiguous():
                raise ValueError(f"{name} must be contiguous of shape ({columns},), got {tuple(parameter.shape)}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps must be finite and at least 0, got {eps}")
    c_scale = _check_grid(scale, zero_point, qmin, qmax)
    codes, scales = _outputs(x, scale)
    if rows.numel():
        arguments = loader.LayerNormArgs(
            x=rows.data_ptr(),
            rows=rows.shape[0],
            columns=columns,
            row_stride=rows.stride(0),
            dtype=_DTYPES[x.dtype],
            weight=_pointer(weight),
            bias=_pointer(bias),
            eps=eps,
            scale=c_scale,
            zero_point=zero_point + _OFFSET,
            lo=qmin + _OFFSET,
            hi=qmax + _OFFSET,
            codes=codes.data_ptr(),
            scales=_pointer(scales),
            threads=torch.get_num_threads(),
        )
        _call("vitq_cpu_layer_norm_quantize", arguments)
    return codes, scales


def quantize_rows(
    x: Tensor, scale: float | None, zero_point: int, qmin: int, qmax: int
) -> tuple[Tensor, Tensor | None]:
    """clamp(round(x / scale) + zero_point, qmin, qmax) in float32, ties to even.

    `x` is float32 or bfloat16. Returns uint8 codes of x's shape and, when `scale` is None,
    the float32 scale of each row [..., 1]: max(amax, RANGE_MIN) / qmax. Bit for bit what
    `vitq.quantizers.uniform` computes.
    """
    rows = _rows("x", x)
    c_scale = _check_grid(scale, zero_point, qmin, qmax)
    codes, scales = _outputs(x, scale)
    if rows.numel():
        arguments = loader.QuantizeArgs(
            x=rows.data_ptr(),
            rows=rows.shape[0],
            columns=rows.shape[1],
            row_stride=rows.stride(0),
            dtype=_DTYPES[x.dtype],
            scale=c_scale,
            zero_point=zero_point + _OFFSET,
            lo=qmin + _OFFSET,
            hi=qmax + _OFFSET,
            codes=codes.data_ptr(),
            scales=_pointer(scales),
            threads=torch.get_num_threads(),
        )
        _call("vitq_cpu_quantize_rows", arguments)
    return codes, scales


def attention_int8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    logit_scale: Sequence[float],
    v_scale: Sequence[float],
    q_zero: Sequence[int] = (0,),
    k_zero: Sequence[int] = (0,),
    v_zero: Sequence[int] = (0,),
    p_bits: int = 8,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    out_scale: float | None = None,
    out_zero_point: int = 0,
    out_qmin: int = -128,
    out_qmax: int = 127,
) -> Tensor:
    """softmax(logit_scale * (q - q_zero)(k - k_zero) + bias + mask) (v - v_zero) * v_scale, on int8 codes.

    Scales and zero points: one, or one a head. `q`, `k`, `v` are int8 of shape [B, N, H, D], any strides but a unit last one. The
    probabilities are rounded to codes of `p_bits` bits (2 to 8) relative to the largest of
    their row. `bias` is float32 [H, N, N]; `mask` is float32 [W, N, N] and batch entry b uses
    mask[b % W] (Swin's shifted windows). Either may hold -inf; a row without any key left
    gives zeros. Returns [B, N, H * D] in `out_dtype` (float32 or bfloat16), or uint8 codes
    when `out_scale` is given.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, tensor, (torch.int8,))
        if tensor.dim() != 4 or tensor.shape != q.shape:
            raise ValueError(f"{name} must be [B, N, H, D] like q {tuple(q.shape)}, got {tuple(tensor.shape)}")
        if tensor.shape[3] > 1 and tensor.stride(3) != 1:
            raise ValueError(f"{name}'s last dimension must be contiguous, its stride is {tensor.stride(3)}")
    batch, tokens, heads, dim = q.shape
    if not 1 <= dim <= MAX_HEAD_DIM:
        raise ValueError(f"q's last dimension (head size) must be 1 to {MAX_HEAD_DIM}, got {dim}")
    if not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(f"q's second dimension (tokens) must be 1 to {MAX_TOKENS}, got {tokens}")
    each = {"logit_scale": logit_scale, "v_scale": v_scale, "q_zero": q_zero, "k_zero": k_zero, "v_zero": v_zero}
    for name, values in each.items():
        if len(values) not in (1, heads):
            raise ValueError(f"{name} must be one number, or one for each of the {heads} heads, got {len(values)}")
        for value in values:
            if name.endswith("zero") and not -128 <= value <= 127:
                raise ValueError(f"{name} must be -128 to 127, got {value}")
            if name.endswith("scale") and not math.isfinite(ctypes.c_float(value).value):
                raise ValueError(f"{name} must be finite in float32, got {value}")
    if not 2 <= p_bits <= 8:
        raise ValueError(f"p_bits must be 2 to 8, got {p_bits}")
    _check_scores("bias", bias, heads, tokens)
    _check_scores("mask", mask, None, tokens)
    if mask is not None and batch % mask.shape[0]:
        raise ValueError(f"mask has {mask.shape[0]} windows, which does not divide the batch of {batch}")
    if out_scale is not None:
        out_dtype = torch.uint8
    elif out_dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"out_dtype must be torch.float32 or torch.bfloat16, got {out_dtype}")
    c_out_scale = 1.0 if out_scale is None else _check_grid(out_scale, out_zero_point, out_qmin, out_qmax, "out_")

    out = torch.empty(batch, tokens, heads * dim, dtype=out_dtype)
    if out.numel():
        constants = {name: ((ctypes.c_float if name.endswith("scale") else ctypes.c_int32) * heads)(*(list(values) * (heads // len(values))))
                     for name, values in each.items()}
        arguments = loader.AttentionArgs(
            batch=batch,
            tokens=tokens,
            heads=heads,
            dim=dim,
            q=q.data_ptr(),
            k=k.data_ptr(),
            v=v.data_ptr(),
            q_strides=q.stride()[:3],
            k_strides=k.stride()[:3],
            v_strides=v.stride()[:3],
            **{name: ctypes.addressof(array) for name, array in constants.items()},
            p_max=2**p_bits - 1,
            bias=_pointer(bias),
            bias_head_stride=0 if bias is None else bias.stride(0),
            mask=_pointer(mask),
            windows=1 if mask is None else mask.shape[0],
            out=out.data_ptr(),
            out_dtype=_DTYPES[out_dtype],
            out_scale=c_out_scale,
            out_zero_point=out_zero_point + _OFFSET,
            out_lo=out_qmin + _OFFSET,
            out_hi=out_qmax + _OFFSET,
            threads=torch.get_num_threads(),
        )
        _call("vitq_cpu_attention_int8", arguments)
    return out


def _call(name: str, arguments: ctypes.Structure) -> None:
    status = getattr(loader.library(), name)(ctypes.byref(arguments))
    if status == 2:  # VITQ_NO_MEMORY
        raise MemoryError(f"{name} could not allocate its scratch memory")
    if status != 0:
        raise RuntimeError(f"{name} refused its arguments (status {status})")


def _check_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must be {expected}, got {tensor.dtype}")
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise ValueError(f"{name} must be a dense CPU tensor, got {tensor.layout} on {tensor.device}")


def _rows(name: str, x: Tensor) -> Tensor:
    """x as [rows, columns], copied only when its leading strides allow no such view."""
    _check_tensor(name, x, (torch.float32, torch.bfloat16))
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"{name} must have a last dimension of at least 1, got shape {tuple(x.shape)}")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name}'s last dimension must be contiguous, its stride is {x.stride(-1)}")
    return x.detach().reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _check_grid(scale: float | None, zero_point: int, qmin: int, qmax: int, prefix: str = "") -> float:
    """Checks a grid; returns the float32 scale (1 for a dynamic one, which is not read)."""
    if not -128 <= qmin < qmax <= 127:
        raise ValueError(f"{prefix}qmin and {prefix}qmax must satisfy -128 <= qmin < qmax <= 127, got {qmin}, {qmax}")
    if not -128 <= zero_point <= 127:
        raise ValueError(f"{prefix}zero_point must be -128 to 127, got {zero_point}")
    if scale is None:
        if zero_point != 0 or qmax < 1:
            raise ValueError(f"per-row scales need zero_point 0 and a positive qmax, got {zero_point} and {qmax}")
        return 1.0
    c_scale = ctypes.c_float(scale).value
    if not (math.isfinite(c_scale) and c_scale > 0):
        raise ValueError(f"{prefix}scale must be positive and finite in float32, got {scale}")
    return c_scale


def _check_scores(name: str, scores: Tensor | None, leading: int | None, tokens: int) -> None:
    """bias [H, N, N] or mask [W, N, N]: each [N, N] slice contiguous."""
    if scores is None:
        return
    _check_tensor(name, scores, (torch.float32,))
    expected = f"[{'W' if leading is None else leading}, {tokens}, {tokens}]"
    if scores.dim() != 3 or scores.shape[0] < 1 or scores.shape[1:] != (tokens, tokens):
        raise ValueError(f"{name} must have shape {expected}, got {tuple(scores.shape)}")
    if leading is not None and scores.shape[0] != leading:
        raise ValueError(f"{name} must have shape {expected}, got {tuple(scores.shape)}")
    # only the bias has a stride of its own in C (it may be expanded over the heads)
    if not (scores.is_contiguous() if leading is None else scores[0].is_contiguous()):
        raise ValueError(f"{name} must be contiguous, its strides are {scores.stride()}")


def _outputs(x: Tensor, scale: float | None) -> tuple[Tensor, Tensor | None]:
    codes = torch.empty(x.shape, dtype=torch.uint8)
    scales = torch.empty(*x.shape[:-1], 1, dtype=torch.float32) if scale is None else None
    return codes, scales


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
