"""tools/llm_benchmark.py, in process: its table on a tiny model, and what it says of mistakes."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import run_tool

pytest.importorskip("transformers", reason="needs pip install vitq[llm]")

import _generation  # noqa: E402
import language_models  # noqa: E402
import llm_benchmark  # noqa: E402
import vitq  # noqa: E402

TINY = ["--random", "tiny", "--prompt", "12", "--decode", "3", "--repeats", "1", "--no-compile", "--device", "cpu"]


def test_a_table(tmp_path) -> None:
    code, out, err = run_tool(llm_benchmark, *TINY, "--batch", "1,2", "--recipes", "w8a8-dynamic, flatquant-w4a4kv4", "--output", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    assert code == 0, err
    assert [(r["case"], r["batch"]) for r in report["rows"]] == [(case, batch) for case in ("bfloat16 eager", "w8a8-dynamic", "flatquant-w4a4kv4") for batch in (1, 2)]
    assert all(r["prefill_ms"] > 0 and r["decode_ms"] > 0 and r["prefill_ratio"] > 0 for r in report["rows"])
    assert all(r["decode_ratio"] == 1 for r in report["rows"][:2]) and "flatquant-w4a4kv4" in out and report["prompt"] == 12


def test_a_folder_needs_no_tokenizer_and_a_recipe_that_measures_no_text(tmp_path) -> None:
    llm_benchmark.random_model("tiny", torch.device("cpu")).save_pretrained(tmp_path / "model")
    code, out, err = run_tool(llm_benchmark, "--model", tmp_path / "model", *TINY[2:], "--recipes", "quik-w4a4,w8a8", "--output", tmp_path / "r.json")
    assert code == 0, err
    assert [r["case"] for r in json.loads((tmp_path / "r.json").read_text())["rows"]] == ["float16 eager", "quik-w4a4", "w8a8"]
    assert vitq.load_language_model(tmp_path / "model", tokenizer=False).tokenizer is None


def test_what_was_measured_stays_when_a_later_recipe_fails(tmp_path, monkeypatch) -> None:
    real, run = vitq.convert, [*TINY, "--recipes", "w8a8-dynamic,dgq-w4a8,w4a4", "--output", tmp_path / "r.json"]

    def fails(error: Exception):
        def convert(model, recipe, *args, **kwargs):
            if recipe.name == "dgq-w4a8":
                raise error
            return real(model, recipe, *args, **kwargs)

        return convert

    monkeypatch.setattr(vitq, "convert", fails(ValueError("no such layers")))
    code, out, err = run_tool(llm_benchmark, *run)
    assert code == 2 and "no such layers" in err and "w8a8-dynamic" in out and len(json.loads((tmp_path / "r.json").read_text())["rows"]) == 2
    monkeypatch.setattr(vitq, "convert", fails(torch.OutOfMemoryError("CUDA out of memory")))
    code, out, err = run_tool(llm_benchmark, *run)
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert code == 0 and [r.get("notes") for r in rows] == [[], [], ["out of memory in conversion"], []] and "out of memory in conversion" in out


def test_models_that_are_not_timed(tmp_path) -> None:
    for family, message in (("Falcon", "a FalconForCausalLM is not timed here"), ("OPT", "--prompt and --decode: 300 is more than the 256 positions of")):
        language_models.build(family, **({"max_position_embeddings": 256} if family == "OPT" else {})).save_pretrained(tmp_path / family)
        code, _, err = run_tool(llm_benchmark, "--model", tmp_path / family, "--prompt", "290", "--decode", "10", "--no-compile", "--device", "cpu")
        assert code == 2 and message in err, err


@torch.no_grad()
def test_its_steps_are_those_of_generate() -> None:
    """What is timed writes the tokens that `generate` writes."""
    model = vitq.convert(llm_benchmark.random_model("tiny", torch.device("cpu")), llm_benchmark.recipe_of("flatquant-w4a4kv4", None), dtype=torch.float32)
    cache = vitq.quantized_cache(model, max_length=32, batch_size=2)
    ids = torch.randint(model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    case = _generation.Case(model, cache, model, 2, 12, 5, torch.device("cpu"))
    assert torch.equal(case.ids, ids)
    case.prefill(case.ids)
    tokens = [case.token.clone()]
    for _ in range(5):
        case.step(case.token)
        tokens.append(case.token.clone())
    assert torch.equal(torch.cat(tokens, 1), wanted[:, 12:])


@pytest.mark.parametrize("arguments, message", [
    ([], "give --random with the names of shapes, or --model"), (["--random", "tiny", "--model", "x"], "give --random"),
    (["--random", "llama-9"], "--random llama-9: known are llama-2-7b"), ([*TINY, "--batch", "0"], "--batch 0: give numbers"),
    ([*TINY, "--batch", "a"], "--batch a: give numbers"), ([*TINY, "--recipes", "w9"], "neither a file nor a shipped recipe"),
    ([*TINY, "--prompt", "0"], "--prompt"), (["--random", "tiny, tiny,x"], "--random x: known"), ([*TINY, "--output", "."], "is a folder"), ([*TINY, "--recipes", "erq-w3a3-paper"], "erq-w3a3-paper is for simulation"),
])
def test_mistakes(arguments: list[str], message: str) -> None:
    code, _, err = run_tool(llm_benchmark, *arguments)
    assert code == 2 and message in err
