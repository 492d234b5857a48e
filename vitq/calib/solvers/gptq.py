"""GPTQ (Frantar et al., ICLR 2023; arXiv 2210.17323): columns one after the other, each one's error made up for by those after it."""

from __future__ import annotations

import torch
from torch import Tensor

from vitq.calib.solvers.problem import Problem, Solution, solve_ridge
from vitq.quantizers.grid import WeightGrid

# Columns whose errors are collected before the columns after them are moved, all at once.
BLOCK = 128


def gptq(problem: Problem) -> Solution:
    """Options: damping (0.01), a part of the Gram matrix's mean diagonal; act_order (true), columns with large inputs first. Kept columns come
    last and make up for all others, as QUIK has it.

    Raises ValueError on NaN or infinity.
    """
    options, gram, features = problem.options, problem.gram.quantized[:-1, :-1], problem.weight.shape[1]
    grid = problem.grid()
    ridge = options.get("damping", 0.01) * float(gram.diagonal().mean())
    codes, moved = quantize_in_sequence(problem.joint(), features, grid, problem.spec.bits, gram, ridge, act_order=options.get("act_order", True))
    return Solution(codes, grid, problem.bias, None if problem.kept is None else moved[:, features:].float())


def quantize_in_sequence(joint: Tensor, features: int, grid: WeightGrid, bits: int, gram: Tensor, ridge: float, *,
                         act_order: bool = True) -> tuple[Tensor, Tensor]:
    """joint [N, D], whose first K = features columns have the grid, for inputs of this Gram matrix [D, D]. Returns codes int8 [N, K], and
    joint with these on the grid and the rest (kept columns, a bias) moved to make up for them."""
    scale, zero, low, high = (t.double().expand(len(joint), features) for t in (grid.columns(), grid.zero_points(), *grid.limits(bits)))
    gram = gram.clone()
    dead = gram.diagonal() == 0  # whatever such a column holds is multiplied by 0
    gram[dead, dead] = 1.0
    order = torch.arange(len(gram), device=gram.device)
    if act_order:
        order[:features] = torch.argsort(gram.diagonal()[:features], descending=True, stable=True)
    gram, moved = gram[order][:, order], joint[:, order]
    scale, zero, low, high = (t[:, order[:features]] for t in (scale, zero, low, high))
    inverse = solve_ridge(gram, torch.eye(len(gram), dtype=gram.dtype, device=gram.device), ridge)
    factor = torch.linalg.cholesky(0.5 * (inverse + inverse.T), upper=True)
    codes = torch.empty_like(scale)
    for start in range(0, features, BLOCK):
        stop = min(start + BLOCK, features)
        errors = torch.empty(len(moved), stop - start, dtype=moved.dtype, device=moved.device)
        for column in range(start, stop):
            # Few and small operations: on a GPU their launches are the time.
            step, shift, value = scale[:, column], zero[:, column], moved[:, column]
            code = (value / step + shift).round_().clamp_(low[:, column], high[:, column])
            codes[:, column] = code
            error = (value - (code - shift) * step).div_(factor[column, column])
            moved[:, column : stop].addr_(error, factor[column, column : stop], alpha=-1)
            errors[:, column - start] = error
        moved[:, stop:] -= errors @ factor[start:stop, stop:]
    back = torch.argsort(order)
    return codes[:, back[:features]].to(torch.int8), moved[:, back]
