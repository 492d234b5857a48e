"""Round to nearest."""

from __future__ import annotations

from vitq.calib.solvers.problem import Problem, Solution
from vitq.quantizers.grid import weight_grid
from vitq.quantizers.uniform import quantize


def rtn(problem: Problem) -> Solution:
    """Each weight to the nearest code. Raises ValueError on NaN or infinity."""
    grid = weight_grid(problem.weight, problem.spec)
    return Solution(quantize(problem.weight, grid.columns(), grid.zero_points(), problem.spec.bits), grid, problem.bias)
