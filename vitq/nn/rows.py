"""Buffers of a module that transforms rows, or clips their ranges, before it quantizes them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from vitq.formats import ActivationFormat, Kronecker
from vitq.recipe import QuantSpec


class RowBuffers:
    """The buffers NAME_left float16 [A, A], NAME_right float16 [B, B] and NAME_clip float32 [2] of a module, those that a dynamic format has: the matrices of
    these sizes, None for one that there is not, and a clip where one is learned or given."""

    def __init__(self, module: nn.Module, name: str, spec: QuantSpec, left: int | None = None, right: int | None = None) -> None:
        self.module, self.name = module, name
        self.sizes = {"left": left, "right": right}
        self.clipped = spec.dynamic and (spec.observer == "learned" or spec.clip_ratio != 1.0)
        for side, n in self.sizes.items():
            if n is not None:
                module.register_buffer(f"{name}_{side}", torch.eye(n, dtype=torch.float16))
        if self.clipped:
            module.register_buffer(f"{name}_clip", torch.ones(2))

    def fill(self, fmt: ActivationFormat) -> None:
        """Take what the format has."""
        for side, n in self.sizes.items():
            if n is not None:
                self._buffer(side).copy_(getattr(fmt.transform, side))
        if self.clipped:
            self._buffer("clip").copy_(fmt.clip)

    def format(self, fmt: ActivationFormat) -> ActivationFormat:
        """The format with these buffers."""
        left, right = (None if n is None else self._buffer(side) for side, n in self.sizes.items())
        transform = None if left is None and right is None else Kronecker(left, right)
        return replace(fmt, transform=transform, clip=self._buffer("clip") if self.clipped else None)

    def described(self) -> str:
        """What is done to rows, to follow a format's name."""
        sizes = [n for n in self.sizes.values() if n is not None]
        times = f", times {' and '.join(f'{n} x {n}' for n in sizes)}" if sizes else ""
        return times + (", clipped" if self.clipped else "")

    def _buffer(self, part: str) -> torch.Tensor:
        return getattr(self.module, f"{self.name}_{part}")
