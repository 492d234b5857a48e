"""vitq.perplexity against a direct computation, on float, simulated and quantized models."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers", reason="needs pip install vitq[llm]")
from language_models import build, ids, quick  # noqa: E402

import vitq  # noqa: E402


def directly(model, windows) -> float:
    """Token by token, in float64."""
    losses = []
    for window in windows:
        p = model(window[None]).logits[0].double().log_softmax(-1)
        losses += [-float(p[i, window[i + 1]]) for i in range(len(window) - 1)]
    return math.exp(sum(losses) / len(losses))


@pytest.fixture(scope="module")
def models():
    source, recipe = build(), quick("w8a8")
    calib = [ids(4, 200, seed=2)]
    return {"float": source, "quantized": vitq.convert(source, recipe, calib, dtype=torch.float32), "simulated": vitq.simulate(source, recipe, calib),
            "bfloat16": vitq.convert(source, recipe, calib, dtype=torch.bfloat16)}


@pytest.mark.parametrize("name", ["float", "quantized", "simulated", "bfloat16"])
def test_is_what_its_definition_says(models, name: str) -> None:
    windows = ids(5, 300, seed=3)  # more positions than are computed at once
    seen: list[int] = []
    found = vitq.perplexity(models[name], windows, batch_size=2, progress=seen.append)
    assert found == pytest.approx(directly(models[name], windows), rel=1e-2 if name == "bfloat16" else 1e-5) and seen == [2, 2, 1]
    assert found == pytest.approx(vitq.perplexity(models[name], [{"input_ids": w[None]} for w in windows]), rel=1e-2 if name == "bfloat16" else 1e-6)


def test_quantizing_costs_little_and_simulation_says_how_much(models) -> None:
    found = {name: vitq.perplexity(model, ids(4, 100, seed=3)) for name, model in models.items()}
    assert found["quantized"] == pytest.approx(found["simulated"], rel=0.01) and found["quantized"] == pytest.approx(found["float"], rel=0.2)


def test_an_even_model_has_the_size_of_its_vocabulary() -> None:
    model = build()
    model.lm_head.weight.zero_()
    assert vitq.perplexity(model, ids(2, 30)) == pytest.approx(128)


def test_nothing_of_all_positions_and_words_is_in_float64_or_twice(models) -> None:
    """Log-probabilities are made for 256 positions at once, whatever the window."""
    sizes = []
    cross_entropy = torch.nn.functional.cross_entropy

    def watched(rows, *args, **kwargs):
        sizes.append((len(rows), rows.dtype))
        return cross_entropy(rows, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "cross_entropy", watched)
        vitq.perplexity(models["bfloat16"], ids(1, 1000), batch_size=1)
    assert max(n for n, _ in sizes) == 256 and {dtype for _, dtype in sizes} == {torch.float32} and sum(n for n, _ in sizes) == 999


@pytest.mark.parametrize("windows, error, message", [
    (torch.empty(0, 8, dtype=torch.long), ValueError, "no windows"), ([], ValueError, "no windows"), (ids(2, 1), ValueError, "two tokens or more"),
    (ids() + 100, ValueError, "0 to 127"), (torch.rand(2, 8), TypeError, "must be integers"), (["text"], TypeError, "token ids")])
def test_mistakes(windows, error, message: str) -> None:
    with pytest.raises(error, match=message):
        vitq.perplexity(build(), windows)
    with pytest.raises(ValueError, match="batch_size"):
        vitq.perplexity(build(), ids(), batch_size=0)


def test_broken_logits() -> None:
    model = build()
    model.model.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="logits of LlamaForCausalLM hold NaN"):
        vitq.perplexity(model, ids())
