"""The compiled GEMM and attention of the CUDA backend, as `vitq.ops.dispatch` sees them: what they take, their constants,
outputs.

`run` is plain Python over tensors, so `torch.compile(fullgraph=True)`, `torch.export` and CUDA graphs take it. It calls
`torch.ops.vitq.*`, which also run on CPU tensors.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitq.cuda import loader, tuning
from vitq.cuda import ops as _ops  # noqa: F401  (registers torch.ops.vitq)
from vitq.cuda.layout import even_first, pack_weight, pad_columns, permute_rows, round_up, unit_columns, unpack_weight
from vitq.formats import QTensor
from vitq.ops.attention import AttentionSpec, why_not_static_int8
from vitq.ops.common import OutputFormat, even_groups, signed
from vitq.ops.dispatch import register
from vitq.ops.linear import Constants, LinearSpec, check_float_only, fold
from vitq.ops.windows import Windows

WIDEST_HEAD = 128  # of csrc/attention.cu
LONGEST_SUM = 1 << 17  # products of two codes that an int32 surely holds
# Codes are rounded by adding 1.5·2^23, which needs |value| < 2^22.
LARGEST_VALUE = 2.0**22


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """weight: `layout.pack_weight`; scale float32 [S, N'], column_sums and bias [N'], weight_fp fp16 [N', F']: see
    `vitq.ops.linear.fold`. Beyond widen_rows rows a 4-bit weight is widened to int8 before the GEMM, by its multipliers and zero points if it has
    any: int8 [G, N'] by `layout.even_first`, and uint8 [K'], which group a column is in; group_columns: where all are as wide."""

    weight: Tensor
    bits: int
    n: int
    k: int
    segment_ends: tuple[int, ...]
    scale: Tensor
    column_sums: Tensor | None
    bias: Tensor
    weight_fp: Tensor | None
    activation: str
    dynamic: bool
    output: OutputFormat | None
    out_scale: float
    out_zero_point: int
    widen_rows: int
    multiplier: Tensor | None
    group_zero: Tensor | None
    group: Tensor | None
    group_columns: int


@register("linear", "cuda")
class CutlassLinear:
    """Everything that follows the product runs in its epilogue. Weights of up to 4 bits stay packed in GPU memory."""

    @property
    def name(self) -> str:
        arch = "" if loader.why_unavailable() else f"sm{loader.kernel_arch(torch.cuda.current_device())}-"
        return f"cutlass-{arch}s8"

    def supports(self, spec: LinearSpec) -> str | None:
        return loader.why_unavailable() or why_not_linear(spec)

    def pack(self, spec: LinearSpec, device: torch.device) -> PackedLinear:
        params, output = spec.params, spec.output
        n, k = params.codes.shape
        bits = 4 if params.weight_bits <= 4 else 8
        constants = fold(spec)
        weight_fp = constants.weight_fp
        if weight_fp is not None:
            weight_fp = permute_rows(F.pad(weight_fp.half(), (0, -weight_fp.shape[1] % 16))).to(device)
        scalar = output is not None and not constants.to_codes
        packed = pack_weight((params.codes if bits == 4 else params.integers).detach(), bits).to(device)
        multiplier = group_zero = group = None
        group_columns = 0
        if bits == 4 and params.weight_multiplier is not None:
            levels = params.weight_multiplier, None if params.weight_zero is None else params.weight_zero.to(torch.int8)
            multiplier, group_zero = (None if t is None else even_first(t.expand(2, n) if len(t) == 1 else t).to(device) for t in levels)
            group = F.pad(params.column_group, (0, 2 * packed.shape[1] - k)).to(device)
            group_columns = even_groups(params.column_group, k) or 0
        ends = params.segment_ends
        return PackedLinear(
            weight=packed, bits=bits, n=n, k=k, segment_ends=ends if len(ends) > 1 else (),
            scale=pad_columns(constants.scale).to(device),
            column_sums=None if constants.column_sums is None else pad_columns(constants.column_sums).to(device),
            bias=pad_columns(constants.bias).to(device), weight_fp=weight_fp, activation=spec.activation or "",
            dynamic=params.input.dynamic, output=None if output is None else output.to(device),
            out_scale=float(output.scale) if scalar else 1.0, out_zero_point=int(output.zero_point) if scalar else 0,
            widen_rows=sys.maxsize if bits == 8 else tuning.widen_rows(packed.device, k, len(ends), None if group is None else group_columns),
            multiplier=multiplier, group_zero=group_zero, group=group, group_columns=group_columns)

    def unpack(self, packed: PackedLinear) -> Tensor:
        return unpack_weight(packed.weight, packed.bits, packed.n, packed.k)

    def run(self, packed: PackedLinear, x: QTensor, *, dtype: torch.dtype, residual: Tensor | None = None,
            inplace: bool = False, out: Tensor | None = None) -> Tensor | QTensor:
        output, codes, n = packed.output, signed(x), packed.n
        check_float_only(output, residual, out)
        if codes.shape[-1] != packed.k:
            raise ValueError(f"linear: the input has {codes.shape[-1]} features, the weight takes {packed.k}")
        shape = (*codes.shape[:-1], n)
        if out is not None:
            y = out
        elif inplace and residual is not None and (residual.dtype, residual.shape) == (dtype, shape) and residual.is_contiguous():
            y = residual
        elif output is None:
            y = torch.empty(shape, dtype=dtype, device=codes.device)
        else:  # rows at multiples of 16 bytes are what the next GEMM reads
            y = torch.empty((*shape[:-1], round_up(n, 16)), dtype=torch.int8, device=codes.device)[..., :n]
        codes = aligned(codes.reshape(-1, packed.k))
        m = codes.shape[0]
        flat, other = y, residual
        if residual is not None and residual.shape != shape:
            other = residual.expand(shape)
        if y.is_contiguous() and (other is None or other.is_contiguous()):
            flat, other = y.view(m, n), None if other is None else other.view(m, n)
        else:
            flat, other = groups(y), None if other is None else unit_columns(groups(other))
        weight, bits, multiplier, group_zero = packed.weight, packed.bits, packed.multiplier, packed.group_zero
        if m > packed.widen_rows:
            weight, bits = torch.empty((weight.shape[0], 2 * weight.shape[1]), dtype=torch.int8, device=weight.device), 8
            torch.ops.vitq.widen_int4(weight, packed.weight, multiplier, group_zero, packed.group)
            multiplier = group_zero = None
        shift = codes_fp = None
        if packed.column_sums is not None:
            shift = x.shift.reshape(m).contiguous()
        if packed.weight_fp is not None:
            codes_fp = x.fp.reshape(m, -1)
            if missing := packed.weight_fp.shape[1] - codes_fp.shape[1]:  # an F.pad by nothing would copy
                codes_fp = F.pad(codes_fp, (0, missing))
            codes_fp = codes_fp.contiguous()
        torch.ops.vitq.linear(
            flat, codes, weight, packed.scale, packed.bias, weight_bits=bits,
            row_scale=x.scale.reshape(m).contiguous() if packed.dynamic else None, residual=other, column_sums=packed.column_sums,
            row_shift=shift, segment_ends=packed.segment_ends, codes_fp=codes_fp, weight_fp=packed.weight_fp,
            activation=packed.activation, out_scale=packed.out_scale, out_zero_point=packed.out_zero_point,
            out_bits=8 if output is None else output.bits, multiplier=multiplier, group_zero=group_zero, group_columns=packed.group_columns)
        return y if output is None else QTensor(y, output.scale, output.zero_point)


def why_not_linear(spec: LinearSpec) -> str | None:
    """None where the kernels compute a case exactly as the reference does, else the reason."""
    params, output = spec.params, spec.output
    n, k = params.codes.shape
    if not n or not k:
        return f"the weight is empty ({n} x {k})"
    if k >= LONGEST_SUM:
        return f"{k} input features; sums of {LONGEST_SUM} products or more may leave int32"
    if spec.activation not in (None, "relu", "gelu", "gelu_tanh"):
        return f"activation {spec.activation!r} is not in its epilogue"
    if not params.input.signed:
        return "unsigned codes do not fit int8"
    if len(params.segment_ends) > loader.MAX_SEGMENTS:
        return f"{len(params.segment_ends)} segments, more than {loader.MAX_SEGMENTS}"
    if params.weight_multiplier is not None and len(params.weight_multiplier) > 2 and (reason := _why_not_groups(params.column_group)):
        return reason
    if output is None:
        return None
    if spec.activation is not None:
        return "an activation before a per-column output format" if output.scale.ndim else None
    if params.input.dynamic:
        return "codes of a dynamic input without an activation are not bounded when the weight is packed"
    if params.weight_fp is not None:
        return "codes of float16 columns without an activation are not bounded when the weight is packed"
    if (largest := largest_value(params.integers, params.segment_ends, fold(spec))) >= LARGEST_VALUE:
        return f"values before rounding reach {largest:.3g} codes; it rounds exactly below 2^22"
    return None


def _why_not_groups(group: Tensor) -> str | None:
    """The reason of the kernel that widens codes with more than two groups of columns: it asks once for 32 of them."""
    if group.dtype != torch.uint8:
        return "more than 256 groups of columns"
    steps = F.pad(group[None].float(), (0, -len(group) % 32), mode="replicate").view(-1, 32)
    return None if bool((steps == steps[:, :1]).all()) else "groups of columns that do not change at multiples of 32"


def largest_value(codes: Tensor, ends: tuple[int, ...], constants: Constants) -> float:
    """A bound on |y| for any input of 8-bit codes."""
    bound = constants.bias.double().abs()
    for s, (start, end) in enumerate(zip((0, *ends), ends)):
        bound = bound + 128.0 * codes[:, start:end].double().abs().sum(1) * constants.scale[s].double().abs()
    return float(bound.max())


def aligned(codes: Tensor) -> Tensor:
    """[M, K] with a row stride of whole 16 bytes, as TMA and 16-byte loads need: a copy where it is not. (Where rows start, the
    operator looks for itself: a trace knows no addresses.)"""
    if codes.stride(1) == 1 and codes.stride(0) % 16 == 0:
        return codes
    m, k = codes.shape
    rows = torch.empty((m, round_up(k, 16)), dtype=torch.int8, device=codes.device)[:, :k]
    return rows.copy_(codes)


def groups(x: Tensor) -> Tensor:
    """[.., R, N] as [G, R, N], a view where there is one; [N] and [R, N] as one group."""
    if x.ndim <= 2:
        return x.view(1, -1, x.shape[-1]) if x.ndim < 2 else x.unsqueeze(0)
    return x if x.ndim == 3 else x.flatten(0, -3)


@dataclass(frozen=True, eq=False)
class PackedAttention:
    """Keyword arguments of torch.ops.vitq.attention that the case fixes, and the output's format on the device."""

    constants: dict[str, list]  # logit_scale, v_scale, q_zero, v_zero: one of each, or one a head
    p_bits: int
    output: OutputFormat | None
    out_scale: float
    out_zero_point: int


@register("attention", "cuda")
class CudaAttention:
    """q·k, softmax and p·v of a whole sequence, or of each window of an image, in one kernel."""

    name = "cuda-attention-s8"

    def supports(self, spec: AttentionSpec) -> str | None:
        if why := why_not_static_int8(spec, WIDEST_HEAD):
            return why
        if any(f.scale.ndim for f in (spec.params.q, spec.params.k, spec.params.v)) and spec.num_heads > loader.MOST_HEADS:
            return f"scales of each of {spec.num_heads} heads; this kernel takes {loader.MOST_HEADS}"
        if spec.output is not None and spec.output.scale.ndim:
            return "its output takes one scale, not one a column"
        return loader.why_unavailable()

    def pack(self, spec: AttentionSpec, device: torch.device) -> PackedAttention:
        output, constants = spec.output, spec.constants()
        del constants["k_zero"]  # which cancels in the softmax
        return PackedAttention(
            constants, spec.params.p_bits, None if output is None else output.to(device),
            1.0 if output is None else float(output.scale), 0 if output is None else int(output.zero_point))

    def run(self, packed: PackedAttention, q: Tensor, k: Tensor, v: Tensor, *, dtype: torch.dtype, bias: Tensor | None = None,
            mask: Tensor | None = None, window: Windows | None = None, pad: Tensor | None = None) -> Tensor | QTensor:
        """As `vitq.ops.attention.CutsWindows.run` says."""
        b, n, h, d = q.shape
        output = packed.output
        y = torch.empty((b, n, h * d), dtype=dtype if output is None else torch.int8, device=q.device)
        q, k, v = (unit_columns(t) for t in (q, k, v))
        bias, mask = (None if t is None else unit_columns(t.float()) for t in (bias, mask))
        torch.ops.vitq.attention(
            y, q, k, v, **packed.constants, p_bits=packed.p_bits, bias=bias, mask=mask, window=[] if window is None else window.list(),
            pad=None if window is None or pad is None else pad.contiguous(), out_scale=packed.out_scale,
            out_zero_point=packed.out_zero_point, out_bits=8 if output is None else output.bits)
        return y if output is None else QTensor(y, output.scale, output.zero_point)
