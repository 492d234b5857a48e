"""act_scales: what SmoothQuant's file holds, by the source model's names."""

from __future__ import annotations

import pytest
import torch
from helpers import build, images, run_tool

import vitq

transformers = pytest.importorskip("transformers", reason="needs pip install vitq[llm]")
import language_models  # noqa: E402
from language_models import ids  # noqa: E402


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
