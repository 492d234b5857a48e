"""Round to nearest."""

from __future__ import annotations

import torch

from vitq.calib.solvers.problem import Problem, Solution
from vitq.quantizers.uniform import quantize


def rtn(problem: Problem) -> Solution:
    """Each weight to the nearest code. Raises ValueError on NaN or infinity."""
    grid = problem.grid()
    codes = quantize(problem.weight, grid.columns(), grid.zero_points(), problem.spec.bits)
    low, high = grid.limits(problem.spec.bits)
    return Solution(codes.clamp(low.to(torch.int8), high.to(torch.int8)), grid, problem.bias, problem.kept)
