"""The public functional pipeline: quantize -> int_matmul -> dequantize, on any device.

    x = vitq.ops.quantize(activations, bits=8)                 # per token: x.scale is [..., 1]
    w = vitq.ops.quantize(weight, bits=8)                      # per output channel: w.scale is [N, 1]
    acc = vitq.ops.int_matmul(x, w)                            # int32 [..., N], exact
    y = vitq.ops.dequantize(acc, x.scale, w.scale, bias)       # float32 [..., N]

With codes that span each row's own range and some features left in float16 (QUIK), `kept` int32 [F] and `rest` the other features:

    x = vitq.ops.quantize(activations, bits=4, symmetric=False, kept=kept)
    w = vitq.ops.quantize(weight[:, rest], bits=4)
    acc = vitq.ops.int_matmul(x, w)
    y = vitq.ops.dequantize(acc, x.scale, w.scale, bias, shift=x.shift, weight=w, fp=x.fp, weight_fp=weight[:, kept])
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitq.formats import ActivationFormat, QTensor
from vitq.ops import dispatch
from vitq.ops.common import signed
from vitq.ops.linear import int_matmul as _reference_int_matmul
from vitq.ops.quantize import ReferenceQuantize  # noqa: F401  (registers the kernels)
from vitq.quantizers.outliers import kept_columns
import vitq.ops.attention  # noqa: F401
import vitq.ops.layer_norm  # noqa: F401


def quantize(x: Tensor, bits: int = 8, scale: float | Tensor | None = None, zero_point: int = 0,
             backend: str = "auto", *, symmetric: bool = True, kept: Tensor | None = None) -> QTensor:
    """float [..., K] -> int8 codes [..., K].

    scale None: one scale a row (the last dimension), found from the row, and unless symmetric a shift too: x ≈ codes·scale + shift. Else
    static per tensor: code = clamp(round(x / scale) + zero_point). kept: integers [F], features that become the result's `fp`, float16
    [..., F], at most ±65504, and have no codes: these are then [..., K - F], in the order of the others. Raises TypeError for what is not a float tensor, or integers,
    ValueError for bits outside 2..8, a scale that is not positive, a zero point outside the code range, features that are not among K or
    all of them, or a static format that is to be asymmetric by `symmetric`.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a float tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    columns = None
    if kept is not None:
        if not isinstance(kept, Tensor) or kept.is_floating_point() or kept.dtype == torch.bool or kept.ndim != 1:
            raise TypeError(f"kept must be a tensor of integers [F], got {f'{kept.dtype} {list(kept.shape)}' if isinstance(kept, Tensor) else type(kept).__name__}")
        if len(kept) and not 0 <= int(kept.min()) <= int(kept.max()) < x.shape[-1] or len(kept.unique()) != len(kept):
            raise ValueError(f"kept must be different integers among the {x.shape[-1]} features, got {kept.tolist()[:8]}")
        if len(kept) == x.shape[-1]:
            raise ValueError(f"kept names all {x.shape[-1]} features: then nothing is quantized")
        columns = kept_columns(kept, x.shape[-1])
    fmt = ActivationFormat(bits, dynamic=True, columns=columns, symmetric=symmetric) if scale is None else ActivationFormat(
        bits, scale=scale, zero_point=zero_point, columns=columns, symmetric=symmetric)
    choice = dispatch.choose("quantize", dispatch.check_backend(backend), fmt, x.device)
    q = choice.kernel.run(choice.kernel.pack(fmt, x.device), x)
    if q.codes.dtype == torch.uint8:
        q = QTensor(signed(q), q.scale, q.zero_point - 128)
    if kept is not None and q.fp.shape[-1] != len(kept):  # filled up to whole steps of a GEMM
        q = QTensor(q.codes, q.scale, q.zero_point, q.shift, q.fp[..., : len(kept)])
    return q


def int_matmul(x: QTensor | Tensor, weight: QTensor | Tensor) -> Tensor:
    """int8 codes x [..., M, K] times weight [N, K] transposed -> int32 [..., M, N], exactly.

    Zero points are not applied: acc − zx·Σ_k w is theirs to subtract (see `dequantize`).
    Raises TypeError for codes that are not int8 and ValueError if K differs.
    """
    a, b = (signed(t) if isinstance(t, QTensor) else t for t in (x, weight))
    if a.dtype != torch.int8 or b.dtype != torch.int8:
        raise TypeError(f"int_matmul takes int8 codes, got {a.dtype} and {b.dtype}")
    if b.ndim != 2 or a.shape[-1] != b.shape[1]:
        raise ValueError(f"int_matmul needs x [..., K] and weight [N, K], got {list(a.shape)} and {list(b.shape)}")
    rows = a.reshape(-1, a.shape[-1])
    # cuBLASLt's int8 GEMM takes multiples of 8 and more than 16 rows; its CPU twin takes anything.
    takes_all = rows.device.type == "cpu" and dispatch.cpu_int8_isa() is not None
    aligned = rows.device.type == "cuda" and rows.shape[0] > 16 and rows.shape[1] % 8 == 0 and b.shape[0] % 8 == 0
    acc = torch._int_mm(rows.contiguous(), b.t()) if takes_all or aligned else _reference_int_matmul(rows, b)
    return acc.view(*a.shape[:-1], b.shape[0])


def dequantize(acc: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None = None, *, zero_point: int = 0,
               weight: QTensor | Tensor | None = None, shift: Tensor | None = None, fp: Tensor | None = None,
               weight_fp: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """int32 [..., M, N] -> float: (acc − zero_point·Σ_k weight)·x_scale·weight_scale + shift·weight_scale·Σ_k weight + fp·weight_fpᵀ + bias,
    in float32, cast last.

    x_scale: [] or [..., M, 1]; weight_scale: [N] or [N, 1]. A zero point other than 0, or a shift [..., M, 1], needs `weight`, for its row
    sums. fp [..., M, F] and weight_fp [N, F]: the features that were not quantized.
    """
    if (zero_point or shift is not None) and weight is None:
        raise ValueError("a zero point or a shift needs weight=, whose row sums it multiplies")
    if (fp is None) != (weight_fp is None):
        raise ValueError("fp= and weight_fp= are the two sides of one product: give both or none")
    sums = None
    if weight is not None:
        sums = (signed(weight) if isinstance(weight, QTensor) else weight).sum(dim=1, dtype=torch.int32)
    if zero_point:
        acc = acc - zero_point * sums
    y = acc.float() * x_scale * weight_scale.reshape(-1)
    if shift is not None:
        y = y + shift * (weight_scale.reshape(-1) * sums)
    if fp is not None:
        y = y + fp.float() @ weight_fp.float().T
    return (y if bias is None else y + bias).to(dtype)
