"""Generation with a static cache on a GPU: tokens of the graphs are those of the calls that they hold, and of the dynamic cache."""

from __future__ import annotations

import pytest
import torch
from helpers import sqnr

pytest.importorskip("transformers", reason="needs pip install vitq[llm]")
from language_models import build, ids, quick  # noqa: E402

import vitq  # noqa: E402
from vitq.nn.key_values import QuantKeyValues  # noqa: E402

pytestmark = pytest.mark.gpu
SIZES = dict(hidden_size=256, intermediate_size=672, num_hidden_layers=2)
INT4, INT8 = ("kv.bits=4", "kv.symmetric=false"), ("kv.bits=8",)
CASES = {"int4": ("Llama", INT4), "int8": ("Llama", INT8), "values in float": ("Llama", ("kv.bits=8", "pv.other.bits=16")),
         "turned": ("Llama", (*INT4, "qk.other.transform=hadamard", "qk.other.clip_ratio=0.9")), "window": ("Mistral", INT4), "norms": ("Qwen3", INT8),
         "no rotation": ("OPT", INT4), "float": ("Llama", ())}


def converted(name: str, dtype: torch.dtype = torch.float16):
    family, changes = CASES[name]
    kwargs = {"hidden_size": 256, "ffn_dim": 512, "word_embed_proj_dim": 256} if family == "OPT" else {**SIZES, "head_dim": 64}
    if family == "Mistral":
        kwargs["sliding_window"] = 24
    return vitq.convert(build(family, **kwargs), quick("w8a8-dynamic", *changes), dtype=dtype).cuda()


def cache_of(model, name: str, batch: int):
    if name != "float":
        return vitq.quantized_cache(model, max_length=64, batch_size=batch)
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_graphs_give_the_tokens_of_the_calls(name: str, batch: int, dtype: torch.dtype) -> None:
    """Greedy and sampled, with padding on the left, in one cache after another's reset."""
    model, x = converted(name, dtype), ids(batch, 12).cuda()
    mask = torch.ones_like(x)
    mask[-1, :5] = 0
    cache, found = cache_of(model, name, batch), {}
    for disable_compile in (True, False):
        for given, sampled in ((torch.ones_like(x), False), (mask, False), (mask, True)):
            cache.reset()
            torch.manual_seed(0)
            tokens = model.generate(x, attention_mask=given, max_new_tokens=40, do_sample=sampled, past_key_values=cache, disable_compile=disable_compile)
            found.setdefault((sampled, bool(given.all())), []).append(tokens)
    graphs = cache.__dict__["_step_graphs"]
    assert len(graphs) == 1 and all(isinstance(graph, tuple) for graph in graphs.values())
    assert all(torch.equal(*tokens) for tokens in found.values())


@pytest.mark.parametrize("name", [name for name in CASES if name != "float"])
@torch.no_grad()
def test_logits_are_those_of_the_dynamic_cache(name: str) -> None:
    """A prompt, then tokens one by one and a few at a time; the kernel reads the codes."""
    model, x = converted(name), ids(2, 48).cuda()
    kernels = {module._choice(torch.device("cuda", 0))[0].kernel.name for module in model.modules() if isinstance(module, QuantKeyValues)}
    assert kernels == {"cuda-cached-attention"}
    found = []
    for cache in (vitq.quantized_cache(model), vitq.quantized_cache(model, max_length=64, batch_size=2)):
        ends = (30, 31, 32, 36, 44, 45)
        found.append(torch.cat([model(x[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in zip((0, *ends), (*ends, 48))], 1))
    if name != "turned":  # a static cache turns a prompt's keys back in place of its queries, after which a code may be another
        assert torch.equal(found[0][:, :30], found[1][:, :30])
    assert sqnr(*found) > (20 if name != "int8" else 30)


@torch.no_grad()
def test_streaming_and_copies() -> None:
    import copy
    import types

    from transformers import TextStreamer

    model, x, words = converted("int4"), ids(1, 6).cuda(), []
    streamer = TextStreamer(types.SimpleNamespace(decode=lambda tokens, **options: " ".join(map(str, tokens)) + " "), skip_prompt=True)
    streamer.on_finalized_text = lambda text, stream_end=False: words.extend(text.split())
    given = dict(attention_mask=torch.ones_like(x), max_new_tokens=20, do_sample=False)
    cache = vitq.quantized_cache(model, max_length=32)
    tokens = model.generate(x, past_key_values=cache, streamer=streamer, **given)
    assert [int(word) for word in words] == tokens[0, 6:].tolist()
    again = copy.deepcopy(model)
    cache.reset()
    assert torch.equal(again.generate(x, past_key_values=cache, **given), tokens)
    assert torch.equal(model.generate(x, cache_implementation="static", **given), tokens)  # of 26 tokens, which is no multiple of 16
