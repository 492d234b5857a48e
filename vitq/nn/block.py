"""Fused MLP and transformer blocks: norm+quantize, qkv, attention, proj+residual, norm+quantize, fc1+activation, fc2+residual."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vitq.formats import QTensor
from vitq.nn.attention import QuantAttention, window_mask
from vitq.nn.linear import QuantLinear
from vitq.nn.norm import QuantLayerNorm
from vitq.nn.packed import PackedModule
from vitq.ops.common import OutputFormat
from vitq.ops.windows import Windows


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

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.hidden(x))

    def hidden(self, x: Tensor | QTensor) -> Tensor | QTensor:
        """What fc2 reads."""
        h = self.fc1(x)
        return self.act(h) if self.activation is None or not isinstance(self.fc1, QuantLinear) else h


class QuantBlock(PackedModule):
    """x + attn(norm1(x)), then x + mlp(norm2(x)), in seven kernels: timm's Block on [B, N, C]; with a window, timm's
    SwinTransformerBlock on [B, H, W, C], where attention finds the windows by itself."""

    def __init__(self, source: nn.Module, *, window: tuple[int, int] | None = None, shift: tuple[int, int] = (0, 0),
                 backend: str):
        super().__init__(backend)
        self.norm1, self.norm2 = (QuantLayerNorm(n, backend=backend) for n in (source.norm1, source.norm2))
        self.attn: QuantAttention = source.attn
        self.mlp: QuantMlp = source.mlp
        self.window, self.shift = window, shift

    def link(self) -> None:
        self.norm1.fuse(self.attn.qkv.input_format())
        self.norm2.fuse(self.mlp.fc1.input_format())

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, *, first: int | None = None,
                inplace: bool = False) -> Tensor:
        """As timm's. first: how many tokens of each sequence are wanted, all of which see all tokens; others are not computed.
        inplace: x may be overwritten."""
        mask = window = None
        if self.window is not None:
            window = Windows(x.shape[1], x.shape[2], self.window, self.shift)
        else:
            mask = window_mask(attn_mask, is_causal, x.shape[0], x.shape[1], x.device)
        codes = self.attn.attend(self.norm1(x), mask, window, first)
        if first is None:
            x = self.attn.proj(codes, residual=x, inplace=inplace)
        else:
            x = self.attn.proj(codes, residual=x[:, :first])
        # One name for all of them, so that codes are freed as soon as they are read.
        codes = self.norm2(x)
        codes = self.mlp.hidden(codes)
        # This x is the block's own; its input may be kept by a caller (forward_intermediates).
        return self.mlp.fc2(codes, residual=x, inplace=True)


class QuantPatchMerging(PackedModule):
    """timm's PatchMerging, [B, H, W, C] -> [B, ⌈H/2⌉, ⌈W/2⌉, 2·C]: gather, norm, quantize in one kernel, then the reduction."""

    def __init__(self, source: nn.Module, *, backend: str):
        super().__init__(backend)
        self.norm, self.reduction = QuantLayerNorm(source.norm, merge=True, backend=backend), source.reduction

    def link(self) -> None:
        self.norm.fuse(self.reduction.input_format())

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        return self.reduction(self.norm(x))
