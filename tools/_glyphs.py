"""The glyphs task of train_demo.py: characters of the Latin, Greek and Cyrillic scripts, in fonts that the model has not seen.

Fonts come from PyPI (`pip install '.[glyphs]'`). Those of TRAIN are trained and calibrated on, those of TEST are held out: a split by
font family. Characters that most families draw alike (Latin A, Greek Alpha, Cyrillic A) are one class. Every image is a character at a
fixed size, distorted: turned, sheared, warped, thickened or thinned, with fragments of its neighbours, on an uneven ground, with noise.
"""
from __future__ import annotations

import argparse
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from _fonts import TEST, TILE, TRAIN, Family

ARCH, MEAN, STD = "deit_small_patch16_224", 0.5, 0.25
DEFAULTS = {"epochs": 40, "batch-size": 512, "lr": 1e-3, "drop-path": 0.05, "smoothing": 0.05}

# ASCII, Latin-1, Latin Extended-A and B, Greek, Cyrillic, Vietnamese, punctuation, currencies.
RANGES = ((0x21, 0x7F), (0xA1, 0x250), (0x370, 0x400), (0x400, 0x500), (0x1E00, 0x1F00), (0x2010, 0x2050), (0x20A0, 0x20C0))
IN_TRAIN, IN_TEST = 8, 4  # families that must have a character
ALIKE = 0.93  # overlap (of intersection to union of ink) from which on two characters look the same in a font
ENOUGH, PACE = 0.25, 0.004  # accuracy on the last batches from which on distortion grows, by so much a step
SIDE = 112  # pixels: of an image


class Glyphs:
    """Families, characters and classes. `classes`: 'U+00041' ..., the first character of each, in order."""

    def __init__(self) -> None:
        self.families = {"train": [Family(*f) for f in TRAIN.values()], "test": [Family(*f) for f in TEST.values()]}
        count = {part: Counter(c for f in families for c in f.has) for part, families in self.families.items()}
        codes = [c for low, high in RANGES for c in range(low, high) if unicodedata.category(chr(c))[0] in "LNSP"
                 and count["train"][c] >= IN_TRAIN and count["test"][c] >= IN_TEST]
        self.class_of = self.merge(codes)
        first = sorted(set(self.class_of.values()))
        self.classes = tuple(f"U+{c:05X}" for c in first)
        self.index = {code: first.index(leader) for code, leader in self.class_of.items()}

    def merge(self, codes: list[int]) -> dict[int, int]:
        """Code -> the first code that most families draw alike (through others, if need be)."""
        families = self.families["train"] + self.families["test"]
        both, same = np.zeros((len(codes),) * 2), np.zeros((len(codes),) * 2)
        for family in families:
            has = np.array([c in family.has for c in codes])
            ink = np.stack([family.draw(c) for c in np.array(codes)[has]]).reshape(has.sum(), -1) > 127
            x = torch.from_numpy(ink).float()
            shared = (x @ x.T).numpy()
            area = np.diag(shared)
            union = area[:, None] + area[None] - shared
            where = np.ix_(np.flatnonzero(has), np.flatnonzero(has))
            both[where] += 1
            same[where] += (shared >= ALIKE * union) & (area > 0)
        groups = connected_components(2 * same > both, directed=False)[1].tolist()
        return {code: codes[groups.index(group)] for code, group in zip(codes, groups)}

    def render(self, part: str) -> tuple[Tensor, Tensor]:
        """Every character in every family and style: ink uint8 [N, TILE, TILE], class int64 [N]; characters without ink are left out."""
        jobs = [(family, code, style) for family in self.families[part] for style in range(len(family.fonts))
                for code in self.class_of if code in family.has]
        with ThreadPoolExecutor() as pool:
            ink = torch.from_numpy(np.stack(list(pool.map(lambda job: job[0].draw(*job[1:]), jobs, chunksize=256))))
        label = torch.tensor([self.index[code] for _, code, _ in jobs])
        drawn = ink.flatten(1).amax(1) > 127
        return ink[drawn], label[drawn]


class Sampler:
    """Draws distorted images: first a class, then one of its characters' renderings; all classes equally often."""

    def __init__(self, ink: Tensor, label: Tensor, classes: int, seed: int):
        self.ink, self.classes = ink, classes
        self.gen = torch.Generator(ink.device).manual_seed(seed)
        order = label.argsort(stable=True)
        self.order, self.count = order, torch.bincount(label, minlength=classes)
        self.start = self.count.cumsum(0) - self.count
        if not self.count.all():
            raise ValueError("a class has no rendering")

    def rand(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(shape, generator=self.gen, device=self.ink.device) * (high - low) + low

    def noise(self, n: int, channels: int, cells: int) -> Tensor:
        """A smooth random field, [n, channels, SIDE, SIDE], of about unit variance at the cells."""
        coarse = torch.randn(n, channels, cells, cells, generator=self.gen, device=self.ink.device)
        return F.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic", align_corners=True)

    def tiles(self, label: Tensor) -> Tensor:
        """float 0..1 [n, 1, TILE, TILE]: a rendering of each class."""
        at = self.start[label] + (self.rand(len(label)) * self.count[label]).long()
        return self.ink[self.order[at]][:, None].float() / 255

    def place(self, tiles: Tensor, shift: Tensor, warp: Tensor, strength: float) -> Tensor:
        """Ink [n, 1, SIDE, SIDE] of tiles, turned, sheared, scaled and warped."""
        n = len(tiles)
        angle = self.rand(n, low=-0.25, high=0.25) * strength
        sx, sy = (1 + self.rand(n, low=-0.13, high=0.13) * strength for _ in range(2))
        shear = self.rand(n, low=-0.25, high=0.25) * strength
        cos, sin = angle.cos(), angle.sin()
        theta = torch.stack([torch.stack([cos * sx, -sin * sx + shear, shift[:, 0]], 1),
                             torch.stack([sin * sy, cos * sy, shift[:, 1]], 1)], 1)
        theta[:, :, :2] *= SIDE / TILE
        grid = F.affine_grid(theta, [n, 1, SIDE, SIDE], align_corners=False) + warp.permute(0, 2, 3, 1)
        return F.grid_sample(tiles, grid, align_corners=False)

    def images(self, label: Tensor, strength: float = 1.0) -> Tensor:
        """float 0..1 [n, 1, SIDE, SIDE] of classes int64 [n]; strength 0 leaves the characters as they are, white on black, 1 is
        what is tested."""
        n = len(label)

        def each(low: float, high: float) -> Tensor:
            return self.rand(n, 1, 1, 1, low=low, high=high)

        warp = self.noise(n, 2, 5) * 0.035 * strength
        ink = self.place(self.tiles(label), self.rand(n, 2, low=-0.13, high=0.13) * strength, warp, strength)
        # Two neighbours, of which a fragment may show at a side.
        for side in (-1, 1):
            other = torch.randint(self.classes, (n,), generator=self.gen, device=label.device)
            away = torch.stack([side * self.rand(n, low=0.95, high=1.5), self.rand(n, low=-0.3, high=0.3)], 1)
            ink = torch.maximum(ink, self.place(self.tiles(other), away, warp, strength) * (each(0, 1) < 0.7 * strength))
        soft = F.avg_pool2d(ink, 5, 1, 2, count_include_pad=False)
        cut = each(-0.22, 0.22) * strength  # below 0 thickens, above 0 thins
        ink = ((0.5 * ink + 0.5 * soft - 0.45 - cut) * 3 + 0.5).clamp(0, 1)
        ground = each(0, 1) * strength + self.noise(n, 1, 4) * each(0, 0.16) * strength
        contrast = each(0.9 - 0.6 * strength, 1.0)
        paint = torch.where(ground.mean((2, 3), keepdim=True) > 0.5, ground - contrast, ground + contrast)
        paint = paint + self.noise(n, 1, 6) * 0.08 * strength
        x = ground.clamp(0, 1) * (1 - ink) + paint.clamp(0, 1) * ink
        blurred = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        x = torch.lerp(x, blurred, each(0, 1) * strength)
        speckle = torch.randn(x.shape, generator=self.gen, device=x.device)
        return (x + speckle * each(0, 0.12) * strength).clamp(0, 1)


class Batches:
    """Training batches, made on the device: (images [B, 3, size, size] 0..1, labels, None). Distortion grows from none to full strength, as
    fast as the model follows: with characters that move, and are dark on light as often as light on dark, a transformer does not leave
    chance for thousands of steps, while it learns those that stay in a hundred."""

    def __init__(self, ink: Tensor, label: Tensor, classes: int, size: int, batch: int, seed: int):
        self.sampler, self.size, self.batch, self.images = Sampler(ink, label, classes, seed), size, batch, len(ink)
        self.strength = 0.0

    def __call__(self, accuracy: float) -> tuple[Tensor, Tensor, None]:
        if accuracy > ENOUGH:
            self.strength = min(1.0, self.strength + PACE)
        s = self.sampler
        label = torch.randint(s.classes, (self.batch,), generator=s.gen, device=s.ink.device)
        x = F.interpolate(s.images(label, self.strength), size=(self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        return x.expand(-1, 3, -1, -1), label, None


def write_images(samples: list[tuple[Path, int]], sampler: Sampler) -> None:
    """An image of its class to each path, drawn on the CPU so that every machine writes the same."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(samples), 256):
            paths, labels = zip(*samples[start:start + 256])
            pixels = (sampler.images(torch.tensor(labels))[:, 0] * 255).round().to(torch.uint8).numpy()
            list(pool.map(_write_image, paths, pixels))  # list: a write that fails is raised here


def _write_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=92)


def prepare(a: argparse.Namespace, size: int):
    """(classes, batches, held-out samples, what they are, one line for the card); writes OUTPUT/glyphs/{train,val}, where they are not
    there yet."""
    glyphs, folder = Glyphs(), a.output / "glyphs"
    ink, label = glyphs.render("train")
    held: list[tuple[Path, int]] = []
    for name, each, seed in (("train", 4, 1), ("val", a.test_images, 2)):
        each = each if not a.limit else 1
        held = [(folder / name / c / f"{i:03d}.jpg", y) for y, c in enumerate(glyphs.classes) for i in range(each)]
        if not all(path.is_file() for path, _ in held):
            write_images(held, Sampler(*((ink, label) if name == "train" else glyphs.render("test")), len(glyphs.classes), seed))
    if a.limit:
        held = held[:: max(1, len(held) // a.limit)]
    data = (f"{len(glyphs.class_of)} characters ({len(glyphs.classes)} classes) in {len(TRAIN)} font families from PyPI, held-out images in "
            f"{len(TEST)} others, {SIDE}x{SIDE} pixels")
    batches = Batches(ink.to(a.device), label.to(a.device), len(glyphs.classes), size, a.batch_size, a.seed)
    if a.limit:
        batches.images = a.limit
    return glyphs.classes, batches, held, "held-out images", data
