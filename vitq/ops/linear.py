"""linear: integer GEMM with everything that follows it.

    y[m, n] = act( sx[m]·sw[n]·(Σ_k qx[m,k]·qw[n,k] − zx·Σ_k qw[n,k]) + shift[m]·Σ_k sw[n]·qw[n,k] + b[n] ) + residual[m, n]

then either cast to a float dtype or requantized to codes. Scaling is done in float32 from the int32 accumulators, by fused
multiply-adds with the constants that `fold` makes, the same on every backend:

    static:   y = fma(acc, scale, bias)          dynamic:  y = fma(acc·r, scale, bias), r the row's scale

Several segments continue the chain: y = bias, or where rows have shifts y = fma(shift, column_sums, bias); then for each segment
y = fma(acc_s·r, scale_s, y); then the float16 columns are added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vitq.cpu import loader
from vitq.formats import QTensor, int_range
from vitq.ops.common import OutputFormat, activate, fma32, requantize, signed, unsigned
from vitq.ops.dispatch import cpu_int8_isa, register
from vitq.plan import LinearParams


@dataclass(frozen=True)
class LinearSpec:
    """Constants of one linear layer. activation: gelu | gelu_tanh | relu | None; output: None for a float result."""

    params: LinearParams
    activation: str | None = None
    output: OutputFormat | None = None


class Constants(NamedTuple):
    """What follows the accumulators, on the weight's device: scale float32 [S, N]; column_sums float32 [N], what a row's shift
    is multiplied with, None where rows have none; bias float32 [N]. to_codes: the output format is in them, so the chain of
    fused multiply-adds gives codes that only need rounding."""

    scale: Tensor
    column_sums: Tensor | None
    bias: Tensor
    weight_fp: Tensor | None
    to_codes: bool


def fold(spec: LinearSpec) -> Constants:
    """A static input's scale goes into `scale`, its zero point into `bias`; and without an activation in between the output's
    scale and zero point into both. Products are formed in float64 and rounded once. ValueError for asymmetric weights without
    multipliers, whose codes less zero points no kernel multiplies."""
    params, output = spec.params, spec.output
    if params.weight_zero is not None and params.weight_multiplier is None:
        raise ValueError("zero points of weights need multipliers: without these they are for simulation")
    device, n = params.codes.device, params.codes.shape[0]
    ends = params.segment_ends
    scale = params.weight_scale.to(device, torch.float32).view(len(ends), n)
    bias = torch.zeros(n, dtype=torch.float64, device=device) if params.bias is None else params.bias.to(device, torch.float64)
    column_sums = None
    if not params.input.symmetric:
        column_sums = sum(codes.double() * s.double() for codes, s in zip(_sums(params), scale))
    if not params.input.dynamic:
        scale = scale * params.input.scale.to(device)
        zero_point = params.input.zero_point.to(device, torch.float64)
        for codes, s in zip(_sums(params), scale):
            bias = bias - zero_point * codes * s.double()
    bias, weight_fp = bias.float(), None if params.weight_fp is None else params.weight_fp.to(device)
    if output is None or spec.activation is not None:
        return Constants(scale, None if column_sums is None else column_sums.float(), bias, weight_fp, False)
    out_scale, out_zero = output.scale.to(device, torch.float64), output.zero_point.to(device, torch.float64)
    if weight_fp is not None:
        weight_fp = (weight_fp.double() / out_scale.expand(n)[:, None]).to(weight_fp.dtype)
    return Constants((scale.double() / out_scale).float(), None if column_sums is None else (column_sums / out_scale).float(),
                     (bias.double() / out_scale + out_zero).float(), weight_fp, True)


def _sums(params: LinearParams) -> list[Tensor]:
    """Of each segment's integers over its columns, int64 [N]."""
    ends = params.segment_ends
    return [params.integers[:, start:end].sum(dim=1, dtype=torch.int64) for start, end in zip((0, *ends), ends)]


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [.., M, K] · b [.., N, K]ᵀ of integer codes -> int32 [.., M, N], exactly.

    Through float64 BLAS, which is exact below 2^53 and far faster than torch's integer loops.
    """
    return (a.double() @ b.double().transpose(-2, -1)).to(torch.int32)


def check_float_only(output: OutputFormat | None, residual: Tensor | None, out: Tensor | None) -> None:
    """Raises ValueError for what only a float result can have, where codes are written."""
    for name, given in (("residual", residual), ("out", out)):
        if given is not None and output is not None:
            raise ValueError(f"linear: this layer writes codes, so it takes no {name}")


@register("linear", "reference")
class ReferenceLinear:
    name = "torch-int32"

    def supports(self, spec: LinearSpec) -> str | None:
        return None

    def pack(self, spec: LinearSpec, device) -> tuple:
        constants = [t.to(device) if isinstance(t, Tensor) else t for t in fold(spec)]
        return spec, spec.params.integers.to(device), Constants(*constants)

    def run(self, packed: tuple, x: QTensor, *, dtype: torch.dtype, residual: Tensor | None = None,
            inplace: bool = False, out: Tensor | None = None) -> Tensor | QTensor:
        """x: codes [.., K] -> [.., N] in `dtype`, or codes. residual: float [.., N], added last; inplace: it may be overwritten.
        out: float [.., N], any strides with contiguous columns, is filled and returned; it may be the residual."""
        spec, weight, constants = packed
        check_float_only(spec.output, residual, out)
        codes, y, start = signed(x), constants.bias, 0
        if constants.column_sums is not None:
            y = fma32(x.shift, constants.column_sums, y)
        for s, end in enumerate(spec.params.segment_ends):
            value = int_matmul(codes[..., start:end], weight[:, start:end]).float()
            y = fma32(value * x.scale if spec.params.input.dynamic else value, constants.scale[s], y)
            start = end
        if constants.weight_fp is not None:
            fp = x.fp[..., : constants.weight_fp.shape[1]]
            y = (y.double() + fp.double() @ constants.weight_fp.double().T).float()
        if constants.to_codes:
            rounded = torch.round(y).clamp(*int_range(spec.output.bits)).to(torch.int8)
            return QTensor(rounded, spec.output.scale.to(y.device), spec.output.zero_point.to(y.device))
        y = activate(y, spec.activation)
        if residual is not None:
            y = y + residual.float()
        if spec.output is not None:
            return requantize(y, spec.output)
        return y.to(dtype) if out is None else out.copy_(y)


class OneDnnWeights(NamedTuple):
    """What `OneDnnLinear.pack` makes, of the spec what runs alone: its codes would stay in memory. bias holds every folded constant; tail is the
    layer's own bias where the input is dynamic (added after the row scale); limits clamp codes of fewer than 8 bits, which oneDNN saturates to 8."""

    activation: str | None
    output: OutputFormat | None
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
        if spec.params.plain and spec.activation is not None and spec.output is not None and spec.output.scale.ndim:
            return "an activation before a per-column output format"
        return None

    def pack(self, spec: LinearSpec, device) -> OneDnnWeights | OneDnnSegments:
        params = spec.params
        if not params.plain:
            return _pack_segments(spec)
        n = params.codes.shape[0]
        sums = params.integers.sum(dim=1, dtype=torch.int64).double()
        scale = params.weight_scale.double()
        bias = torch.zeros(n, dtype=torch.float64) if params.bias is None else params.bias.double()
        out_scale, out_zero, tail, handed_on, limits = 1.0, 0, None, 0, None
        if spec.output is not None:
            shift, limits = _written(spec.output)
            handed_on = spec.output.zero_point + shift
        if params.input.dynamic:
            # The row scale multiplies after the GEMM, so only the shift is folded in here, and the bias is added last.
            tail = bias.float()
            bias = -128.0 * sums * scale
        else:
            scale = scale * params.input.scale.double()
            bias = bias - (int(params.input.zero_point) + 128) * sums * scale
            if spec.output is not None and spec.output.scale.ndim:  # per column: no activation can come in between
                scale, bias = scale / spec.output.scale.double(), bias / spec.output.scale.double()
                bias = bias + spec.output.zero_point.double()
            elif spec.output is not None:
                out_scale, out_zero = float(spec.output.scale), int(spec.output.zero_point) + shift
        weight = torch.ops.onednn.qlinear_prepack(params.integers.contiguous(), None)
        return OneDnnWeights(spec.activation, spec.output, weight, scale.float(), torch.zeros(n, dtype=torch.int32), bias.float(), out_scale,
                             out_zero, tail, handed_on, limits)

    def run(self, packed: OneDnnWeights | OneDnnSegments, x: QTensor, *, dtype: torch.dtype, residual: Tensor | None = None,
            inplace: bool = False, out: Tensor | None = None) -> Tensor | QTensor:
        check_float_only(packed.output, residual, out)
        segmented = isinstance(packed, OneDnnSegments)
        y = _run_segments(packed, x, dtype, residual) if segmented else self._run(packed, x, dtype, residual, inplace)
        return y if out is None else out.copy_(y)

    def _run(self, packed: OneDnnWeights, x: QTensor, dtype: torch.dtype, residual: Tensor | None,
             inplace: bool) -> Tensor | QTensor:
        activation, output, weight, scale, zeros, bias, out_scale, out_zero, tail, handed_on, limits = packed
        codes = unsigned(x)
        if tail is not None:
            return self._dynamic(packed, x, codes, dtype, residual)
        post, algorithm = _ONEDNN_ACTIVATIONS[activation]
        if output is not None:
            kind = torch.int8 if output.signed_only else torch.uint8
            y = torch.ops.onednn.qlinear_pointwise(codes, 1.0, 0, weight, scale, zeros, bias, out_scale, out_zero, kind,
                                                   post, [], algorithm)
            if limits is not None:
                y.clamp_(*limits)
            return QTensor(y, output.scale, handed_on)
        if dtype == torch.float16:  # which oneDNN does not write
            return self._run(packed, x, torch.float32, None if residual is None else residual.float(), False).to(dtype)
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
        y = activate(torch.addcmul(packed.tail, y, x.scale), packed.activation)
        if packed.output is not None:
            return requantize(y, packed.output)
        return (y if residual is None else y.add_(residual)).to(dtype)


class OneDnnSegments(NamedTuple):
    """What `_pack_segments` makes. parts: (start, end, weight, scale, bias) of each segment; the first one's bias holds all
    folded constants, or where the input is dynamic the shift to u8 alone. limits: see `OneDnnWeights`. weight_fp: float32 [N, F]."""

    activation: str | None
    output: OutputFormat | None
    dynamic: bool
    constants: Constants
    parts: list[tuple[int, int, Tensor, Tensor, Tensor]]
    zeros: Tensor
    limits: tuple[int, int] | None
    weight_fp: Tensor | None


def _written(output: OutputFormat) -> tuple[int, tuple[int, int] | None]:
    """What oneDNN adds to the signed codes that it writes, and the limits of codes of fewer than 8 bits, which it saturates to 8."""
    shift, (qmin, qmax) = 0 if output.signed_only else 128, int_range(output.bits)
    return shift, (qmin + shift, qmax + shift) if output.bits < 8 else None


def _pack_segments(spec: LinearSpec) -> OneDnnSegments:
    params, constants = spec.params, fold(spec)
    ends, parts = params.segment_ends, []
    shift, limits = _written(spec.output) if constants.to_codes and constants.weight_fp is None else (0, None)
    for scale, start, end in zip(constants.scale, (0, *ends), ends):
        codes = params.integers[:, start:end].contiguous()
        bias = -128.0 * codes.sum(dim=1, dtype=torch.int64).double() * scale.double()
        if not start and not params.input.dynamic:
            bias = bias + constants.bias.double() + shift
        parts.append((start, end, torch.ops.onednn.qlinear_prepack(codes, None), scale.contiguous(), bias.float()))
    weight_fp = None if constants.weight_fp is None else constants.weight_fp.float()
    zeros = torch.zeros(params.codes.shape[0], dtype=torch.int32)
    return OneDnnSegments(spec.activation, spec.output, params.input.dynamic, constants, parts, zeros, limits, weight_fp)


def _run_segments(packed: OneDnnSegments, x: QTensor, dtype: torch.dtype, residual: Tensor | None) -> Tensor | QTensor:
    """A GEMM for each segment, which adds to the float32 result of those before; without an activation or float16 columns the last one
    writes the codes. (All rows at once: chunks that stay in a core's cache took 1.3 to 1.6 times as long, since few rows suit oneDNN less.)"""
    activation, output, dynamic, constants, parts, zeros, limits, weight_fp = packed
    writes_codes = constants.to_codes and not dynamic and weight_fp is None
    codes, y = unsigned(x), None
    for start, end, weight, scale, bias in parts:
        kind = torch.float32
        if writes_codes and end == parts[-1][1]:
            kind = torch.int8 if output.signed_only else torch.uint8
        before = (codes[..., start:end].contiguous(), 1.0, 0, weight, scale, zeros)
        if y is None:
            y = torch.ops.onednn.qlinear_pointwise(*before, bias, 1.0, 0, kind, "none", [], "")
        else:
            y = torch.ops.onednn.qlinear_pointwise.binary(*before, y, bias, 1.0, 0, kind, 1.0, 0, "add", 1.0, "none", [], "")
    if writes_codes:
        y = y if limits is None else y.clamp_(*limits)
        return QTensor(y, output.scale, output.zero_point + (0 if output.signed_only else 128))
    if dynamic:
        y = torch.addcmul(constants.bias, y, x.scale)
    if constants.column_sums is not None:
        y = y.addcmul_(x.shift, constants.column_sums)
    if weight_fp is not None:
        fp = x.fp[..., : weight_fp.shape[1]].float()
        y.view(-1, y.shape[-1]).addmm_(fp.reshape(-1, fp.shape[-1]), weight_fp.T)
    if dynamic or weight_fp is not None:
        if constants.to_codes:
            return QTensor(torch.round(y).clamp_(*int_range(output.bits)).to(torch.int8), output.scale, output.zero_point)
    y = activate(y, activation)
    if output is None:
        return (y if residual is None else y.add_(residual)).to(dtype)
    if output.scale.ndim or output.signed_only or loader.why_unavailable():
        return requantize(y, output)
    from vitq.cpu import kernels

    codes, _ = kernels.quantize_rows(y, float(output.scale), int(output.zero_point), *int_range(output.bits))
    return QTensor(codes, output.scale, output.zero_point + 128)


_ONEDNN_ACTIVATIONS = {None: ("none", ""), "relu": ("relu", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}

