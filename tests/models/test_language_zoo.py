"""vitq.load_language_model: folders, and names on a hub that is played; tests/tools/test_quantize_llm.py has what is refused."""

from __future__ import annotations

import time
import urllib.request

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs pip install vitq[llm]")
from language_models import build  # noqa: E402

import vitq  # noqa: E402
from vitq.models import hub  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tokenizers import Tokenizer, models

    path = tmp_path_factory.mktemp("models") / "tiny"
    build().to(torch.bfloat16).save_pretrained(path)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "word": 1}, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(path)
    return path


def test_a_folder(folder) -> None:
    loaded = vitq.load_language_model(folder)
    assert loaded.model.dtype == torch.bfloat16 and not loaded.model.training and loaded.name == str(folder)
    assert loaded.tokenizer("word")["input_ids"] == [1]
    again = vitq.load_language_model(str(folder), dtype=torch.float32)
    assert again.model.dtype == torch.float32
    assert all(torch.equal(a, b.to(torch.bfloat16)) for a, b in zip(loaded.model.parameters(), again.model.parameters(), strict=True))


def test_a_folder_without_a_tokenizer(tmp_path) -> None:
    build().save_pretrained(tmp_path)
    assert vitq.load_language_model(tmp_path, tokenizer=False).tokenizer is None
    with pytest.raises(FileNotFoundError, match="has no tokenizer: save it there"):
        vitq.load_language_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        vitq.load(tmp_path / "none")


@pytest.fixture
def from_pretrained(folder, monkeypatch):
    """transformers finds `someone/tiny` in `folder`; whether each call asked for local files alone."""
    asked = []
    for auto in (transformers.AutoConfig, transformers.AutoTokenizer, transformers.AutoModelForCausalLM):
        own = auto.from_pretrained

        def played(name, own=own, **options):
            if name == "someone/tiny":  # and not one of these for another
                asked.append(options.pop("local_files_only", False))
            return own(folder, **options)

        monkeypatch.setattr(auto, "from_pretrained", played)
    return asked


def away(request, timeout):
    raise OSError("no route")


def test_a_name_on_the_hub(from_pretrained, monkeypatch) -> None:
    monkeypatch.setattr(hub, "probe", lambda url: None)
    assert vitq.load_language_model("someone/tiny").name == "someone/tiny" and from_pretrained == [False] * 3


def test_without_a_hub_its_cache_is_enough(from_pretrained, monkeypatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(urllib.request, "urlopen", away)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: "a path")
    vitq.load_language_model("someone/tiny")
    assert from_pretrained == [True] * 3, "nothing is looked for in the network"


def test_without_a_hub_and_cache(from_pretrained, monkeypatch) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", away)
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="someone/none is neither a folder nor in the hub's cache.*cannot be reached: no route"):
        vitq.load_language_model("someone/none")
    assert time.monotonic() - start < 10 and not from_pretrained
