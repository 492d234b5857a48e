"""Float16 columns and asymmetric inputs (QUIK), from the choice of columns to the executed model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import build, images, quick, sqnr
from torch import Tensor, nn

import vitq
from vitq.calib.gram import gram_of
from vitq.calib.solvers import SOLVERS
from vitq.calib.solvers.problem import Problem
from vitq.formats import ActivationFormat, QTensor
from vitq.nn.linear import QuantLinear
from vitq.quantizers.activation import fake_activation
from vitq.quantizers.outliers import outlier_columns, outlier_count
from vitq.quantizers.uniform import quantize_per_token_asymmetric
from vitq.recipe import QuantSpec

STRONG = (3, 40, 41, 97)  # channels of a multiple of the others' size


def inputs(rows: int = 300, features: int = 160, seed: int = 0) -> Tensor:
    x = torch.randn(rows, features, generator=torch.Generator().manual_seed(seed)) + 0.4
    x[:, STRONG] *= 40
    return x


def linear(features: int = 160, out: int = 48) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(features, out)


def test_a_rows_codes_span_its_range() -> None:
    """The worked example of QUIK's kernel form, exact in float32; rows of one sign; constant rows and rows of zeros."""
    codes, scale, shift = quantize_per_token_asymmetric(torch.tensor([[-1.0, 0.0, 0.6, 2.0]]), 4)
    assert codes.tolist() == [[-8, -3, 0, 7]] and float(scale) == pytest.approx(0.2) and float(shift) == pytest.approx(0.6)
    x = torch.stack((torch.linspace(5, 6, 16), torch.linspace(-3, -2, 16), torch.full((16,), 7.25), torch.zeros(16)))
    codes, scale, shift = quantize_per_token_asymmetric(x, 4)
    assert codes[0].tolist() == codes[1].tolist() == list(range(-8, 8)) and codes[2:].eq(-8).all()
    assert (codes * scale + shift - x).abs().max() < 1e-6
    assert torch.equal(QTensor(codes, scale, shift=shift).dequantize(), codes * scale + shift)


@pytest.mark.parametrize("features, asked, limit, count", [
    (4096, 256, 0.0625, 256), (4096, 256, 0.5, 256), (11008, 100_000, 0.0625, 688), (576, 256, 0.0625, 32), (576, 128, 0.25, 128),
    (128, 256, 0.0625, 16), (96, 256, 0.0625, 0), (4096, 0, 0.5, 0), (4096, 100, 0.5, 96), (16, 256, 0.5, 0), (32, 256, 0.5, 16)])
def test_how_many(features: int, asked: int, limit: float, count: int) -> None:
    assert outlier_count(QuantSpec(outliers=asked, outlier_limit=limit), features) == count


def test_which() -> None:
    columns = outlier_columns(torch.tensor([1.0, 9.0, 2.0, 9.0, 9.0]), 2)
    assert columns.fp.tolist() == [1, 3] and columns.order.tolist() == [0, 2, 4]


@pytest.mark.parametrize("fmt", [ActivationFormat(4, dynamic=True, symmetric=False), ActivationFormat(8, dynamic=True),
                                 ActivationFormat(4, scale=0.3, zero_point=-2)], ids=["asymmetric", "symmetric", "static"])
def test_outliers_do_not_widen_the_others_range(fmt: ActivationFormat) -> None:
    """Quantized as if the outliers were not there; these themselves are only rounded to float16."""
    x = inputs()
    columns = outlier_columns(x.abs().amax(0), 16)
    assert set(STRONG) <= set(columns.fp.tolist())
    fake = fake_activation(x, dataclasses.replace(fmt, columns=columns))
    assert torch.equal(fake[:, columns.order.long()], fake_activation(x[:, columns.order.long()], fmt))
    assert torch.equal(fake[:, columns.fp.long()], x[:, columns.fp.long()].half().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@torch.no_grad()
def test_what_float16_does_not_hold_becomes_its_largest(backend: str, dtype: torch.dtype) -> None:
    """At run time alone: calibration refuses such inputs. The simulation says the same, and NaN stays what it is."""
    layer, x = linear(), inputs()
    recipe = quick("quik-w4a4", "fc1.input.outliers=16", "fc1.input.outlier_limit=0.2", "solver=rtn")
    module = vitq.linear_module(layer, recipe, x, backend=backend, dtype=torch.float32)
    x, kept = x[:5].to(dtype), module.fp_columns
    x[:4, STRONG[0]] = torch.tensor([7e4, -1e6, torch.inf, -torch.inf])
    x[4, STRONG[1]] = torch.nan
    at = kept.tolist().index(STRONG[0])
    most = torch.tensor([65504.0, -65504, 65504, -65504])
    fp = vitq.ops.quantize(x, bits=4, symmetric=False, kept=kept, backend=backend).fp
    assert torch.equal(fp[:4, at].float(), most) and torch.equal(fp[4].isnan(), kept == STRONG[1])
    fake = fake_activation(x, module.input_format())
    assert torch.equal(fake[:4, STRONG[0]], most) and fake[4, STRONG[1]].isnan()
    bounded = x[:4].float()
    bounded[:, STRONG[0]] = most
    assert torch.equal(module(x)[:4], module(bounded)) and module(x)[4].isnan().all()


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_what_the_codes_miss_moves_into_the_kept_columns(solver: str) -> None:
    """Every solver but rounding leaves less error with columns that it may move than with the same ones fixed."""
    layer, x = linear(), inputs(2000)
    x = x @ (torch.eye(160) + 0.1 * torch.randn(160, 160, generator=torch.Generator().manual_seed(3)))  # features that say something of each other
    columns = outlier_columns(x.abs().amax(0), 16)
    order = torch.cat((columns.order, columns.fp)).long()
    spec, gram = QuantSpec(bits=3, granularity="per_channel", observer="minmax"), gram_of(x, None).ordered(order)
    weight, bias = layer.weight.detach()[:, order], layer.bias.detach()
    solution = SOLVERS[solver](Problem(weight[:, :144], bias, spec, gram, {}, False, weight[:, 144:]))
    numbers = solution.codes * solution.grid.columns()
    assert solution.codes.shape == (48, 144) and solution.kept.shape == (48, 16)

    def error(kept: Tensor) -> float:
        y = x[:, order] @ torch.cat((numbers, kept), 1).T + solution.bias
        return float((y - x @ layer.weight.T - bias).square().mean())

    if solver == "rtn":
        assert torch.equal(solution.kept, weight[:, 144:])
    else:
        assert error(solution.kept) < 0.9 * error(weight[:, 144:])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("changes", [
    [], ["fc1.bits=8"], ["fc1.input.symmetric=true"], ["fc1.input.outliers=0"], ["solver=rtn"], ["solver=erq"],
    ["fc1.weight.symmetric=false"], ["fc1.weight.granularity=per_group", "fc1.weight.group_size=64", "solver=dual_grain"],
    ["fc1.weight.segments=dual_uniform"], ["fc1.bits=8", "fc1.weight.segments=dual_uniform"], ["fc1.input.dynamic=false", "fc1.input.bits=8"]], ids=" ".join)
@torch.no_grad()
def test_a_layer_computes_its_equation(changes: list[str], backend: str) -> None:
    """In float64 from what the buffers hold: nothing here knows of column sums or orders of columns."""
    layer, x = linear(192), torch.cat((inputs(), torch.randn(300, 32)), 1)
    recipe = quick("quik-w4a4", "fc1.input.outlier_limit=0.2", "fc1.input.outliers=32", *changes)
    module = vitq.linear_module(layer, recipe, x, backend=backend, dtype=torch.float32)
    kept = 0 if "fc1.input.outliers=0" in changes else 32
    assert module.outliers == kept and module.portable().shape[1] * (2 if module.weight_bits <= 4 else 1) == 192 - kept
    fmt = module.input_format()
    weight = torch.zeros(48, 192, dtype=torch.float64)
    integers = module.cases()["linear"].params.integers.double()
    scale = module.weight_scale.double()
    ends = module.cases()["linear"].params.segment_ends
    integers = torch.cat([integers[:, a:b] * s[:, None] for a, b, s in zip((0, *ends), ends, scale.view(len(ends), -1))], 1)
    order = torch.arange(192) if fmt.columns is None else fmt.columns.order.long()
    weight[:, order] = integers
    if kept:
        weight[:, module.fp_columns.long()] = module.weight_fp.double()
    exact = fake_activation(x, fmt).double() @ weight.T + module.bias.double()
    got = module(x)
    assert sqnr(exact, got) > 100, "the module computes what its numbers say"
    assert sqnr(layer(x), got) > (12 if kept else 1)


@pytest.mark.parametrize("name", ["quik-w4a4", "quik-w8a8"])
@pytest.mark.parametrize("kind", ["deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
@torch.no_grad()
def test_vision_models_execute_what_is_simulated(kind: str, name: str, tmp_path) -> None:
    sizes = {"depth": 2} if kind.startswith("deit") else {"depths": (2, 2), "embed_dim": 64, "num_heads": (2, 4)}
    model = build(kind, **sizes)
    x, recipe = images(model), quick(name, "calib_size=2", "input.outliers=16", "input.outlier_limit=0.3")
    executed, simulated = vitq.convert(model, recipe, [x], dtype=torch.float32), vitq.simulate(model, recipe, [x])
    assert sqnr(simulated(x), executed(x)) > 40 and sqnr(model(x), executed(x)) > (4 if name == "quik-w4a4" else 28)
    rows = [row for row in vitq.explain(executed) if row.role == "fc1"]
    assert rows and all("asymmetric per token, 16 float16 columns" in row.format for row in rows)
    folder = vitq.save(executed, tmp_path / "c", source={"name": kind, "model_kwargs": {"num_classes": 10, **sizes}})
    assert torch.equal(vitq.load(folder)(x), executed(x))


@torch.no_grad()
def test_more_outliers_are_better_and_a_threshold_leaves_some_out(tmp_path) -> None:
    model = build("deit_tiny_patch16_224", depth=2)
    for i, block in enumerate(model.blocks):  # as language models have them: some channels of a norm far above the others
        block.norm1.weight[list(STRONG)] *= 30
        block.attn.qkv.weight[:, list(STRONG)] /= 30
        if i == 0:  # one layer's lie below the threshold
            block.norm1.weight *= 0.01
            block.norm1.bias *= 0.01
            block.attn.qkv.weight *= 100
    x = images(model, 4)
    recipe = quick("quik-w4a4", "calib_size=4", "input.outlier_limit=0.3", "fc2.input.outliers=0", "fc1.input.outliers=0", "proj.input.outliers=0")
    found = [sqnr(model(x), vitq.convert(model, recipe.with_overrides([f"qkv.input.outliers={k}"]), [x])(x)) for k in (0, 16, 48)]
    assert found[0] + 3 < found[1] < found[2], found
    some = vitq.convert(model, recipe.with_overrides(["qkv.input.outliers=16", "qkv.input.outlier_threshold=5"]), [x])
    assert [block.attn.qkv.outliers for block in some.blocks] == [0, 16]
    assert some.vitq.recipe.rules[-1].names == ("blocks.0.attn.qkv",) and some.vitq.recipe.rules[-1].input == {"outliers": 0}
    assert [row.format.endswith("16 float16 columns") for row in vitq.explain(some) if row.role == "qkv"] == [False, True]
    folder = vitq.save(some, tmp_path / "c", source={"name": "deit_tiny_patch16_224", "model_kwargs": {"num_classes": 10, "depth": 2}})
    assert torch.equal(vitq.load(folder)(x), some(x))


def test_a_fold_and_outliers_of_a_static_input_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="with the transform layernorm_fold, after which all channels have one range"):
        vitq.Recipe.from_yaml("w8a8").with_overrides(["qkv.input.outliers=16"])


def test_statistics_of_a_static_recipe_do_not_serve_outliers() -> None:
    model = build("deit_tiny_patch16_224", depth=1)
    statistics = vitq.calibrate(model, quick("w8a8", "transforms=[]"), [images(model, 4)])
    with pytest.raises(ValueError, match="no fitting statistics for 'blocks.0.attn.qkv:input'"):
        vitq.convert(model, quick("quik-w4a4", "solver=rtn"), statistics)
    assert isinstance(vitq.convert(model, quick("quik-w4a4", "solver=rtn"), [images(model, 4)]).blocks[0].attn.qkv, QuantLinear)


@pytest.mark.parametrize("name", ["quik-w4a4", "quik-w8a8"])
def test_one_layer_from_float(name: str) -> None:
    """By activations or by what statistics hold of them; what is missing is said."""
    layer, x = linear(192), torch.cat((inputs(), torch.randn(300, 32)), 1)
    recipe = quick(name, "fc1.input.outliers=16", "fc1.input.outlier_limit=0.2", "solver=rtn")
    histogram = vitq.Histogram(192)
    histogram.update(x)
    one, other = (vitq.QuantLinear.from_float(layer, recipe, stats) for stats in (x, histogram))
    assert isinstance(one, vitq.QuantLinear) and torch.equal(one(x), other(x)) and one.fp_columns.tolist() == other.fp_columns.tolist()
    with pytest.raises(ValueError, match="has float16 columns: give sample="):
        vitq.QuantLinear.from_float(layer, recipe)
    with pytest.raises(ValueError, match="solves by 'gptq': give sample=, activations"):
        vitq.QuantLinear.from_float(layer, quick(name, "fc1.input.outliers=16"), histogram)
    with pytest.raises(TypeError, match="or a Histogram of them"):
        vitq.QuantLinear.from_float(layer, recipe, vitq.Statistics())
    with pytest.raises(ValueError, match="sample has 160 features, the layer 192"):
        vitq.QuantLinear.from_float(layer, recipe, inputs())
    with pytest.raises(ValueError, match="one linear layer has none"):
        vitq.QuantLinear.from_float(layer, "phq-w8", x)
    with pytest.raises(ValueError, match="inputs reach 1e.05, more than the float16 of outliers holds"):
        vitq.QuantLinear.from_float(layer, recipe, torch.cat((x, torch.full((1, 192), 1e5))))


def test_the_steps_one_by_one() -> None:
    """quantize, multiply integers, multiply the float part, dequantize: the example in vitq.ops.functional is the layer's result."""
    layer, x = linear(192), torch.cat((inputs(), torch.randn(300, 32)), 1)
    recipe = quick("quik-w4a4", "fc1.input.outliers=16", "fc1.input.outlier_limit=0.2", "solver=rtn")
    module = vitq.QuantLinear.from_float(layer, recipe, x, backend="reference", dtype=torch.float32)
    kept, rest = module.fp_columns, module.column_order.long()
    codes = vitq.ops.quantize(x, bits=4, symmetric=False, kept=kept)
    weight = vitq.ops.quantize(layer.weight.detach()[:, rest], bits=4)
    y = vitq.ops.dequantize(vitq.ops.int_matmul(codes, weight), codes.scale, weight.scale, layer.bias.detach(), shift=codes.shift, weight=weight,
                            fp=codes.fp, weight_fp=layer.weight.detach()[:, kept.long()].half())
    assert sqnr(module(x), y) > 100
    for wrong, message in (({"kept": torch.tensor([192])}, "among the 192 features"), ({"kept": torch.arange(192)}, "all 192 features"),
                           ({"scale": 0.1, "symmetric": False}, "symmetric=False is for signed dynamic formats")):
        with pytest.raises(ValueError, match=message):
            vitq.ops.quantize(x, **wrong)
    for wrong in (torch.zeros(192, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.int32), [3], torch.tensor([3.0])):
        with pytest.raises(TypeError, match="kept must be a tensor of integers"):
            vitq.ops.quantize(x, kept=wrong)
    with pytest.raises(ValueError, match="kept must be different integers"):
        vitq.ops.quantize(x, kept=torch.tensor([3, 3]))
    with pytest.raises(ValueError, match="give both or none"):
        vitq.ops.dequantize(vitq.ops.int_matmul(codes, weight), codes.scale, weight.scale, fp=codes.fp)
    with pytest.raises(ValueError, match="needs weight="):
        vitq.ops.dequantize(vitq.ops.int_matmul(codes, weight), codes.scale, weight.scale, shift=codes.shift)
