"""The grid of a weight: the scales that its codes are multiplied with, before a solver chooses the codes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitq.formats import int_range
from vitq.quantizers import dual_uniform
from vitq.quantizers.uniform import scale_and_zero, weight_range
from vitq.recipe import QuantSpec


@dataclass(frozen=True)
class Division:
    """How the input features of a weight are divided. sizes: features of each group, () for one group of all. scales: how the groups' are
    given: `segments`, ranges of columns with accumulators of their own; `multiples`, integer multiples of one; `floats`, where the input
    is in floating point."""

    sizes: tuple[int, ...] = ()
    scales: str = "segments"

    def group(self) -> Tensor:
        """[K]: the group of each feature where groups are neighbours, uint8 or where there are too many int16."""
        dtype = torch.uint8 if len(self.sizes) <= 256 else torch.int16
        return torch.cat([torch.full((size,), i, dtype=dtype) for i, size in enumerate(self.sizes)])

    @property
    def segmented(self) -> bool:
        return bool(self.sizes) and self.scales == "segments"

    @property
    def multiplied(self) -> bool:
        return bool(self.sizes) and self.scales == "multiples"


def divide(spec: QuantSpec, out_features: int, in_features: int, weight_only: bool = False) -> Division:
    """What ``spec`` makes of a weight [out_features, in_features]: the same for every weight of that size. weight_only: its input stays in
    floating point."""
    if spec.granularity == "per_group":
        whole, rest = divmod(in_features, spec.group_size)
        return Division((spec.group_size,) * whole + (rest,) * bool(rest), "floats" if weight_only else "multiples")
    outliers = dual_uniform.outlier_count(out_features, in_features) if spec.segments == "dual_uniform" else 0
    sizes = (outliers, in_features - outliers) if outliers else ()
    return Division(sizes, "multiples" if dual_uniform.shares_scale(spec.bits) else "segments")


@dataclass(frozen=True, eq=False)
class WeightGrid:
    """Of a weight [N, K]. scale: float32 [N], or [G, N] where the groups are segments or have scales in floating point; group: uint8 or int16
    [K], that of each column, None for one group. multiplier: int8 [G, N] where the groups' scales are its multiples of ``scale`` [N]. zero_point: int32
    [N], or [G, N], among the codes; None for a symmetric grid."""

    scale: Tensor
    group: Tensor | None = None
    multiplier: Tensor | None = None
    zero_point: Tensor | None = None

    def columns(self) -> Tensor:
        """The scale of each weight, float32 [N, K]; [N, 1] for one group."""
        if self.group is None:
            return self.scale[:, None]
        scale = self.scale if self.multiplier is None else self.scale * self.multiplier
        return scale[self.group.long()].T

    def zero_points(self) -> Tensor:
        """The zero point of each weight, int32, broadcasting as `columns`."""
        if self.zero_point is None:
            return torch.zeros(1, 1, dtype=torch.int32, device=self.scale.device)
        return self.zero_point[:, None] if self.group is None else self.zero_point[self.group.long()].T

    def limits(self, bits: int) -> tuple[Tensor, Tensor]:
        """The smallest and the largest code of each weight, float64, broadcasting to [N, K]: those of so many bits whose distance from the zero
        point, times the multiplier, is at most 127."""
        low, high = (torch.full((1, 1), float(code), dtype=torch.float64, device=self.scale.device) for code in int_range(bits))
        if self.multiplier is None:
            return low, high
        reach = torch.div(127, self.multiplier.int(), rounding_mode="floor")
        zero = torch.zeros_like(reach) if self.zero_point is None else self.zero_point
        lower, upper = torch.maximum(low, (zero - reach).double()), torch.minimum(high, (zero + reach).double())
        if bool((lower == low).all() and (upper == high).all()):
            return low, high
        group = self.group.long()
        return lower[group].T, upper[group].T


def weight_grid(weight: Tensor, spec: QuantSpec, weight_only: bool = False, ratios: Tensor | None = None) -> WeightGrid:
    """The grid that ``spec`` chooses for a weight [N, K]. ratios: float32 [N, 2], for an observer ``learned``: what parts of each row's least and
    largest weight its range is. ValueError as `vitq.quantizers.uniform.weight_range` has it."""
    if spec.observer == "learned" and ratios is not None:
        lo, hi = (end * ratio for end, ratio in zip((weight.amin(1).float(), weight.amax(1).float()), ratios.to(weight.device).unbind(1)))
        return WeightGrid(scale_and_zero(lo.clamp_max(0.0), hi.clamp_min(0.0), spec.bits, symmetric=True)[0])
    division = divide(spec, *weight.shape, weight_only)
    if not division.sizes:
        scale, zero_point = weight_range(weight, spec)
        return WeightGrid(scale, zero_point=None if spec.symmetric else zero_point)
    if spec.granularity == "per_group":
        group = division.group().to(weight.device)
        spec = replace(spec, granularity="per_channel")
    else:
        group = dual_uniform.column_groups(weight, division.sizes[dual_uniform.OUTLIERS])
    scale, zero_point = map(torch.stack, zip(*(weight_range(weight[:, group == g], spec) for g in range(len(division.sizes)))))
    if not division.multiplied:
        return WeightGrid(scale, group, zero_point=None if spec.symmetric else zero_point)
    share = dual_uniform.share_scale if len(scale) == 2 and spec.segments == "dual_uniform" else share_scale
    shared, multiplier = share(scale, spec.bits, spec.symmetric)
    if spec.symmetric:
        return WeightGrid(shared, group, multiplier)
    qmin, qmax = int_range(spec.bits)
    # The range starts where it did, in steps of the scale that came out.
    zero_point = (qmin + (zero_point - qmin) * scale / (shared * multiplier)).round().clamp(qmin, qmax).to(torch.int32)
    return WeightGrid(shared, group, multiplier, zero_point)


def share_scale(scale: Tensor, bits: int, symmetric: bool = True) -> tuple[Tensor, Tensor]:
    """The scales of G groups, [G, N] -> one a row, float32 [N], and multipliers int8 [G, N]: the row's largest scale gets the largest multiplier
    with which every code is an int8, the others what comes nearest. (What clips nothing, the next larger one, serves SmolLM2-135M worse: 45.0 of
    perplexity by rounding to nearest in place of 41.8.)"""
    largest = dual_uniform.largest_multiplier(bits, symmetric)
    shared = (scale.amax(0) / largest).float()
    return shared, (scale / shared).round().clamp(1, largest).to(torch.int8)
