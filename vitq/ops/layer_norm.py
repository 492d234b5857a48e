"""layer_norm_quantize: LayerNorm over the last dimension, its result quantized in the same pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from vitq.cpu import loader
from vitq.formats import ActivationFormat, QTensor
from vitq.ops.dispatch import register
from vitq.ops.quantize import ReferenceQuantize, cpu_constants, on_device, readable


@dataclass(frozen=True)
class LayerNormSpec:
    """weight, bias: float32 [C] or None; output: how the result is quantized."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    output: ActivationFormat


@register("layer_norm_quantize", "cpu")
class CpuLayerNorm:
    name = "c-layer-norm"

    def supports(self, spec: LayerNormSpec) -> str | None:
        return loader.why_unavailable()

    def pack(self, spec: LayerNormSpec, device) -> tuple:
        return spec, *cpu_constants(spec.output)

    def run(self, packed: tuple, x: Tensor) -> QTensor:
        from vitq.cpu import kernels

        spec, fmt, scale, zero_point, handed_on = packed
        codes, row_scale = kernels.layer_norm_quantize(readable(x), spec.weight, spec.bias, spec.eps, scale, zero_point,
                                                       fmt.qmin, fmt.qmax)
        return QTensor(codes, fmt.scale if row_scale is None else row_scale, handed_on)


@register("layer_norm_quantize", "reference")
class ReferenceLayerNorm:
    name = "torch"

    def supports(self, spec: LayerNormSpec) -> str | None:
        return None

    def pack(self, spec: LayerNormSpec, device) -> LayerNormSpec:
        return LayerNormSpec(spec.weight, spec.bias, spec.eps, on_device(spec.output, device))

    def run(self, packed: LayerNormSpec, x: Tensor) -> QTensor:
        y = F.layer_norm(x.float(), x.shape[-1:], packed.weight, packed.bias, packed.eps)
        return ReferenceQuantize().run(packed.output, y)
