"""What calibration hands to execution: for each layer the chosen formats and codes. A leaf: data only."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vitq.formats import ActivationFormat, Kronecker
from vitq.recipe import LayerSpec, Recipe


@dataclass(frozen=True)
class LinearParams:
    """A linear layer in integers: y = Σ_s Σ_{k in s} ((qx − zx)·sx + shift) · qw·sw_s + Σ_f x_f·w_f + b.

    codes: int8 [N, K], within the range of `weight_bits`; weight_scale: float32 [N], per output channel;
    bias: float32 [N] or None, without any zero-point term (kernels fold that in when they pack).

    `input.columns` says which features the K columns hold and where their segments s end, K then counting columns, those
    of the value 0 too (their weights are 0). With S segments weight_scale is [S, N]. weight_fp: float16 [N, F], for the features kept in float16.

    Without segments columns may have groups: column_group, uint8 or int16 [K], is that of each. Up to 4 bits, with weight_multiplier int8
    [G, N], a grid of two levels: what is multiplied is (code − weight_zero) · multiplier, an int8 too, with zero points int32 [G, N], and
    weight_scale [N] is that of one step of the multiplier. Without multipliers weight_zero, int32 as weight_scale, is for simulation alone.

    input None: the layer reads floats, y = Σ_k x · (qw − zw)·sw + b, and with groups weight_scale and weight_zero are [G, N].
    """

    codes: Tensor
    weight_bits: int
    weight_scale: Tensor
    bias: Tensor | None
    input: ActivationFormat | None
    weight_zero: Tensor | None = None
    weight_fp: Tensor | None = None
    weight_multiplier: Tensor | None = None
    column_group: Tensor | None = None

    @property
    def integers(self) -> Tensor:
        """int8 [N, K]: what the input's codes are multiplied with."""
        if self.weight_multiplier is None:
            return self.codes
        group = self.column_group.long()
        codes = self.codes if self.weight_zero is None else self.codes - self.weight_zero[group].T
        return (codes * self.weight_multiplier[group].T).to(torch.int8)

    @property
    def segment_ends(self) -> tuple[int, ...]:
        """Where each segment of the K columns ends; one segment unless the input's columns say otherwise."""
        columns = self.input.columns
        return (self.codes.shape[1],) if columns is None or not columns.segment_ends else columns.segment_ends

    @property
    def plain(self) -> bool:
        """One segment of all features in order, rows without shifts: what every kernel takes."""
        return self.input.columns is None and self.input.symmetric


@dataclass(frozen=True)
class AttentionParams:
    """q, k and v are static, with one scale and zero point or one a head [H]; probabilities are unsigned, each row scaled so that its
    maximum is the top code. With p_log_scale, float32 [], they have log√2 levels below it, for simulation only."""

    q: ActivationFormat
    k: ActivationFormat
    v: ActivationFormat
    p_bits: int
    p_log_scale: Tensor | None = None


@dataclass(frozen=True)
class CacheParams:
    """Keys and values as they enter a cache: dynamic formats of a token's numbers in one head, None where they stay in float."""

    k: ActivationFormat | None
    v: ActivationFormat | None


@dataclass(frozen=True)
class InputParams:
    """What is done to an input that some layers share, beside rounding it: learned, or Hadamard's matrices. Of keys or values of a cache: transform and clip.

    divisor: float32 [K], what its channels are divided by where they are made; values: float32 [D, D], what the values of the attention before it are
    multiplied by, head by head; transform and clip: of its format; ratios: float32 [N, 2], N the outputs of all these layers, which parts of the least
    and of the largest weight of each are its range, or with `clamped` what weights beyond are set to before anything else. None for what is not done.
    """

    divisor: Tensor | None = None
    values: Tensor | None = None
    transform: Kronecker | None = None
    clip: Tensor | None = None
    ratios: Tensor | None = None
    clamped: bool = False


@dataclass
class Plan:
    """specs: what the recipe asks of every layer; layers: what was chosen for those it quantizes, and from how many images."""

    recipe: Recipe
    specs: dict[str, LayerSpec] = field(default_factory=dict)
    layers: dict[str, LinearParams | AttentionParams | CacheParams] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    samples: int = 0
