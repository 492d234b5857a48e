"""transformers' decoders: the same numbers in canonical form, then converted, and generation."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import check_sites_without_weights, sqnr
from torch import nn

transformers = pytest.importorskip("transformers", reason="needs pip install vitq[llm]")
from language_models import CASES, GQA, OLD, build, ids, layers, quick  # noqa: E402

import vitq  # noqa: E402
from vitq.calib.runner import specs  # noqa: E402
from vitq.conversion import build as assemble  # noqa: E402
from vitq.conversion import quantize  # noqa: E402
from vitq.models import UnsupportedModelError, prepare  # noqa: E402


def generated(model: nn.Module, x: torch.Tensor, mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
    mask = torch.ones_like(x) if mask is None else mask
    return model.generate(x, attention_mask=mask, max_new_tokens=8, do_sample=False, **kwargs)[:, x.shape[1]:]


@pytest.mark.parametrize("family, kwargs", CASES)
@torch.no_grad()
def test_canonical_form_computes_the_same(family: str, kwargs: dict) -> None:
    model = build(family, **kwargs)
    modules, weights = str(model), copy.deepcopy(model.state_dict())
    canonical = prepare(model).model
    assert (model(ids()).logits - canonical(ids()).logits).abs().max() < 1e-5
    assert torch.equal(generated(model, ids()), generated(canonical, ids()))
    assert str(model) == modules != str(canonical), "the given model is not touched"
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("family, kwargs", CASES)
def test_sites_are_known_without_weights(family: str, kwargs: dict) -> None:
    check_sites_without_weights(build(family, **kwargs))


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


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
FED = [  # by the norms of a layer
    ("Llama", {}, {"input_layernorm": QKV, "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj")}),
    ("OPT", {}, {"self_attn_layer_norm": QKV, "final_layer_norm": ("fc1",)}),
    ("Falcon", GQA, {"ln_attn": ("self_attention.query_key_value",), "ln_mlp": ("mlp.dense_h_to_4h",)}),
    ("Falcon", {}, {"input_layernorm": ("self_attention.query_key_value", "mlp.dense_h_to_4h")}),
    ("Falcon", OLD, {"input_layernorm": ("self_attention.query_key_value",), "post_attention_layernorm": ("mlp.dense_h_to_4h",)}),
]


@pytest.mark.parametrize("family, kwargs, fed", FED)
@torch.no_grad()
def test_the_norms_take_the_channels_scales(family: str, kwargs: dict, fed: dict) -> None:
    """One channel fifty times the others, as language models have them."""
    model, calib, found = build(family, **kwargs), [ids(4, 200, seed=2)], {}
    for layer in layers(model):
        for channel, (norm, linears) in enumerate(fed.items(), 3):
            for parameter in layer.get_submodule(norm).parameters():
                parameter[channel] *= 50
            for linear in linears:
                layer.get_submodule(linear).weight[:, channel] /= 50
    for transforms in ("[]", "[layernorm_fold]"):
        converted = vitq.convert(model, quick("w8a8", f"transforms={transforms}"), calib, dtype=torch.float32)
        found[transforms] = sqnr(model(ids()).logits, converted(ids()).logits)
    assert found["[layernorm_fold]"] > found["[]"] + 5, found
    folded = [row for row in vitq.explain(converted) if row.note.startswith("LayerNorm fold")]
    assert [row.role for row in folded] == ["qkv", "fc1"] * 2
    assert all(("of the scale only (the norm has no bias)" in row.note) == (family == "Llama") for row in folded)


@pytest.mark.parametrize("family, kwargs, hidden", [("Llama", {"mlp_bias": True}, True), ("OPT", {}, True), ("OPT", {"activation_function": "gelu"}, False),
                                                     ("Falcon", {}, False)])
@pytest.mark.parametrize("transform", ["smoothquant", "clip_outliers"])
@torch.no_grad()
def test_smoothing_leaves_the_float_output(family: str, kwargs: dict, hidden: bool, transform: str) -> None:
    """The hidden values of an MLP take part where what is between its layers keeps a factor, and outliers there then cost less."""
    model, calib, found = build(family, **kwargs), [ids(4, 200, seed=2)], {}
    rows = {"Llama": "mlp.up_proj", "OPT": "fc1", "Falcon": "mlp.dense_h_to_4h"}[family]
    for layer in layers(model):
        layer.get_submodule(rows).weight[5] *= 50
    for transforms in ("[]", f"[{transform}]"):
        recipe = quick("w8a8", f"transforms={transforms}", "input.symmetric=true")
        prepared, plan = quantize(model, recipe, calib)
        assert sqnr(model(ids()).logits, prepared.model(ids()).logits) > 90
        found[transforms] = sqnr(model(ids()).logits, vitq.simulate(model, recipe, calib)(ids()).logits)
    smoothed = [site.role for site in prepared.linears if site.name in plan.notes]
    assert smoothed == (["qkv", "fc1", "fc2"] if hidden else ["qkv", "fc1"]) * 2
    assert not hidden or found[f"[{transform}]"] > found["[]"] + 3, found


@pytest.mark.parametrize("family, kwargs", CASES)
@pytest.mark.parametrize("name", ["w8a8-dynamic", "w8a8"])
@torch.no_grad()
def test_generation(family: str, kwargs: dict, name: str) -> None:
    """Greedy tokens are those of one forward after another; with a static cache, and beside longer rows, the same."""
    converted = vitq.convert(build(family, **kwargs), quick(name), [ids(4)] if name == "w8a8" else None, dtype=torch.float32)
    x, tokens = ids(2, 6), []
    for _ in range(8):
        tokens.append(converted(torch.cat((x, *tokens), 1)).logits[:, -1:].argmax(-1))
    assert torch.equal(generated(converted, x), torch.cat(tokens, 1))
    if not kwargs.get("alibi"):  # transformers' own code fails there: its mask is as long as the cache, its biases as the text
        assert torch.equal(generated(converted, x, cache_implementation="static"), torch.cat(tokens, 1))
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), x), 1)
    mask = torch.cat((torch.zeros(2, 3, dtype=torch.long), torch.ones_like(x)), 1)
    assert torch.equal(generated(converted, padded, mask), torch.cat(tokens, 1))
    assert sqnr(converted(x).logits, converted(padded, attention_mask=mask).logits[:, 3:]) > 35


@pytest.mark.parametrize("family, kwargs, qkv, fc2, embedding", [
    ("Llama", {}, "model.layers.0.self_attn.qkv_proj", "model.layers.1.mlp.down_proj", "model.embed_tokens"),
    ("OPT", {}, "model.decoder.layers.0.self_attn.qkv_proj", "model.decoder.layers.1.fc2", "model.decoder.embed_tokens"),
    ("Falcon", GQA, "transformer.h.0.self_attention.query_key_value", "transformer.h.1.mlp.dense_4h_to_h", "transformer.word_embeddings"),
])
@torch.no_grad()
def test_solvers_and_explain(family: str, kwargs: dict, qkv: str, fc2: str, embedding: str) -> None:
    """The solvers of the vision recipes work on these layers as they are."""
    model, calib, found = build(family, **kwargs), [ids(8, 40, seed=3)], {}
    for recipe in (quick("w4a8", "calib_size=8", "solver=rtn"), quick("w4a8", "calib_size=8", "solver=gptq"), quick("erq-w4a4", "calib_size=8")):
        converted = vitq.convert(model, recipe, calib, dtype=torch.float32)
        logits = converted(ids(seed=3)).logits
        assert sqnr(vitq.simulate(model, recipe, calib)(ids(seed=3)).logits, logits) > 25
        found[recipe.solver] = sqnr(model(ids(seed=3)).logits, logits)
    assert found["gptq"] > found["rtn"] + 1, found
    assert found["erq"] > 5, found
    rows = {row.layer: row for row in vitq.explain(converted)}
    assert rows[qkv].role == "qkv" and rows[fc2].role == "fc2" and rows[fc2].format.startswith("W4")
    assert rows[embedding].note == "token embedding"


@pytest.mark.parametrize("family, kwargs", CASES)
@torch.no_grad()
def test_sixteen_bits(family: str, kwargs: dict) -> None:
    """What stays in float takes the dtype, tied weights stay tied, and angles keep float32."""
    model = build(family, **kwargs)
    converted = vitq.convert(model, quick("w8a8-dynamic"), dtype=torch.bfloat16)
    embedding = converted.get_input_embeddings().weight
    assert embedding.dtype == torch.bfloat16
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert (getattr(converted.lm_head, "weight", None) is embedding) == tied
    assert all(buffer.dtype == torch.float32 for name, buffer in converted.named_buffers() if name.endswith("inv_freq"))
    assert sqnr(model(ids()).logits, converted(ids()).logits.float()) > 20
    if tied:
        rows = {row.layer: row for row in vitq.explain(converted)}
        assert rows["lm_head"].bytes == 0, "one tensor counts once"


@torch.no_grad()
def test_rows_that_are_divided_stay_within_16_bits() -> None:
    """A gate that keeps hidden values tiny does not make what it is multiplied with huge."""
    model, x = build("Llama", mlp_bias=True), ids(4, 40, seed=2)
    for layer in layers(model):
        layer.mlp.gate_proj.weight[3], layer.mlp.gate_proj.bias[3] = 0.0, -15.0
        layer.mlp.up_proj.bias[3] = 10.0
    recipe = quick("smoothquant-w8a8", "transform_options={alpha: 1.0}")
    prepared, _ = quantize(model, recipe, [x])
    up = max(float(prepared.model.get_submodule(f"model.layers.{i}.mlp.gate_up_proj").bias[112 + 3].abs()) for i in range(2))
    assert 10 < up <= 1001 and sqnr(model(x).logits, prepared.model(x).logits) > 60


@torch.no_grad()
def test_a_layer_that_stays_in_float_gets_no_bias(tmp_path) -> None:
    """Of two layers that share a norm one is quantized: a checkpoint's float model would have no place for a shift."""
    model, x = build("Falcon", bias=False), ids(4, 40, seed=2)
    converted = vitq.convert(model, quick("w8a8", "qkv.bits=16"), [x], dtype=torch.float32)
    assert sqnr(model(x).logits, converted(x).logits) > 20
    assert {row.note for row in vitq.explain(converted) if row.role == "fc1"} == {"LayerNorm fold of the scale only (a layer that stays in float has no bias)"}
    assert torch.equal(vitq.load(vitq.save(converted, tmp_path / "c"))(x).logits, converted(x).logits)


@pytest.mark.parametrize("name, most", [("gptq-w4a16", 0.30), ("dgq-w4a8", 0.30), ("quik-w4a4", 0.39), ("w8a8-dynamic", 0.52)])
def test_sizes_of_llama_2_7b(name: str, most: float) -> None:
    """Everything that it stores, as a part of the float16 model, on the meta device."""
    with torch.device("meta"):
        config = transformers.LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
        prepared, recipe = prepare(transformers.LlamaForCausalLM(config), check=False), vitq.Recipe.from_yaml(name)
        half = 2 * sum(p.numel() for p in prepared.model.parameters())
        converted = assemble(prepared, recipe, specs(prepared, recipe), dtype=torch.float16, backend="auto")
    stored = sum(t.numel() * t.element_size() for t in (*converted.parameters(), *converted.buffers()))
    assert half == pytest.approx(13.48e9, rel=0.01) and stored < most * half


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


def subclass(name: str) -> type:
    return type(name, (nn.Linear,), {})


@pytest.mark.parametrize("family, kwargs, where, part, message", [
    ("Llama", {}, "self_attn.v_proj", subclass("LoraLinear")(64, 32), "LoraLinear"),
    ("Llama", {}, "adapter", nn.Linear(3, 3), "model.layers.1.adapter"),
    ("OPT", {}, "self_attn.q_proj", subclass("LoraLinear")(64, 64), "LoraLinear"),
    ("OPT", {}, "fc1", subclass("LoraLinear")(64, 112), "layers.1.fc1.*LoraLinear"),
    ("OPT", {}, "adapter", nn.Linear(3, 3), "model.decoder.layers.1.adapter"),
    ("OPT", {}, "self_attn.adapter", nn.Linear(3, 3), "model.decoder.layers.1.self_attn.adapter"),
    ("OPT", {}, "self_attn", nn.Identity(), "layers.1.self_attn.*Identity.*known: OPTAttention"),
    ("OPT", {}, "activation_fn", nn.PReLU(), "layers.1.activation_fn.*PReLU"),
    ("Falcon", {}, "self_attention.query_key_value", subclass("LoraLinear")(64, 96), "LoraLinear"),
    ("Falcon", {}, "mlp.dense_4h_to_h", subclass("LoraLinear")(112, 64), "LoraLinear"),
    ("Falcon", {}, "adapter", nn.Linear(3, 3), "transformer.h.1.adapter"),
    ("Falcon", {}, "mlp.adapter", nn.Linear(3, 3), "transformer.h.1.mlp.adapter"),
    ("Falcon", {}, "mlp", nn.Identity(), "h.1.mlp.*Identity.*known: FalconMLP"),
])
def test_what_is_not_known_is_named(family: str, kwargs: dict, where: str, part: nn.Module, message: str) -> None:
    model = build(family, **kwargs)
    parent, _, name = f"1.{where}".rpartition(".")
    setattr(layers(model).get_submodule(parent), name, part)
    with pytest.raises(UnsupportedModelError, match=message):
        prepare(model)


def test_models_that_are_not_known() -> None:
    other = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64))
    with pytest.raises(UnsupportedModelError, match="no adapter for transformers.*GPT2LMHeadModel.*known there: FalconForCausalLM, .*OPTForCausalLM"):
        prepare(other)
    flash = build("Falcon")
    flash.transformer.h[1].self_attention.__class__ = transformers.models.falcon.modeling_falcon.FalconFlashAttention2
    with pytest.raises(UnsupportedModelError, match="transformer.h.1.self_attention.*attn_implementation='sdpa'"):
        prepare(flash)


def test_what_cannot_be_done_is_refused() -> None:
    converted = vitq.convert(build(), quick("w8a8-dynamic"))
    with pytest.raises(ValueError, match="already quantized"):
        vitq.convert(converted)
    with pytest.raises(RuntimeError, match="cannot be trained"):
        converted.train()
