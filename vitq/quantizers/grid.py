"""The grid of a weight: the scales that its codes are multiplied with, before a solver chooses the codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitq.quantizers import dual_uniform
from vitq.quantizers.uniform import weight_range
from vitq.recipe import QuantSpec


@dataclass(frozen=True, eq=False)
class WeightGrid:
    """Of a weight [N, K]. scale: float32 [N], or [2, N] where columns are divided into two groups with scales of their own; group: uint8
    [K], that of each column, None for one group. multiplier: int8 [2, N] where the two scales are its multiples of ``scale`` [N]."""

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
    outliers = dual_uniform.outlier_count(*weight.shape) if spec.segments == "dual_uniform" else 0
    if not outliers:
        return WeightGrid(weight_range(weight, spec)[0])
    group = dual_uniform.column_groups(weight, outliers)
    scale = torch.stack([weight_range(weight[:, group == g], spec)[0] for g in (dual_uniform.OUTLIERS, dual_uniform.OTHERS)])
    if not dual_uniform.shares_scale(spec.bits):
        return WeightGrid(scale, group)
    scale, multiplier = dual_uniform.share_scale(scale, spec.bits)
    return WeightGrid(scale, group, multiplier)
