"""Round to nearest: choose each row's range, then round."""

from __future__ import annotations

from torch import Tensor

from vitq.quantizers.uniform import quantize, weight_range
from vitq.recipe import QuantSpec


def rtn(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """weight [N, K] float32 -> codes int8 [N, K] and scale float32 [N]. Raises ValueError on NaN or infinity."""
    scale, zero_point = weight_range(weight, spec)
    return quantize(weight, scale[:, None], zero_point[:, None], spec.bits), scale
