"""Datasets of images that survive what folders really hold: odd modes, broken files, links, copies."""
from __future__ import annotations

import hashlib
import logging
import os
import struct
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Sequence

from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

_log = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .bmp .ppm .pgm .pbm .pnm .tif .tiff .webp .gif".split())
NO_LABEL = -1
Transform = Callable[[Any], Tensor]  # a PIL image, RGB -> float32 [3, H, W]


class Sample(NamedTuple):
    """One image file and its class index (-1: none)."""

    path: str
    label: int


def walk(folder: Path) -> list[str]:
    """Every image file under `folder`, sorted; links are followed, but no folder and no file is taken twice."""
    found: dict[str, str] = {}
    seen: set[str] = set()
    for base, dirs, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(base)
        if real in seen:
            dirs.clear()
            continue
        seen.add(real)
        dirs[:] = sorted(d for d in dirs if not d.startswith("."))
        for f in sorted(files):
            if not f.startswith(".") and os.path.splitext(f)[1].lower() in IMAGE_SUFFIXES:
                path = os.path.join(base, f)
                found.setdefault(os.path.realpath(path), path)
    return sorted(found.values())


def to_rgb(image: Any) -> Any:
    """A PIL image of any mode as 8-bit RGB. 16-bit and float greys are scaled, not clipped; alpha is dropped."""
    import numpy as np
    from PIL import Image

    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        # PIL clips these modes to 0..255, which turns most 16-bit images white.
        a = np.nan_to_num(np.asarray(image, dtype=np.float64))
        top = float(a.max(initial=0.0))
        if image.mode == "F":
            full = 1.0 if top <= 1 else 255.0 if top <= 255 else top
        else:
            full = 255.0 if top <= 255 and not image.mode.startswith("I;16") else max(65535.0, top)
        image = Image.fromarray(np.rint(a.clip(0) * (255.0 / full)).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def decode(source: Any, transform: Transform) -> Tensor:
    """Opens a path, a file object or a PIL image; any failure to decode it is a ValueError."""
    from PIL import Image

    try:
        if isinstance(source, Image.Image):
            rgb = to_rgb(source)
        else:
            with Image.open(source) as image:
                image.load()  # inside the try: PIL reads lazily, and a truncated file shows only here
                rgb = to_rgb(image)
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, zlib.error,
            Image.DecompressionBombError) as e:
        raise ValueError(str(e) or type(e).__name__) from e
    return transform(rgb)


class ImageStream(IterableDataset):
    """What files and streams share: skipping or refusing the unreadable, one warning at the end, sharding, limits.

    A subclass gives ``_sources() -> (name, what to decode, label)``. Images are decoded by a few threads (PIL releases
    the interpreter lock) and come out in order.
    """

    def __init__(self, transform: Transform, what: str, skipped: list[str], unreadable: str,
                 limit: int | None):
        self.transform, self.what, self.skipped = transform, what, skipped
        self.unreadable, self.limit = unreadable, limit

    def _sources(self) -> Iterator[tuple[str, Any, int]]:
        raise NotImplementedError

    def _sharded(self) -> Iterator[tuple[str, Any, int]]:
        worker = get_worker_info()
        for i, item in enumerate(self._sources()):
            if worker is None or i % worker.num_workers == worker.id:
                yield item

    def _refused(self, name: str, error: ValueError) -> None:
        if self.unreadable == "error":
            raise ValueError(f"cannot read the image {name}: {error}. Remove or repair it, or let unreadable images "
                             "be skipped (unreadable='skip')") from error
        if name not in self.skipped:
            self.skipped.append(name)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        given, before = 0, len(self.skipped)
        worker = get_worker_info()
        threads = 1 if worker else min(8, os.cpu_count() or 1)
        limit = self.limit
        if worker and limit is not None:  # this worker's share
            limit = limit // worker.num_workers + (worker.id < limit % worker.num_workers)
        pending: deque[tuple[str, int, Future]] = deque()
        pool = ThreadPoolExecutor(threads)
        try:
            sources = self._sharded()
            while limit is None or given < limit:
                while len(pending) < 2 * threads and (item := next(sources, None)) is not None:
                    pending.append((item[0], item[2], pool.submit(decode, item[1], self.transform)))
                if not pending:
                    break
                name, label, future = pending.popleft()
                try:
                    image = future.result()
                except ValueError as e:
                    self._refused(name, e)
                    continue
                given += 1
                yield image, label
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            if len(self.skipped) > before:
                new = self.skipped[before:]
                _log.warning("skipped %d unreadable image(s): %s%s", len(new), ", ".join(new[:5]),
                             " ..." if len(new) > 5 else "")
        if not given and not worker and limit != 0:
            raise ValueError(f"{self.what}: none of its images could be used")


class ImageFiles(ImageStream):
    """Image files in a fixed order. Iterating skips what cannot be read; ``[i]`` raises ValueError for it.

    ``len()`` counts the files listed, an upper bound of what iterating yields. `avoid` holds the files of the other
    set: a byte-identical copy of one of them (or a link to it) is left out, so no image is ever in both.
    """

    def __init__(self, samples: Sequence[Sample], transform: Transform, *, what: str,
                 skipped: list[str], unreadable: str = "skip", limit: int | None = None,
                 avoid: Sequence[Sample] = ()):
        super().__init__(transform, what, skipped, unreadable, limit)
        self.samples = list(samples)
        self._avoid = _Copies(avoid)

    def __len__(self) -> int:
        return len(self.samples) if self.limit is None else min(self.limit, len(self.samples))

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[: len(self)][index]
        try:
            return decode(path, self.transform), label
        except ValueError as e:
            raise ValueError(f"cannot read the image {path}: {e}") from e

    def _sources(self) -> Iterator[tuple[str, Any, int]]:
        for path, label in self.samples:
            if self._avoid.has(path):
                _log.info("%s is also among the evaluation images: not used to calibrate", path)
            else:
                yield path, path, label

    def check(self) -> None:
        """ValueError now, not after minutes of other work, where there is nothing to give."""
        first = None
        for path, source, _ in self._sources():
            try:
                decode(source, self.transform)
                return
            except ValueError as e:
                first = first or f"{path}: {e}"
        raise ValueError(f"{self.what}: none of its {len(self.samples)} images can be used "
                         f"({first or 'each of them is a copy of an evaluation image'})")


class _Copies:
    """Byte-identical copies of the given files, found lazily: sizes first, then a digest of the few that agree."""

    def __init__(self, samples: Sequence[Sample]):
        self._paths = [s.path for s in samples]
        self._by_size: dict[int, list[str]] | None = None
        self._digests: dict[str, bytes] = {}

    def has(self, path: str) -> bool:
        if not self._paths:
            return False
        if self._by_size is None:
            self._by_size = {}
            for p in self._paths:
                self._by_size.setdefault(_size(p), []).append(p)
        size = _size(path)
        # Files that are empty or gone are no images; reading them reports that.
        return size > 0 and any(self._digest(p) == self._digest(path) for p in self._by_size.get(size, ()))

    def _digest(self, path: str) -> bytes:
        if path not in self._digests:
            try:
                self._digests[path] = hashlib.sha256(Path(path).read_bytes()).digest()
            except OSError:
                self._digests[path] = path.encode()
        return self._digests[path]


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
