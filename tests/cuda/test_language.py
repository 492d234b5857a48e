"""Language models on a GPU: what the integers of a CPU say, and generation."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import sqnr

pytest.importorskip("transformers", reason="needs pip install vitq[llm]")
from language_models import build, ids, quick  # noqa: E402

import vitq  # noqa: E402

pytestmark = pytest.mark.gpu
SIZES = dict(hidden_size=256, intermediate_size=672, num_hidden_layers=2)


@pytest.mark.parametrize("family", ["Llama", "OPT", "Falcon"])
@pytest.mark.parametrize("name", ["w8a8-dynamic", "w8a8", "smoothquant-w8a8", "dgq-w4a8", "gptq-w4a16",
                                  "quik-w4a4", "quik-w8a8", "phq-w8", "phq-mixed"])
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
    assert sqnr(wanted, logits) > 35 and sqnr(model(x).logits, half(x.cuda()).logits.float().cpu()) > (20 if name.endswith("w8a8") else 4 if name == "quik-w4a4" else 8)
    assert all(row.kernel != "torch-int32" for row in vitq.explain(on_gpu)), "no layer falls back"


@pytest.mark.parametrize("name", ["w8a8-dynamic", "smoothquant-w8a8"])
@torch.no_grad()
def test_greedy_tokens_are_those_of_the_reference(name: str) -> None:
    model, recipe = build("Llama", **SIZES, max_position_embeddings=256), quick(name)
    calib = [ids(4, 100, seed=2)] if recipe.is_static else None
    tokens = []
    for device, backend in (("cpu", "reference"), ("cuda", "auto")):
        converted = vitq.convert(model, recipe, calib, backend, dtype=torch.float32).to(device)
        x = ids(2, 8).to(device)
        for cache in ({}, {"cache_implementation": "static"}):
            tokens.append(converted.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=64, do_sample=False, **cache).cpu())
    assert all(torch.equal(tokens[0], other) for other in tokens[1:])
