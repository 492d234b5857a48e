"""QuantLinear: a drop-in for nn.Linear on integer codes; QuantPatchConv: the same for a patch embedding."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from vitq.formats import ActivationFormat, Columns, QTensor, pack_int4, pack_nibbles, unpack_int4
from vitq.nn.packed import PackedModule, Row
from vitq.nn.rows import RowBuffers
from vitq.ops.common import OutputFormat
from vitq.ops.linear import LinearSpec
from vitq.ops.patches import PatchesSpec
from vitq.plan import LinearParams
from vitq.quantizers.grid import divide
from vitq.quantizers.outliers import outlier_count
from vitq.recipe import LayerSpec


class CodedLinear(PackedModule):
    """What linear layers with W in 2..8-bit codes share. Buffers: qweight, int8 [N, K], or uint8 [N, ⌈K/2⌉] packed up to 4 bits, of K input
    features; bias float32 [N].

    The codes are held once where a kernel can give them back (`Kernel.unpack`): qweight is None while it is packed, and `portable` makes it again
    for what is saved, copied or moved.
    """

    def __init__(self, in_features: int, out_features: int, spec: LayerSpec, *, dtype: torch.dtype, backend: str):
        super().__init__(backend)
        self.in_features, self.out_features, self.dtype, self.weight_spec = in_features, out_features, dtype, spec.weight
        self.weight_bits, self.symmetric = spec.weight.bits, spec.weight.symmetric
        self.outliers = 0 if spec.weight_only else outlier_count(spec.input, in_features)
        self.coded_features = in_features - self.outliers
        self.division = divide(spec.weight, out_features, self.coded_features, spec.weight_only)
        shape = (out_features, (self.coded_features + 1) // 2 if self.weight_bits <= 4 else self.coded_features)
        self.register_buffer("qweight", torch.zeros(shape, dtype=torch.uint8 if self.weight_bits <= 4 else torch.int8))
        self.register_buffer("bias", torch.zeros(out_features))
        self._code_bytes = self.qweight.numel()

    def set_params(self, params: LinearParams) -> None:
        self.invalidate()
        self.qweight.copy_(pack_int4(params.codes) if self.weight_bits <= 4 else params.codes)
        self.weight_scale.copy_(params.weight_scale)
        if params.bias is not None:
            self.bias.copy_(params.bias)

    def codes(self) -> Tensor:
        """int8 [N, K], unpacked."""
        return unpack_int4(self.portable(), self.coded_features) if self.weight_bits <= 4 else self.portable()

    def portable(self) -> Tensor:
        """qweight, made again where a kernel alone holds the codes."""
        return self._given_back() if self.qweight is None else self.qweight

    @torch.inference_mode(False)  # of which no buffer may be: it could not be loaded in place later
    def _given_back(self) -> Tensor | None:
        """qweight of what a kernel packed, None where none unpacks it."""
        for choice, packed in self._packed.values():
            if hasattr(choice.kernel, "unpack"):
                codes = choice.kernel.unpack(packed)
                return pack_nibbles(codes) if self.weight_bits <= 4 else codes
        return None

    def _pack(self) -> None:
        super()._pack()
        given = self._given_back()
        if given is not None and torch.equal(given, self.qweight):  # not of codes times multipliers, nor where an odd K is padded with others than 0
            self.qweight = None

    def invalidate(self) -> None:
        self.qweight = self.portable()
        super().invalidate()

    def own_bytes(self) -> int:
        return super().own_bytes() + (self._code_bytes if self.qweight is None else 0)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.qweight is None:
            destination[f"{prefix}qweight"] = self._given_back()  # first, as it is among the buffers
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_buffers": {**self._buffers, "qweight": self.portable()}}

    def stored(self) -> str:
        """What the file does not save, for `row`."""
        held = 4 if self.weight_bits <= 4 else 8
        return "" if self.weight_bits == held else f"{self.weight_bits}-bit codes are stored in {held} bits"

    def described(self) -> str:
        """How the columns are divided and whether codes have zero points, to follow a format's name."""
        kind, sizes = "segments" if self.division.segmented else "columns", " + ".join(map(str, self.division.sizes))
        groups = f", groups of {self.weight_spec.group_size}" if self.weight_spec.granularity == "per_group" else f", {kind} {sizes}" if sizes else ""
        floats = f", {self.outliers} float16 columns" if self.outliers else ""
        return groups + floats + ("" if self.symmetric else ", asymmetric weights")


class QuantLinear(CodedLinear):
    """y = x Wᵀ + b with W in 2..8-bit codes and x quantized statically (per tensor) or dynamically (per token).

    Buffers: qweight (int8 [N, K], or uint8 [N, ⌈K/2⌉] packed where weight_bits <= 4), weight_scale float32 [N],
    bias float32 [N]; input_scale float32 [] and input_zero_point int32 [] if static. With F outliers K counts the other input features,
    weight_fp is float16 [N, F] and fp_columns int32 [F] says which they are. With G groups of input features
    (`vitq.quantizers.grid.Division`): as segments weight_scale is [G, N]; else weight_multiplier is int8 [G, N] and column_group uint8, or
    int16 of many groups, [K]. With segments or outliers column_order int32 [K] is the feature of each column of qweight. Asymmetric weights
    have multipliers too, of one group at least, and weight_zero int8 [G, N]. An input that is transformed has input_left float16 [A, A] and
    input_right float16 [B, B], or one of them (`vitq.formats.Kronecker`); one whose ranges are clipped input_clip float32 [2].
    """

    adds_residual = True  # forward takes one

    def __init__(self, in_features: int, out_features: int, spec: LayerSpec, *, dtype: torch.dtype, backend: str,
                 matrices: tuple[int | None, int | None] = (None, None)):
        """matrices: sizes of those that the input is multiplied by, None for one that there is not."""
        super().__init__(in_features, out_features, spec, dtype=dtype, backend=backend)
        self.input_bits, self.dynamic = spec.input.bits, spec.input.dynamic
        self.input_rows = RowBuffers(self, "input", spec.input, *matrices)
        self.shifted = self.dynamic and not spec.input.symmetric
        groups, segmented = len(self.division.sizes), self.division.segmented
        self.register_buffer("weight_scale", torch.ones((groups, out_features) if segmented else out_features))
        if segmented or self.outliers:
            self.register_buffer("column_order", torch.arange(self.coded_features, dtype=torch.int32))
        if self.outliers:
            self.register_buffer("fp_columns", torch.arange(self.coded_features, in_features, dtype=torch.int32))
            self.register_buffer("weight_fp", torch.zeros(out_features, self.outliers, dtype=torch.float16))
        self.levels = 0 if segmented else groups or int(not self.symmetric)
        if self.levels:
            self.register_buffer("weight_multiplier", torch.ones(self.levels, out_features, dtype=torch.int8))
            self.register_buffer("column_group", self.division.group() if groups else torch.zeros(self.coded_features, dtype=torch.uint8))
        if not self.symmetric:
            self.register_buffer("weight_zero", torch.zeros(self.levels, out_features, dtype=torch.int8))
        self.too_small = spec.weight.segments != "one" and not groups
        if not self.dynamic:
            self.register_buffer("input_scale", torch.ones(()))
            self.register_buffer("input_zero_point", torch.zeros((), dtype=torch.int32))
        self._activation: str | None = None
        self._output: OutputFormat | None = None

    def set_params(self, params: LinearParams) -> None:
        super().set_params(params)
        if self.division.segmented or self.outliers:
            self.column_order.copy_(params.input.columns.order)
        if self.outliers:
            self.fp_columns.copy_(params.input.columns.fp)
            self.weight_fp.copy_(params.weight_fp)
        if self.levels:
            self.weight_multiplier.copy_(params.weight_multiplier)
            self.column_group.copy_(params.column_group)
        if not self.symmetric:
            self.weight_zero.copy_(params.weight_zero)
        self.input_rows.fill(params.input)
        if not self.dynamic:
            self.input_scale.copy_(params.input.scale)
            self.input_zero_point.copy_(params.input.zero_point)

    def input_format(self) -> ActivationFormat:
        columns = None
        if self.division.segmented or self.outliers:
            ends = tuple(accumulate(self.division.sizes)) if self.division.segmented else ()
            columns = Columns(self.column_order, ends, self.fp_columns if self.outliers else None)
        if self.dynamic:
            return self.input_rows.format(ActivationFormat(self.input_bits, dynamic=True, columns=columns, symmetric=not self.shifted))
        return ActivationFormat(self.input_bits, scale=self.input_scale, zero_point=self.input_zero_point, columns=columns)

    def fuse(self, activation: str | None = None, output: OutputFormat | None = None) -> None:
        """Run this activation, then requantize to this format, inside the GEMM's epilogue."""
        self._activation, self._output = activation, output
        self.invalidate()

    def cases(self) -> dict[str, Any]:
        levels = {}
        if self.levels:
            levels = {"weight_multiplier": self.weight_multiplier, "column_group": self.column_group,
                      "weight_zero": None if self.symmetric else self.weight_zero.int()}
        params = LinearParams(self.codes(), self.weight_bits, self.weight_scale, self.bias, self.input_format(),
                              weight_fp=self.weight_fp if self.outliers else None, **levels)
        return {"quantize": self.input_format(), "linear": LinearSpec(params, self._activation, self._output)}

    def forward(self, x: Tensor | QTensor, *, residual: Tensor | None = None, inplace: bool = False,
                out: Tensor | None = None) -> Tensor | QTensor:
        """x [..., K] float or codes -> [..., N]. residual [..., N] is added; inplace says it may be overwritten; out [..., N],
        of any strides but a contiguous N, is filled and returned."""
        if not isinstance(x, QTensor):
            x = self.call("quantize", x)
        return self.call("linear", x, dtype=self.dtype, residual=residual, inplace=inplace, out=out)

    def row(self, layer: str, role: str, note: str = "") -> Row:
        choices = {op: choice for op, (choice, _) in self.packed().items()}
        choice = choices.pop("linear")
        storage = ""
        if self.weight_bits <= 4 and choice.backend != "cuda":
            storage = "packed int4 in the file, widened to int8 here"
        undivided = "too small to divide its columns" if self.too_small else ""
        # Elsewhere the norm before writes the codes, in any order.
        floats = "its input comes as floats, since its columns have an order of their own"
        floats = floats if (self.division.segmented or self.outliers) and not self.dynamic and role in ("proj", "fc2") else ""
        notes = [note, undivided, floats, self.stored(), storage, choice.reason and f"fell back: {choice.reason}",
                 *(c.reason and f"a float input is quantized by {c.kernel.name}: {c.reason}" for c in choices.values())]
        kind = self.timing() + self.described()
        return Row(layer, role, f"W{self.weight_bits}A{self.input_bits} {kind}", choice.backend, choice.kernel.name,
                   self.own_bytes(), self.held_bytes(), "; ".join(n for n in notes if n))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, W{self.weight_bits}A{self.input_bits}, {self.timing()}{self.described()}"

    def timing(self) -> str:
        """When and for what the input's scale is found."""
        found = "asymmetric per token" if self.shifted else "dynamic per token" if self.dynamic else "static per tensor"
        return found + self.input_rows.described()


class QuantPatchConv(QuantLinear):
    """A convolution whose stride is its kernel, as one GEMM over patches: [B, C, H, W] -> [B, O, H/ph, W/pw]."""

    def __init__(self, conv: nn.Conv2d, spec: LayerSpec, *, dtype: torch.dtype, backend: str):
        features = conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1]
        super().__init__(features, conv.out_channels, spec, dtype=dtype, backend=backend)
        self.kernel_size = conv.kernel_size

    def cases(self) -> dict[str, Any]:
        cases = super().cases()
        return {"quantize_patches": PatchesSpec(cases["quantize"], self.kernel_size), "linear": cases["linear"]}

    def patches(self, images: Tensor) -> tuple[QTensor, Tensor]:
        """images [B, C, H, W] -> codes [B, H/ph, W/pw, K], and float32 [B]: NaN for an image that is not finite, else 0."""
        x, broken = self.call("quantize_patches", images)
        (ph, pw), (b, _, height, width) = self.kernel_size, images.shape
        return QTensor(x.codes.view(b, height // ph, width // pw, x.codes.shape[-1]), x.scale, x.zero_point), broken

    def forward(self, x: Tensor | QTensor, *, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """x: images, or the codes of `patches`. residual and out [B, H/ph·W/pw, O] are as in `QuantLinear`; out is returned."""
        if not isinstance(x, QTensor):
            x, _ = self.patches(x)
        b, h, w, k = x.codes.shape
        x = QTensor(x.codes.view(b, h * w, k), x.scale, x.zero_point)
        y = self.call("linear", x, dtype=self.dtype, residual=residual, out=out)
        return y.unflatten(1, (h, w)).permute(0, 3, 1, 2) if out is None else y
