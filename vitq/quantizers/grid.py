"""The grid of a weight: the scales that its codes are multiplied with, before a solver chooses the codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitq.formats import int_range
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
    group. multiplier: int8 [G, N] where the groups' scales are its multiples of ``scale`` [N]. zero_point: int32 [N], or [G, N], among the
    codes; None for a symmetric grid."""

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


def weight_grid(weight: Tensor, spec: QuantSpec) -> WeightGrid:
    """The grid that ``spec`` chooses for a weight [N, K]. ValueError as `vitq.quantizers.uniform.weight_range` has it."""
    division = divide(spec, *weight.shape)
    if not division.sizes:
        scale, zero_point = weight_range(weight, spec)
        return WeightGrid(scale, zero_point=None if spec.symmetric else zero_point)
    group = dual_uniform.column_groups(weight, division.sizes[dual_uniform.OUTLIERS])
    scale, zero_point = map(torch.stack, zip(*(weight_range(weight[:, group == g], spec) for g in range(len(division.sizes)))))
    if division.segmented:
        return WeightGrid(scale, group, zero_point=None if spec.symmetric else zero_point)
    shared, multiplier = dual_uniform.share_scale(scale, spec.bits, spec.symmetric)
    if spec.symmetric:
        return WeightGrid(shared, group, multiplier)
    qmin, qmax = int_range(spec.bits)
    # The range starts where it did, in steps of the scale that came out.
    zero_point = (qmin + (zero_point - qmin) * scale / (shared * multiplier)).round().clamp(qmin, qmax).to(torch.int32)
    return WeightGrid(shared, group, multiplier, zero_point)
