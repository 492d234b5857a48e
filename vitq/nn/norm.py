"""QuantLayerNorm: a LayerNorm whose result leaves as the next layer's codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitq.formats import ActivationFormat, QTensor
from vitq.nn.packed import PackedModule, Row
from vitq.ops.layer_norm import LayerNormSpec


class QuantLayerNorm(PackedModule):
    """float [..., C] -> codes [..., C]. Buffers weight, bias: float32 [C], ones and zeros where the source has none."""

    def __init__(self, norm: nn.LayerNorm, *, backend: str):
        super().__init__(backend)
        channels, self.eps = norm.normalized_shape[-1], norm.eps
        self.register_buffer("weight", torch.ones(channels) if norm.weight is None else norm.weight.detach().float().clone())
        self.register_buffer("bias", torch.zeros(channels) if norm.bias is None else norm.bias.detach().float().clone())
        self._output: ActivationFormat | None = None

    def fuse(self, output: ActivationFormat) -> None:
        self._output = output
        self.invalidate()

    def cases(self) -> dict[str, Any]:
        return {"layer_norm_quantize": LayerNormSpec(self.weight, self.bias, self.eps, self._output)}

    def forward(self, x: Tensor) -> QTensor:
        return self.call("layer_norm_quantize", x)

    def row(self, layer: str) -> Row:
        choice, fmt = self.packed()["layer_norm_quantize"][0], self._output
        kind = "dynamic per token" if fmt.dynamic else "static per tensor"
        return Row(layer, "norm", f"float -> A{fmt.bits} {kind}", choice.backend, choice.kernel.name, self.own_bytes(),
                   f"fell back: {choice.reason}" if choice.reason else "")
