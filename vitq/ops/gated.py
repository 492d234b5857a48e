"""gated_quantize: act(gate)·up of rows [gate, up], the inner features of a gated MLP, quantized in the same pass."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vitq.formats import ActivationFormat, QTensor
from vitq.ops.common import activate
from vitq.ops.dispatch import register
from vitq.ops.quantize import CpuQuantize, ReferenceQuantize

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@dataclass(frozen=True)
class GatedSpec:
    """activation: of ACTIVATIONS; output: how the product is quantized."""

    activation: str
    output: ActivationFormat

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"GatedSpec: activation = {self.activation!r}; allowed: {', '.join(map(repr, ACTIVATIONS))}")


def gated(x: Tensor, activation: str) -> Tensor:
    """x [..., 2 K] -> act(x[..., :K])·x[..., K:]; the activation is computed in float32 and rounded to x's dtype, the product too."""
    if x.shape[-1] % 2:
        raise ValueError(f"gated: x has rows of {x.shape[-1]} numbers; give a gate and as many others")
    gate, up = x.chunk(2, -1)
    return activate(gate.float(), activation).to(x.dtype) * up


class GatedByQuantize:
    """torch for the product, the backend's own kernel for its codes."""

    quantize: ReferenceQuantize | CpuQuantize

    def supports(self, spec: GatedSpec) -> str | None:
        return self.quantize.supports(spec.output)

    def pack(self, spec: GatedSpec, device) -> tuple:
        return spec.activation, self.quantize.pack(spec.output, device)

    def run(self, packed: tuple, x: Tensor) -> QTensor:
        activation, constants = packed
        return self.quantize.run(constants, gated(x, activation))


@register("gated_quantize", "cpu")
class CpuGated(GatedByQuantize):
    name = "torch+c-quantize"
    quantize = CpuQuantize()


@register("gated_quantize", "reference")
class ReferenceGated(GatedByQuantize):
    name = "torch"
    quantize = ReferenceQuantize()
