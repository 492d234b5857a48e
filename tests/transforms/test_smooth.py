"""Outliers of activations move into the weights; the float output stays."""

from __future__ import annotations

import pytest
import torch
from helpers import build, images, quick
from torch import nn

import vitq
from vitq.calib.online import divide_input, divisible
from vitq.calib.runner import transform_of
from vitq.calib.statistics import Histogram
from vitq.conversion import quantize
from vitq.models.sites import LinearSite
from vitq.transforms.smooth import clip_scale, divide_norm, divide_rows, multiply_columns, smoothquant_scale


def test_scales_by_hand() -> None:
    weight = torch.tensor([[1.0, -0.5], [0.25, 1.0]])
    scale = smoothquant_scale(torch.tensor([16.0, 1.0]), [weight], 0.5)
    assert scale.tolist() == [4.0, 1.0]
    assert smoothquant_scale(torch.tensor([16.0, 1.0]), [0.5 * weight, weight], 0.5).tolist() == [4.0, 1.0], "the largest of all that read it"
    assert smoothquant_scale(torch.tensor([0.0, 4.0]), [weight], 0.5).tolist() == [1.0, 2.0], "a channel of zeros stays"
    largest = torch.ones(400)
    largest[7], largest[9], largest[11] = 50.0, 20.0, 5.0
    clipped = clip_scale(largest, 0.005)  # two channels of 400 may stand out: the third is the limit
    assert (clipped[7], clipped[9], clipped[11]) == (10.0, 4.0, 1.0) and float(clipped.sum()) == 397 + 15.0
    assert clip_scale(torch.zeros(5), 0.005).tolist() == [1.0] * 5
    assert clip_scale(torch.tensor([0.0, 0.0, 8.0, 2.0, 0.0]), 0.4).tolist() == [1.0, 1.0, 4.0, 1.0, 1.0], "channels of zeros are no limit"


@pytest.mark.parametrize("norm", [nn.LayerNorm(12), nn.RMSNorm(12)])
def test_what_is_divided_is_multiplied(norm: nn.Module) -> None:
    torch.manual_seed(0)
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    linear, up = nn.Linear(12, 5), nn.Linear(7, 20)
    x, scale = torch.randn(3, 12), torch.rand(12).double() + 0.1
    before = linear(norm(x))
    divide_norm(norm, scale)
    multiply_columns(linear, scale)
    torch.testing.assert_close(linear(norm(x)), before, rtol=1e-5, atol=1e-6)
    z = torch.randn(4, 7)
    hidden, first = up(z), up(z)[:, :8]
    before = linear(hidden[:, 8:])
    divide_rows(up, 8, scale)
    multiply_columns(linear, scale)
    torch.testing.assert_close(linear(up(z)[:, 8:]), before, rtol=1e-5, atol=1e-6)
    assert torch.equal(up(z)[:, :8], first), "rows before the first stay"
    with pytest.raises(ValueError, match="without a weight"):
        divide_norm(nn.LayerNorm(12, elementwise_affine=False), scale)


@pytest.mark.parametrize("transform", ["smoothquant", "clip_outliers"])
@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-dynamic"])
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
@torch.no_grad()
def test_the_float_output_of_a_model_stays(name: str, recipe: str, transform: str) -> None:
    model = build(name).eval()
    x = images(model)
    wanted = model(x)
    prepared, plan = quantize(model, quick(recipe, f"transforms=[{transform}]", "calib_size=2"), [x])
    assert sum("SmoothQuant" in note or "divided" in note for note in plan.notes.values()) >= 4
    torch.testing.assert_close(prepared.model(x), wanted, rtol=1e-4, atol=1e-4)


def test_merged_histogram_is_that_of_the_divided_channels() -> None:
    torch.manual_seed(0)
    x = torch.randn(5000, 6) * torch.tensor([1e-3, 1.0, 30.0, 5.0, 0.0, 2.0]) + torch.tensor([0.0, 0.1, -4.0, 0.0, 0.0, 1.0])
    divisor = torch.tensor([1e-3, 2.0, 20.0, 1.0, 1.0, 3.0])
    channels, one = Histogram(6), Histogram()
    channels.update(x)
    one.update(x / divisor)
    merged = channels.merged(divisor)
    assert merged.count == one.count and float(merged.max) == pytest.approx(float(one.max)) and float(merged.min) == pytest.approx(float(one.min))
    for observer in ("minmax", "percentile", "mse"):
        for bits in (4, 8):
            for got, want in zip(merged.range(bits, False, observer), one.range(bits, False, observer)):
                assert float(got) == pytest.approx(float(want), rel=0.05), (observer, bits)


@pytest.mark.parametrize("changes, message", [
    (["transforms=[smoothquant, layernorm_fold]"], "each of them scales the same channels, so give one"),
    (["transforms=[smoothquant]", "transform_options={alpha: 1.5}"], "transform_options.alpha: 1.5; allowed: 0 to 1"),
    (["transforms=[smoothquant]", "transform_options={top: 0.1}"], "transform_options.top: unknown key; allowed: alpha"),
    (["transforms=[]", "transform_options={alpha: 0.5}"], "transform_options.alpha: unknown key"),
])
def test_refuses(changes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vitq.Recipe.from_yaml("w8a8").with_overrides(changes)


def test_another_transform_or_solver_has_options_of_its_own() -> None:
    changed = vitq.Recipe.from_yaml("dgq-w4a8").with_overrides(["transforms=[smoothquant]", "solver=gptq"])
    assert not changed.transform_options and not changed.solver_options
    kept = vitq.Recipe.from_yaml("dgq-w4a8").with_overrides(["calib_size=4", "transforms=[clip_outliers]"])
    assert kept.transform_options == {"top": 0.005}


@torch.no_grad()
def test_statistics_of_largest_values_alone_are_no_ranges() -> None:
    model = build("deit_tiny_patch16_224", depth=1)
    smooth = quick("smoothquant-w8a8", "calib_size=2")
    stats = vitq.calibrate(model, smooth, [images(model)])
    assert stats["blocks.0.attn.qkv:input"].bins == 4
    static = quick("w8a8-dynamic", "calib_size=2", "qkv.input.dynamic=false")
    with pytest.raises(ValueError, match="statistics of 'blocks.0.attn.qkv:input' are largest values alone, which tell no static range"):
        vitq.convert(model, static, stats)


def test_a_transform_that_finds_nothing_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = build("deit_tiny_patch16_224", depth=1)
    with caplog.at_level("WARNING", "vitq"):
        vitq.convert(model, quick("gptq-w4a16", "calib_size=2", "transforms=[smoothquant]"), [images(model)])
    assert "the transform smoothquant found no layer to change" in caplog.text


def test_smoothing_needs_data() -> None:
    with pytest.raises(ValueError, match="give calib="):
        vitq.convert(build("deit_tiny_patch16_224"), "smoothquant-w8a8")


@pytest.mark.parametrize("rows", [None, ("rows", 0)])
@pytest.mark.parametrize("norm", [None, nn.LayerNorm(12), nn.LayerNorm(12, elementwise_affine=False)])
def test_who_divides_an_input_is_asked_once(norm: nn.Module | None, rows: tuple | None) -> None:
    """Transforms and what is learned take the same inputs, those that `divide_input` can divide: by the norm where there is one, else by rows."""
    model = nn.ModuleDict({"rows": nn.Linear(3, 12), "linear": nn.Linear(12, 5), **({} if norm is None else {"norm": norm})})
    sites = [LinearSite("linear", "fc1", None if norm is None else "norm", rows=rows)]
    able = rows is not None if norm is None else norm.weight is not None
    assert divisible(model, sites) == able
    for transform, dynamic in (("smoothquant", True), ("smoothquant", False), ("layernorm_fold", False), ("layernorm_fold", True)):
        recipe = quick("w8a8", f"transforms=[{transform}]", *(["input.dynamic=true"] if dynamic else []))
        taken = able and (transform == "smoothquant" or norm is not None and not dynamic)
        assert transform_of(sites, {"linear": recipe.resolve("fc1", "linear")}, recipe, model) == (transform if taken else None)
    if able:
        divide_input(model, sites, torch.ones(12))
    else:
        with pytest.raises((ValueError, TypeError)):
            divide_input(model, sites, torch.ones(12))
