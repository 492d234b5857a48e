"""quantize: float rows in, integer codes out, static per tensor or dynamic per row."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vitq.cpu import loader
from vitq.formats import ActivationFormat, QTensor, to_float16
from vitq.ops.dispatch import register
from vitq.quantizers import uniform


@register("quantize", "cpu")
class CpuQuantize:
    name = "c-quantize"

    def supports(self, spec: ActivationFormat) -> str | None:
        return why_not_in_one_pass(spec) or loader.why_unavailable()

    def pack(self, spec: ActivationFormat, device) -> tuple:
        return cpu_constants(spec)

    def run(self, packed: tuple, x: Tensor) -> QTensor:
        from vitq.cpu import kernels

        fmt, scale, zero_point, handed_on = packed
        codes, row_scale = kernels.quantize_rows(readable(x), scale, zero_point, fmt.qmin, fmt.qmax)
        return QTensor(ordered(codes, fmt), fmt.scale if row_scale is None else row_scale, handed_on)


@register("quantize", "reference")
class ReferenceQuantize:
    name = "torch"

    def supports(self, spec: ActivationFormat) -> str | None:
        return None

    def pack(self, spec: ActivationFormat, device) -> ActivationFormat:
        return on_device(spec, device)

    def run(self, packed: ActivationFormat, x: Tensor) -> QTensor:
        columns, x, fp = packed.columns, x.float(), None
        if packed.transform is not None:
            x = packed.transform.apply(x)
        if columns is not None:
            fp = None if columns.fp is None else to_float16(x[..., columns.fp.long()])
            if columns.order is not None:
                x = x[..., columns.order.clamp_min(0).long()].masked_fill(columns.order < 0, 0.0)
        if packed.dynamic and not packed.symmetric:
            return asymmetric(x, packed, fp)
        if packed.dynamic:
            codes, scale, zero_point = *uniform.quantize_per_token(x, packed.bits, clip=packed.clip), 0
        else:
            scale, zero_point = packed.scale, packed.zero_point
            codes = uniform.quantize(x, scale, zero_point, packed.bits)
        return QTensor(codes, scale, zero_point, fp=fp)


def asymmetric(x: Tensor, fmt: ActivationFormat, fp: Tensor | None) -> QTensor:
    """Dynamic asymmetric codes of x, float32 [..., K] in the order of the format's columns; those that hold no feature have code 0."""
    order = None if fmt.columns is None else fmt.columns.order
    if order is None or not bool((order < 0).any()):
        codes, scale, shift = uniform.quantize_per_token_asymmetric(x, fmt.bits, fmt.clip)
    else:
        there, codes = order >= 0, torch.zeros(x.shape, dtype=torch.int8, device=x.device)
        codes[..., there], scale, shift = uniform.quantize_per_token_asymmetric(x[..., there], fmt.bits, fmt.clip)
    return QTensor(codes, scale, 0, shift, fp)


def readable(x: Tensor) -> Tensor:
    """x as the C kernels read it: float32 or bfloat16, with a last dimension of unit stride."""
    if x.dtype == torch.float16:
        x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def on_device(fmt: ActivationFormat, device) -> ActivationFormat:
    columns = None if fmt.columns is None else fmt.columns.to(device)
    if fmt.dynamic:
        transform, clip = (None if value is None else value.to(device) for value in (fmt.transform, fmt.clip))
        return replace(fmt, columns=columns, transform=transform, clip=clip)
    return replace(fmt, scale=fmt.scale.to(device), zero_point=fmt.zero_point.to(device), columns=columns)


def why_not_in_one_pass(fmt: ActivationFormat) -> str | None:
    """The reason of kernels that write each feature's code and nothing else, after which `ordered` may reorder all of them."""
    columns = fmt.columns
    if fmt.transform is not None or fmt.clip is not None:
        return "it neither transforms rows nor clips their ranges"
    if not fmt.symmetric:
        return "it finds no shift for each row"
    if columns is not None and columns.fp is not None:
        return "it keeps no float16 columns"
    if columns is not None and columns.order is not None and bool((columns.order < 0).any()):
        return "it does not fill up columns"
    return None


def ordered(codes: Tensor, fmt: ActivationFormat) -> Tensor:
    """Codes [..., K] of the features in their order -> [..., K] in the order of the format's columns."""
    columns = fmt.columns
    return codes if columns is None or columns.order is None else codes.index_select(-1, columns.order)


def cpu_constants(fmt: ActivationFormat) -> tuple[ActivationFormat, float | None, int, int]:
    """Scale and zero point as the plain numbers that a C call takes, and the zero point of the uint8 codes it returns."""
    if fmt.dynamic:
        return fmt, None, 0, 128
    zero_point = int(fmt.zero_point)
    return fmt, float(fmt.scale), zero_point, zero_point + 128
