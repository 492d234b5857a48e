"""DGQ (Zhang et al., arXiv 2310.04836): 4-bit groups of columns whose scales are integer multiples of one a row, so that the GEMM is int8.

Both grains are searched by the error of the layer's output on the inputs that the Gram matrix stands for, which is that of all of them, where
DGQ's code looks at one sample: first the range of each group on its own, then the scale of each row, whose multiples the groups' become.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vitq.calib.solvers.gptq import quantize_in_sequence
from vitq.calib.solvers.problem import Problem, Solution
from vitq.quantizers.grid import Division, WeightGrid, divide, weight_grid
from vitq.quantizers.uniform import fake_quantize, scale_and_zero

# Parts of a group's range, and of a row's largest weight, that DGQ tries; of the latter every fourth first, then those around the best.
GROUP_RATIOS = tuple(1.02 - 0.22 * (i + 1) / 20 for i in range(20))
ROW_RATIOS = tuple(1.02 - 0.82 * (i + 1) / 80 for i in range(80))
COARSE = 4


def dual_grain(problem: Problem) -> Solution:
    """Options: rounding: sequence, GPTQ's on the grid that was found | nearest, DGQ's; damping (0.01), of the former, as `gptq` has it.

    A layer without groups has the grid of its recipe. Raises ValueError on NaN or infinity.
    """
    weight, options, bits = problem.weight, problem.options, problem.spec.bits
    gram, features = problem.gram.quantized[:-1, :-1], weight.shape[1]
    division = divide(problem.spec, *weight.shape, problem.weight_only)
    if problem.spec.granularity == "per_group":
        inner = gram[:features, :features]
        grid = search(weight, problem, division, (inner / float(inner.diagonal().mean().clamp_min(1e-30))).float())
    else:
        grid = problem.grid()
    if options.get("rounding", "sequence") == "nearest":
        return Solution(_nearest(weight, grid, bits).to(torch.int8), grid, problem.bias, problem.kept)
    ridge = options.get("damping", 0.01) * float(gram.diagonal().mean())
    codes, moved = quantize_in_sequence(problem.joint(), features, grid, bits, gram, ridge)
    return Solution(codes, grid, problem.bias, None if problem.kept is None else moved[:, features:].float())


def search(weight: Tensor, problem: Problem, division: Division, gram: Tensor) -> WeightGrid:
    """The grid of a weight [N, K] for inputs of this Gram matrix, float32 [K, K] of any scale."""
    spec, group = problem.spec, division.group().to(weight.device)
    if not bool(torch.isfinite(weight).all()):
        weight_grid(weight, replace(spec, observer="minmax"), problem.weight_only)  # which says so
    parts, start = [], 0
    for size in division.sizes:
        columns = slice(start, start + size)
        parts.append(_group_range(weight[:, columns], spec.bits, spec.symmetric, gram[columns, columns]))
        start += size
    scale, zero_point = (torch.stack(t) for t in zip(*parts))
    zero_point = None if spec.symmetric else zero_point
    if not division.multiplied:
        return WeightGrid(scale, group, zero_point=zero_point)
    largest = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)

    def of(ratio: Tensor) -> WeightGrid:
        shared = largest * ratio / 127
        return WeightGrid(shared, group, (scale / shared).round().clamp(1, 127).to(torch.int8), zero_point)

    ratios = torch.tensor(ROW_RATIOS, device=weight.device)
    best, least = torch.zeros(len(weight), dtype=torch.long, device=weight.device), torch.full_like(largest, torch.inf)
    for offsets in (range(0, len(ratios), COARSE), (-3, -2, -1, 1, 2, 3)):
        centre = best if min(offsets) < 0 else torch.zeros_like(best)
        for offset in offsets:
            index = (centre + offset).clamp(0, len(ratios) - 1)
            error = _error(weight, of(ratios[index]), spec.bits, gram)
            better = error < least
            best, least = torch.where(better, index, best), torch.where(better, error, least)
    return of(ratios[best])


def _group_range(weight: Tensor, bits: int, symmetric: bool, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row of one group [N, g]."""
    lo, hi = weight.amin(1), weight.amax(1)
    best = scale_and_zero(lo, hi, bits, symmetric)
    least = torch.full_like(lo, torch.inf)
    for ratio in GROUP_RATIOS:
        scale, zero_point = scale_and_zero(lo * ratio, hi * ratio, bits, symmetric)
        difference = fake_quantize(weight, scale[:, None], zero_point[:, None], bits).sub_(weight)
        error = ((difference @ gram) * difference).sum(1)
        better = error < least
        least = torch.where(better, error, least)
        best = tuple(torch.where(better, new, old) for new, old in zip((scale, zero_point), best))
    return best


def _nearest(weight: Tensor, grid: WeightGrid, bits: int) -> Tensor:
    """Codes as float32 [N, K]."""
    low, high = grid.limits(bits)
    return (weight / grid.columns()).round_().add_(grid.zero_points()).clamp_(low.float(), high.float())


def _error(weight: Tensor, grid: WeightGrid, bits: int, gram: Tensor) -> Tensor:
    """Of each row's outputs, squared, float32 [N]."""
    difference = _nearest(weight, grid, bits).sub_(grid.zero_points()).mul_(grid.columns()).sub_(weight)
    return ((difference @ gram) * difference).sum(1)
