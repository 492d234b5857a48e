"""The grid of a weight: the scales that its codes are multiplied with, before a solver chooses the codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitq.quantizers import dual_uniform
from vitq.quantizers.uniform import weight_range
from vitq.recipe import QuantSpec


@dataclass(frozen=True)
class Division:
    """How the input features of a weight are divided. sizes: features of each group, () for one group of all. segmented: the groups are
    ranges of columns with accumulators of their own; otherwise their scales are multiples of one."""

    sizes: tuple[int, ...] = ()
    segmented: bool = False


def divide(spec: QuantSpec, out_features: int, in_features: int) -> Division:
    """What ``spec`` makes of a weight [out_features, in_features]: the same for every weight of that size."""
    outliers = dual_uniform.outlier_count(out_features, in_features) if spec.segments == "dual_uniform" else 0
    return Division((outliers, in_features - outliers), not dual_uniform.shares_scale(spec.bits)) if outliers else Division()


@dataclass(frozen=True, eq=False)
class WeightGrid:
    """Of a weight [N, K]. scale: float32 [N], or [G, N] where the groups are segments; group: uint8 [K], that of each column, None for one
    group. multiplier: int8 [G, N] where the groups' scales are its multiples of ``scale`` [N]."""

    scale: Tensor
    group: Tensor | None = None
    multiplier: Tensor | None = None

    def columns(self) -> Tensor:
        """The scale of each weight, float32 [N, K]; [N, 1] for one group."""
        if self.group is None:
            return self.scale[:, None]
        scale = self.scale if self.multiplier is None else self.scale * self.multiplier
        return scale[self.group.long()].T


def weight_grid(weight: Tensor, spec: QuantSpec) -> WeightGrid:
    """The grid that ``spec`` chooses for a weight [N, K]. ValueError as `vitq.quantizers.uniform.weight_range` has it."""
    division = divide(spec, *weight.shape)
    if not division.sizes:
        return WeightGrid(weight_range(weight, spec)[0])
    group = dual_uniform.column_groups(weight, division.sizes[dual_uniform.OUTLIERS])
    scale = torch.stack([weight_range(weight[:, group == g], spec)[0] for g in range(len(division.sizes))])
    if division.segmented:
        return WeightGrid(scale, group)
    scale, multiplier = dual_uniform.share_scale(scale, spec.bits)
    return WeightGrid(scale, group, multiplier)
