"""layer_norm: LayerNorm over the last dimension, float in and out, for norms whose result no integer layer reads alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitq.ops.dispatch import register


@dataclass(frozen=True)
class FloatNormSpec:
    """weight, bias: float32 [C]."""

    weight: Tensor
    bias: Tensor | None
    eps: float


@register("layer_norm", "reference")
class ReferenceFloatNorm:
    name = "torch"

    def supports(self, spec: FloatNormSpec) -> str | None:
        return None

    def pack(self, spec: FloatNormSpec, device) -> FloatNormSpec:
        return spec

    def run(self, packed: FloatNormSpec, x: Tensor, *, dtype: torch.dtype) -> Tensor:
        """Computed in float32, rounded once."""
        return F.layer_norm(x.float(), packed.weight.shape, packed.weight, packed.bias, packed.eps).to(dtype)
