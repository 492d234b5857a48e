"""What calibration hands to execution: for each layer the chosen formats and codes. A leaf: data only."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from vitq.formats import ActivationFormat
from vitq.recipe import LayerSpec, Recipe


@dataclass(frozen=True)
class LinearParams:
    """A linear layer in integers: y = Σ_k (qx − zx)·sx · qw·sw + b.

    codes: int8 [N, K], within the range of `weight_bits`; weight_scale: float32 [N], symmetric per output channel;
    bias: float32 [N] or None, without any zero-point term (kernels fold that in when they pack).
    """

    codes: Tensor
    weight_bits: int
    weight_scale: Tensor
    bias: Tensor | None
    input: ActivationFormat


@dataclass(frozen=True)
class AttentionParams:
    """q, k and v are static per tensor; probabilities are unsigned, each row scaled so that its maximum is the top code."""

    q: ActivationFormat
    k: ActivationFormat
    v: ActivationFormat
    p_bits: int


@dataclass
class Plan:
    """specs: what the recipe asks of every layer; layers: what was chosen for those it quantizes, and from how many images."""

    recipe: Recipe
    specs: dict[str, LayerSpec] = field(default_factory=dict)
    layers: dict[str, LinearParams | AttentionParams] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    samples: int = 0
