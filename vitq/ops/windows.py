"""Windows of images, as Swin's attention cuts them: shifted cyclically, padded to whole windows at the lower right edge.

A kernel of the attention op reads and writes tokens in image order and finds the windows itself; the reference and the
CPU kernel do it with the copies below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# What Swin adds to the logits of tokens that the cyclic shift brought together from apart.
APART = -100.0


@dataclass(frozen=True)
class Windows:
    """height x width tokens in windows of `window` (rows, columns) after a cyclic shift by `shift`."""

    height: int
    width: int
    window: tuple[int, int]
    shift: tuple[int, int] = (0, 0)

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width in whole windows."""
        return self.height + -self.height % self.window[0], self.width + -self.width % self.window[1]

    @property
    def pads(self) -> bool:
        return self.padded != (self.height, self.width)

    @property
    def tokens(self) -> int:
        """Tokens of one window."""
        return self.window[0] * self.window[1]

    def list(self) -> list[int]:
        """As the op takes it: height, width, window rows and columns, shift down and right."""
        return [self.height, self.width, *self.window, *self.shift]


def to_windows(x: Tensor, windows: Windows, pad: Tensor | None = None) -> Tensor:
    """x [B, height·width, ...] in image order -> [B·nW, tokens, ...]; pad [...] is what stands where the image is padded."""
    (height, width), (rows, columns), inner = windows.padded, windows.window, x.shape[2:]
    x = x.reshape(x.shape[0], windows.height, windows.width, math.prod(inner))
    if any(windows.shift):
        x = torch.roll(x, shifts=(-windows.shift[0], -windows.shift[1]), dims=(1, 2))
    if windows.pads:
        image, x = x, pad.reshape(-1).expand(x.shape[0], height, width, -1).clone()
        x[:, : windows.height, : windows.width] = image
    x = x.view(x.shape[0], height // rows, rows, width // columns, columns, x.shape[-1]).transpose(2, 3)
    return x.reshape(-1, windows.tokens, *inner)


def from_windows(y: Tensor, windows: Windows) -> Tensor:
    """Undo `to_windows`: [B·nW, tokens, C] -> [B, height·width, C]."""
    (height, width), (rows, columns) = windows.padded, windows.window
    down, across = height // rows, width // columns
    y = y.view(y.shape[0] // (down * across), down, across, rows, columns, y.shape[-1]).transpose(2, 3)
    y = y.reshape(y.shape[0], height, width, y.shape[-1])[:, : windows.height, : windows.width]
    if any(windows.shift):
        y = torch.roll(y, shifts=windows.shift, dims=(1, 2))
    return y.reshape(y.shape[0], windows.height * windows.width, y.shape[-1])


def shift_mask(windows: Windows, device: torch.device) -> Tensor | None:
    """Swin's mask, float32 [nW, tokens, tokens]; None without a shift. Made on the device: nothing is copied from the host."""
    if not any(windows.shift):
        return None

    def bands(size: int, window: int, shift: int) -> Tensor:
        at = torch.arange(size, device=device)
        return (at >= size - window).int() + (at >= size - shift).int() if shift else torch.zeros_like(at)

    (height, width), (rows, columns) = windows.padded, windows.window
    region = 3 * bands(height, rows, windows.shift[0])[:, None] + bands(width, columns, windows.shift[1])
    region = region.view(height // rows, rows, width // columns, columns).transpose(1, 2).reshape(-1, windows.tokens)
    return (region.unsqueeze(1) != region.unsqueeze(2)).float() * APART


def merge_patches(x: Tensor) -> Tensor:
    """Swin's patch merging: [B, H, W, C] -> [B, H/2, W/2, 4·C], the 2 x 2 neighbours in the order (0,0), (1,0), (0,1), (1,1)."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)
