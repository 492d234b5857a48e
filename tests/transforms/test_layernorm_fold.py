"""The fold's identities (RepQ-ViT, ERQ §1.4): nothing changes in float, and codes are those of the per-channel quantizer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitq.quantizers.uniform import quantize, scale_and_zero
from vitq.transforms.layernorm_fold import fold


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    norm, linear = nn.LayerNorm(48), nn.Linear(48, 20)
    for p in (*norm.parameters(), *linear.parameters()):
        p.copy_(torch.randn(p.shape, generator=generator))
    norm.weight[5] = 0  # a dead channel: constant output
    norm.weight[7] *= 40
    return norm, linear, torch.randn(500, 48, generator=generator)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_fold(pair, bits: int, symmetric: bool) -> None:
    norm, linear, x = pair
    y, before = norm(x), linear(norm(x))
    lo, hi = y.amin(0), y.amax(0)
    scale, zero = scale_and_zero(lo, hi, bits, symmetric)
    floored = scale.clamp_min(scale.mean() * 1e-3)
    target_scale, target_zero = fold(norm, [linear], scale, zero)
    assert (linear(norm(x)) - before).norm() / before.norm() < 1e-5
    assert target_zero.dtype == torch.int32 and target_scale.dtype == torch.float32
    per_channel = torch.round(y / floored) + zero
    folded = torch.round(norm(x) / target_scale) + target_zero
    alive = torch.arange(48) != 5
    assert ((per_channel - folded)[:, alive].abs() <= 1).all()
    assert float(((per_channel - folded)[:, alive] != 0).float().mean()) < 1e-3, "equal but for float32 ties"
    codes = quantize(norm(x), target_scale, target_zero, bits).int()
    assert codes.min() >= -(2 ** (bits - 1)) and codes.max() < 2 ** (bits - 1)


def test_symmetric_fold_leaves_zero_where_it_was(pair) -> None:
    norm, linear, x = pair
    y = norm(x)
    scale, zero = scale_and_zero(y.amin(0), y.amax(0), 8, True)
    bias = linear.bias.clone()
    fold(norm, [linear], scale, zero)
    assert torch.equal(linear.bias, bias), "no shift, so padding with zeros after the norm stays right"


def test_bad_shapes(pair) -> None:
    norm, linear, _ = pair
    with pytest.raises(ValueError, match=r"shape \[48\]"):
        fold(norm, [linear], torch.ones(3), torch.zeros(3))
    with pytest.raises(ValueError, match="a norm with a weight"):
        fold(nn.LayerNorm(48, elementwise_affine=False), [nn.Linear(48, 3)], torch.ones(48), torch.zeros(48))
    with pytest.raises(ValueError, match="a norm with a bias where zero points differ"):
        fold(nn.RMSNorm(48), [nn.Linear(48, 3)], torch.ones(48), torch.arange(48))


@pytest.mark.parametrize("norm", [nn.RMSNorm(48), nn.LayerNorm(48, bias=False)])
@torch.no_grad()
def test_a_norm_without_a_bias_gives_its_scale_away(norm) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(48, 20, bias=False), torch.randn(60, 48) * torch.linspace(0.1, 5, 48)
    norm.weight.uniform_(0.1, 30.0)
    y = norm(x)
    before, (scale, zero) = linear(y), scale_and_zero(y.amin(0), y.amax(0), 8, True)
    target_scale, target_zero = fold(norm, [linear], scale, zero)
    assert linear.bias is None and int(target_zero) == 0
    assert (linear(norm(x)) - before).norm() / before.norm() < 1e-5
    assert ((torch.round(norm(x) / target_scale) - torch.round(y / scale)).abs() > 0).float().mean() < 1e-3


@torch.no_grad()
def test_a_linear_without_a_bias_gets_one() -> None:
    """Swin's patch merging has none."""
    torch.manual_seed(0)
    norm, linear, x = nn.LayerNorm(48), nn.Linear(48, 20, bias=False), torch.randn(60, 48) * torch.linspace(0.1, 5, 48)
    norm.weight.uniform_(0.1, 3.0)
    norm.bias.normal_()
    y = norm(x)
    before = linear(y)
    fold(norm, [linear], *scale_and_zero(y.amin(0), y.amax(0), 4, False))
    assert linear.bias is not None and (linear(norm(x)) - before).norm() / before.norm() < 1e-5
