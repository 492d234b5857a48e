"""vitq.open_text: windows of files, folders and named sets; the two sets never share a token."""

from __future__ import annotations

import sys
import time
import types
import urllib.request

import pytest
import torch

import vitq


def words(text: str, verbose: bool = True) -> dict[str, list[int]]:
    """A tokenizer with one id for each word, and one at the start: word i of `story` has id i."""
    return {"input_ids": [10**6] + [int(word[1:]) for word in text.split()]}


def story(count: int, first: int = 0) -> str:
    return " ".join(f"w{i}" for i in range(first, first + count))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text(story(1003))
    return path


def test_windows_of_a_file(file) -> None:
    text = vitq.open_text(file, words, 10, nsamples=20)
    assert text.eval.shape == (50, 10) and text.calib.shape == (20, 10) and text.eval.dtype == torch.int64
    assert torch.equal(text.eval.flatten(), torch.arange(499, 999)), "the second half, in order and without a gap"
    assert all(torch.equal(w, w[0] + torch.arange(10)) for w in text.calib if w[0] != 10**6), "windows are pieces of the text"


def test_no_token_is_in_both_sets_nor_twice_in_one(file) -> None:
    for seed in range(5):
        text = vitq.open_text(file, words, 10, nsamples=50, seed=seed)
        everything = torch.cat((text.calib, text.eval)).flatten()
        assert len(everything.unique()) == len(everything) == 1000


def test_seed_and_limit(file) -> None:
    a, b, c = (vitq.open_text(str(file), words, 10, nsamples=9, seed=seed, limit=4) for seed in (1, 1, 2))
    assert torch.equal(a.calib, b.calib) and not torch.equal(a.calib, c.calib)
    whole = vitq.open_text(file, words, 10, nsamples=0)
    assert torch.equal(a.eval, c.eval) and torch.equal(a.eval, whole.eval[:4]) and whole.calib.shape == (0, 10)


def test_a_folder(tmp_path) -> None:
    (tmp_path / "b.txt").write_text(story(30, 10))
    (tmp_path / "a.txt").write_text(story(10))
    (tmp_path / "notes.md").write_text("words that are none")
    text = vitq.open_text(tmp_path, words, 5, nsamples=1)
    assert torch.equal(text.eval.flatten(), torch.arange(19, 39)), "a.txt comes before b.txt"


@pytest.mark.parametrize("content, arguments, error, message", [
    (" \n", {}, ValueError, "story.txt is empty"), (story(5), {}, ValueError, "6 tokens, fewer than one window of 10"),
    (story(50), {"nsamples": 3}, ValueError, "2 windows of 10 tokens to calibrate on in its first half, 3 are asked for"),
    (story(50), {"seqlen": 1}, ValueError, "seqlen must be at least 2"), (story(50), {"nsamples": -1}, ValueError, "nsamples must be at least 0"),
    (story(50), {"limit": 0}, ValueError, "limit must be at least 1")])
def test_mistakes(content, arguments, error, message, tmp_path) -> None:
    (tmp_path / "story.txt").write_text(content)
    with pytest.raises(error, match=message):
        vitq.open_text(tmp_path / "story.txt", words, **{"seqlen": 10, "nsamples": 0, **arguments})


def test_what_is_no_text(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no such text: nowhere.txt. Give wikitext2, c4, a text file"):
        vitq.open_text("nowhere.txt", words)
    with pytest.raises(ValueError, match="holds no .txt files"):
        vitq.open_text(tmp_path, words)
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="x.txt is no text in UTF-8"):
        vitq.open_text(tmp_path, words)
    with pytest.raises(TypeError, match="'wikitext2', 'c4'"):
        vitq.open_text(3, words)


# Named sets, with a hub that is played ----------------------------------------------------------------------------------


@pytest.fixture
def datasets(monkeypatch):
    """The package datasets, with train and held-out documents of 100 words; `asked` records each call."""
    asked = []

    def load_dataset(name, configuration=None, *, data_files=None, streaming=False):
        asked.append((name, configuration, data_files, streaming))
        held = "test" if "wikitext" in name else "validation"

        def documents(first):
            return ({"text": story(100, first + 100 * i)} for i in range(2000))

        return {"train": documents(0), held: documents(10**6)}

    module = types.SimpleNamespace(load_dataset=load_dataset, asked=asked,
                                   config=types.SimpleNamespace(HF_HUB_OFFLINE=False, HF_ENDPOINT="https://hub.invalid"))
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr("vitq.models.hub.probe", lambda url: None)
    return module


@pytest.mark.parametrize("name, streamed, evaluated", [("wikitext2", False, 200_000), ("c4", True, 110_000)])
def test_named_sets_calibrate_on_train_and_evaluate_what_is_held_out(name, streamed, evaluated, datasets) -> None:
    text = vitq.open_text(name, words, 50, nsamples=30)
    assert text.calib.shape == (30, 50) and int(text.calib[text.calib != 10**6].max()) < 200_000
    assert text.eval.shape == (evaluated // 50, 50) and int(text.eval.min()) >= 10**6
    (_, configuration, files, streaming), = datasets.asked
    assert streaming == streamed and (configuration == "wikitext-2-raw-v1") == (files is None)
    if streamed:
        assert int(text.calib[text.calib != 10**6].max()) < 10_000, "no more of the train split is read than it takes"


def test_a_set_in_the_cache_needs_no_network(datasets, monkeypatch) -> None:
    datasets.config.HF_HUB_OFFLINE = True
    monkeypatch.setattr("vitq.models.hub.probe", lambda url: pytest.fail("asked the network"))
    assert vitq.open_text("c4", words, 50, nsamples=2, limit=3).eval.shape == (3, 50)
    assert datasets.asked[0][3] is False, "what is in the cache is not read as a stream"


def test_a_hub_that_cannot_be_reached_is_noticed_soon(datasets, monkeypatch) -> None:
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "datasets", datasets)

    def away(request, timeout):
        raise OSError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", away)
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="wikitext2 cannot be had: hub.invalid cannot be reached: no route. Give a text file"):
        vitq.open_text("wikitext2", words)
    assert time.monotonic() - start < 10 and not datasets.asked


def test_errors_of_datasets(datasets, monkeypatch) -> None:
    def broken(*args, **kwargs):
        raise ConnectionError("gone away")

    datasets.load_dataset = broken
    with pytest.raises(ConnectionError, match="c4 cannot be had: gone away"):
        vitq.open_text("c4", words)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="c4 needs the package datasets: pip install datasets"):
        vitq.open_text("c4", words)
