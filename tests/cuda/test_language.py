"""Language models on a GPU: what the integers of a CPU say, and generation."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import sqnr

transformers = pytest.importorskip("transformers", reason="needs pip install vitq[llm]")
from language_models import build, ids, quick  # noqa: E402
from llm_benchmark import recipe_of  # noqa: E402

import vitq  # noqa: E402
from vitq.nn.key_values import RowCodes  # noqa: E402

pytestmark = pytest.mark.gpu
SIZES = dict(hidden_size=256, intermediate_size=672, num_hidden_layers=2)


@pytest.mark.parametrize("family", ["Llama", "OPT", "Falcon"])
@pytest.mark.parametrize("name", ["w8a8-dynamic", "w8a8", "smoothquant-w8a8", "dgq-w4a8", "gptq-w4a16", "quik-w4a4", "quik-w8a8", "phq-w8", "phq-mixed"])
@torch.no_grad()
def test_a_gpu_computes_what_the_reference_does(name: str, family: str) -> None:
    sizes = SIZES if family == "Llama" else {"hidden_size": 256}
    if family == "Falcon" and name.startswith("phq"):  # whose heads share a key and value else
        sizes = {**sizes, "multi_query": False, "parallel_attn": False}
    model, recipe = build(family, **sizes), quick(name)
    calib = [ids(4, 100, seed=2)] if recipe.is_static or recipe.needs_inputs else None
    on_cpu = vitq.convert(model, recipe, calib, "reference", dtype=torch.float32)
    on_gpu = vitq.convert(model, recipe, calib, dtype=torch.float32).cuda()  # of a solver on a GPU other codes come out
    half = vitq.convert(copy.deepcopy(model).cuda(), recipe, calib)
    x = ids(3, 50)
    wanted, logits = on_cpu(x).logits, on_gpu(x.cuda()).logits.cpu()
    assert sqnr(wanted, logits) > (25 if name == "quik-w4a4" else 35)  # a 4-bit code that turns over weighs 16 times an 8-bit one
    assert sqnr(model(x).logits, half(x.cuda()).logits.float().cpu()) > (20 if name.endswith("w8a8") else 4 if name == "quik-w4a4" else 8)
    assert all(row.kernel != "torch-int32" for row in vitq.explain(on_gpu)), "no layer falls back"


@pytest.mark.parametrize("name", ["w8a8-dynamic", "smoothquant-w8a8"])
@torch.no_grad()
def test_greedy_tokens_are_those_of_the_reference(name: str) -> None:
    """64 of them, up to the first near tie: norms and attention differ in the last bits, a code then turns over, and random weights make logits
    that are close to one another."""
    model, recipe = build("Llama", **SIZES, max_position_embeddings=256), quick(name)
    calib = [ids(4, 100, seed=2)] if recipe.is_static else None
    x, tokens = ids(8, 8), []
    for device, backend in (("cpu", "reference"), ("cuda", "auto")):
        converted = vitq.convert(model, recipe, calib, backend, dtype=torch.float32).to(device)
        for cache in ({}, {"cache_implementation": "static"}):
            tokens.append(converted.generate(x.to(device), attention_mask=torch.ones_like(x).to(device), max_new_tokens=64, do_sample=False, **cache).cpu())
        if device == "cpu":
            top = converted(tokens[0]).logits[:, :-1].topk(2).values
            near = (top[..., 0] - top[..., 1] < 0.05 * converted(x).logits.std())[:, x.shape[1] - 1 :]  # of each new token
    whole = 0
    for other in tokens[1:]:
        differs = (other != tokens[0])[:, x.shape[1] :]
        for row, close in zip(differs, near):
            whole += not bool(row.any())
            assert not row.any() or close[int(row.int().argmax())], "tokens part at a near tie alone"
    assert whole >= 3 * len(x) // 2, f"{whole} of {3 * len(x)} rows are equal to the end"


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", ["true", "false"])
@torch.no_grad()
def test_a_cache_on_a_gpu_holds_what_it_does_on_a_cpu(bits: int, symmetric: str) -> None:
    """The same bytes of the same keys, and the same logits with the cache and without."""
    codes = RowCodes(bits, symmetric == "true")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = (torch.randn(2, 4, 33, 64, generator=torch.Generator().manual_seed(0)) * 3 + 1).to(dtype)
        rows = codes.pack(x.cuda())
        assert torch.equal(rows.cpu(), codes.pack(x))
        assert torch.equal(codes.unpack(rows, 64, dtype), codes.fake(x.cuda())) and torch.equal(codes.fake(x.cuda()).cpu(), codes.fake(x))
    converted = vitq.convert(build("Llama", **SIZES).cuda(), quick("w8a8-dynamic", f"kv.bits={bits}", f"kv.symmetric={symmetric}"))
    x = ids(2, 30).cuda()
    assert torch.equal(converted(x, use_cache=True).logits, converted(x, use_cache=False).logits)
    assert converted.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=8, do_sample=False).shape == (2, 38)


@pytest.mark.xdist_group("much memory")
@pytest.mark.parametrize("name", ["w8a8-dynamic", "w4a4kv4", "flatquant-w4a4kv4"])
@torch.inference_mode()
def test_tensors_of_more_than_two_to_the_31_elements(name: str) -> None:
    """64 prompts of 2048 tokens through a block of Qwen2.5-7B's shape, whose gates take 5·10^9 numbers: the last is what it is with two others."""
    if torch.cuda.mem_get_info()[0] < 50e9:
        pytest.skip("needs 50 GB of GPU memory")
    model = build("Qwen2", hidden_size=3584, intermediate_size=18944, num_hidden_layers=1, num_attention_heads=28, num_key_value_heads=4, vocab_size=1024,
                  max_position_embeddings=2176)
    converted = vitq.convert(model.cuda(), recipe_of(name, None), dtype=torch.float16)
    x = torch.randint(1024, (64, 2048), generator=torch.Generator().manual_seed(0)).cuda()
    caches = [transformers.DynamicCache(config=converted.config) for _ in range(2)]
    many, few = (converted(rows, past_key_values=cache, logits_to_keep=1).logits.float() for rows, cache in zip((x, x[-3:]), caches))
    assert torch.isfinite(many).all() and sqnr(few, many[-3:]) > 40
    for a, b in zip(*(cache.layers for cache in caches)):
        assert torch.equal(a.keys[-3:], b.keys) and torch.equal(a.values[-3:], b.values)
