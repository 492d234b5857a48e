"""Dual uniform weights: which columns are outliers, two scales as multiples of one, and the grid they give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitq.formats import int_range
from vitq.quantizers import dual_uniform
from vitq.quantizers.grid import weight_grid
from vitq.quantizers.uniform import fake_quantize, weight_range
from vitq.recipe import QuantSpec

DUAL = {"granularity": "per_channel", "observer": "minmax", "segments": "dual_uniform"}


def stretched(n: int, k: int, columns: list[int], seed: int = 0) -> torch.Tensor:
    """Random weights, some columns larger."""
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02
    weight[:, columns] *= 9.0
    return weight


def by_hand(weight: torch.Tensor, outliers: int) -> list[int]:
    """ERQ's rule row by row, with numpy's percentiles."""
    counts = [0] * weight.shape[1]
    for row in weight.double().numpy():
        high = np.percentile(row[row > 0], 99) if (row > 0).any() else np.inf
        low = np.percentile(row[row < 0], 1) if (row < 0).any() else -np.inf
        for column in np.flatnonzero((row > high) | (row < low)):
            counts[column] += 1
    return sorted(sorted(range(len(counts)), key=lambda c: (-counts[c], c))[:outliers])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n, k, outliers", [(64, 96, 32), (576, 192, 32), (40, 70, 5), (3, 33, 1), (20, 64, 0)])
def test_outlier_columns_follow_the_rule(n: int, k: int, outliers: int, seed: int) -> None:
    weight = stretched(n, k, [3, 7, 20], seed)
    weight[0] = weight[0].abs()  # a row without negative weights, one without positive ones, one of zeros, a constant one
    weight[1 % n] = -weight[1 % n].abs()
    if n > 4:
        weight[2], weight[3] = 0.0, 0.25
    groups = dual_uniform.column_groups(weight, outliers)
    assert groups.dtype == torch.uint8
    assert (groups == dual_uniform.OUTLIERS).nonzero().flatten().tolist() == by_hand(weight, outliers)


@pytest.mark.parametrize("n, k, count", [(1152, 384, 64), (1536, 384, 96), (2304, 768, 128), (3072, 768, 160), (576, 192, 32),
                                         (288, 96, 32), (384, 96, 32), (19, 384, 0), (1536, 32, 0), (4096, 64, 32), (4096, 65, 64), (0, 0, 0)])
def test_how_many_columns(n: int, k: int, count: int) -> None:
    """ERQ's n / 20, in whole steps of 32, and some left for the other group."""
    assert dual_uniform.outlier_count(n, k) == count


def test_column_groups_refuses() -> None:
    for weight, outliers in ((torch.zeros(3), 0), (torch.zeros(3, 4), 5), (torch.zeros(3, 4), -1)):
        with pytest.raises(ValueError, match="give \\[N, K\\]"):
            dual_uniform.column_groups(weight, outliers)


@pytest.mark.parametrize("bits", range(2, 9))
def test_products_are_int8(bits: int) -> None:
    qmin, qmax = int_range(bits)
    largest = dual_uniform.largest_multiplier(bits)
    assert -128 <= qmin * largest and qmax * largest <= 127 < (qmax + 1) * (largest + 1)
    assert dual_uniform.shares_scale(bits) == (bits <= 4)


@pytest.mark.parametrize("bits, error", [(2, 0.01), (3, 0.016), (4, 0.031)])
def test_two_scales_as_multiples_of_one(bits: int, error: float) -> None:
    """Any ratio up to the largest multiplier is met within a few percent, either way round."""
    largest = dual_uniform.largest_multiplier(bits)
    ratio = torch.linspace(1.0, largest, 500)
    scale = torch.stack((ratio, torch.ones(500))) * 0.013
    for given in (scale, scale.flip(0)):
        shared, multiplier = dual_uniform.share_scale(given, bits)
        assert multiplier.dtype == torch.int8 and 1 <= int(multiplier.min()) and int(multiplier.max()) <= largest
        assert float((shared * multiplier / given - 1).abs().max()) < error
    beyond = torch.tensor([[100.0, 0.1], [0.1, 100.0]])
    shared, multiplier = dual_uniform.share_scale(beyond, bits)
    assert multiplier.tolist() == [[largest, 1], [1, largest]]
    assert (shared * multiplier).amax(0).tolist() == pytest.approx([100.0, 100.0])


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_grid_serves_both_groups(bits: int) -> None:
    weight = stretched(64, 128, list(range(5, 30)))
    one, dual = (weight_grid(weight, QuantSpec(bits=bits, **{**DUAL, "segments": kind})) for kind in ("one", "dual_uniform"))
    assert one.group is None and one.columns().shape == (64, 1) and torch.equal(one.scale, weight_range(weight, QuantSpec(
        bits=bits, granularity="per_channel", observer="minmax"))[0])
    assert dual.columns().shape == weight.shape and (dual.multiplier is not None) == (bits <= 4)
    assert {5, 29} <= set((dual.group == dual_uniform.OUTLIERS).nonzero().flatten().tolist())
    errors = [(fake_quantize(weight, grid.columns(), 0, bits) - weight).square()[:, dual.group == dual_uniform.OTHERS].mean() for grid in (one, dual)]
    assert errors[1] < (0.2 if bits > 2 else 0.8) * errors[0]  # 9 times finer where there are no outliers; 2 bits hardly tell


@pytest.mark.parametrize("segments", ["one", "dual_uniform"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_asymmetric_grids(bits: int, segments: str) -> None:
    """Rows that are not centred lose less with a zero point; every code less its zero point, times its multiplier, is an int8."""
    weight = stretched(64, 128, list(range(5, 30)))
    weight = weight.abs() - 0.2 * weight.abs().mean(1, keepdim=True)
    specs = [QuantSpec(bits=bits, **{**DUAL, "segments": segments, "symmetric": symmetric}) for symmetric in (True, False)]
    symmetric, asymmetric = (weight_grid(weight, spec) for spec in specs)
    assert symmetric.zero_point is None and int(symmetric.zero_points().abs().max()) == 0
    qmin, qmax = int_range(bits)
    assert qmin <= int(asymmetric.zero_point.min()) and int(asymmetric.zero_point.max()) <= qmax
    multiplier = 1 if asymmetric.multiplier is None else int(asymmetric.multiplier.max())
    assert multiplier * (2**bits - 1) <= 127
    errors = [(fake_quantize(weight, grid.columns(), grid.zero_points(), bits) - weight).square().mean() for grid in (symmetric, asymmetric)]
    assert errors[1] < 0.6 * errors[0]


def test_a_small_weight_keeps_one_group() -> None:
    assert weight_grid(torch.randn(10, 384), QuantSpec(**DUAL)).group is None
