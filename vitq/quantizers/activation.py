"""Activations as their format has them, in float."""

from __future__ import annotations

from torch import Tensor

from vitq.formats import ActivationFormat
from vitq.quantizers.uniform import fake_quantize, fake_quantize_per_token


def fake_activation(x: Tensor, fmt: ActivationFormat) -> Tensor:
    """The numbers that the codes of x [..., K] stand for, float32, each feature in its place."""
    if fmt.dynamic:
        return fake_quantize_per_token(x, fmt.bits)
    return fake_quantize(x, fmt.scale.to(x.device), fmt.zero_point.to(x.device), fmt.bits)
