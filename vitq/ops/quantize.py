"""quantize: float rows in, integer codes out, static per tensor or dynamic per row."""

from __future__ import annotations

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

        fmt, scale, zero_point = packed
        codes, row_scale = kernels.quantize_rows(x, scale, zero_point, fmt.qmin, fmt.qmax)
        return QTensor(codes, fmt.scale, fmt.zero_point + 128) if row_scale is None else QTensor(codes, row_scale, 128)


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


def on_device(fmt: ActivationFormat, device) -> ActivationFormat:
    if fmt.dynamic:
        return fmt
    return ActivationFormat(fmt.bits, scale=fmt.scale.to(device), zero_point=fmt.zero_point.to(device))


def cpu_constants(fmt: ActivationFormat) -> tuple[ActivationFormat, float | None, int]:
    """Scale and zero point as the plain numbers that a C call takes."""
    if fmt.dynamic:
        return fmt, None, 0
    return fmt, float(fmt.scale), int(fmt.zero_point)
