"""layer_norm_quantize: LayerNorm or RMSNorm over the last dimension, its result quantized in the same pass."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from vitq.cpu import loader
from vitq.formats import ActivationFormat, QTensor
from vitq.ops.dispatch import register
from vitq.ops.quantize import CpuQuantize, ReferenceQuantize, cpu_constants, on_device, ordered, readable, why_not_in_one_pass
from vitq.ops.windows import merge_patches


@dataclass(frozen=True)
class LayerNormSpec:
    """weight, bias: float32 [C] or None; output: how the result is quantized. merge: x is [B, H, W, C/4], H and W even, and
    `vitq.ops.windows.merge_patches` of it is what is normalised. rms: RMSNorm, which has no bias and takes no mean off."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    output: ActivationFormat
    merge: bool = False
    rms: bool = False

    def __post_init__(self) -> None:
        if self.rms and self.bias is not None:
            raise ValueError("LayerNormSpec: RMSNorm has no bias; leave it out, or rms")


@register("layer_norm_quantize", "cpu")
class CpuLayerNorm:
    name = "c-layer-norm"

    def supports(self, spec: LayerNormSpec) -> str | None:
        return ("it takes no RMSNorm" if spec.rms else None) or why_not_in_one_pass(spec.output) or loader.why_unavailable()

    def pack(self, spec: LayerNormSpec, device) -> tuple:
        return spec, *cpu_constants(spec.output)

    def run(self, packed: tuple, x: Tensor) -> QTensor:
        from vitq.cpu import kernels

        spec, fmt, scale, zero_point, handed_on = packed
        x = merge_patches(x) if spec.merge else x
        codes, row_scale = kernels.layer_norm_quantize(readable(x), spec.weight, spec.bias, spec.eps, scale, zero_point,
                                                       fmt.qmin, fmt.qmax)
        return QTensor(ordered(codes, fmt), fmt.scale if row_scale is None else row_scale, handed_on)


@register("layer_norm_quantize", "cpu")
class CpuRmsNorm:
    """torch for the norm, in float32, the C kernel for its codes."""

    name = "torch+c-quantize"

    def supports(self, spec: LayerNormSpec) -> str | None:
        return (None if spec.rms else "it takes RMSNorm alone") or CpuQuantize().supports(spec.output)

    def pack(self, spec: LayerNormSpec, device) -> tuple:
        return spec, CpuQuantize().pack(spec.output, device)

    def run(self, packed: tuple, x: Tensor) -> QTensor:
        spec, constants = packed
        x = merge_patches(x) if spec.merge else x
        return CpuQuantize().run(constants, F.rms_norm(x.float(), x.shape[-1:], spec.weight, spec.eps))


@register("layer_norm_quantize", "reference")
class ReferenceLayerNorm:
    name = "torch"

    def supports(self, spec: LayerNormSpec) -> str | None:
        return None

    def pack(self, spec: LayerNormSpec, device) -> LayerNormSpec:
        return replace(spec, output=on_device(spec.output, device))

    def run(self, packed: LayerNormSpec, x: Tensor) -> QTensor:
        x = merge_patches(x) if packed.merge else x
        norm = F.rms_norm if packed.rms else functools.partial(F.layer_norm, bias=packed.bias)
        y = norm(x.float(), x.shape[-1:], weight=packed.weight, eps=packed.eps)
        return ReferenceQuantize().run(packed.output, y)
