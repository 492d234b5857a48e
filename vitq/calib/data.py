"""Images in: the demo photographs, a folder or a Hugging Face dataset, preprocessed the way the model wants.

:func:`open_images` gives two disjoint streams, one to calibrate with and one to evaluate on. Both yield
``(image, label)``: a float32 tensor ``[3, H, W]`` after timm's own evaluation transform, and an int label, -1 where
there is none. Nothing here touches the global random state: an order is a hash or comes from ``random.Random(seed)``.
"""
from __future__ import annotations

import hashlib
import os
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from vitq.calib.image_files import IMAGE_SUFFIXES, NO_LABEL, ImageFiles, Sample, walk

TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("val", "validation", "valid", "test", "dev")
DEMO_CLASSES = ("global", "local", "nominal")  # sorted, as ImageFolder numbers them
SYNTHETIC_EVAL = 16  # images that are made beside those to calibrate on
DEMO_TEST_COUNTS = {"nominal": 200, "local": 100, "global": 100}
_WNID = re.compile(r"n\d{8}\Z")


@dataclass(frozen=True)
class ImageData:
    """Two disjoint sets of preprocessed images, see :func:`open_images`."""

    calib: Dataset
    eval: Dataset
    class_names: tuple[str, ...]
    name: str
    eval_labels_known: bool
    skipped: list[str] = field(default_factory=list)


def data_config(model: torch.nn.Module) -> dict[str, Any]:
    """The preprocessing `model` was trained for, as plain lists, numbers and strings that JSON can hold.

    Keys: ``input_size`` [C, H, W], ``mean``, ``std``, ``interpolation``, ``crop_pct``, ``crop_mode``.
    """
    from timm.data import resolve_model_data_config

    cfg = dict(resolve_model_data_config(model))
    # pretrained_cfg keeps the size of the weights; a model built with img_size= accepts only its own.
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    if size is not None and getattr(embed, "strict_img_size", True):
        size = (size, size) if isinstance(size, int) else tuple(size)
        cfg["input_size"] = (cfg["input_size"][0], *size)
    return {k: list(v) if isinstance(v, (tuple, list)) else v for k, v in cfg.items()}


def _make_transform(cfg: dict[str, Any]) -> Callable[[Any], Tensor]:
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    if not isinstance(cfg, dict) or any(k not in cfg for k in keys):
        raise ValueError(f"data_config needs the keys {', '.join(keys)} (vitq.data_config(model) gives them); got "
                         f"{sorted(cfg) if isinstance(cfg, dict) else type(cfg).__name__}")
    if len(cfg["input_size"]) != 3 or cfg["input_size"][0] != 3:
        raise ValueError(f"images are read as RGB, so input_size must be [3, H, W]; got {list(cfg['input_size'])}")
    from timm.data import create_transform

    return create_transform(**{k: tuple(cfg[k]) if isinstance(cfg[k], list) else cfg[k] for k in keys},
                            is_training=False)


def _hash_key(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _list_folder(root: Path) -> tuple[list[Sample], tuple[str, ...]]:
    """Samples of a folder of class folders (labels by sorted name), or of a flat one (label -1, no classes)."""
    classes = sorted(d.name for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
    samples: list[Sample] = []
    for label, c in enumerate(classes):
        samples += [Sample(p, label) for p in walk(root / c)]
    if samples:
        return samples, tuple(classes)
    return [Sample(p, NO_LABEL) for p in walk(root)], ()


def _one_per_file(samples: Iterable[Sample]) -> list[Sample]:
    """Drops a file that is reached again through a link, under this or another class."""
    return list({os.path.realpath(s.path): s for s in reversed(list(samples))}.values())[::-1]


def _by_hash(samples: Iterable[Sample], root: Path) -> list[Sample]:
    # The order of a hash mixes the classes, so the first N images are a fair sample of all, whatever the seed.
    return sorted(samples, key=lambda s: _hash_key(Path(os.path.relpath(s.path, root)).as_posix()))


def _folder_samples(root: Path, seed: int) -> tuple[list[Sample], list[Sample], tuple[str, ...]]:
    """(calibration samples, evaluation samples, class names) of a folder in any of the known layouts."""
    def sub(names: Sequence[str]) -> Path | None:
        return next((root / n for n in names if (root / n).is_dir()), None)

    train, evaluation = sub(TRAIN_NAMES), sub(EVAL_NAMES)
    rng = random.Random(seed)
    if train is None or evaluation is None:
        only = train or evaluation or root
        samples, classes = _list_folder(only)
        samples = _one_per_file(samples)
        rng.shuffle(samples)
        half = len(samples) // 2
        if len(samples) == 1:
            raise ValueError(f"{only} holds one image; at least two are needed, to calibrate on one and evaluate on "
                             "another")
        return samples[:half], _by_hash(samples[half:], root), classes
    calib, calib_classes = _list_folder(train)
    held, classes = _list_folder(evaluation)
    for part, folder in ((calib, train), (held, evaluation)):
        if not part:
            raise ValueError(f"{folder} holds no image files (looked for {' '.join(sorted(IMAGE_SUFFIXES))})")
    index = {c: i for i, c in enumerate(classes)}
    to_eval = [index.get(c, NO_LABEL) for c in calib_classes]
    calib = [Sample(p, to_eval[label] if label >= 0 else NO_LABEL) for p, label in calib]
    rng.shuffle(calib)
    return calib, _by_hash(held, root), classes


def demo_split(root: str | os.PathLike[str] | None = None) -> dict[str, list[tuple[str, int]]]:
    """The fixed split of the textile photographs: ``{"train": 1600 x (path, label), "test": 400 x (path, label)}``.

    Labels index :data:`DEMO_CLASSES`. In each class the images whose ``class/file`` name hashes lowest are the test
    images, so the split depends on neither seed nor file system. `root` is the folder with the class folders;
    by default the installed package's. Raises ImportError without the package, FileNotFoundError for a wrong `root`.
    """
    if root is None:
        try:
            from conformal_clip_data import textile_simulated_root
        except ImportError as e:
            raise ImportError("the demo photographs come with the package conformal-clip-data: "
                              "pip install 'vitq[demo]', or give your own images as a folder") from e
        root = textile_simulated_root()
    split: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    for label, name in enumerate(DEMO_CLASSES):
        folder = Path(root) / name
        paths = walk(folder) if folder.is_dir() else []
        if len(paths) <= DEMO_TEST_COUNTS[name]:
            raise FileNotFoundError(f"{folder} should hold the {name} photographs of conformal-clip-data; it has "
                                    f"{len(paths)} images. Reinstall the package: pip install 'vitq[demo]'")
        paths.sort(key=lambda p: _hash_key(f"{name}/{os.path.basename(p)}"))
        n = DEMO_TEST_COUNTS[name]
        split["test"] += [(p, label) for p in paths[:n]]
        split["train"] += [(p, label) for p in paths[n:]]
    for part in split.values():
        part.sort(key=lambda s: _hash_key(f"{DEMO_CLASSES[s[1]]}/{os.path.basename(s[0])}"))
    return split


def open_images(data: str, data_config: dict[str, Any], *, seed: int = 0, unreadable: str = "skip",
                limit: int | None = None, model: torch.nn.Module | None = None) -> ImageData:
    """Opens images for calibration and evaluation; no image is ever in both sets.

    data: ``"demo"`` (the textile photographs), a folder, ``"hf:NAME[:SPLIT]"`` (streamed), or ``"synthetic"`` (made by `vitq.synthesize` from
        ``model``: 128 images or `limit` to calibrate, 16 others to evaluate, without labels). PATH/train calibrates
        and PATH/val (validation, test) evaluates; a folder of class folders, or a flat one, is split in two by `seed`.
    data_config: what :func:`data_config` gives; the images come out as float32 ``[3, H, W]`` of its input size.
    seed: orders the calibration images (and splits an unsplit folder). The order of evaluation is fixed by a hash.
    unreadable: ``"skip"`` (named in ``.skipped`` and one warning) or ``"error"`` (ValueError naming the file).
    limit: at most so many images in each of the two sets.

    Raises FileNotFoundError (no such folder), ValueError (nothing readable, a bad argument), ImportError (a package
    that this kind of data needs is missing).
    """
    if not isinstance(data, (str, os.PathLike)) or not str(data):
        raise TypeError(f"data must be 'demo', a folder, 'hf:NAME[:SPLIT]' or 'synthetic'; got {data!r}")
    if unreadable not in ("skip", "error"):
        raise ValueError(f"unreadable must be 'skip' or 'error'; got {unreadable!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1; got {limit}")
    data, transform = os.fspath(data), _make_transform(data_config)
    if data == "synthetic":
        return _synthetic(model, data_config, limit or 128, seed)
    if data.startswith("hf:"):
        from vitq.calib.hf_data import open_hf

        calib, held, classes, known, skipped = open_hf(data, transform, seed=seed, unreadable=unreadable, limit=limit)
        return ImageData(calib, held, classes, data, known, skipped)
    if data == "demo":
        split = demo_split()
        calib, held = ([Sample(*s) for s in split[k]] for k in ("train", "test"))
        random.Random(seed).shuffle(calib)
        classes: tuple[str, ...] = DEMO_CLASSES
    else:
        root = Path(data).expanduser()
        if not root.exists():
            raise FileNotFoundError(f"no such folder: {data}. Give 'demo', a folder of images, 'hf:NAME[:SPLIT]' or 'synthetic'")
        if not root.is_dir():
            raise ValueError(f"{data} is a file; give the folder that holds the images")
        calib, held, classes = _folder_samples(root, seed)
        if not held:
            raise ValueError(f"{data} holds no image files (looked for {' '.join(sorted(IMAGE_SUFFIXES))})")
    skipped = []
    common: dict[str, Any] = dict(skipped=skipped, unreadable=unreadable, limit=limit)
    sets = [ImageFiles(calib, transform, what=f"{data} (calibration)", avoid=() if data == "demo" else held, **common),
            ImageFiles(held, transform, what=f"{data} (evaluation)", **common)]
    if unreadable == "skip":
        for s in sets:
            s.check()
    return ImageData(*sets, classes, data, bool(classes), skipped)


def _synthetic(model: torch.nn.Module | None, config: dict[str, Any], count: int, seed: int) -> ImageData:
    from vitq.calib.synthetic import synthesize

    if model is None:
        raise ValueError("synthetic images are made from a model: give model=")
    images = synthesize(model, count + SYNTHETIC_EVAL, config, seed=seed)
    unknown = torch.full((len(images),), NO_LABEL)
    return ImageData(TensorDataset(images[:count], unknown[:count]), TensorDataset(images[count:], unknown[count:]), (), "synthetic", False)


def batches(dataset: Dataset, batch_size: int, *, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields ``(images [B, 3, H, W], labels int64 [B])`` in the dataset's own order; the last may be smaller.

    limit: stop after so many images. Raises ValueError for a batch size or limit under 1.
    """
    for name, n in (("batch_size", batch_size), ("limit", limit)):
        if n is not None and n < 1:
            raise ValueError(f"{name} must be at least 1; got {n}")
    items = iter(dataset) if hasattr(dataset, "__iter__") else (dataset[i] for i in range(len(dataset)))  # type: ignore
    images: list[Tensor] = []
    labels: list[int] = []
    try:
        for n, (image, label) in enumerate(items, 1):
            images.append(image)
            labels.append(int(label))
            if len(images) == batch_size or n == limit:
                yield torch.stack(images), torch.tensor(labels)
                images, labels = [], []
            if n == limit:
                return
        if images:
            yield torch.stack(images), torch.tensor(labels)
    finally:
        if hasattr(items, "close"):
            items.close()


def labels_match(model_class_names: Sequence[str] | None, num_classes: int, data: ImageData) -> bool:
    """Whether `data`'s labels are the model's own classes, so that top-1 means something.

    True where both name the same classes in the same order; where the model records none, where it has 1000 classes
    and so many WordNet folders (n01440764 ...) are there. ImageNet-1k may name its classes by wnid or by words.
    """
    names = tuple(data.class_names)
    if not data.eval_labels_known or len(names) != num_classes:
        return False
    if model_class_names is not None:
        own = tuple(model_class_names)
        return own == names or (num_classes == 1000 and _as_wnids(own) == _as_wnids(names) is not None)
    if num_classes != 1000:
        return False
    wnids = _as_wnids(names)
    return wnids is not None and list(wnids) == sorted(wnids)


def _as_wnids(names: tuple[str, ...]) -> tuple[str, ...] | None:
    """1000 class names as wnids: themselves, or found by ImageNet-1k's words; None where they are neither."""
    if all(_WNID.match(n) for n in names):
        return names
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    words = [str(w).split(",")[0].strip().lower() for w in info.label_descriptions()]
    same = sum(w == n.split(",")[0].strip().lower() for w, n in zip(words, names))
    # A few spellings differ between the copies in use; shuffled or other classes agree almost nowhere.
    return tuple(info.label_names()) if len(names) == 1000 and same >= 950 else None
