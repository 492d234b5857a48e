"""WeightOnlyLinear: a drop-in for nn.Linear whose weight is integer codes and whose input stays in floating point."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import vitq.ops.weight_only  # noqa: F401  (registers its kernels)
from vitq.formats import pack_int4, unpack_int4
from vitq.nn.linear import described
from vitq.nn.packed import PackedModule, Row
from vitq.plan import LinearParams
from vitq.quantizers.grid import divide
from vitq.recipe import LayerSpec


class WeightOnlyLinear(PackedModule):
    """y = x Wᵀ + b with W in 2..8-bit codes.

    Buffers: qweight (int8 [N, K], or uint8 [N, ⌈K/2⌉] packed where weight_bits <= 4), weight_scale float32 [N], bias float32 [N]; weight_zero
    int8 [N] where the weight is asymmetric. With G groups of neighbouring input features scale and zero are [G, N].
    """

    def __init__(self, in_features: int, out_features: int, spec: LayerSpec, *, dtype: torch.dtype, backend: str):
        super().__init__(backend)
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.weight_spec, self.weight_bits, self.symmetric = spec.weight, spec.weight.bits, spec.weight.symmetric
        packed = self.weight_bits <= 4
        shape = (out_features, (in_features + 1) // 2 if packed else in_features)
        self.register_buffer("qweight", torch.zeros(shape, dtype=torch.uint8 if packed else torch.int8))
        self.division = divide(spec.weight, out_features, in_features, weight_only=True)
        grid = (len(self.division.sizes), out_features) if self.division.sizes else (out_features,)
        self.register_buffer("weight_scale", torch.ones(grid))
        if not self.symmetric:
            self.register_buffer("weight_zero", torch.zeros(grid, dtype=torch.int8))
        self.register_buffer("bias", torch.zeros(out_features))

    def set_params(self, params: LinearParams) -> None:
        self.qweight.copy_(pack_int4(params.codes) if self.weight_bits <= 4 else params.codes)
        self.weight_scale.copy_(params.weight_scale)
        if not self.symmetric:
            self.weight_zero.copy_(params.weight_zero)
        if params.bias is not None:
            self.bias.copy_(params.bias)
        self.invalidate()

    def codes(self) -> Tensor:
        """int8 [N, K], unpacked."""
        return unpack_int4(self.qweight, self.in_features) if self.weight_bits <= 4 else self.qweight

    def cases(self) -> dict[str, Any]:
        group = self.division.group() if self.division.sizes else None
        return {"weight_only": LinearParams(self.codes(), self.weight_bits, self.weight_scale, self.bias, None, column_group=group,
                                            weight_zero=None if self.symmetric else self.weight_zero.int())}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] float -> [..., N]."""
        return self.call("weight_only", x, dtype=self.dtype)

    def row(self, layer: str, role: str, note: str = "") -> Row:
        choice, _ = self.packed()["weight_only"]
        held = 4 if self.weight_bits <= 4 else 8
        stored = "" if self.weight_bits == held else f"{self.weight_bits}-bit codes are stored in {held} bits"
        notes = [note, stored, choice.reason and f"fell back: {choice.reason}"]
        return Row(layer, role, self._format(), choice.backend, choice.kernel.name, self.own_bytes(), "; ".join(n for n in notes if n))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self._format()}"

    def _format(self) -> str:
        return f"W{self.weight_bits}A16{described(self.division, self.weight_spec)}" + ("" if self.symmetric else ", asymmetric weights")
