"""Weights in codes, inputs in floating point; and every shipped recipe on an image model and on a language model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import build, images, quick, sqnr
from torch import nn

import vitq
import vitq.plan
from vitq.calib.choose import linear_params
from vitq.calib.gram import gram_of
from vitq.nn.weight_only import WeightOnlyLinear
from vitq.ops.dispatch import registered

pytest.importorskip("transformers", reason="needs pip install vitq[llm]")
import language_models  # noqa: E402

# dB of the logits against the float model, random weights: by weight bits and by activation bits, the least that a working recipe has.
FLOORS = {(8, 16): 30.0, (8, 8): 18.0, (6, 6): 12.0, (5, 5): 8.0, (4, 16): 8.0, (4, 8): 7.0, (4, 4): 4.0, (3, 4): 1.0, (3, 3): 0.0}
# Of recipes whose method must show.
OWN_FLOORS = {"quik-w8a8": 28.0, "quik-w4a4": 8.0, "phq-w8": 27.0, "phq-mixed": 13.0, "dgq-w4a8": 10.0}


@pytest.mark.parametrize("granularity", ["per_channel", "per_group", "per_tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("features", [96, 75, 30])
def test_the_product_is_that_of_the_dequantized_weight(features: int, bits: int, symmetric: bool, granularity: str) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(features, 17), torch.randn(2, 5, features)
    recipe = vitq.Recipe.from_yaml("gptq-w4a16").with_overrides(
        [f"fc1.weight.bits={bits}", f"fc1.weight.symmetric={str(symmetric).lower()}", f"fc1.weight.granularity={granularity}", "fc1.weight.group_size=32"])
    spec = recipe.resolve("fc1")
    params = linear_params(linear, spec, recipe, None, gram_of(x, None))
    scale, zero = params.weight_scale, torch.zeros_like(params.weight_scale) if params.weight_zero is None else params.weight_zero
    group = torch.arange(features) // 32 if granularity == "per_group" else None
    scale, zero = (t[:, None] if group is None else t[group].T for t in (scale, zero))
    weight = (params.codes.double() - zero.double()) * scale.double()
    assert sqnr(linear.weight, weight) > {2: 2.0, 4: 14.0, 8: 35.0}[bits]
    wanted = x.double() @ weight.T + linear.bias.double()
    for backend, kernel in registered("weight_only"):
        if backend != "cuda" and kernel.supports(params) is None:
            packed = kernel.pack(params, torch.device("cpu"))
            torch.testing.assert_close(kernel.run(packed, x, dtype=torch.float32).double(), wanted, rtol=1e-5, atol=1e-5)
            half = kernel.run(packed, x.bfloat16(), dtype=torch.bfloat16)
            assert half.dtype == torch.bfloat16 and sqnr(wanted, half) > 40
    module = WeightOnlyLinear(features, 17, spec, dtype=torch.float32, backend="auto")
    module.set_params(params)
    torch.testing.assert_close(module(x).double(), wanted, rtol=1e-5, atol=1e-5)
    held = 17 * ((features + 1) // 2 if bits <= 4 else features)
    assert module.portable().numel() == held, "the weight stays packed"


@pytest.mark.parametrize("features, group, outputs", [(96, 64, 17), (256, 0, 32), (160, 32, 48)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_bfloat16_rows_on_a_cpu_meet_packed_weights(features: int, group: int, outputs: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(features, outputs), torch.randn(2, 3, features)
    recipe = vitq.Recipe.from_yaml("gptq-w4a16").with_overrides([f"fc1.weight.symmetric={str(symmetric).lower()}", *(
        [f"fc1.weight.group_size={group}"] if group else ["fc1.weight.granularity=per_channel"])])
    module = vitq.linear_module(linear, recipe, x, dtype=torch.bfloat16)
    wanted = vitq.linear_module(linear, recipe, x, dtype=torch.float32, backend="reference")(x)
    choice, _ = module.packed()["weight_only"]
    assert choice.kernel.name == "torch-int4" and sqnr(wanted, module(x.bfloat16())) > 40
    monkeypatch.setattr("vitq.ops.weight_only.PackedWeight.rows", None)  # no weight becomes floats
    assert module(x.bfloat16()).shape == wanted.shape
    with pytest.raises(TypeError):
        module(x.bfloat16().repeat(20, 1, 1))


def test_what_the_packed_product_of_a_cpu_refuses() -> None:
    (kernel,) = [kernel for backend, kernel in registered("weight_only") if kernel.name == "torch-int4"]
    params = vitq.plan.LinearParams(torch.zeros(4, 64, dtype=torch.int8), 4, torch.ones(4), None, None)
    assert kernel.supports(params) is None
    group = torch.arange(64) % 2
    for change, reason in (({"weight_bits": 8}, "weights of 8 bits"), ({"codes": torch.zeros(4, 40, dtype=torch.int8)}, "40 features in groups"),
                           ({"column_group": group, "weight_scale": torch.ones(2, 4)}, "64 features in groups that are not whole")):
        assert reason in kernel.supports(replace(params, **change))


def test_rows_of_a_large_weight_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x = nn.Linear(64, 50), torch.randn(3, 64)
    module = vitq.linear_module(linear, "gptq-w4a16", x, dtype=torch.float32)
    whole = module(x)
    monkeypatch.setattr("vitq.ops.weight_only.CHUNK", 64 * 7)
    torch.testing.assert_close(module(x), whole, rtol=1e-6, atol=1e-6)
    assert sqnr(linear(x), whole) > 15 and "W4A16, groups of 128, asymmetric weights" in repr(module)


@pytest.fixture(scope="module")
def decoder() -> nn.Module:
    return language_models.build("Llama", hidden_size=160, intermediate_size=288)


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return build("deit_tiny_patch16_224", depth=2)


@pytest.mark.parametrize("kind", ["vit", "decoder"])
@pytest.mark.parametrize("name", sorted(vitq.recipes()))
@torch.no_grad()
def test_every_recipe_on_images_and_on_text(name: str, kind: str, request: pytest.FixtureRequest) -> None:
    """It runs and is as close as its bits allow, or says why it does not."""
    model = request.getfixturevalue(kind)
    x = language_models.ids(4, 40) if kind == "decoder" else images(model)
    recipe = quick(name, *([] if "flatquant" in name else ["weight.observer=minmax"]), "calib_size=2")
    if recipe.learns:
        recipe = recipe.with_overrides(["block_gradient.epochs=20"])
    if kind == "vit" and recipe.resolve("qk").cached:
        with pytest.raises(ValueError, match="as they enter a cache, and a model of images has none"):
            vitq.convert(model, recipe, [x])
        return
    if recipe.execution == "simulated":
        with pytest.raises(ValueError, match="is for simulation"):
            vitq.convert(model, recipe, [x])
        executed = vitq.simulate(model, recipe, [x])
    else:
        executed = vitq.convert(model, recipe, [x])
    logits = [(m(x).logits if kind == "decoder" else m(x)).float() for m in (model, executed)]
    part = ".least" if recipe.heads else ""
    spec = recipe.resolve("qkv", f"qkv{part}")
    assert torch.isfinite(logits[1]).all() and sqnr(*logits) > OWN_FLOORS.get(name, FLOORS[spec.weight.bits, spec.input.bits])
    if recipe.execution != "simulated":
        rows = {row.role: row for row in vitq.explain(executed) if row.role != "qkv" or row.layer.endswith(part)}
        bits = spec.input.bits
        assert rows["qkv"].format.startswith(f"W{spec.weight.bits}A{bits}") and rows["fc2"].kernel != "torch"


@pytest.mark.parametrize("size", [224, 136])  # windows that fit, and windows filled up with zeros
@pytest.mark.parametrize("name, changes", [("gptq-w4a16", []), ("w8a8-dynamic", ["bits=16"]), ("w8a8-dynamic", [f"{r}.bits=16" for r in ("qkv", "proj", "fc1", "fc2")])])
@torch.no_grad()
def test_swin_blocks_that_stay_in_float(name: str, changes: list[str], size: int) -> None:
    model = build("swin_tiny_patch4_window7_224", depths=(2, 2), embed_dim=24, num_heads=(1, 2), img_size=size)
    x, recipe = images(model), quick(name, *changes, "calib_size=2")
    executed, simulated = vitq.convert(model, recipe, [x], dtype=torch.float32), vitq.simulate(model, recipe, [x])
    assert sqnr(simulated(x), executed(x)) > 100 and sqnr(model(x), executed(x)) > (20 if name == "gptq-w4a16" else 35)
    with pytest.raises(ValueError, match="'layers.0.blocks.0' or its input in float: a Swin block runs quantized as a whole or not at all"):
        vitq.convert(model, quick("w8a8-dynamic", "fc1.input.bits=16", "calib_size=2"), [x])


@pytest.mark.parametrize("changes, message", [
    (["fc1.weight.bits=16", "fc1.input.bits=8"], "its input has 8: integers are multiplied by integers"),
    (["patch_embed.weight.bits=4", "patch_embed.input.bits=16"], "a patch embedding runs in integers or in float"),
    (["fc1.weight.segments=dual_uniform", "fc1.weight.granularity=per_channel"], "an input in floating point needs no accumulators"),
    (["fc1.weight.group_size=48"], "weight.group_size: 48; allowed: multiples of 32"),
    (["fc1.input.bits=8", "fc1.weight.bits=8", "fc1.weight.symmetric=true"], "times the multiplier of its group would not be an int8"),
    (["fc1.input.granularity=per_group", "fc1.input.bits=8"], "allowed for static activations"),
    (["fc1.weight.segments=dual_uniform", "fc1.input.bits=8"], "columns are divided one way"),
])
def test_refuses(changes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vitq.Recipe.from_yaml("gptq-w4a16").with_overrides(changes)


def test_a_weight_only_model_reloads(tmp_path, vit: nn.Module) -> None:
    x = images(vit)
    model = vitq.convert(vit, quick("gptq-w4a16", "calib_size=2"), [x])
    folder = vitq.save(model, tmp_path / "c", source={"name": "deit_tiny_patch16_224", "model_kwargs": {"num_classes": 10, "depth": 2}})
    assert torch.equal(vitq.load(folder)(x), model(x))
