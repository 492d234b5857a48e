"""Fused MLP and transformer blocks: norm+quantize -> qkv -> attention -> proj+residual -> norm+quantize -> fc1+act -> fc2+residual."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitq.formats import QTensor
from vitq.nn.attention import QuantAttention, window_mask
from vitq.nn.linear import QuantLinear
from vitq.nn.norm import QuantLayerNorm
from vitq.nn.packed import PackedModule
from vitq.ops.common import OutputFormat


class QuantMlp(PackedModule):
    """fc1 -> activation -> fc2. A known activation runs in fc1's epilogue, which hands fc2 its codes if it is static."""

    def __init__(self, source: nn.Module, activation: str | None, *, backend: str):
        super().__init__(backend)
        self.fc1, self.fc2, self.act = source.fc1, source.fc2, source.act
        self.activation = activation

    def link(self) -> None:
        if not isinstance(self.fc1, QuantLinear):
            return
        output = None
        if self.activation is not None and isinstance(self.fc2, QuantLinear):
            output = OutputFormat.of(self.fc2.input_format())
        self.fc1.fuse(self.activation, output)

    def forward(self, x: Tensor | QTensor, *, residual: Tensor | None = None, inplace: bool = False) -> Tensor:
        h = self.fc1(x)
        if self.activation is None or not isinstance(self.fc1, QuantLinear):
            h = self.act(h)
        if isinstance(self.fc2, QuantLinear):
            return self.fc2(h, residual=residual, inplace=inplace)
        y = self.fc2(h)
        return y if residual is None else y + residual


class QuantBlock(PackedModule):
    """x + attn(norm1(x)), then x + mlp(norm2(x)): timm's Block in seven kernels."""

    def __init__(self, source: nn.Module, *, backend: str):
        super().__init__(backend)
        self.norm1, self.norm2 = (QuantLayerNorm(n, backend=backend) for n in (source.norm1, source.norm2))
        self.attn: QuantAttention = source.attn
        self.mlp: QuantMlp = source.mlp

    def link(self) -> None:
        self.norm1.fuse(self.attn.qkv.input_format())
        self.norm2.fuse(self.mlp.fc1.input_format())

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        mask = window_mask(attn_mask, is_causal, x.shape[0], x.shape[1], x.device)
        x = self.attn.proj(self.attn.attend(self.norm1(x), mask), residual=x)
        # The block's input may be kept by a caller (forward_intermediates); this x is the block's own.
        return self.mlp(self.norm2(x), residual=x, inplace=True)


class QuantWindowBlock(QuantBlock):
    """timm's SwinTransformerBlock on [B, H, W, C]. Windows are cut, shifted and put back on 8-bit codes."""

    def __init__(self, source: nn.Module, *, backend: str):
        super().__init__(source, backend=backend)
        self.window_size, self.shift_size = tuple(source.window_size), tuple(source.shift_size)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        q = self.norm1(x)
        windows, padded = to_windows(q, self.window_size, self.shift_size)
        mask = None
        if any(self.shift_size):
            mask = shift_mask(padded, self.window_size, self.shift_size, x.device)
        y = self.attn.attend(windows, mask)
        y = from_windows(y, self.window_size, self.shift_size, padded, (b, h, w))
        x = self.attn.proj(y, residual=x)
        return self.mlp(self.norm2(x), residual=x, inplace=True)


def to_windows(x: QTensor, window: tuple[int, int], shift: tuple[int, int]) -> tuple[QTensor, tuple[int, int]]:
    """codes [B, H, W, C] -> [B·nW, Wh·Ww, C] and the padded (H, W). Padding is the code of zero.

    Per-row scales, where there are any, are cut the same way.
    """

    def cut(t: Tensor, pad_value: float) -> Tensor:
        b, h, w, c = t.shape
        wh, ww = window
        if any(shift):
            t = torch.roll(t, shifts=(-shift[0], -shift[1]), dims=(1, 2))
        pad_h, pad_w = -h % wh, -w % ww
        if pad_h or pad_w:
            t = F.pad(t, (0, 0, 0, pad_w, 0, pad_h), value=pad_value)
        h, w = h + pad_h, w + pad_w
        return t.view(b, h // wh, wh, w // ww, ww, c).transpose(2, 3).reshape(-1, wh * ww, c)

    h, w = x.shape[1:3]
    padded = (h + -h % window[0], w + -w % window[1])
    codes = cut(x.codes, int(x.zero_point))
    scale = cut(x.scale, 1.0) if x.scale.ndim == 4 else x.scale
    return QTensor(codes, scale, x.zero_point), padded


def from_windows(y: Tensor | QTensor, window: tuple[int, int], shift: tuple[int, int], padded: tuple[int, int],
                 size: tuple[int, int, int]) -> Tensor | QTensor:
    """Undo `to_windows`: [B·nW, Wh·Ww, C] -> [B, H, W, C] of the unpadded size (B, H, W)."""
    if isinstance(y, QTensor):
        return QTensor(from_windows(y.codes, window, shift, padded, size), y.scale, y.zero_point)
    (b, h, w), (wh, ww) = size, window
    y = y.view(b, padded[0] // wh, padded[1] // ww, wh, ww, -1).transpose(2, 3).reshape(b, *padded, -1)
    y = y[:, :h, :w]
    if any(shift):
        y = torch.roll(y, shifts=shift, dims=(1, 2))
    return y.contiguous()


@lru_cache(maxsize=64)
def shift_mask(size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], device: torch.device) -> Tensor:
    """Swin's mask, float32 [nW, N, N]: −100 between tokens that the cyclic shift brought together from apart."""
    (h, w), (wh, ww) = size, window
    region = torch.zeros(h, w, dtype=torch.int32)
    bands = [((0, -win), (-win, -sh), (-sh, None)) for win, sh in ((wh, shift[0]), (ww, shift[1]))]
    for i, rows in enumerate(bands[0]):
        for j, columns in enumerate(bands[1]):
            region[slice(*rows), slice(*columns)] = 3 * i + j
    region = region.view(h // wh, wh, w // ww, ww).transpose(1, 2).reshape(-1, wh * ww)
    apart = region.unsqueeze(1) != region.unsqueeze(2)
    return torch.zeros(apart.shape).masked_fill_(apart, -100.0).to(device)
