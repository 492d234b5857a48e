"""QuantLinear: a drop-in for nn.Linear on integer codes; QuantPatchConv: the same for a patch embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitq.formats import ActivationFormat, QTensor, pack_int4, unpack_int4
from vitq.nn.packed import PackedModule, Row
from vitq.ops.common import OutputFormat
from vitq.ops.linear import LinearSpec
from vitq.plan import LinearParams
from vitq.recipe import LayerSpec


class QuantLinear(PackedModule):
    """y = x Wᵀ + b with W in 2..8-bit codes and x quantized statically (per tensor) or dynamically (per token).

    Buffers: qweight (int8 [N, K], or uint8 [N, ⌈K/2⌉] packed where weight_bits <= 4), weight_scale float32 [N],
    bias float32 [N]; input_scale float32 [] and input_zero_point int32 [] if static.
    """

    def __init__(self, in_features: int, out_features: int, spec: LayerSpec, *, dtype: torch.dtype, backend: str):
        super().__init__(backend)
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.weight_bits, self.input_bits, self.dynamic = spec.weight.bits, spec.input.bits, spec.input.dynamic
        packed = self.weight_bits <= 4
        shape = (out_features, (in_features + 1) // 2 if packed else in_features)
        self.register_buffer("qweight", torch.zeros(shape, dtype=torch.uint8 if packed else torch.int8))
        self.register_buffer("weight_scale", torch.ones(out_features))
        self.register_buffer("bias", torch.zeros(out_features))
        if not self.dynamic:
            self.register_buffer("input_scale", torch.ones(()))
            self.register_buffer("input_zero_point", torch.zeros((), dtype=torch.int32))
        self._activation: str | None = None
        self._output: OutputFormat | None = None

    def set_params(self, params: LinearParams) -> None:
        codes = pack_int4(params.codes) if self.weight_bits <= 4 else params.codes
        self.qweight.copy_(codes)
        self.weight_scale.copy_(params.weight_scale)
        if params.bias is not None:
            self.bias.copy_(params.bias)
        if not self.dynamic:
            self.input_scale.copy_(params.input.scale)
            self.input_zero_point.copy_(params.input.zero_point)
        self.invalidate()

    def input_format(self) -> ActivationFormat:
        if self.dynamic:
            return ActivationFormat(self.input_bits, dynamic=True)
        return ActivationFormat(self.input_bits, scale=self.input_scale, zero_point=self.input_zero_point)

    def codes(self) -> Tensor:
        """int8 [N, K], unpacked."""
        return unpack_int4(self.qweight, self.in_features) if self.weight_bits <= 4 else self.qweight

    def fuse(self, activation: str | None = None, output: OutputFormat | None = None) -> None:
        """Run this activation, then requantize to this format, inside the GEMM's epilogue."""
        self._activation, self._output = activation, output
        self.invalidate()

    def cases(self) -> dict[str, Any]:
        params = LinearParams(self.codes(), self.weight_bits, self.weight_scale, self.bias, self.input_format())
        return {"quantize": self.input_format(), "linear": LinearSpec(params, self._activation, self._output)}

    def forward(self, x: Tensor | QTensor, *, residual: Tensor | None = None, inplace: bool = False) -> Tensor | QTensor:
        """x [..., K] float or codes -> [..., N]. residual [..., N] is added; inplace says it may be overwritten."""
        if not isinstance(x, QTensor):
            x = self.call("quantize", x)
        return self.call("linear", x, dtype=self.dtype, residual=residual, inplace=inplace)

    def row(self, layer: str, role: str, note: str = "") -> Row:
        choice, quantize = self.packed()["linear"][0], self.packed()["quantize"][0]
        storage = ""
        if self.weight_bits <= 4 and choice.backend != "cuda":
            storage = "packed int4 in the file, widened to int8 here"
        notes = [note, storage, choice.reason and f"fell back: {choice.reason}",
                 quantize.reason and f"a float input is quantized by {quantize.kernel.name}: {quantize.reason}"]
        kind = "dynamic per token" if self.dynamic else "static per tensor"
        return Row(layer, role, f"W{self.weight_bits}A{self.input_bits} {kind}", choice.backend, choice.kernel.name,
                   self.own_bytes(), "; ".join(n for n in notes if n))

    def extra_repr(self) -> str:
        return (f"{self.in_features}, {self.out_features}, W{self.weight_bits}A{self.input_bits}, "
                f"{'dynamic' if self.dynamic else 'static'}")


class QuantPatchConv(QuantLinear):
    """A convolution whose stride is its kernel, as one GEMM over patches: [B, C, H, W] -> [B, O, H/ph, W/pw]."""

    def __init__(self, conv: nn.Conv2d, spec: LayerSpec, *, dtype: torch.dtype, backend: str):
        self_features = conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1]
        super().__init__(self_features, conv.out_channels, spec, dtype=dtype, backend=backend)
        self.kernel_size = conv.kernel_size

    def forward(self, x: Tensor) -> Tensor:
        (ph, pw), (b, c, height, width) = self.kernel_size, x.shape
        h, w = height // ph, width // pw
        x = self.call("quantize", x[:, :, : h * ph, : w * pw].contiguous())
        patches = x.codes.view(b, c, h, ph, w, pw).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w, -1)
        y = self.call("linear", QTensor(patches, x.scale, x.zero_point), dtype=self.dtype)
        return y.transpose(1, 2).unflatten(2, (h, w))
