"""What a solver is given and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vitq.calib.gram import Gram
from vitq.quantizers.grid import WeightGrid, weight_grid
from vitq.recipe import QuantSpec


@dataclass(frozen=True, eq=False)
class Problem:
    """One linear layer. weight float32 [N, K], bias float32 [N] or None; gram: of its inputs, None for a solver that needs none;
    options: the recipe's `solver_options`; weight_only: the layer reads floats; ratios: float32 [N, 2], which parts of each row's least and largest weight
    are its range, where that was learned; kept: float32 [N, F], the columns of input features that
    stay in floating point, which in the Gram matrix come after those of the weight."""

    weight: Tensor
    bias: Tensor | None
    spec: QuantSpec
    gram: Gram | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    weight_only: bool = False
    kept: Tensor | None = None
    ratios: Tensor | None = None

    def grid(self, weight: Tensor | None = None) -> WeightGrid:
        """The grid of the weight, or of another in its place. ValueError as `weight_grid`."""
        return weight_grid(self.weight if weight is None else weight, self.spec, self.weight_only, self.ratios)

    def joint(self, bias: bool = False) -> Tensor:
        """[weight, kept], or [weight, kept, bias], float64 [N, D]: a solver moves what comes after the weight to make up for the codes."""
        parts = (self.weight, self.kept, self.bias[:, None] if bias and self.bias is not None else None)
        return torch.cat([part for part in parts if part is not None], 1).double()


@dataclass(frozen=True, eq=False)
class Solution:
    """codes int8 [N, K] on the grid, and the bias and the kept columns that go with them, float32 [N] and [N, F], or None."""

    codes: Tensor
    grid: WeightGrid
    bias: Tensor | None
    kept: Tensor | None = None


def solve_ridge(gram: Tensor, right: Tensor, ridge: float) -> Tensor:
    """(gram + ridge·I)⁻¹ right, float64, by Cholesky; with ten times the ridge, again and again, where that fails.

    ValueError for a gram matrix that is not finite.
    """
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("the inputs' Gram matrix is not finite; check the calibration data and the model's activations")
    ridge = max(ridge, 1e-12 * float(gram.diagonal().mean()), torch.finfo(torch.float64).tiny)
    while True:
        factor, failed = torch.linalg.cholesky_ex(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
        if not int(failed):
            return torch.cholesky_solve(right, factor)
        ridge *= 10.0
        if not ridge < float("inf"):
            raise ValueError("the inputs' Gram matrix cannot be solved with any ridge; check the calibration data")
