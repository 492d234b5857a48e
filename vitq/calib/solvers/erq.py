"""ERQ (Zhong et al., ICML 2024, arXiv 2407.06794, and TPAMI 2025): reduce the error of quantized inputs, then of quantized weights.

Aqer moves the float weights and the bias to what fits the quantized inputs best, by ridge regression. Wqer then quantizes some of the
remaining columns, chooses the direction of their rounding, and moves the others to make up for what is left, until none remains. Both are
in closed form from Gram matrices, with weight and bias as one matrix [W, b] whose last input is 1.

ERQ's code quantizes half of the remaining columns at once, in the order of the features. Column by column, large inputs first, as GPTQ
does it, with exact descent over all columns afterwards, leaves less of the weights' error (tests/calib/test_solvers.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitq.calib.solvers.gptq import quantize_in_sequence
from vitq.calib.solvers.problem import Problem, Solution, solve_ridge
from vitq.quantizers.grid import WeightGrid

STEPS = 100  # of the gradient rule, as in ERQ's code


def erq(problem: Problem) -> Solution:
    """Options: input_ridge (2000), weight_ridge (60): λ as a multiple of the inputs' mean square, or with absolute_ridge λ itself, which is what
    as many rows of inputs of that size in every direction would add to the Gram matrix; reduce_inputs (true): Aqer; columns: sequence |
    halves; compensate (true): move the columns that are left; rounding: descent, the exact descent | gradient, ERQ's rule, of halves |
    nearest.

    Raises ValueError on NaN or infinity.
    """
    options, gram, features, bits = problem.options, problem.gram, problem.weight.shape[1], problem.spec.bits
    joint = problem.joint(bias=True)
    quantized, cross = (m[: joint.shape[1], : joint.shape[1]] for m in (gram.quantized, gram.cross))
    unit = 1.0 if options.get("absolute_ridge", False) else float(quantized.diagonal()[:features].mean()) / max(gram.rows, 1)
    if options.get("reduce_inputs", True):
        joint = reduce_input_error(joint, quantized, cross, options.get("input_ridge", 2000.0) * unit)
    grid = problem.grid(joint[:, :features].float())
    rounding, compensate = options.get("rounding", "descent"), options.get("compensate", True)
    ridge = options.get("weight_ridge", 60.0) * unit
    if options.get("columns", "sequence") == "halves" or not compensate:
        codes, moved = quantize_by_halves(joint, features, grid, bits, quantized, gram.rows, ridge, rounding=rounding,
                                          compensate=compensate)
    else:
        codes, moved = quantize_in_sequence(joint, features, grid, bits, quantized, ridge)
        if rounding == "descent":
            codes, moved = descend_all(joint, codes, grid, bits, quantized, gram.rows, ridge)
    kept = None if problem.kept is None else moved[:, features : features + problem.kept.shape[1]].float()
    return Solution(codes, grid, None if problem.bias is None else moved[:, -1].float(), kept)


def reduce_input_error(joint: Tensor, quantized: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """Aqer: joint [N, D] plus the ridge solution of what it misses of the float outputs on quantized inputs."""
    return joint + solve_ridge(quantized, (cross - quantized) @ joint.T, ridge).T


def quantize_by_halves(joint: Tensor, features: int, grid: WeightGrid, bits: int, quantized: Tensor, rows: int, ridge: float, *,
                       rounding: str, compensate: bool) -> tuple[Tensor, Tensor]:
    """Wqer on joint [N, D], whose first K = features columns have the grid. Returns codes int8 [N, K], and joint with these on the grid
    and the rest moved."""
    scale, zero = (t.double().expand(len(joint), features) for t in (grid.columns(), grid.zero_points()))
    joint = joint.clone()
    limits = grid.limits(bits)
    codes = torch.empty(scale.shape, dtype=torch.int8, device=joint.device)
    start = 0
    while start < features:
        stop = min(start + max((joint.shape[1] - start) // 2, 1), features)
        step = scale[:, start:stop]
        low, high = (t if t.numel() == 1 else t[:, start:stop] for t in limits)
        value = joint[:, start:stop] / step + zero[:, start:stop]
        chosen = torch.round(value).clamp(low, high)
        inner = quantized[start:stop, start:stop] / max(rows, 1)
        if rounding == "descent":
            chosen = descend(value, chosen, step, inner, low, high)
        elif rounding == "gradient":
            chosen = follow_gradient(value, chosen, step, inner, low, high)
        error = (chosen - value) * step
        codes[:, start:stop] = chosen.to(torch.int8)
        joint[:, start:stop] += error
        if compensate and stop < joint.shape[1]:
            right = quantized[stop:, start:stop] @ error.T
            joint[:, stop:] -= solve_ridge(quantized[stop:, stop:], right, ridge).T
        start = stop
    return codes, joint


def descend_all(joint: Tensor, codes: Tensor, grid: WeightGrid, bits: int, quantized: Tensor, rows: int, ridge: float) -> tuple[Tensor, Tensor]:
    """Descent over all columns of codes int8 [N, K] towards joint [N, D], with the ridge on the inputs; what comes after them is always at its best. As
    `quantize_by_halves` returns."""
    features = codes.shape[1]
    step, zero = (t.double().expand(codes.shape) for t in (grid.columns(), grid.zero_points()))
    inner, along = quantized[:features, :features], quantized[:features, features:]
    if along.shape[1]:  # kept columns and a bias, which are always at their best
        answer = solve_ridge(quantized[features:, features:], along.T, ridge if along.shape[1] > 1 else 0.0)
        inner = inner - along @ answer
    inner = inner + ridge * torch.eye(features, dtype=inner.dtype, device=inner.device)
    codes = descend(joint[:, :features] / step + zero, codes.double(), step, inner / max(rows, 1), *grid.limits(bits))
    moved = torch.cat(((codes - zero) * step, joint[:, features:]), 1)
    if along.shape[1]:
        moved[:, features:] -= (moved[:, :features] - joint[:, :features]) @ answer.T
    return codes.to(torch.int8), moved


def descend(value: Tensor, codes: Tensor, step: Tensor, inner: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Exact coordinate descent of Σ e M eᵀ over each row's errors e = (code − value)·step, from `codes`: the code up or down that lowers
    it most, until none does. All [N, S] float64, the codes' limits low and high [N, S] or [1, 1]; inner M [S, S]."""
    codes = codes.clone()
    product, diagonal = ((codes - value) * step) @ inner, inner.diagonal()
    active = torch.arange(len(codes), device=codes.device)
    floor = 1e-12 * (diagonal.mean() * step.square().mean(1)).clamp_min(1e-300)
    for _ in range(8 * codes.shape[1]):
        here, slope = step[active], 2 * product[active] * step[active]
        curve = here.square() * diagonal
        up, down = curve + slope, curve - slope
        least, most = (t if len(t) == 1 else t[active] for t in (low, high))
        up.masked_fill_(codes[active] >= most, torch.inf)
        down.masked_fill_(codes[active] <= least, torch.inf)
        best, column = torch.minimum(up, down).min(1)
        better = best < -floor[active]
        sign = torch.where(up.gather(1, column[:, None]) <= down.gather(1, column[:, None]), 1.0, -1.0)[:, 0].double()
        active, column, sign = active[better], column[better], sign[better]
        if not len(active):
            break
        codes[active, column] += sign
        product[active] += (sign * step[active, column])[:, None] * inner[column]
    return codes


def follow_gradient(value: Tensor, codes: Tensor, step: Tensor, inner: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """ERQ's rule: the error with the largest gradient that it shares the sign of steps against it, to the nearer of its two roundings,
    as long as the row's objective does not rise. Arguments as of `descend`."""
    codes = codes.clone()
    low, high = (rounded(value).clamp(low, high) for rounded in (torch.floor, torch.ceil))
    error = (codes - value) * step
    product = error @ inner
    loss = (error * product).sum(1)
    active = torch.arange(len(codes), device=codes.device)
    for _ in range(STEPS):
        gradient = 2 * product[active]
        size = torch.where(error[active] * gradient > 0, gradient.abs(), torch.zeros_like(gradient))
        best, column = size.max(1)
        at = (active, column)
        wanted = error[at] - gradient.gather(1, column[:, None])[:, 0]
        up, down = (high[at] - value[at]) * step[at], (low[at] - value[at]) * step[at]
        to = torch.where((up - wanted).abs() <= (down - wanted).abs(), up, down)
        change = to - error[at]
        new_loss = loss[active] + 2 * change * product[at] + change.square() * inner.diagonal()[column]
        moves = (best > 0) & (change != 0) & (new_loss <= loss[active])
        if not bool(moves.any()):
            break
        active, column, change, to, new_loss = active[moves], column[moves], change[moves], to[moves], new_loss[moves]
        product[active] += change[:, None] * inner[column]
        error[active, column], loss[active] = to, new_loss
        codes[active, column] = torch.where(to == (high[active, column] - value[active, column]) * step[active, column],
                                            high[active, column], low[active, column])
    return codes
