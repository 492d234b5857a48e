"""quantize: float rows in, integer codes out, static per tensor or dynamic per row."""

from __future__ import annotations

import torch
from torch import Tensor

from vitq.cpu import loader
from vitq.formats import ActivationFormat, QTensor
from vitq.ops.dispatch import register
from vitq.quantizers import uniform


@register("quantize", "cpu")
class CpuQuantize:
    name = "c-quantize"

    def supports(self, spec: ActivationFormat) -> str | None:
        return loader.why_unavailable()

    def pack(self, spec: ActivationFormat, device) -> tuple:
        return cpu_constants(spec)

    def run(self, packed: tuple, x: Tensor) -> QTensor:
        from vitq.cpu import kernels

        fmt, scale, zero_point, handed_on = packed
        codes, row_scale = kernels.quantize_rows(readable(x), scale, zero_point, fmt.qmin, fmt.qmax)
        return QTensor(codes, fmt.scale if row_scale is None else row_scale, handed_on)


@register("quantize", "reference")
class ReferenceQuantize:
    name = "torch"

    def supports(self, spec: ActivationFormat) -> str | None:
        return None

    def pack(self, spec: ActivationFormat, device) -> ActivationFormat:
        return on_device(spec, device)

    def run(self, packed: ActivationFormat, x: Tensor) -> QTensor:
        if packed.dynamic:
            codes, scale = uniform.quantize_per_token(x.float(), packed.bits)
            return QTensor(codes, scale, 0)
        codes = uniform.quantize(x.float(), packed.scale, packed.zero_point, packed.bits)
        return QTensor(codes, packed.scale, packed.zero_point)


def readable(x: Tensor) -> Tensor:
    """x as the C kernels read it: float32 or bfloat16, with a last dimension of unit stride."""
    if x.dtype == torch.float16:
        x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def on_device(fmt: ActivationFormat, device) -> ActivationFormat:
    if fmt.dynamic:
        return fmt
    return ActivationFormat(fmt.bits, scale=fmt.scale.to(device), zero_point=fmt.zero_point.to(device))


def cpu_constants(fmt: ActivationFormat) -> tuple[ActivationFormat, float | None, int, int]:
    """Scale and zero point as the plain numbers that a C call takes, and the zero point of the uint8 codes it returns."""
    if fmt.dynamic:
        return fmt, None, 0, 128
    zero_point = int(fmt.zero_point)
    return fmt, float(fmt.scale), zero_point, zero_point + 128
