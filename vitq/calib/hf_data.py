"""Streams of images from Hugging Face datasets, through the optional package ``datasets``."""
from __future__ import annotations

import hashlib
import io
import random
from typing import Any, Iterator

from vitq.calib.image_files import NO_LABEL, ImageStream, Transform

TRAIN_SPLITS = ("train", "training")
EVAL_SPLITS = ("validation", "val", "valid", "test", "dev")
SHUFFLE_BUFFER = 1000  # examples still encoded: about 100 MB at ImageNet's sizes


class HfStream(ImageStream):
    """A streamed split, or one of its two halves.

    half: None for the whole split; else (seed, 0 or 1): examples are dealt by a hash of their index in the stream's
        own order, so the two halves are disjoint however they are read.
    shuffle: seed of a buffered shuffle, or None to keep the stream's order.
    """

    def __init__(self, stream: Any, columns: tuple[str, str | None], transform: Transform, *, what: str,
                 skipped: list[str], unreadable: str, limit: int | None, half: tuple[int, int] | None = None,
                 shuffle: int | None = None):
        super().__init__(transform, what, skipped, unreadable, limit)
        self.stream, self.columns, self.half, self.shuffle = stream, columns, half, shuffle

    def _examples(self) -> Iterator[tuple[str, Any, int]]:
        image, label = self.columns
        for i, example in enumerate(self.stream):
            if self.half is None or _deal(self.half[0], i) == self.half[1]:
                value = example[image]
                where = value.get("path") if isinstance(value, dict) else None
                number = example[label] if label is not None else None
                yield (f"example {i}" + (f" ({where})" if where else ""), value,
                       NO_LABEL if number is None else int(number))

    def _sources(self) -> Iterator[tuple[str, Any, int]]:
        examples = self._examples()
        if self.shuffle is not None:
            examples = _shuffled(examples, random.Random(self.shuffle))
        for name, value, label in examples:
            if isinstance(value, dict):  # not decoded yet: so a broken image can be skipped, not the whole stream
                value = io.BytesIO(value["bytes"]) if value.get("bytes") is not None else value.get("path")
            yield name, io.BytesIO() if value is None else value, label


def _deal(seed: int, index: int) -> int:
    return hashlib.sha256(f"{seed}:{index}".encode()).digest()[0] & 1


def _shuffled(items: Iterator[Any], rng: random.Random) -> Iterator[Any]:
    buffer: list[Any] = []
    for item in items:
        if len(buffer) < SHUFFLE_BUFFER:
            buffer.append(item)
            continue
        i = rng.randrange(SHUFFLE_BUFFER)
        yield buffer[i]
        buffer[i] = item
    rng.shuffle(buffer)
    yield from buffer


def _columns(stream: Any, data: str) -> tuple[str, str | None, tuple[str, ...]]:
    """(image column, label column or None, class names) from the features' types, else from the first example."""
    features = dict(getattr(stream, "features", None) or {})
    if not features:
        first = next(iter(stream), None)
        if first is None:
            raise ValueError(f"{data}: the split is empty")
        features = dict(first)
    kinds = {k: type(v).__name__ for k, v in features.items()}
    images = [k for k, v in features.items() if kinds[k] == "Image" or hasattr(v, "getpixel")]
    if not images:
        listed = ", ".join(f"{k} ({kinds[k]})" for k in features)
        raise ValueError(f"{data}: no column holds images; the columns are {listed}. Save the images to a folder and "
                         "give that")
    labels = [k for k in features if kinds[k] == "ClassLabel"]
    label = next((k for k in ("label", "labels", "fine_label") if k in labels), labels[0] if labels else None)
    return images[0], label, tuple(features[label].names) if label else ()


def open_hf(data: str, transform: Transform, *, seed: int, unreadable: str,
            limit: int | None) -> tuple[HfStream, HfStream, tuple[str, ...], bool, list[str]]:
    """``hf:NAME[:SPLIT]`` as (calibration, evaluation, class names, labels known, the list of skipped images).

    Without SPLIT the train split calibrates and validation (or test) evaluates. SPLIT, or an only split, is dealt in
    two. Raises ImportError without ``datasets``, ValueError for a wrong name, split or columns.
    """
    name, _, split = data[len("hf:"):].partition(":")
    if not name:
        raise ValueError(f"got {data!r}; give hf:NAME or hf:NAME:SPLIT, such as hf:timm/mini-imagenet:validation")
    try:
        import datasets
    except ImportError as e:
        raise ImportError(f"{data} needs the package datasets: pip install datasets") from e
    try:
        splits = datasets.load_dataset(name, streaming=True)
    except (OSError, ValueError, RuntimeError) as e:
        raise ValueError(f"cannot open the Hugging Face dataset {name!r}: {e}") from e
    if split and split not in splits:
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(splits)}")
    train = next((s for s in TRAIN_SPLITS if s in splits), None)
    held = next((s for s in EVAL_SPLITS if s in splits), None)
    if not split and (train is None or held is None):
        split = train or held or next(iter(splits))

    image, label, classes = _columns(splits[split or held], data)
    skipped: list[str] = []

    def undecoded(which: str) -> Any:
        stream = splits[which]
        if hasattr(stream, "cast_column") and getattr(stream, "features", None):
            stream = stream.cast_column(image, datasets.Image(decode=False))
        return stream

    def part(stream: Any, role: str, **kwargs: Any) -> HfStream:
        return HfStream(stream, (image, label), transform, what=f"{data} ({role})", skipped=skipped,
                        unreadable=unreadable, limit=limit, **kwargs)

    if split:
        stream = undecoded(split)
        calib = part(stream, "calibration", half=(seed, 0), shuffle=seed)
        evaluation = part(stream, "evaluation", half=(seed, 1))
    else:
        stream = undecoded(train)
        if hasattr(stream, "shuffle"):  # this one shuffles the order of the files too
            stream = stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        calib = part(stream, "calibration")
        evaluation = part(undecoded(held), "evaluation")
    return calib, evaluation, classes, label is not None, skipped
