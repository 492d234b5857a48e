"""LayerNorms: one whose result leaves as the next layer's codes, and one that stays in float."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitq.formats import ActivationFormat, QTensor
from vitq.nn.packed import PackedModule, Row
from vitq.ops.float_norm import FloatNormSpec
from vitq.ops.layer_norm import LayerNormSpec


class QuantLayerNorm(PackedModule):
    """float [..., C] -> codes [..., C]. Buffers weight, bias: float32 [C], ones and zeros where the source has none; an RMSNorm has no bias.

    merge: the input is [B, H, W, C/4] with even H and W, and its 2 x 2 neighbours are put side by side first (Swin).
    """

    def __init__(self, norm: nn.LayerNorm | nn.RMSNorm, *, merge: bool = False, backend: str):
        super().__init__(backend)
        channels, self.eps, self.merge = norm.normalized_shape[-1], norm.eps, merge
        self.register_buffer("weight", torch.ones(channels) if norm.weight is None else norm.weight.detach().float().clone())
        self.rms = isinstance(norm, nn.RMSNorm)
        bias = getattr(norm, "bias", None)
        self.register_buffer("bias", None if self.rms else torch.zeros(channels) if bias is None else bias.detach().float().clone())
        self._output: ActivationFormat | None = None

    def fuse(self, output: ActivationFormat) -> None:
        self._output = output
        self.invalidate()

    def cases(self) -> dict[str, Any]:
        return {"layer_norm_quantize": LayerNormSpec(self.weight, self.bias, self.eps, self._output, self.merge, self.rms)}

    def forward(self, x: Tensor) -> QTensor:
        return self.call("layer_norm_quantize", x)

    def row(self, layer: str) -> Row:
        choice, fmt = self.packed()["layer_norm_quantize"][0], self._output
        kind = "dynamic per token" if fmt.dynamic else "static per tensor"
        return Row(layer, "norm", f"float -> A{fmt.bits} {kind}", choice.backend, choice.kernel.name, self.own_bytes(), self.held_bytes(),
                   f"fell back: {choice.reason}" if choice.reason else "")


class FloatLayerNorm(PackedModule):
    """float [..., C] -> float [..., C] in `dtype`. Buffers weight and, where the source has one, bias: float32 [C]."""

    def __init__(self, norm: nn.LayerNorm, *, dtype: torch.dtype, backend: str):
        super().__init__(backend)
        self.channels, self.eps, self.dtype = norm.normalized_shape[-1], norm.eps, dtype
        self.register_buffer("weight", norm.weight.detach().float().clone())
        self.register_buffer("bias", None if norm.bias is None else norm.bias.detach().float().clone())

    def cases(self) -> dict[str, Any]:
        return {"layer_norm": FloatNormSpec(self.weight, self.bias, self.eps)}

    def forward(self, x: Tensor) -> Tensor:
        return self.call("layer_norm", x, dtype=self.dtype)

    def row(self, layer: str) -> Row:
        choice = self.packed()["layer_norm"][0]
        return Row(layer, "norm", str(self.dtype)[6:], choice.backend, choice.kernel.name, self.own_bytes(), self.held_bytes(),
                   f"fell back: {choice.reason}" if choice.reason else "")
