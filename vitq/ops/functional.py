"""The public functional pipeline: quantize -> int_matmul -> dequantize, on any device.

    x = vitq.ops.quantize(activations, bits=8)                 # per token: x.scale is [..., 1]
    w = vitq.ops.quantize(weight, bits=8)                      # per output channel: w.scale is [N, 1]
    acc = vitq.ops.int_matmul(x, w)                            # int32 [..., N], exact
    y = vitq.ops.dequantize(acc, x.scale, w.scale, bias)       # float32 [..., N]
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitq.formats import ActivationFormat, QTensor
from vitq.ops import dispatch
from vitq.ops.common import signed
from vitq.ops.linear import int_matmul as _reference_int_matmul
from vitq.ops.quantize import ReferenceQuantize  # noqa: F401  (registers the kernels)
import vitq.ops.attention  # noqa: F401
import vitq.ops.layer_norm  # noqa: F401


def quantize(x: Tensor, bits: int = 8, scale: float | Tensor | None = None, zero_point: int = 0,
             backend: str = "auto") -> QTensor:
    """float [..., K] -> int8 codes [..., K].

    scale None: symmetric, one scale a row (the last dimension), found from the row. Else static per tensor:
    code = clamp(round(x / scale) + zero_point). Raises TypeError for what is not a float tensor, ValueError for bits
    outside 2..8, a scale that is not positive, or a zero point outside the code range.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a float tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    fmt = ActivationFormat(bits, dynamic=True) if scale is None else ActivationFormat(bits, scale=scale, zero_point=zero_point)
    choice = dispatch.choose("quantize", dispatch.check_backend(backend), fmt, x.device)
    q = choice.kernel.run(choice.kernel.pack(fmt, x.device), x)
    if q.codes.dtype == torch.uint8:
        q = QTensor(signed(q), q.scale, q.zero_point - 128)
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
               weight: QTensor | Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """int32 [..., M, N] -> float: (acc − zero_point·Σ_k weight)·x_scale·weight_scale + bias, in float32, cast last.

    x_scale: [] or [..., M, 1]; weight_scale: [N] or [N, 1]. A zero point other than 0 needs `weight`, for its row sums.
    """
    if zero_point:
        if weight is None:
            raise ValueError("a zero point needs weight=, whose row sums it multiplies")
        codes = signed(weight) if isinstance(weight, QTensor) else weight
        acc = acc - zero_point * codes.sum(dim=1, dtype=torch.int32)
    y = acc.float() * x_scale * weight_scale.reshape(-1)
    return (y if bias is None else y + bias).to(dtype)
