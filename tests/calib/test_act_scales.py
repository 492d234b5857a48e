"""act_scales: what SmoothQuant's file holds, by the source model's names."""

from __future__ import annotations

import pytest
import torch
from helpers import build, images, run_tool

import vitq

transformers = pytest.importorskip("transformers", reason="needs pip install vitq[llm]")
import language_models  # noqa: E402
from language_models import ids  # noqa: E402

from vitq.models.language import source_names  # noqa: E402


@pytest.mark.parametrize("family", ["Llama", "OPT", "Falcon"])
def test_largest_inputs_by_the_models_own_names(family: str) -> None:
    model, batches = language_models.build(family), [ids(2, 20, seed=1), ids(2, 20, seed=2)]
    found = vitq.act_scales(model, batches)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert found.keys() == linears.keys() and all(found[name].shape == (module.in_features,) for name, module in linears.items())
    if family == "Llama":
        layer = model.model.layers[1]
        assert torch.equal(found["model.layers.1.self_attn.q_proj"], found["model.layers.1.self_attn.v_proj"])
        with torch.no_grad():
            seen = [model.model(batch, output_hidden_states=True).hidden_states[1] for batch in batches]
            normed = torch.cat([layer.input_layernorm(h).flatten(0, 1) for h in seen])
        torch.testing.assert_close(found["model.layers.1.self_attn.k_proj"], normed.abs().amax(0))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_vision_models_too() -> None:
    model = build("deit_tiny_patch16_224", depth=1)
    assert vitq.act_scales(model, [images(model)])["blocks.0.attn.qkv"].shape == (192,)


def test_refuses() -> None:
    model = language_models.build("Llama")
    with pytest.raises(ValueError, match="no calibration data"):
        vitq.act_scales(model, [])
    assert torch.equal(vitq.act_scales(model, ids())["lm_head"], vitq.act_scales(model, [ids()])["lm_head"]), "one tensor is one batch"
    with pytest.raises(ValueError, match="quantized already"):
        vitq.act_scales(vitq.convert(model), [ids()])
    with pytest.raises(ValueError, match="there is nothing to measure"):
        vitq.act_scales(torch.nn.Conv2d(3, 3, 1), [torch.zeros(1, 3, 4, 4)])
    with pytest.raises(ValueError, match="token ids"):
        vitq.act_scales(model, [torch.full((1, 4), 10_000)])
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[0] = float("inf")
    with pytest.raises(ValueError, match="input of 'model.layers.0.self_attn.q_proj': not finite"):
        vitq.act_scales(model, [ids()])


def test_the_tool_says_what_is_wrong(tmp_path) -> None:
    import act_scales as tool

    code, _, err = run_tool(tool, "--model", tmp_path / "none", "--nsamples", 0)
    assert code == 2 and "--nsamples must be at least 1" in err
    code, _, err = run_tool(tool, "--model", tmp_path / "none", "--output", tmp_path / "no" / "a.pt")
    assert code == 2 and "there is no folder" in err
    code, _, err = run_tool(tool, "--model", tmp_path / "none", "--output", tmp_path)
    assert code == 2 and "it is a folder" in err


RECIPES = [("smoothquant-w8a8", ()), ("quik-w4a4", ("input.outliers=8",)), ("dgq-w4a8", ("solver=rtn",))]


@pytest.mark.parametrize("name, changes", RECIPES)
@pytest.mark.parametrize("family", ["Llama", "OPT", "Falcon"])
@torch.no_grad()
def test_imported_maxima_stand_for_measured_ones(family: str, name: str, changes: tuple, tmp_path) -> None:
    model, calib, x = language_models.build(family), [ids(4, 20, seed=1)], ids(2, 16, seed=5)
    recipe = language_models.quick(name, *changes)
    measured = vitq.calibrate(model, recipe, calib)
    scales = vitq.act_scales(model, calib)
    wanted = vitq.convert(model, recipe, calib, statistics=measured, dtype=torch.float32)
    torch.save(scales, tmp_path / "act_scales.pt")
    stats = vitq.import_act_scales(tmp_path / "act_scales.pt", model)
    vitq.check(model, recipe, stats)
    found = vitq.convert(model, recipe, calib, statistics=stats, dtype=torch.float32)
    torch.testing.assert_close(found(x).logits, wanted(x).logits, atol=2e-6, rtol=0)  # transformers' RMSNorm has other last bits than torch's
    for key in measured:
        for source in source_names(key.rpartition(":")[0]):
            scales[source] = torch.maximum(measured[key].min.abs(), measured[key].max.abs())
    found = vitq.convert(model, recipe, calib, statistics=vitq.import_act_scales(scales, model), dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), wanted.state_dict().values(), strict=True))
    assert torch.equal(found(x).logits, wanted(x).logits)


def test_maxima_tell_no_static_range() -> None:
    model = language_models.build("Llama")
    stats = vitq.import_act_scales(vitq.act_scales(model, ids()), model)
    for recipe in (vitq.Recipe.from_yaml("w8a8"), vitq.Recipe.from_yaml("smoothquant-w8a8").with_overrides(["input.dynamic=false"])):
        for use in (vitq.check, lambda model, recipe, stats: vitq.convert(model, recipe, statistics=stats)):
            with pytest.raises(ValueError, match="largest values alone, which tell no static range: calibrate with this recipe"):
                use(model, recipe, stats)
    other = language_models.build("Llama", num_hidden_layers=1)
    with pytest.raises(ValueError, match="another model"):
        vitq.check(other, "smoothquant-w8a8", stats)


def test_files_that_do_not_fit(tmp_path) -> None:
    model = language_models.build("Llama", tie_word_embeddings=True)
    scales, q = vitq.act_scales(model, ids()), "model.layers.1.self_attn.q_proj"

    def refuses(match: str, value: object, name: str = q) -> None:
        with pytest.raises(ValueError, match=match):
            vitq.import_act_scales({**scales, name: value}, model)

    assert len(vitq.import_act_scales({name: t for name, t in scales.items() if name != "lm_head"}, model)) == 8
    with pytest.raises(ValueError, match="'model.layers.1.self_attn.q_proj' of this LlamaForCausalLM are missing"):
        vitq.import_act_scales({name: t for name, t in scales.items() if name != q}, model)
    refuses(r"'model.layers.1.self_attn.q_proj' has torch.float32 \[63\]; the layer has 64 input features", scales[q][:63])
    refuses("has torch.int64", scales[q].long())
    refuses("negative or not finite", -scales[q])
    refuses("negative or not finite", scales[q] * float("nan"))
    refuses("share an input differ in channel .*q_proj: .*k_proj: .*they were not measured together", scales[q] * 3)
    refuses("'model.layers.9.mlp.up_proj' of it are no linear layers", scales[q], "model.layers.9.mlp.up_proj")
    refuses("not a mapping of layer names", [1.0])
    half = vitq.import_act_scales({**scales, q: scales[q] * 0.8}, model)["model.layers.1.self_attn.qkv_proj:input"]
    assert torch.equal(half.max, scales[q]) and torch.equal(half.min, -scales[q]), "the largest of what is said of one input"
    with pytest.raises(FileNotFoundError, match="no such file"):
        vitq.import_act_scales(tmp_path / "none.pt", model)
    with pytest.raises(FileNotFoundError, match="a folder; give the file"):
        vitq.import_act_scales(tmp_path, model)
    torch.save(scales, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:1000])
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "code.pt")
    torch.save([scales[q]], tmp_path / "list.pt")
    for name, match in (("cut.pt", "torch.save wrote whole"), ("code.pt", "tensors, numbers, texts and containers of these alone$"), ("list.pt", "not a mapping of layer names")):
        with pytest.raises(ValueError, match=match):
            vitq.import_act_scales(tmp_path / name, model)
