"""transformers' decoders: the same numbers in canonical form, then converted, and generation."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import sqnr
from torch import nn

transformers = pytest.importorskip("transformers", reason="needs pip install vitq[llm]")
from language_models import CASES, build, ids, quick  # noqa: E402

import vitq  # noqa: E402
from vitq.models import UnsupportedModelError, prepare  # noqa: E402


def generated(model: nn.Module, x: torch.Tensor, mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
    mask = torch.ones_like(x) if mask is None else mask
    return model.generate(x, attention_mask=mask, max_new_tokens=8, do_sample=False, **kwargs)[:, x.shape[1]:]


@pytest.mark.parametrize("family, kwargs", CASES)
@torch.no_grad()
def test_canonical_form_computes_the_same(family: str, kwargs: dict) -> None:
    model = build(family, **kwargs)
    canonical = prepare(model).model
    assert (model(ids()).logits - canonical(ids()).logits).abs().max() < 1e-5
    assert torch.equal(generated(model, ids()), generated(canonical, ids()))
    assert hasattr(model.model.layers[0].self_attn, "q_proj"), "the given model is not touched"


@pytest.mark.parametrize("family, kwargs", CASES)
@pytest.mark.parametrize("name", ["w8a8-dynamic", "w8a8", "w4a8"])
@torch.no_grad()
def test_execution_equals_simulation(family: str, kwargs: dict, name: str) -> None:
    model, recipe = build(family, **kwargs), quick(name)
    calib = [ids(4, 200, seed=2)] if recipe.is_static else None  # enough that no channel's range is chance
    converted = vitq.convert(model, recipe, calib, dtype=torch.float32)
    logits = converted(ids()).logits
    assert logits.dtype == torch.float32 and sqnr(vitq.simulate(model, recipe, calib)(ids()).logits, logits) > 35
    assert sqnr(model(ids()).logits, logits) > (25 if name == "w8a8-dynamic" else 20 if name == "w8a8" else 8)


@torch.no_grad()
def test_the_norms_take_the_channels_scales() -> None:
    """One channel fifty times the others, as language models have them."""
    model, calib, found = build(), [ids(4, 200, seed=2)], {}
    for layer in model.model.layers:
        layer.input_layernorm.weight[3] *= 50
        layer.post_attention_layernorm.weight[5] *= 50
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            linear.weight[:, 3] /= 50
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight[:, 5] /= 50
    for transforms in ("[]", "[layernorm_fold]"):
        converted = vitq.convert(model, quick("w8a8", f"transforms={transforms}"), calib, dtype=torch.float32)
        found[transforms] = sqnr(model(ids()).logits, converted(ids()).logits)
    assert found["[layernorm_fold]"] > found["[]"] + 5, found
    notes = {row.layer: row.note for row in vitq.explain(converted)}
    assert "LayerNorm fold of the scale only (the norm has no bias)" in notes["model.layers.0.self_attn.qkv_proj"]


@torch.no_grad()
def test_generation() -> None:
    """Greedy tokens are those of one forward after another; with a static cache, and beside longer rows, the same."""
    converted = vitq.convert(build(), quick("w8a8-dynamic"), dtype=torch.float32)
    x, tokens = ids(2, 6), []
    for _ in range(8):
        tokens.append(converted(torch.cat((x, *tokens), 1)).logits[:, -1:].argmax(-1))
    assert torch.equal(generated(converted, x), torch.cat(tokens, 1))
    assert torch.equal(generated(converted, x, cache_implementation="static"), torch.cat(tokens, 1))
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), x), 1)
    mask = torch.cat((torch.zeros(2, 3, dtype=torch.long), torch.ones_like(x)), 1)
    assert torch.equal(generated(converted, padded, mask), torch.cat(tokens, 1))


@torch.no_grad()
def test_solvers_and_explain() -> None:
    """The solvers of the vision recipes work on these layers as they are."""
    model, calib, found = build(), [ids(8, 40, seed=3)], {}
    for solver in ("rtn", "gptq"):
        converted = vitq.convert(model, quick("w4a8", "calib_size=8", f"solver={solver}"), calib, dtype=torch.float32)
        found[solver] = sqnr(model(ids(seed=3)).logits, converted(ids(seed=3)).logits)
    assert found["gptq"] > found["rtn"] + 1, found
    rows = {row.layer: row for row in vitq.explain(converted)}
    assert rows["model.layers.0.self_attn.qkv_proj"].role == "qkv" and rows["model.layers.1.mlp.down_proj"].format.startswith("W4")
    assert rows["model.embed_tokens"].note == "token embedding"


@torch.no_grad()
def test_tied_weights_stay_tied() -> None:
    converted = vitq.convert(build(tie_word_embeddings=True), quick("w8a8-dynamic"), dtype=torch.bfloat16)
    assert converted.lm_head.weight is converted.model.embed_tokens.weight and converted.lm_head.weight.dtype == torch.bfloat16
    assert converted.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.isfinite(converted(ids()).logits.float()).all()
    rows = {row.layer: row for row in vitq.explain(converted)}
    assert rows["model.embed_tokens"].bytes == 128 * 64 * 2 and rows["lm_head"].bytes == 0, "one tensor counts once"


@pytest.mark.parametrize("calib, error, message", [
    ([torch.randn(4, 20)], TypeError, "token ids must be integers"), ([ids(4)[0]], ValueError, r"shape \[batch, tokens\]"),
    ([ids(4) + 100], ValueError, "token ids must be 0 to 127"), ([{"labels": ids(4)}], TypeError, "a mapping with 'input_ids'"),
    ([], ValueError, "calibration data holds 0"),
])
def test_bad_tokens(calib, error, message) -> None:
    with pytest.raises(error, match=message):
        vitq.convert(build(), quick("w8a8"), calib)


def test_a_mapping_of_a_tokenizer_calibrates() -> None:
    model, recipe = build(), quick("w8a8")
    a, b = (vitq.convert(model, recipe, [batch], dtype=torch.float32) for batch in (ids(4), {"input_ids": ids(4), "attention_mask": None}))
    with torch.no_grad():
        assert torch.equal(a(ids()).logits, b(ids()).logits)


def test_what_is_not_known_is_named() -> None:
    model = build()
    odd = copy.deepcopy(model)
    odd.model.layers[1].self_attn.v_proj = type("LoraLinear", (nn.Linear,), {})(64, 32)
    with pytest.raises(UnsupportedModelError, match="LoraLinear"):
        prepare(odd)
    odd = copy.deepcopy(model)
    odd.model.layers[0].mlp.gate_proj.register_parameter("extra", None)
    odd.model.layers[0].adapter = nn.Linear(3, 3)
    with pytest.raises(UnsupportedModelError, match="model.layers.0.adapter"):
        prepare(odd)
    other = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64))
    with pytest.raises(UnsupportedModelError, match="no adapter for transformers.*GPT2LMHeadModel"):
        prepare(other)


def test_what_cannot_be_done_is_refused(tmp_path) -> None:
    converted = vitq.convert(build(), quick("w8a8-dynamic"))
    with pytest.raises(TypeError, match="use vitq.save"):
        converted.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="already quantized"):
        vitq.convert(converted)
    with pytest.raises(RuntimeError, match="cannot be trained"):
        converted.train()
    assert not (tmp_path / "m").exists()
