"""Solvers against their definitions, written out with explicit data; and the layers that could break them."""

from __future__ import annotations

import pytest
import torch
from helpers import build, images, quick, sqnr
from torch.utils.data import DataLoader, IterableDataset

import vitq
from vitq.calib import gram as grams
from vitq.calib.gram import Gram, collect_grams, gram_of
from vitq.calib.solvers import SOLVERS
from vitq.calib.solvers.erq import descend, follow_gradient, reduce_input_error
from vitq.calib.solvers.problem import Problem, solve_ridge
from vitq.formats import ActivationFormat, int_range
from vitq.models import prepare
from vitq.quantizers.activation import fake_activation
from vitq.quantizers.grid import WeightGrid
from vitq.quantizers.uniform import scale_and_zero
from vitq.recipe import QuantSpec

FORMAT = ActivationFormat(4, scale=0.4, zero_point=1)
FINE = ActivationFormat(8, scale=0.05, zero_point=1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(rows: int, features: int, seed: int = 0) -> torch.Tensor:
    """Correlated, of unequal size, off zero."""
    mix = torch.randn(features, features, generator=generator(seed)) / features**0.5
    return torch.randn(rows, features, generator=generator(seed + 1)) @ mix * torch.linspace(0.2, 2.0, features) + 0.3


def layer(n: int, k: int, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, k, generator=generator(seed)) * 0.1, torch.randn(n, generator=generator(seed + 1))


def output_error(problem: Problem, x: torch.Tensor, solution, fmt: ActivationFormat = FORMAT) -> float:
    """Mean square of what the quantized layer misses of the float one, on the inputs themselves."""
    weight = (solution.codes - solution.grid.zero_points()).double() * solution.grid.columns().double()
    bias = 0.0 if problem.bias is None else solution.bias.double() - problem.bias.double()
    wanted = x.double() @ problem.weight.double().T
    return float((fake_activation(x, fmt).double() @ weight.T + bias - wanted).square().mean())


def test_gram_matrices_are_the_sums_of_products() -> None:
    x = inputs(500, 20)
    gram = gram_of(x, FORMAT)
    ones = torch.ones(500, 1, dtype=torch.float64)
    floats, read = (torch.cat((t.double(), ones), 1) for t in (x, fake_activation(x, FORMAT)))
    torch.testing.assert_close(gram.quantized, read.T @ read, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(gram.cross, read.T @ floats, rtol=1e-12, atol=1e-9)
    assert gram.rows == 500


@pytest.mark.parametrize("ridge", [0.1, 10.0])
@pytest.mark.parametrize("rows", [400, 12])
def test_input_error_reduction_is_explicit_ridge_regression(rows: int, ridge: float) -> None:
    x, (weight, bias) = inputs(rows, 24), layer(7, 24)
    ones = torch.ones(rows, 1, dtype=torch.float64)
    floats, read = (torch.cat((t.double(), ones), 1) for t in (x, fake_activation(x, FORMAT)))
    joint = torch.cat((weight, bias[:, None]), 1).double()
    missed = floats @ joint.T - read @ joint.T
    explicit = joint + torch.linalg.lstsq(
        torch.cat((read, ridge**0.5 * torch.eye(25, dtype=torch.float64))), torch.cat((missed, torch.zeros(25, 7, dtype=torch.float64))),
        driver="gelsd").solution.T
    got = reduce_input_error(joint, read.T @ read, read.T @ floats, ridge)
    torch.testing.assert_close(got, explicit, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("size", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("rule", ["descent", "gradient"])
def test_rounding_never_raises_its_objective(rule: str, size: float) -> None:
    """At any size of the inputs the exact descent lowers it; ERQ's rule needs steps that large gradients ask for."""
    x = inputs(300, 32).double() * size
    inner = x.T @ x / len(x)
    weight, step = layer(40, 32)[0].double(), torch.full((40, 32), 0.05, dtype=torch.float64)
    value = weight / step
    low, high, nearest = value.floor().clamp(-8, 7), value.ceil().clamp(-8, 7), value.round().clamp(-8, 7)

    def objective(codes: torch.Tensor) -> torch.Tensor:
        error = (codes - value) * step
        return ((error @ inner) * error).sum(1)

    least, most = (torch.full((1, 1), code, dtype=torch.float64) for code in (-8.0, 7.0))
    rounded = (descend if rule == "descent" else follow_gradient)(value, nearest, step, inner, least, most)
    before, after = objective(nearest), objective(rounded)
    assert bool((after <= before * (1 + 1e-9)).all()) and bool(((rounded >= -8) & (rounded <= 7)).all())
    if rule == "gradient":
        assert bool(((rounded == low) | (rounded == high)).all())
        return
    assert float(after.sum()) < 0.7 * float(before.sum())
    for column in range(32):  # no single step is left that lowers it
        for by in (-1, 1):
            stepped = rounded.clone()
            stepped[:, column] = (stepped[:, column] + by).clamp(-8, 7)
            assert bool((objective(stepped) >= after * (1 - 1e-6)).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4])
def test_solvers_lose_less_the_more_they_do(bits: int, symmetric: bool) -> None:
    x, (weight, bias) = inputs(2000, 64), layer(48, 64)
    spec, gram = QuantSpec(bits=bits, granularity="per_channel", symmetric=symmetric), gram_of(x, FORMAT)

    def error(solver: str, **options) -> float:
        if solver == "erq":  # 2000 rows that repeat one pattern take a smaller ridge than as many of a trained model
            options = {"input_ridge": 20.0, **options}
        problem = Problem(weight, bias, spec, gram, options)
        return output_error(problem, x, SOLVERS[solver](problem))

    off = {"reduce_inputs": False, "compensate": False, "rounding": "nearest"}
    rtn, nothing = error("rtn"), error("erq", **off)
    assert nothing == pytest.approx(rtn, rel=1e-6)  # with every part off it is rounding to nearest
    assert error("gptq") < rtn
    for part in ({"reduce_inputs": True}, {"compensate": True}, {"compensate": True, "columns": "halves"}, {"rounding": "descent"},
                 {"rounding": "gradient"}):
        assert error("erq", **{**off, **part}) < rtn, part
    paper = error("erq", columns="halves", rounding="gradient")
    assert error("erq") < error("erq", columns="halves") < paper < rtn
    assert error("erq") < 0.95 * error("gptq") and error("erq") < 0.7 * rtn


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("segments", ["one", "dual_uniform"])
@pytest.mark.parametrize("solver", ["gptq", "erq"])
@pytest.mark.parametrize("case", ["plain", "no bias", "constant row", "dead channel", "few rows", "one feature", "6 bits"])
def test_layers_that_could_break_a_solver(case: str, solver: str, segments: str, symmetric: bool) -> None:
    bits = 6 if case == "6 bits" else 4
    features = 1 if case == "one feature" else 70
    x, (weight, bias) = inputs(10 if case == "few rows" else 300, features), layer(60, features)
    if case == "constant row":
        weight[3], weight[4] = 0.0, 0.7
    if case == "dead channel":
        x[:, 5] = 0.0
    spec = QuantSpec(bits=bits, granularity="per_channel", segments=segments, symmetric=symmetric)
    problem = Problem(weight, None if case == "no bias" else bias, spec, gram_of(x, FORMAT))
    solution = SOLVERS[solver](problem)
    qmin, qmax = int_range(bits)
    assert solution.codes.dtype == torch.int8 and solution.codes.shape == weight.shape
    assert qmin <= int(solution.codes.min()) and int(solution.codes.max()) <= qmax
    assert (solution.bias is None) == (problem.bias is None)
    rtn = SOLVERS["rtn"](problem)
    found, least = output_error(problem, x, solution), output_error(problem, x, rtn)
    assert found <= 1.05 * least


def test_a_singular_matrix_gets_a_larger_ridge() -> None:
    ones = torch.ones(6, 6, dtype=torch.float64)
    assert bool(torch.isfinite(solve_ridge(ones, ones, 0.0)).all())
    with pytest.raises(ValueError, match="Gram matrix is not finite"):
        solve_ridge(ones * torch.nan, ones, 1.0)


def test_memory_bounds_the_layers_of_one_pass(monkeypatch) -> None:
    """However the layers are grouped into passes, and the images into batches, the matrices are the same."""
    prepared = prepare(build(depth=2))
    x = images(prepared.model, 6, seed=2)
    formats = {site.name: FORMAT for site in prepared.linears}
    passes = []
    monkeypatch.setattr(grams, "gathering", lambda model, group, real=grams.gathering: (passes.append(len(group)), real(model, group))[1])
    at_once = dict(collect_grams(prepared, formats, [x], 6))
    assert passes == [len(formats)] and list(at_once) == list(formats)
    passes.clear()
    for name, gram in collect_grams(prepared, formats, x.split(2), 6, memory=2e6):
        torch.testing.assert_close(gram.quantized, at_once[name].quantized, rtol=1e-6, atol=1e-3)
        torch.testing.assert_close(gram.cross, at_once[name].cross, rtol=1e-6, atol=1e-3)
        assert gram.rows == at_once[name].rows
    assert len(passes) > 2 and sum(passes) == len(formats)


SWIN = {"img_size": 56, "embed_dim": 32, "depths": (1, 2), "num_heads": (2, 4)}


@pytest.mark.parametrize("name, kwargs", [("deit_tiny_patch16_224", {"depth": 2}), ("swin_tiny_patch4_window7_224", SWIN)])
def test_models_lose_less_by_erq_than_by_gptq_and_rounding(name: str, kwargs: dict) -> None:
    model = build(name, **kwargs)
    x, calib = images(model, 4), [images(model, 8, seed=2), images(model, 8, seed=3)]
    found = {}
    for solver in ("rtn", "gptq", "erq"):
        # Few and random inputs take a smaller ridge than those of a trained model, of which the default is.
        options = "{input_ridge: 10}" if solver == "erq" else "{}"
        recipe = quick("erq-w4a4", f"solver={solver}", f"solver_options={options}", calib_size=16)
        converted = vitq.convert(model, recipe, iter(calib), dtype=torch.float32)  # an iterator is read once
        found[solver] = sqnr(model.forward_features(x), converted.forward_features(x))
        assert sqnr(vitq.simulate(model, recipe, calib)(x), converted(x)) > 20
    # Random weights hardly tell the two solvers apart here; test_solvers_lose_less_the_more_they_do does, layer by layer.
    assert found["gptq"] > found["rtn"] + 0.8 and found["erq"] > found["gptq"] - 0.1, found


def test_what_a_solver_needs() -> None:
    model, recipe = build(depth=1), quick("erq-w8a8")
    with pytest.raises(ValueError, match="needs the calibration images themselves"):
        vitq.convert(model, recipe, vitq.calibrate(model, recipe, [images(model, 4)]))
    dynamic = quick("w8a8-dynamic", "solver=gptq", "calib_size=4")
    with pytest.raises(ValueError, match="solves by 'gptq': give calib="):
        vitq.convert(model, dynamic)
    assert sqnr(model(images(model)), vitq.convert(model, dynamic, [images(model, 4, seed=2)])(images(model))) > 25
    with pytest.raises(TypeError, match="images must be floating point"):  # what nothing else looks at
        vitq.convert(model, dynamic, [torch.zeros(4, 3, 224, 224, dtype=torch.uint8)])
    stats = vitq.calibrate(model, recipe, [images(model, 4)])
    for given in ([], iter([])):
        with pytest.raises(ValueError, match="calibration data holds 0 images"):
            vitq.convert(model, recipe, given, statistics=stats)
    with pytest.raises(ValueError, match="solves by 'gptq': give sample="):
        vitq.linear_module(model.blocks[0].mlp.fc1, dynamic)
    sample = torch.randn(300, 192)
    module = vitq.linear_module(model.blocks[0].mlp.fc1, dynamic, sample, dtype=torch.float32)
    assert sqnr(model.blocks[0].mlp.fc1(sample), module(sample)) > 30


def test_every_pass_sees_the_same_images() -> None:
    """Of a loader that shuffles, and of one that cannot be read twice."""
    model, recipe = build(depth=1), quick("erq-w8a8", calib_size=8)

    class Shuffled:
        reads = 0

        def __iter__(self):
            self.reads += 1
            return iter([images(model, 4, seed=10 * self.reads), images(model, 4, seed=10 * self.reads + 1)])

    shuffled, x = Shuffled(), images(model)
    found = vitq.convert(model, recipe, shuffled, memory=1e6)(x)
    assert shuffled.reads == 1
    assert torch.equal(found, vitq.convert(model, recipe, [images(model, 4, seed=10), images(model, 4, seed=11)])(x))
    once = Once([images(model, 4, seed=10), images(model, 4, seed=11)])
    assert torch.equal(found, vitq.convert(model, recipe, DataLoader(once, batch_size=None))(x))


class Once(IterableDataset):
    """Has nothing more to give the second time."""

    def __init__(self, batches) -> None:
        self.batches = iter(batches)

    def __iter__(self):
        return self.batches


@pytest.mark.parametrize("options, message", [
    ("{rounding: up}", "solver_options.rounding: 'up' is not known; allowed: nearest, gradient, descent"),
    ("{ridge: 1}", "solver_options.ridge: unknown key"), ("{input_ridge: 0}", "solver_options.input_ridge: 0; allowed: a number above 0"),
    ("{rounding: gradient}", "solver_options.rounding: 'gradient' goes with columns: halves"),
    ("{compensate: 1}", "solver_options.compensate: 1 is int; give true or false"), ("3", "solver_options: 3 is int; give a mapping"),
])
def test_solver_options_are_checked(options: str, message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as raised:
        vitq.Recipe.from_yaml("erq-w4a4").with_overrides([f"solver_options={options}"])
    assert message in str(raised.value)
    recipe = vitq.Recipe.from_yaml("erq-w4a4").with_overrides(["solver_options={rounding: gradient, columns: halves}"])
    assert vitq.Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.solver_options == {"rounding": "gradient", "columns": "halves"}


def test_an_unused_gram_has_no_rows() -> None:
    assert Gram(3).rows == 0 and not bool(Gram(3).quantized.any())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("solver, options", [("rtn", {}), ("gptq", {}), ("dual_grain", {}), ("dual_grain", {"rounding": "nearest"}), ("erq", {})])
def test_groups_are_multiples_of_one_scale_and_products_fit_int8(solver: str, options: dict, symmetric: bool) -> None:
    x, (weight, bias) = inputs(500, 176), layer(24, 176)
    weight[:, 64:128] *= 4.0
    weight[0, 128:] = 0.2  # all of one sign, and constant
    weight[1] = 0.0
    spec = QuantSpec(bits=4, granularity="per_group", group_size=64, symmetric=symmetric)
    solution = SOLVERS[solver](Problem(weight, bias, spec, gram_of(x, FINE), options))
    grid, codes = solution.grid, solution.codes.int()
    assert grid.multiplier.shape == (3, 24) and grid.scale.shape == (24,) and int(grid.multiplier.min()) >= 1
    assert grid.group.tolist() == [0] * 64 + [1] * 64 + [2] * 48, "the last group is short"
    assert int(codes.min()) >= -8 and int(codes.max()) <= 7
    products = (codes - grid.zero_points()) * grid.multiplier.int()[grid.group.long()].T
    assert int(products.abs().max()) <= 127
    one = SOLVERS["rtn"](Problem(weight, bias, QuantSpec(bits=4, granularity="per_channel", symmetric=symmetric), gram_of(x, FINE)))
    problem = Problem(weight, bias, spec, gram_of(x, FINE), options)
    assert output_error(problem, x, solution, FINE) < 0.8 * output_error(problem, x, one, FINE), "groups gain over one scale a row"


@pytest.mark.parametrize("symmetric", [True, False])
def test_dual_grain_loses_less_than_rounding(symmetric: bool) -> None:
    x, (weight, bias) = inputs(2000, 256), layer(48, 256)
    spec, gram = QuantSpec(bits=4, granularity="per_group", group_size=64, symmetric=symmetric), gram_of(x, FINE)

    def error(solver: str, weight_only: bool = False, **options) -> float:
        problem = Problem(weight, bias, spec, gram, options, weight_only)
        return output_error(problem, x, SOLVERS[solver](problem), FINE)

    assert error("dual_grain", rounding="nearest") < 0.95 * error("rtn")
    assert error("dual_grain") < 0.8 * error("dual_grain", rounding="nearest"), "GPTQ's rounding on the same grid"
    assert error("dual_grain") < 1.05 * error("gptq"), "which has ranges of least squares"
    assert error("dual_grain", weight_only=True, rounding="nearest") < error("rtn", weight_only=True), "scales in floating point"


def test_a_group_of_two_grains_by_hand() -> None:
    """A row whose largest weight is 1 with 1/127 a step; a group in [-0.4, 0.5]: scale 0.06, zero point 7 of 0..15, multiplier 8; 0.5 is code 15
    and becomes 64/127."""
    scale, zero = scale_and_zero(torch.tensor([-0.4]), torch.tensor([0.5]), 4, False)
    assert float(scale) == pytest.approx(0.06) and int(zero) == 7 - 8
    multiplier = (scale * 127).round().to(torch.int8)[None]
    grid = WeightGrid(torch.tensor([1 / 127]), torch.zeros(1, dtype=torch.uint8), multiplier, zero[None])
    code = (torch.tensor([[0.5]]) / grid.columns()).round() + grid.zero_points()
    low, high = grid.limits(4)
    assert int(multiplier) == 8 and int(code) + 8 == 15 and (int(low), int(high)) == (-8, 7)
    assert float((code - grid.zero_points()) * grid.columns()) == pytest.approx(64 / 127)
