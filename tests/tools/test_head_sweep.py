"""tools/head_sweep.py, in process, on a tiny language model and on the demo; and recipes with heads in the tools that quantize."""

from __future__ import annotations

import json
import random
import types

import pytest
import torch
from helpers import build as vit
from helpers import images, quick, run_tool

transformers = pytest.importorskip("transformers", reason="needs pip install vitq[llm]")
from language_models import build  # noqa: E402

import head_sweep  # noqa: E402
import quantize_llm  # noqa: E402
import quantize_vit  # noqa: E402
import vitq  # noqa: E402
from _console import Console  # noqa: E402

WORDS = [f"word{i}" for i in range(120)]
QUICK = ["--set", "weight.observer=minmax", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", ".", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path_factory.mktemp("models") / "tiny"
    build(max_position_embeddings=256).save_pretrained(path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "story.txt"
    draw = random.Random(0)
    path.write_text(" ".join(" ".join(draw.choices(WORDS, k=6)) + " ." for _ in range(60)))
    return path


def test_a_language_model(folder, text, tmp_path) -> None:
    code, out, err = run_tool(head_sweep, "--llm", folder, "--data", text, "--seqlen", 16, "--calib-size", 4, "--seeds", 2, "--heads", "0,2,1.0",
                              "--output", tmp_path, *QUICK)
    assert code == 0, err
    report = json.loads((tmp_path / "heads.json").read_text())
    rows = {(row["score"], row["least"]): row["runs"] for row in report["rows"]}
    assert list(rows) == [("float", ""), ("any", "0"), ("contribution", "2"), ("random", "2"), ("any", "1.0")]
    assert [len(runs) for runs in rows.values()] == [1, 2, 2, 2, 2]
    assert [runs[0]["units"] for runs in list(rows.values())[1:]] == [0, 1, 1, 2]
    bits = [runs[0]["bits"] for runs in list(rows.values())[1:]]
    assert bits[0] > bits[1] == bits[2] > bits[3]
    assert all(run["perplexity"] > 1 and 0 <= run["last word %"] <= 100 for runs in rows.values() for run in runs)
    assert report["samples"] == 13 and "| 2 | random |" in (tmp_path / "heads.md").read_text()


def test_the_last_word(folder) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids, count = head_sweep.last_word(tokenizer, torch.tensor(tokenizer("word1 word2 . word3 word4 . word5")["input_ids"]))
    assert tokenizer.decode(ids) in ("word1 word2 . word3 word4", "word1 word2. word3 word4") and count == 1
    assert head_sweep.last_word(tokenizer, torch.tensor(tokenizer("word1 word2")["input_ids"])) is None

    class Knows(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, x, use_cache):
            return type("Out", (), {"logits": torch.nn.functional.one_hot(x + 1, 200).float()})  # each token is one more than the last

    words = [(torch.tensor(ids), count) for ids, count in (([5, 9, 10, 11], 2), ([5, 9, 10, 11], 3), ([3, 4], 1), ([9, 9], 1))]
    assert head_sweep.are_right(Knows(), words) == [True, False, True, False]


@pytest.mark.parametrize("args, message", [
    (["--recipe", "w8a8"], "--recipe w8a8 has no heads: take phq-mixed"), (["--seeds", "0"], "--seeds must be at least 1"),
    (["--heads", "many"], "heads.least: 'many' is str"), (["--scores", "l3"], "heads.score: 'l3' is not known")])
def test_mistakes(args: list[str], message: str, folder, text) -> None:
    code, _, err = run_tool(head_sweep, "--llm", folder, "--data", text, *args)
    assert code == 2 and message in err and err.count("\n") == 1


def test_an_image_model(tmp_path) -> None:
    pytest.importorskip("conformal_clip_data")
    code, _, err = run_tool(head_sweep, "--vit", "deit_s=demo", "--data", "demo", "--recipe", "phq-w8", "--calib-size", 4, "--seeds", 1,
                            "--heads", "2", "--scores", "l1", "--limit", 4, "--batch-size", 4, "--output", tmp_path, *QUICK)
    assert code == 0, err
    row = json.loads((tmp_path / "heads.json").read_text())["rows"][1]
    assert (row["score"], row["runs"][0]["units"]) == ("l1", 2) and row["runs"][0]["top-1 %"] > 50


def test_the_tools_that_quantize_take_recipes_with_heads(folder, text, tmp_path) -> None:
    args = ["--model", folder, "--data", text, "--seqlen", 16, "--nsamples", 4, "--recipe", "phq-w8,phq-mixed", *QUICK]
    code, out, err = run_tool(quantize_llm, *args, "--save", tmp_path / "saved", "--output", tmp_path / "out")
    assert code == 0 and "bit-identical" in out, err
    found = json.loads((tmp_path / "out" / "report.json").read_text())["rows"][1:]
    assert [row["recipe"] for row in found] == ["phq-w8", "phq-mixed"] and found[0]["bits"]["linears"] > 8.5 > found[1]["bits"]["linears"]
    kept = json.loads(run_tool(quantize_llm, *args, "--stats", tmp_path / "stats", "--json")[1])["rows"][1:]
    assert len(vitq.Statistics.load(tmp_path / "stats")) and [row["settings"]["heads"] for row in kept] == [row["settings"]["heads"] for row in found]
    assert [row["perplexity"] for row in kept] == pytest.approx([row["perplexity"] for row in found], rel=0.02)
    model = vit("deit_tiny_patch16_224", depth=2, img_size=64, embed_dim=96, num_heads=4)
    given = types.SimpleNamespace(batch_size=2, backend="auto", memory=1.0)
    data = types.SimpleNamespace(calib=[(image, 0) for image in images(model, 4)])
    recipe = quick("phq-w8")
    statistics, converted = quantize_vit.quantize(given, recipe, types.SimpleNamespace(model=model), data, Console(True, False))
    assert len(statistics) and converted.vitq.calibration == {"images": 4} and converted.vitq.recipe.heads["chosen"]
