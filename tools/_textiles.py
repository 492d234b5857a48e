"""The textiles task of train_demo.py: photographs of cloth, and training batches made of them on the device."""
from __future__ import annotations

import argparse
import random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vitq import DEMO_CLASSES, demo_split

ARCH, MEAN, STD = "deit_small_patch16_224", 0.5, 0.135  # of the training photographs' pixels / 255
DEFAULTS = {"epochs": 200, "batch-size": 192, "lr": 5e-4, "drop-path": 0.1, "smoothing": 0.05}
SPOT, PLAIN = (DEMO_CLASSES.index(c) for c in ("local", "nominal"))  # the class that differs from the other by one small spot
DATA = ("the simulated textile photographs of PyPI `conformal-clip-data` 0.1.4 (MIT licence, Copyright (c) 2025 Megahed), 250x250 "
        "pixels; 1600 to train on, 400 held out")
SPOT_H, SPOT_W = 12, 7  # half axes, in pixels, of the ellipse that covers a spot and its rim


def read_all(samples: list[tuple[str, int]], device: str) -> tuple[Tensor, Tensor]:
    """Photographs as uint8 [N, 3, H, W] and labels [N], resident on the device."""
    x = np.stack([np.asarray(Image.open(p).convert("RGB")) for p, _ in samples])
    return (torch.from_numpy(x).permute(0, 3, 1, 2).contiguous().to(device),
            torch.tensor([y for _, y in samples], device=device))


def find_spots(x: Tensor, rim: int = 4) -> Tensor:
    """Centre (row, column) int64 [N, 2] of the window with the most high-frequency energy: where a spot is.

    The rim is left out: a line along the border of these photographs has more energy than any spot.
    """
    kernel = torch.tensor([[0., -1, 0], [-1, 4, -1], [0, -1, 0]], device=x.device)[None, None]
    out = []
    for part in x[:, :1].split(256):
        energy = F.conv2d(part[..., rim:-rim, rim:-rim].float(), kernel).square()
        energy = F.avg_pool2d(energy, (2 * SPOT_H - 5, 2 * SPOT_W - 5), 1)
        at, width = energy.flatten(1).argmax(1), energy.shape[-1]
        out.append(torch.stack([at // width + rim + 1 + SPOT_H - 3, at % width + rim + 1 + SPOT_W - 3], 1))
    return torch.cat(out)


class Batches:
    """Endless class-balanced training batches, made on the device: (images [B,3,S,S] 0..1, labels, spot masks).

    Augmentations keep what the classes are about: the weave's direction and correlation, and the spot.
    - a half turn (leaves the statistics of the weave as they are; mirroring or quarter turns would not),
    - a crop of at least 90 % of the side that never cuts a spot off; brightness and contrast,
    - a spot moved from a photograph of the spot class into a plain one: new places on new cloth.
    """

    def __init__(self, x: Tensor, y: Tensor, size: int, batch: int, seed: int):
        self.x, self.y, self.size, self.batch, self.images = x, y, size, batch, len(x)
        self.gen, self.sizes = torch.Generator(x.device).manual_seed(seed), random.Random(seed)
        self.by_class = [torch.nonzero(y == c).flatten() for c in range(len(DEMO_CLASSES))]
        self.centres = find_spots(x)

    def rand(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(shape, generator=self.gen, device=self.x.device) * (high - low) + low

    def draw(self, classes: Tensor) -> Tensor:
        """A photograph's index for every class index in `classes`."""
        u = self.rand(len(classes))
        pick = torch.stack([c[(u * len(c)).long()] for c in self.by_class])
        return pick[classes, torch.arange(len(classes), device=classes.device)]

    def __call__(self, accuracy: float) -> tuple[Tensor, Tensor, Tensor]:
        dev, n, (h, w) = self.x.device, self.batch, self.x.shape[-2:]
        side = min(h, w)
        crop = side if self.sizes.random() < 0.5 else self.sizes.randint(int(0.9 * side), side)
        y = torch.arange(n, device=dev) % len(DEMO_CLASSES)
        index = self.draw(y)
        x, centre = self.x[index].float(), self.centres[index]
        rows, cols = torch.arange(h, device=dev)[:, None], torch.arange(w, device=dev)

        def ellipse(c: Tensor) -> Tensor:
            return (((rows - c[:, 0, None, None]) / SPOT_H) ** 2 + ((cols - c[:, 1, None, None]) / SPOT_W) ** 2) <= 1

        # Half of the spot class: cloth of the plain class with a spot of a photograph of the spot class.
        moved = torch.nonzero((y == SPOT) & (self.rand(n) < 0.5)).flatten()
        cloth = self.x[self.draw(torch.full_like(moved, PLAIN))].float()
        to = torch.stack([self.rand(len(moved), low=9, high=h - 10),
                          self.rand(len(moved), low=6, high=w - 8)], 1).long()
        src = (rows[None] + (centre[moved, 0] - to[:, 0])[:, None, None]) % h * w \
            + (cols[None] + (centre[moved, 1] - to[:, 1])[:, None, None]) % w
        spots = x[moved].flatten(2).gather(2, src.flatten(1)[:, None].expand(-1, 3, -1)).view_as(cloth)
        x[moved] = torch.where(ellipse(to)[:, None], spots, cloth)
        centre[moved] = to
        mask = ellipse(centre) & (y == SPOT)[:, None, None]
        turn = self.rand(n) < 0.5
        x[turn], mask[turn] = x[turn].flip(2, 3), mask[turn].flip(1, 2)
        centre = torch.where(turn[:, None], torch.tensor([h - 1, w - 1], device=dev) - centre, centre)
        # Every image is cropped at its own offset, clamped so that a spot's ellipse stays inside.
        start = (self.rand(n, 2) * torch.tensor([h - crop + 1, w - crop + 1], device=dev)).long()
        reach, last = torch.tensor([SPOT_H, SPOT_W], device=dev), torch.tensor([h - crop, w - crop], device=dev)
        low, high = centre + reach + 1 - crop, centre - reach
        inside = start.maximum(low.clamp(min=0).minimum(last)).minimum(high.clamp(min=0).minimum(last))
        start = torch.where((y == SPOT)[:, None], inside, start)
        take, b = torch.arange(crop, device=dev), torch.arange(n, device=dev)[:, None, None]
        r, c = (start[:, :1] + take)[:, :, None], (start[:, 1:] + take)[:, None, :]
        x, mask = x.permute(0, 2, 3, 1)[b, r, c].permute(0, 3, 1, 2), mask[b, r, c]
        x = F.interpolate(x, size=(self.size, self.size), mode="bicubic", antialias=True).clamp(0, 255) / 255
        mean = x.mean((1, 2, 3), keepdim=True)
        x = (x - mean) * self.rand(n, 1, 1, 1, low=0.85, high=1.15) + mean + self.rand(n, 1, 1, 1, low=-.04, high=.04)
        mask = F.interpolate(mask[:, None].float(), size=(self.size, self.size), mode="area")[:, 0]
        return x.clamp(0, 1), y, mask


def prepare(a: argparse.Namespace, size: int):
    """(classes, batches, held-out samples, what they are, one line for the card)."""
    split, what = demo_split(a.images), "held-out test photographs"
    fit, held = split["train"], split["test"]
    if a.val:
        fit, held, what = fit[200:], fit[:200], "validation photographs"
    if a.limit:  # some of every class
        fit, held = (sorted(part, key=lambda s: s[1])[:: max(1, len(part) // a.limit)] for part in (fit, held))
    return DEMO_CLASSES, Batches(*read_all(fit, a.device), size, a.batch_size, a.seed), held, what, DATA
