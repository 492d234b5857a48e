"""tools/quantize_llm.py, in process: the whole job on a tiny model, tokenizer and text, and what is said of every mistake."""

from __future__ import annotations

import importlib.util
import io
import json
import random
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from helpers import run_tool

transformers = pytest.importorskip("transformers", reason="needs pip install vitq[llm]")
from language_models import build  # noqa: E402

import quantize_llm  # noqa: E402
from _console import Bar  # noqa: E402
import vitq  # noqa: E402

WORDS = [f"word{i}" for i in range(120)]
SMALL = ["--seqlen", "16", "--nsamples", "4", "--device", "cpu", "--dtype", "float32"]
QUICK = ["--set", "weight.observer=minmax", "--set", "input.observer=minmax"]


def run(*args):
    return run_tool(quantize_llm, *args)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with tied embeddings and a tokenizer of 120 words, as `save_pretrained` writes them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path_factory.mktemp("models") / "tiny"
    build(tie_word_embeddings=True, max_position_embeddings=256, eos_token_id=2).save_pretrained(path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="</s>").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """20 windows of 16 words, 10 of which are evaluated."""
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(" ".join(random.Random(0).choices(WORDS, k=325)))
    return path


@pytest.fixture(scope="module")
def done(folder, text, tmp_path_factory):
    output = tmp_path_factory.mktemp("out")
    return output, *run(*SMALL, *QUICK, "--model", folder, "--data", text, "--recipe", "w8a8-dynamic,w8a8,w4a8", "--simulate", "--benchmark",
                        "--save", output / "saved", "--output", output / "report")


def test_everything_is_printed(done, folder) -> None:
    output, code, out, err = done
    assert code == 0, err
    for said in (f"model {folder} in float32 on cpu", "4 windows of 16 tokens to calibrate on, 10 to evaluate", "calibrated and converted in",
                 "What runs, w4a8", "token embedding", "LayerNorm fold of the scale only", "10 windows of 16 tokens", "simulated", "part of fp16",
                 "prefill ms", "decode ms a token", "bfloat16", f"wrote {output / 'saved' / 'w8a8'}; reloaded, its logits are bit-identical"):
        assert said in out, said
    rows = {line.split()[0]: line.split() for line in out.split("10 windows of 16 tokens")[-1].splitlines() if line}
    assert rows["float"][2:] == ["-"] * 8 and set(rows) >= {"float", "w8a8-dynamic", "w8a8", "w4a8"}


def test_statistics_are_kept_for_the_next_recipe(folder, text, tmp_path) -> None:
    file = tmp_path / "stats.safetensors"
    common = [*SMALL, *QUICK, "--model", folder, "--data", text, "--stats", file, "--quiet"]
    code, out, err = run(*common, "--recipe", "w8a8,smoothquant-w8a8,w8a8-dynamic", "--output", tmp_path / "first")
    assert code == 0 and f"wrote {file}" in out, err
    written = file.read_bytes()
    code, out, err = run(*common, "--recipe", "smoothquant-w8a8", "--output", tmp_path / "second", "--simulate")
    assert code == 0 and file.read_bytes() == written, err
    first, second = (json.loads((tmp_path / name / "report.json").read_text())["rows"] for name in ("first", "second"))
    assert second[1]["perplexity"] == first[2]["perplexity"] and second[1]["calibration"]["windows"] == 0
    other = build(tie_word_embeddings=True, max_position_embeddings=256, eos_token_id=2, hidden_act="gelu", num_hidden_layers=1)
    other.save_pretrained(tmp_path / "other")
    for part in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "other" / part).write_bytes((folder / part).read_bytes())
    code, _, err = run(*SMALL, *QUICK, "--model", tmp_path / "other", "--data", text, "--stats", file, "--recipe", "w8a8")
    assert code == 2 and "collected on another model" in err
    file.write_bytes(written[:1000])
    code, _, err = run(*common, "--recipe", "w8a8")
    assert code == 2 and len(err.strip().splitlines()) == 1 and "calibrate again" in err


def test_scales_of_smoothquant_are_taken_in_the_place_of_measuring(folder, text, tmp_path) -> None:
    import act_scales

    file = tmp_path / "act_scales.pt"
    common = ["--model", folder, "--data", text, "--device", "cpu", "--quiet"]
    code, _, err = run_tool(act_scales, *common, "--nsamples", 4, "--seqlen", 16, "--output", file)
    assert code == 0, err
    for name, extra in (("file", ["--act-scales", file]), ("measured", [])):
        code, out, err = run(*SMALL, *QUICK, *common, "--recipe", "smoothquant-w8a8", "--output", tmp_path / name, *extra)
        assert code == 0 and (name == "measured" or f"read {file}: the largest inputs of 8 layers" in out), err
    rows = [json.loads((tmp_path / name / "report.json").read_text())["rows"][1] for name in ("file", "measured")]
    assert rows[0]["perplexity"] == pytest.approx(rows[1]["perplexity"], rel=1e-4) and rows[0]["calibration"]["windows"] == 0
    for extra, said in ((["--recipe", "w8a8"], f"--act-scales {file}: the statistics of"), (["--recipe", "w8a8-dynamic"], "leave out --act-scales"),
                        (["--recipe", "smoothquant-w8a8", "--stats", tmp_path / "s"], "give one of the two")):
        code, _, err = run(*SMALL, *common, "--act-scales", file, *extra)
        assert code == 2 and said in err and len(err.strip().splitlines()) == 1, err


def test_everything_is_in_the_report(done, folder, text) -> None:
    output, *_ = done
    report = json.loads((output / "report" / "report.json").read_text())
    assert {"vitq", "torch", "model", "data", "windows", "seqlen", "device", "backend", "seed", "threads", "rows", "notes", "seconds"} <= set(report)
    rows = {row["recipe"]: row for row in report["rows"]}
    assert list(rows) == ["float", "w8a8-dynamic", "w8a8", "w4a8"] and (report["windows"], report["seqlen"]) == (10, 16)
    source = vitq.load_language_model(str(folder))
    found = vitq.open_text(text, source.tokenizer, 16, nsamples=4)
    assert rows["float"]["perplexity"] == pytest.approx(vitq.perplexity(source.model, found.eval))
    for name in ("w8a8-dynamic", "w8a8", "w4a8"):
        row = rows[name]
        checkpoint = output / "saved" / name
        assert row["perplexity"] == pytest.approx(vitq.perplexity(vitq.load(checkpoint), found.eval))
        assert row["ratio"] == pytest.approx(row["perplexity"] / rows["float"]["perplexity"])
        assert row["simulated"] == pytest.approx(row["perplexity"], rel=0.02)
        assert row["bytes"] == (checkpoint / "model.safetensors").stat().st_size and row["reload"] is True
        assert transformers.AutoTokenizer.from_pretrained(checkpoint)("day")["input_ids"] == source.tokenizer("day")["input_ids"]
        assert row["part_of_fp16"] == pytest.approx(row["bytes"] / 2 / sum(p.numel() for p in source.model.parameters()))
        assert row["calibration"]["windows"] == (0 if name == "w8a8-dynamic" else 4) and row["calibration"]["seconds"] > 0
        assert row["speed"]["quantized"]["prefill"]["median_ms"] > 0 and set(row["speed"]) == {"bfloat16", "quantized"}
        assert row["settings"]["name"] == name and row["dtype"] == "torch.float32"
    assert 8 < rows["w8a8"]["bits"]["linears"] < 9 and 4 < rows["w4a8"]["bits"]["linears"] < 5
    assert rows["w4a8"]["bits"]["model"] < rows["w8a8"]["bits"]["model"] and rows["w4a8"]["bytes"] < rows["w8a8"]["bytes"]
    assert (output / "report" / "table.md").read_text().count("\n") == 6


def test_a_checkpoint_is_measured_again(done, text) -> None:
    """It knows the model that it was made of."""
    output, *_ = done
    before = {row["recipe"]: row for row in json.loads((output / "report" / "report.json").read_text())["rows"]}
    code, out, err = run("--load", output / "saved" / "w4a8", "--seqlen", 16, "--device", "cpu", "--dtype", "float32", "--data", text, "--json")
    rows = json.loads(out)["rows"]
    assert code == 0, err
    assert [row["recipe"] for row in rows] == ["float", "w4a8"] and rows[1]["perplexity"] == before["w4a8"]["perplexity"]
    assert rows[1]["bytes"] == before["w4a8"]["bytes"] and "calibration" not in rows[1]


def test_quiet_limit_and_without_saving(folder, text, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*SMALL, "--model", folder, "--data", text, "--limit", 3, "--quiet")
    assert code == 0, err
    assert "3 windows of 16 tokens" in out and "quantizing" not in out and "w8a8-dynamic" in out and not list(tmp_path.iterdir())


def test_a_checkpoint_that_differs_is_exit_code_1(folder, text, tmp_path, monkeypatch) -> None:
    load = vitq.load

    def damaged(*args, **kwargs):
        model = load(*args, **kwargs)
        model.model.norm.weight[3] += 0.1
        return model

    monkeypatch.setattr(vitq, "load", damaged)
    code, out, _ = run(*SMALL, "--model", folder, "--data", text, "--save", tmp_path / "c", "--limit", 1)
    assert code == 1 and "its logits are DIFFERENT" in out


# Zero-shot tasks --------------------------------------------------------------------------------------------------------


def test_tasks_go_to_lm_eval(folder, text, monkeypatch) -> None:
    """With a harness that is played: it gets the float and the quantized model with their tokenizer, and its figures are printed."""
    asked = []

    def simple_evaluate(harness, tasks, **kwargs):
        asked.append((type(harness["pretrained"]).__name__, tasks, kwargs["num_fewshot"]))
        figures = {"alias": "lambada_openai", "acc,none": 0.25 * len(asked), "acc_stderr,none": 0.1, "perplexity,none": 7.5}
        return {"results": {"lambada_openai": figures}}

    manager = types.SimpleNamespace(match_tasks=lambda names: [n for n in names if n == "lambada_openai"])
    for name, module in {"lm_eval": {"simple_evaluate": simple_evaluate}, "lm_eval.tasks": {"TaskManager": lambda: manager}, "lm_eval.models": {},
                         "lm_eval.models.huggingface": {"HFLM": lambda **kwargs: kwargs}}.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**module))
    code, out, err = run(*SMALL, "--model", folder, "--data", text, "--tasks", "lambada_openai", "--eval", "none")
    assert code == 0, err
    assert asked == [("LlamaForCausalLM", ["lambada_openai"], 0), ("QuantizedLlamaForCausalLM", ["lambada_openai"], 0)]
    assert re.search(r"lambada_openai +acc +0.2500 +0.5000", out) and re.search(r"lambada_openai +perplexity +7.5000 +7.5000", out)
    code, _, err = run(*SMALL, "--model", folder, "--data", text, "--tasks", "lambada_openai,lambda")
    assert code == 2 and "lm-eval knows no task lambda;" in err


def test_tasks_run(folder, text, tmp_path) -> None:
    """The harness itself, on a task of its kind whose examples lie in a file: it completes a sentence by one of two words."""
    pytest.importorskip("lm_eval", reason="needs pip install vitq[lm-eval]")
    documents = [{"text": f"word{i} word{i + 1}", "choices": ["word7", "word8"], "label": i % 2} for i in range(6)]
    (tmp_path / "test.json").write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "mine.yaml").write_text(f"""
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / 'test.json'}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""")
    code, out, err = run(*SMALL, "--model", folder, "--data", text, "--tasks", tmp_path / "mine.yaml", "--eval", "none", "--json")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert [row["tasks"]["mine"]["acc"] * 6 % 1 for row in rows] == pytest.approx([0, 0], abs=1e-9) and "perplexity" not in rows[0]


# Mistakes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args, message", [
    (["--data", "no/such.txt"], "no such text: no/such.txt"), (["--recipe", "w3a3"], "w3a3.*shipped: .*w8a8"),
    (["--set", "head.bit=4"], "head.bit: unknown key.*bits"), (["--seqlen", "1"], "--seqlen must be at least 2"),
    (["--data", "short.txt"], "short.txt has 2 tokens, fewer than one window of 16"),
    (["--seqlen", "512"], "--seqlen 512 is more than the 256 positions"),
    (["--limit", "0"], "--limit must be at least 1"),
    (["--nsamples", "50", "--recipe", "w8a8"], "10 windows of 16 tokens to calibrate on.*50 are asked for"),
    (["--model", "no/such/folder"], "no such folder or file: no/such/folder"), (["--device", "nothing"], "device .nothing. cannot be used"),
    (["--backend", "cuda"], "--backend cuda cannot run on cpu"), (["--recipe", "erq-w4a4-paper"], "is for simulation"),
    (["--load", "somewhere", "--recipe", "w8a8"], "--load takes a checkpoint as it is"),
    (["--recipe", "w8a8,w8a8"], "two of the recipes have one name"), (["--stats", "s.st"], "w8a8-dynamic: nothing is measured before that runs"),
    (["--stats", "short.txt/s.st", "--recipe", "w8a8"], "short.txt"), (["--simulate", "--eval", "none"], "leave out --eval none"),
    (["--recipe", "w8a8-dynamic,phq-w8", "--set", "heads.least=99"], "heads.least: 99;.*4 query heads: give that many at most")])
def test_mistakes_are_one_line_and_leave_nothing(args, message, folder, text, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("word1 word2")
    code, _, err = run("--model", folder, "--data", text, *SMALL, "--save", tmp_path / "o", *args)
    lines = [line for line in err.splitlines() if line.startswith("quantize_llm: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err
    assert re.search(message, lines[0]), lines[0]
    assert not (tmp_path / "o").exists()


def test_what_does_not_belong_together(done, folder, text, tmp_path) -> None:
    """A checkpoint, or a file of statistics, of another model is refused before anything is evaluated."""
    output, *_ = done
    shutil.copytree(folder, tmp_path / "other")
    build(hidden_size=96, tie_word_embeddings=True, max_position_embeddings=256, eos_token_id=2).save_pretrained(tmp_path / "other")
    common = [*SMALL[:2], *SMALL[4:], "--data", text]
    code, out, err = run(*common, "--model", tmp_path / "other", "--load", output / "saved" / "w8a8")
    assert code == 2 and "was not made of" in err and "hidden_size is 64" in err and "perplexity" not in out
    stats = tmp_path / "s.st"
    assert run(*SMALL, *QUICK, "--model", folder, "--data", text, "--recipe", "w8a8", "--stats", stats, "--eval", "none")[0] == 0
    for model, recipe, message in ((tmp_path / "other", "w8a8", "another model"), (folder, "smoothquant-w8a8", "collected for another recipe")):
        code, out, err = run(*SMALL, *QUICK, "--model", model, "--data", text, "--recipe", recipe, "--stats", stats)
        assert code == 2 and f"--stats {stats}" in err and message in err and "give another file" in err and "perplexity" not in out
    assert "read " in run(*SMALL, *QUICK, "--model", folder, "--data", text, "--recipe", "w8a8", "--stats", stats, "--eval", "none")[1]


def test_models_that_cannot_be_quantized(done, folder, text, tmp_path) -> None:
    output, *_ = done

    def said(model: Path) -> str:
        code, _, err = run(*SMALL, "--model", model, "--data", text)
        assert code == 2 and len(err.splitlines()) == 1, err
        return err

    assert "quantized already" in said(output / "saved" / "w8a8") and "--load" in said(output / "saved" / "w8a8")
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64))
    gpt.save_pretrained(tmp_path / "gpt")
    assert re.search("is a GPT2LMHeadModel, which vitq has no adapter for; known: .*LlamaForCausalLM", said(tmp_path / "gpt"))
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "gptq").mkdir()
    (tmp_path / "gptq" / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    assert "is quantized already (gptq): give the float model" in said(tmp_path / "gptq")
    (tmp_path / "weights.bin").write_bytes(b"")
    assert "is no .gguf file" in said(tmp_path / "weights.bin")
    code, _, err = run(*SMALL, "--data", text)
    assert code == 2 and "give --model, or --load" in err
    vit = vitq.convert(vitq.load_model("test_vit", "random").model)
    code, _, err = run("--load", vitq.save(vit, tmp_path / "vit"), "--data", text, "--device", "cpu")
    assert code == 2 and "holds a QuantizedVisionTransformer, which is no language model" in err


def test_packages_that_are_missing_are_named(folder, text, tmp_path, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in ("gguf", "accelerate") else find(name, *a))
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert "reading m.gguf needs gguf and accelerate: pip install gguf accelerate" in run(*SMALL, "--model", tmp_path / "m.gguf", "--data", text)[2]
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert "--tasks needs the package lm-eval" in run(*SMALL, "--model", folder, "--data", text, "--tasks", "piqa")[2]


def test_a_folder_that_cannot_be_written_is_found_before_any_work(folder, text, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(vitq, "load_language_model", lambda *a, **k: pytest.fail("work began"))
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "thesis.tex").write_text("years of work")
    code, _, err = run(*SMALL, "--model", folder, "--data", text, "--save", tmp_path / "o")
    assert code == 2 and "no vitq checkpoint" in err and (tmp_path / "o" / "thesis.tex").exists()
    (tmp_path / "file").write_text("")
    code, _, err = run(*SMALL, "--model", folder, "--data", text, "--output", tmp_path / "file" / "o")
    assert code == 2 and "cannot write to the folder" in err


def test_the_tool_is_thin() -> None:
    source = Path(quantize_llm.__file__).read_text()
    assert len(source.splitlines()) < 250 and "from vitq" not in source and "import transformers" not in source
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("total, shown", [(5, [3, 5, 3, 5, 3]), (None, [3, 5, 8, 10, 13])])
def test_a_bar_starts_over_with_each_reading(total: int | None, shown: list[int]) -> None:
    found = []
    with Bar(total=total, file=io.StringIO()) as bar:
        for n in (3, 2, 3, 2, 3):
            bar.update(n)
            found.append(bar.n)
    assert found == shown


# Block by block ---------------------------------------------------------------------------------------------------------


def test_block_by_block_gives_the_same_and_goes_on(folder, text, tmp_path, monkeypatch) -> None:
    from vitq.calib.solvers import SOLVERS

    common, blocks = [*SMALL, *QUICK, "--model", folder, "--data", text], ["--stream", "float", "--calib-device", "cpu", "--resume", tmp_path / "kept"]
    recipes = ["--recipe", "w8a8,gptq-w4a16"]
    code, out, err = run(*common, *recipes, "--json")
    assert code == 0, err
    wanted = [row["perplexity"] for row in json.loads(out)["rows"]]
    solver, calls = SOLVERS["gptq"], []

    def full(problem):
        calls.append(problem)
        if len(calls) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return solver(problem)

    monkeypatch.setitem(SOLVERS, "gptq", full)
    code, out, err = run(*common, *recipes, *blocks)
    assert code == 2 and "1 of 2 blocks are kept in" in err and f"{tmp_path / 'kept' / 'gptq-w4a16'}; call again with the same resume=" in err
    assert "--batch-size (now 1)" in err
    code, out, err = run(*common, *recipes, *blocks, "--simulate", "--json")
    assert code == 0 and len(calls) == 6 + 4, err
    rows = json.loads(out)["rows"]
    assert [row["perplexity"] for row in rows] == wanted
    assert [row["simulated"] for row in rows[1:]] == pytest.approx(wanted[1:], rel=0.02)
    code, out, err = run(*common, "--recipe", "w8a8", *blocks[:4], "--stats", tmp_path / "stats", "--json")
    assert code == 0 and json.loads(out)["rows"][1]["perplexity"] == wanted[1], err
    assert len(vitq.Statistics.load(tmp_path / "stats")) == len(vitq.Statistics.load(tmp_path / "kept" / "w8a8" / "statistics.safetensors"))
    code, out, err = run(*common, "--recipe", "gptq-w4a16", "--stream", "quantized", "--json")
    assert code == 0 and json.loads(out)["rows"][1]["perplexity"] != wanted[2], err


@pytest.mark.parametrize("args, message", [
    (["--resume", "kept"], "give --stream float or"), (["--calib-device", "cpu"], "give --stream float or"),
    (["--stream", "float", "--calib-device", "cuda:77"], "device 'cuda:77' cannot be used"),
    (["--stream", "quantized", "--stats", "stats"], "leave out --stats")])
def test_mistakes_of_block_options(args: list, message: str, folder, text) -> None:
    code, _, err = run(*SMALL, "--model", folder, "--data", text, *args)
    assert code == 2 and re.search(message, err), err


@pytest.mark.parametrize("args", [[], ["--stream", "float"], ["--stream", "quantized", "--resume", "kept"]])
def test_processes_that_share_nothing_are_refused(args: list, folder, text, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = run(*SMALL, "--model", folder, "--data", text, "--recipe", "gptq-w4a16", *args)
    assert code == 2 and "--stream float by the folder of --resume: give both" in err, err


def test_what_is_learned_is_learned_once(folder, text, monkeypatch) -> None:
    """The simulation of a recipe with block_gradient takes what the executed model learned."""
    from vitq.calib import blocks

    seen, learn = [], blocks.learn
    monkeypatch.setattr(blocks, "learn", lambda model, name, *args, **kwargs: (seen.append(name), learn(model, name, *args, **kwargs))[1])
    code, out, err = run(*SMALL, "--model", folder, "--data", text, "--recipe", "flatquant-w4a4kv4", "--set", "block_gradient.epochs=1", "--simulate", "--json")
    row = json.loads(out)["rows"][1]
    assert code == 0 and seen == ["model.layers.0", "model.layers.1"]
    assert abs(row["perplexity"] / row["simulated"] - 1) < 0.02 and row["bits"]["linears"] < 8
