"""Text in: a file, a folder of files, WikiText-2 or C4, as windows of token ids, some to calibrate on and others to evaluate on."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitq.models import hub

@dataclass(frozen=True)
class _Named:
    """A data set on the hub. joint: what stands between its examples when they become one text. evaluated: examples, None for all.
    streamed: only what is read is downloaded; else the whole set, which is then kept in the cache of datasets."""

    repository: str
    configuration: str | None
    files: dict[str, str] | None
    held: str
    joint: str
    evaluated: int | None
    streamed: bool


NAMED = {
    "wikitext2": _Named("Salesforce/wikitext", "wikitext-2-raw-v1", None, "test", "\n\n", None, False),
    # One of C4's thousand files to calibrate on, and of its validation set the part that papers report.
    "c4": _Named("allenai/c4", None, {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"},
                 "validation", " ", 1100, True),
}
CHARACTERS = 12  # of a streamed train split that are read for each token to calibrate on: more than twice as many as English takes


@dataclass(frozen=True, eq=False)
class TextData:
    """Windows of T token ids, int64: calib [nsamples, T], eval [N, T]. No token is in two windows."""

    calib: Tensor
    eval: Tensor
    name: str


def open_text(data: str | os.PathLike[str], tokenizer: Callable[[str], Any], seqlen: int = 2048, *, nsamples: int = 128, seed: int = 0,
              limit: int | None = None) -> TextData:
    """Windows of `seqlen` tokens of a text, side by side: they do not overlap, and an incomplete last one is left out.

    data: "wikitext2" or "c4" (through the package datasets): the train split calibrates, the test or validation split is evaluated. Or a text
        file, or a folder of .txt files, which are joined in the order of their paths: the first half of its windows calibrates, the
        second half is evaluated.
    tokenizer: a tokenizer of transformers. The text is tokenized as one, with the special tokens that it puts at the start of one.
    nsamples: windows to calibrate on, drawn by `seed` from those there are.
    limit: at most so many windows to evaluate, the first ones.

    Raises FileNotFoundError (no such file), ValueError (an empty text, one shorter than a window, too few windows to calibrate on, a
    bad argument), ConnectionError (the hub does not answer within 10 seconds and the set is not in its cache), ImportError (datasets is missing).
    """
    for what, n, least in (("seqlen", seqlen, 2), ("nsamples", nsamples, 0), ("limit", limit, 1)):
        if n is not None and n < least:
            raise ValueError(f"{what} must be at least {least}; got {n}")
    if not isinstance(data, (str, os.PathLike)) or not str(data):
        raise TypeError(f"data must be {', '.join(map(repr, NAMED))}, a text file or a folder of .txt files; got {data!r}")
    name = os.fspath(data)
    if name in NAMED:
        train, held = _named(name, characters=nsamples * seqlen * CHARACTERS)
        calib = _windows(train, tokenizer, seqlen, f"{name} (calibration)") if nsamples else torch.empty(0, seqlen, dtype=torch.int64)
        evaluated = _windows(held, tokenizer, seqlen, f"{name} (evaluation)")
    else:
        windows = _windows(_read(Path(name).expanduser(), name), tokenizer, seqlen, name)
        calib, evaluated = windows[: len(windows) // 2], windows[len(windows) // 2:]
    if len(calib) < nsamples:
        half = "" if name in NAMED else " in its first half"
        raise ValueError(f"{name} has {len(calib)} windows of {seqlen} tokens to calibrate on{half}, {nsamples} are asked for: give more text, "
                         "shorter windows or fewer samples")
    chosen = random.Random(seed).sample(range(len(calib)), nsamples)
    return TextData(calib[chosen], evaluated[:limit], name)


def _windows(text: str, tokenizer: Callable[[str], Any], seqlen: int, what: str) -> Tensor:
    """int64 [N, seqlen] of the text's tokens."""
    if not text.strip():
        raise ValueError(f"{what} is empty: there is no text in it")
    ids = torch.as_tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)  # verbose: it would warn of the length
    if len(ids) < seqlen:
        raise ValueError(f"{what} has {len(ids)} tokens, fewer than one window of {seqlen}: give more text or shorter windows")
    return ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)


def _read(path: Path, name: str) -> str:
    if not path.exists():
        raise FileNotFoundError(f"no such text: {name}. Give {', '.join(NAMED)}, a text file or a folder of .txt files")
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{name} holds no .txt files")
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is no text in UTF-8: {error}") from error
    return "\n\n".join(texts)


def _named(name: str, characters: int) -> tuple[str, str]:
    """(text to calibrate on, text to evaluate on); of a streamed set, about as many characters of the first as are asked for."""
    of = NAMED[name]
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{name} needs the package datasets: pip install datasets; or give a text file") from error
    online = not datasets.config.HF_HUB_OFFLINE
    if online:
        try:
            hub.probe(datasets.config.HF_ENDPOINT)
        except hub.Unavailable as error:
            raise ConnectionError(f"{name} cannot be had: {error}. Give a text file; or set HF_HUB_OFFLINE=1 if it is in the cache of "
                                  "datasets") from error
    streamed = of.streamed and online
    try:
        splits = datasets.load_dataset(of.repository, of.configuration, data_files=of.files, streaming=streamed)
        train = _until(_texts(splits["train"]), characters if of.streamed else None)
        return of.joint.join(train), of.joint.join(itertools.islice(_texts(splits[of.held]), of.evaluated))
    except OSError as error:
        raise ConnectionError(f"{name} cannot be had: {error}. Give a text file instead") from error


def _texts(split: Iterable[dict[str, Any]]) -> Iterator[str]:
    return (example["text"] for example in split)


def _until(texts: Iterator[str], characters: int | None) -> Iterator[str]:
    """The first of `texts` that have so many characters; all for None."""
    seen = 0
    for text in texts:
        if characters is not None and seen >= characters:
            return
        yield text
        seen += len(text)
