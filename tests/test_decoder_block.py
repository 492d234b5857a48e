"""A language model's fused block: what it computes, where it is used, and that transformers finds in it what it looks for."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import torch  # noqa: E402
from helpers import sqnr  # noqa: E402
from language_models import build, ids, quick  # noqa: E402
from torch import nn  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaDecoderLayer  # noqa: E402

import vitq  # noqa: E402
from vitq.models.decoder import FAMILIES  # noqa: E402
from vitq.nn.decoder_block import QuantDecoderBlock, QuantGatedMlp  # noqa: E402


def convert(model: nn.Module, name: str, *changes: str) -> tuple[nn.Module, nn.Module]:
    """Executed in float32, and simulated."""
    recipe = quick(name, *changes)
    calib = [ids(4, 24, seed=2)] if recipe.needs_data else None
    return vitq.convert(model, recipe, calib, dtype=torch.float32), vitq.simulate(model, recipe, calib)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["w8a8-dynamic", "smoothquant-w8a8", "dgq-w4a8", "quik-w4a4", "quarot-w4a4kv4"])
@torch.no_grad()
def test_it_computes_what_is_simulated(family: str, name: str) -> None:
    model, x = build(family, **({"head_dim": 24} if family == "Qwen3" else {})), ids(3, 21)
    executed, simulated = convert(model, name)
    assert all(isinstance(layer, QuantDecoderBlock) for layer in executed.model.layers)
    assert sqnr(simulated(x).logits, executed(x).logits) > (20 if "w4a4" in name else 45)  # a code that turns over weighs more with 4 bits
    got = executed.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=5, do_sample=False)
    again = executed.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(got, again)


@torch.no_grad()
def test_transformers_finds_its_layers() -> None:
    executed, _ = convert(build(), "w8a8-dynamic")
    assert all(isinstance(layer, LlamaDecoderLayer) for layer in executed.model.layers)
    states = executed(ids(2, 9), output_hidden_states=True).hidden_states
    assert len(states) == 3 and torch.equal(states[0], executed.model.embed_tokens(ids(2, 9)))
    assert executed.model.layers[0].hidden_size == 64


@torch.no_grad()
def test_its_input_is_not_written_over() -> None:
    executed, _ = convert(build(), "w8a8-dynamic")
    block, x = executed.model.layers[0], torch.randn(2, 5, 64)
    kept, rotary = x.clone(), executed.model.rotary_emb(x, torch.arange(5)[None])
    block(x, position_embeddings=rotary)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("changes", [("proj.bits=16",), ("fc1.input.bits=16",)])
@torch.no_grad()
def test_a_layer_in_float_leaves_the_block_as_it_was(changes: tuple) -> None:
    model, x = build(), ids(2, 9)
    executed, simulated = convert(model, "w8a8-dynamic", *changes)
    assert not any(isinstance(module, (QuantDecoderBlock, QuantGatedMlp)) for module in executed.modules())
    assert sqnr(simulated(x).logits, executed(x).logits) > 45


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "relu", "silu", "quick_gelu"])
@torch.no_grad()
def test_activations(act: str) -> None:
    model, x = build(hidden_act=act), ids(2, 9)
    executed, simulated = convert(model, "w8a8-dynamic")
    assert sqnr(simulated(x).logits, executed(x).logits) > 45
    rows = {row.layer: row for row in vitq.explain(executed)}
    known = act != "quick_gelu"
    assert ("model.layers.0.mlp" in rows) == known and rows["model.layers.0.input_layernorm"].format == "float -> A8 dynamic per token"
    if known:
        assert rows["model.layers.0.mlp"].format.endswith("(gate)·up -> A8 dynamic per token")


@torch.no_grad()
def test_an_activation_that_was_put_in_by_hand_runs() -> None:
    model, x = build(), ids(2, 9)
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.ReLU()
    executed, simulated = convert(model, "w8a8-dynamic")
    assert sqnr(model(x).logits, executed(x).logits) > 20 and sqnr(simulated(x).logits, executed(x).logits) > 45
