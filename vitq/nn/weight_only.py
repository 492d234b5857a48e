"""WeightOnlyLinear: a drop-in for nn.Linear whose weight is integer codes and whose input stays in floating point."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import vitq.ops.weight_only  # noqa: F401  (registers its kernels)
from vitq.nn.linear import CodedLinear
from vitq.nn.packed import Row
from vitq.plan import LinearParams
from vitq.recipe import LayerSpec


class WeightOnlyLinear(CodedLinear):
    """y = x Wᵀ + b with W in 2..8-bit codes and x in floating point.

    Buffers beside `CodedLinear`'s: weight_scale float32 [N]; weight_zero int8 [N] where the weight is asymmetric. With G groups of
    neighbouring input features they are [G, N].
    """

    def __init__(self, in_features: int, out_features: int, spec: LayerSpec, *, dtype: torch.dtype, backend: str):
        super().__init__(in_features, out_features, spec, dtype=dtype, backend=backend)
        grid = (len(self.division.sizes), out_features) if self.division.sizes else (out_features,)
        self.register_buffer("weight_scale", torch.ones(grid))
        if not self.symmetric:
            self.register_buffer("weight_zero", torch.zeros(grid, dtype=torch.int8))

    def set_params(self, params: LinearParams) -> None:
        super().set_params(params)
        if not self.symmetric:
            self.weight_zero.copy_(params.weight_zero)

    def cases(self) -> dict[str, Any]:
        group = self.division.group() if self.division.sizes else None
        return {"weight_only": LinearParams(self.codes(), self.weight_bits, self.weight_scale, self.bias, None, column_group=group,
                                            weight_zero=None if self.symmetric else self.weight_zero.int())}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] float -> [..., N]."""
        return self.call("weight_only", x, dtype=self.dtype)

    def row(self, layer: str, role: str, note: str = "") -> Row:
        choice, _ = self.packed()["weight_only"]
        notes = [note, self.stored(), choice.reason and f"fell back: {choice.reason}"]
        return Row(layer, role, f"W{self.weight_bits}A16{self.described()}", choice.backend, choice.kernel.name, self.own_bytes(), self.held_bytes(),
                   "; ".join(n for n in notes if n))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, W{self.weight_bits}A16{self.described()}"
