"""linear: integer GEMM with everything that follows it.

    y[m, n] = act( sx[m]·sw[n]·(Σ_k qx[m,k]·qw[n,k] − zx·Σ_k qw[n,k]) + b[n] ) + residual[m, n]

then either cast to a float dtype or requantized to codes. All scaling is done in float32 from the int32 accumulator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vitq.formats import QTensor, int_range
from vitq.ops.common import OutputFormat, activate, requantize, signed, unsigned
from vitq.ops.dispatch import cpu_int8_isa, register
from vitq.plan import LinearParams


@dataclass(frozen=True)
class LinearSpec:
    """Constants of one linear layer. activation: gelu | gelu_tanh | relu | None; output: None for a float result."""

    params: LinearParams
    activation: str | None = None
    output: OutputFormat | None = None


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [.., M, K] · b [.., N, K]ᵀ of integer codes -> int32 [.., M, N], exactly.

    Through float64 BLAS, which is exact below 2^53 and far faster than torch's integer loops.
    """
    return (a.double() @ b.double().transpose(-2, -1)).to(torch.int32)


@register("linear", "reference")
class ReferenceLinear:
    name = "torch-int32"

    def supports(self, spec: LinearSpec) -> str | None:
        return None

    def pack(self, spec: LinearSpec, device) -> tuple:
        codes = spec.params.codes.to(device)
        return spec, codes, codes.sum(dim=1, dtype=torch.int32)

    def run(self, packed: tuple, x: QTensor, *, dtype: torch.dtype, residual: Tensor | None = None,
            inplace: bool = False) -> Tensor | QTensor:
        spec, codes, row_sums = packed
        params = spec.params
        acc = int_matmul(signed(x), codes)
        if not params.input.dynamic:
            acc = acc - params.input.zero_point.to(acc.device) * row_sums
        y = acc.float() * (x.scale.to(acc.device) * params.weight_scale)
        if params.bias is not None:
            y = y + params.bias
        y = activate(y, spec.activation)
        if residual is not None:
            y = y + residual.float()
        return y.to(dtype) if spec.output is None else requantize(y, spec.output)


class OneDnnWeights(NamedTuple):
    """What `OneDnnLinear.pack` makes. bias holds every folded constant; tail is the layer's own bias where the input is
    dynamic (added after the row scale); limits clamp codes of fewer than 8 bits, which oneDNN saturates to 8."""

    spec: LinearSpec
    weight: Tensor
    scale: Tensor
    zeros: Tensor
    bias: Tensor
    out_scale: float
    out_zero: int
    tail: Tensor | None
    handed_on: Tensor | int
    limits: tuple[int, int] | None


@register("linear", "cpu")
class OneDnnLinear:
    """oneDNN through torch: u8 activations, s8 weights relaid out once. u8 because VNNI multiplies u8 by s8; signed
    codes shifted by 128 are unsigned, and the shift is one more constant in the bias."""

    name = "onednn-u8s8"

    def supports(self, spec: LinearSpec) -> str | None:
        if cpu_int8_isa() is None:
            return "this CPU has neither AMX nor AVX512-VNNI"
        if spec.activation is not None and spec.output is not None and spec.output.scale.ndim:
            return "an activation before a per-column output format"
        return None

    def pack(self, spec: LinearSpec, device) -> OneDnnWeights:
        params = spec.params
        n = params.codes.shape[0]
        row_sums = params.codes.sum(dim=1, dtype=torch.int64).double()
        scale = params.weight_scale.double()
        bias = torch.zeros(n, dtype=torch.float64) if params.bias is None else params.bias.double()
        out_scale, out_zero, tail, handed_on, limits = 1.0, 0, None, 0, None
        shift = 0 if spec.output is None or spec.output.signed_only else 128
        if spec.output is not None:
            handed_on = spec.output.zero_point + shift
            if spec.output.bits < 8:
                qmin, qmax = int_range(spec.output.bits)
                limits = qmin + shift, qmax + shift
        if params.input.dynamic:
            # The row scale multiplies after the GEMM, so only the shift is folded in here, and the bias is added last.
            tail = bias.float()
            bias = -128.0 * row_sums * scale
        else:
            scale = scale * params.input.scale.double()
            bias = bias - (int(params.input.zero_point) + 128) * row_sums * scale
            if spec.output is not None and spec.output.scale.ndim:  # per column: no activation can come in between
                scale, bias = scale / spec.output.scale.double(), bias / spec.output.scale.double()
                bias = bias + spec.output.zero_point.double()
            elif spec.output is not None:
                out_scale, out_zero = float(spec.output.scale), int(spec.output.zero_point) + shift
        weight = torch.ops.onednn.qlinear_prepack(params.codes.contiguous(), None)
        return OneDnnWeights(spec, weight, scale.float(), torch.zeros(n, dtype=torch.int32), bias.float(), out_scale, out_zero,
                             tail, handed_on, limits)

    def run(self, packed: OneDnnWeights, x: QTensor, *, dtype: torch.dtype, residual: Tensor | None = None,
            inplace: bool = False) -> Tensor | QTensor:
        spec, weight, scale, zeros, bias, out_scale, out_zero, tail, handed_on, limits = packed
        codes = unsigned(x)
        if tail is not None:
            return self._dynamic(packed, x, codes, dtype, residual)
        post, algorithm = _ONEDNN_ACTIVATIONS[spec.activation]
        if spec.output is not None:
            kind = torch.int8 if spec.output.signed_only else torch.uint8
            y = torch.ops.onednn.qlinear_pointwise(codes, 1.0, 0, weight, scale, zeros, bias, out_scale, out_zero, kind,
                                                   post, [], algorithm)
            if limits is not None:
                y.clamp_(*limits)
            return QTensor(y, spec.output.scale, handed_on)
        if dtype == torch.float16:  # which oneDNN does not write
            y = self.run(packed, x, dtype=torch.float32, residual=None if residual is None else residual.float())
            return y.to(dtype)
        if residual is None:
            return torch.ops.onednn.qlinear_pointwise(codes, 1.0, 0, weight, scale, zeros, bias, 1.0, 0, dtype, post, [],
                                                      algorithm)
        residual = residual.to(dtype).contiguous()
        return torch.ops.onednn.qlinear_pointwise.binary(codes, 1.0, 0, weight, scale, zeros, residual, bias, 1.0, 0,
                                                         dtype, 1.0, 0, "sum" if inplace else "add", 1.0, "none", [], "")

    def _dynamic(self, packed: OneDnnWeights, x: QTensor, codes: Tensor, dtype: torch.dtype,
                 residual: Tensor | None) -> Tensor | QTensor:
        y = torch.ops.onednn.qlinear_pointwise(codes, 1.0, 0, packed.weight, packed.scale, packed.zeros, packed.bias, 1.0, 0,
                                               torch.float32, "none", [], "")
        y = activate(torch.addcmul(packed.tail, y, x.scale), packed.spec.activation)
        if packed.spec.output is not None:
            return requantize(y, packed.spec.output)
        return (y if residual is None else y.add_(residual)).to(dtype)


_ONEDNN_ACTIVATIONS = {None: ("none", ""), "relu": ("relu", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}

