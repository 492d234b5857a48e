"""Uniform quantization against the formula, and weight ranges against brute force."""

import re
import resource

import pytest
import torch

from vitq.quantizers.uniform import (
    WEIGHT_PERCENTILES, dequantize, fake_quantize, fake_quantize_per_token, quantize, quantize_per_token, scale_and_zero, weight_range,
)
from vitq.recipe import QuantSpec


pytestmark = pytest.mark.usefixtures("one_thread")


def samples():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 33, generator=generator)
    outliers = x.clone()
    outliers[:, 3] *= 100
    return {"signed": x, "positive": x.abs(), "negative": -x.abs() - 1, "outliers": outliers, "zero": torch.zeros(16, 33),
            "constant": torch.full((16, 33), 0.7), "tiny": x * 1e-20, "large": x * 1e30, "mixed rows": torch.cat([x[:8], torch.zeros(8, 33)])}


DATA = samples()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_follow_the_formula(name, bits, symmetric):
    x = DATA[name]
    scale, zero_point = scale_and_zero(x.min(), x.max(), bits, symmetric)
    assert scale.dtype == torch.float32 and zero_point.dtype == torch.int32
    assert torch.isfinite(scale) and scale > 0
    codes = quantize(x, scale, zero_point, bits)
    expected = torch.clamp(torch.round(x / scale) + zero_point, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert codes.dtype == torch.int8 and torch.equal(codes.float(), expected)
    back = dequantize(codes, scale, zero_point)
    assert torch.equal(fake_quantize(x, scale, zero_point, bits), back)
    # the whole range is covered: half a step of error, and 0 stays 0
    assert (back - x).abs().max() <= scale * 0.5001 + (scale / 2 if not symmetric else 0)
    zero = torch.zeros(3)
    assert torch.equal(fake_quantize(zero, scale, zero_point, bits), zero)


def test_half_to_even_and_saturation():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 1e9, -1e9, float("inf")])
    assert quantize(x, 1.0, 0, 8).tolist() == [0, 2, 2, 0, -2, 127, -128, 127]


def test_true_division():
    # 3 x 0.1 in float32 is where a reciprocal gives another code than the division
    scale = torch.tensor(1 / 3)
    x = torch.arange(-4000, 4001) * (scale / 2)
    assert torch.equal(quantize(x, scale, 0, 8), (x / scale).round().clamp(-128, 127).to(torch.int8))


def test_float16_is_divided_in_float32():
    x = torch.randn(64, 64).half()
    assert torch.equal(quantize(x, 0.013, 5, 8), quantize(x.float(), 0.013, 5, 8))


def test_rows_have_their_own_scale():
    x = torch.randn(4, 5) * torch.tensor([[1.0], [10.0], [100.0], [0.0]])
    scale, zero = scale_and_zero(x.amin(1), x.amax(1), 8, False)
    whole = fake_quantize(x, scale[:, None], zero[:, None], 8)
    for i in range(4):
        assert torch.equal(whole[i], fake_quantize(x[i], scale[i], zero[i], 8))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", DATA)
def test_per_token(name, bits):
    x = DATA[name]
    codes, scale = quantize_per_token(x, bits)
    assert codes.dtype == torch.int8 and scale.shape == (16, 1) and scale.dtype == torch.float32
    assert torch.isfinite(scale).all() and (scale > 0).all()
    amax = x.abs().amax(1, keepdim=True)
    assert torch.equal(scale, amax.clamp_min(1e-12) / (2 ** (bits - 1) - 1))
    assert torch.equal(codes, quantize(x, scale, 0, bits))
    assert torch.equal(fake_quantize_per_token(x, bits), codes.float() * scale)


@pytest.mark.parametrize("bits", [4, 8])
def test_probabilities(bits):
    p = torch.softmax(torch.randn(3, 2, 7, 7) * 4, -1)
    codes, scale = quantize_per_token(p, bits, signed=False)
    assert codes.dtype == torch.uint8 and scale.shape == (3, 2, 7, 1)
    assert (codes.amax(-1) == 2**bits - 1).all()
    assert torch.equal(fake_quantize_per_token(p, bits, signed=False), codes.float() * scale)
    assert (codes.float() * scale - p).abs().le(scale * 0.5001).all()
    zero_codes, _ = quantize_per_token(torch.zeros(2, 5), bits, signed=False)
    assert not zero_codes.any()


def test_per_token_edges():
    codes, scale = quantize_per_token(torch.zeros(3, 0), 8)
    assert codes.shape == (3, 0) and scale.shape == (3, 1)
    assert quantize_per_token(torch.zeros(0, 4), 8)[1].shape == (0, 1)
    with pytest.raises(ValueError, match="x is a scalar"):
        quantize_per_token(torch.tensor(1.0), 8)


def test_scale_and_zero_values():
    scale, zero = scale_and_zero(torch.tensor([-1.0, 0.5, -3.0, 0.0]), torch.tensor([3.0, 2.0, -1.0, 0.0]), 8, False)
    # all-positive and all-negative ranges are widened to 0
    assert torch.allclose(scale[:3], torch.tensor([4 / 255, 2 / 255, 3 / 255]))
    assert zero.tolist()[:3] == [-64, -128, 127] and zero[3] == -128
    scale, zero = scale_and_zero(-2.0, 1.0, 4, True)
    assert torch.isclose(scale, torch.tensor(2 / 7)) and zero == 0
    assert torch.isfinite(scale_and_zero(-3e38, 3e38, 8, False)[0])


@pytest.mark.parametrize(("lo", "hi"), [(float("nan"), 1.0), (0.0, float("inf")), (1.0, 0.0)])
def test_scale_and_zero_refuses(lo, hi):
    with pytest.raises(ValueError, match="bounds must be finite with lo <= hi"):
        scale_and_zero(lo, hi, 8, True)


def error_of(weight, lo, hi, spec):
    scale, zero = scale_and_zero(lo, hi, spec.bits, spec.symmetric)
    return (fake_quantize(weight, scale[:, None], zero[:, None], spec.bits) - weight).double().square().sum(1)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_weight_range_against_brute_force(bits, symmetric, observer):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(12, 301, generator=generator)
    weight[0, 5], weight[1], weight[2] = 30.0, 0.0, 0.25
    spec = QuantSpec(bits=bits, symmetric=symmetric, granularity="per_channel", observer=observer)
    scale, zero = weight_range(weight, spec)
    assert scale.shape == zero.shape == (12,) and torch.isfinite(scale).all() and (scale > 0).all()
    lo, hi = weight.amin(1), weight.amax(1)
    found = (fake_quantize(weight, scale[:, None], zero[:, None], bits) - weight).double().square().sum(1)
    if observer == "minmax":
        assert torch.equal(scale, scale_and_zero(lo, hi, bits, symmetric)[0])
    elif observer == "percentile":
        brute = torch.stack([error_of(weight, torch.quantile(weight, 1 - p, dim=1), torch.quantile(weight, p, dim=1), spec) for p in WEIGHT_PERCENTILES])
        assert torch.allclose(found, brute.amin(0), rtol=1e-3, atol=1e-9)
    else:
        brute = torch.stack([error_of(weight, lo * r, hi * r, spec) for r in torch.linspace(0.2, 1.0, 401)])
        # 401 ratios fit the chance of 301 elements a little closer; the search is never worse than min-max
        assert (found <= brute.amin(0) * 1.06 + 1e-9).all()
        assert (found <= error_of(weight, lo, hi, spec) + 1e-9).all()


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_weight_per_tensor_and_chunks(observer):
    weight = torch.randn(1100, 300)
    spec = QuantSpec(bits=4, observer=observer)
    scale, zero = weight_range(weight, spec)
    assert scale.shape == zero.shape == (1100,) and (scale == scale[0]).all()
    # rows do not depend on which chunk they fall in
    spec = QuantSpec(bits=4, granularity="per_channel", observer=observer)
    scale, _ = weight_range(weight, spec)
    assert torch.equal(scale[777:780], weight_range(weight[777:780], spec)[0])
    assert torch.equal(weight_range(weight.t(), spec)[0], weight_range(weight.t().contiguous(), spec)[0])


def test_weight_memory_is_bounded():
    weight = torch.randn(2048, 2048)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    weight_range(weight, QuantSpec(bits=4, granularity="per_channel"))
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 50


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weight_refuses_nan(bad):
    weight = torch.randn(4, 5)
    weight[2, 3] = bad
    for granularity in ("per_channel", "per_tensor"):
        with pytest.raises(ValueError, match="the weight holds NaN or inf"):
            weight_range(weight, QuantSpec(granularity=granularity))


def test_weight_refuses_shapes_and_granularity():
    with pytest.raises(ValueError, match=re.escape("weight has shape (3,); give [N, K]")):
        weight_range(torch.zeros(3), QuantSpec())
    with pytest.raises(ValueError, match=re.escape("weight has shape (3, 0)")):
        weight_range(torch.zeros(3, 0), QuantSpec())
    with pytest.raises(ValueError, match="weight granularity = 'per_token'"):
        weight_range(torch.zeros(3, 4), QuantSpec(granularity="per_token"))
