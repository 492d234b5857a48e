"""The compiled row kernels of the CUDA backend, as `vitq.ops.dispatch` sees them: quantize, norms, gates, patches of images."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitq.cuda import loader
from vitq.cuda import ops as _ops  # noqa: F401  (registers torch.ops.vitq)
from vitq.cuda.checks import FLOATS
from vitq.cuda.layout import bits_of, pack_transform, round_up, starts_of
from vitq.formats import ActivationFormat, QTensor
from vitq.ops.dispatch import register
from vitq.ops.float_norm import FloatNormSpec
from vitq.ops.gated import GatedByQuantize, GatedSpec, gated
from vitq.ops.layer_norm import LayerNormSpec, ReferenceLayerNorm
from vitq.ops.patches import PatchesSpec, nan_guard
from vitq.ops.quantize import ReferenceQuantize, on_device

WIDEST_ROW = 32768  # features that csrc/rows.cu takes


@dataclass(frozen=True, eq=False)
class PackedRows:
    """What quantizes rows. format: on the device; scale, zero_point: its numbers; order, fp_order: int32 on the device or
    None; counted, starts: `layout.bits_of` and `starts_of` the order where the scale is dynamic."""

    format: ActivationFormat
    scale: float
    zero_point: int
    order: Tensor | None
    fp_order: Tensor | None
    counted: Tensor | None
    starts: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0
    norm: str = ""
    merge: bool = False


class CudaRows:
    """Floats to codes in one pass over memory, with or without a norm before."""

    def why_not(self, fmt: ActivationFormat) -> str | None:
        if fmt.transform is not None or fmt.clip is not None:
            return "it neither transforms rows nor clips their ranges"
        if not fmt.signed:
            return "unsigned codes do not fit int8"
        if not fmt.dynamic and not 2.0**-100 <= float(fmt.scale) <= 2.0**100:
            return f"the scale {float(fmt.scale):.3g} is outside of 2^-100 to 2^100"
        return loader.why_unavailable()

    def pack_rows(self, fmt: ActivationFormat, device: torch.device, **norm: Any) -> PackedRows:
        columns = fmt.columns
        fp = None if columns is None or columns.fp is None else F.pad(columns.fp, (0, -len(columns.fp) % 16), value=-1).to(device)
        order = None if columns is None or columns.order is None else columns.order.to(device)
        counted = starts = None
        if order is not None and fmt.dynamic:
            features = 1 + max(int(t.max()) for t in (order, fp) if t is not None and len(t))
            counted, starts = bits_of(order, features), starts_of(order, fp, features)
        return PackedRows(on_device(fmt, device), 1.0 if fmt.dynamic else float(fmt.scale), 0 if fmt.dynamic else int(fmt.zero_point), order, fp,
                          counted, starts, **norm)

    def run(self, packed: PackedRows, x: Tensor) -> QTensor:
        """x float [.., K] -> codes [.., K'] (K' = K unless the format orders columns), with merge [.., H, W, K/4] -> [.., H/2,
        W/2, K']."""
        x = readable(x, packed.merge)
        fmt, lead, k = packed.format, x.shape[:-1], x.shape[-1]
        if packed.merge:
            lead, k = (*x.shape[:-3], (x.shape[-3] + 1) // 2, (x.shape[-2] + 1) // 2), 4 * k
        if k > WIDEST_ROW and x.is_cuda:
            return self.run_wide(packed, x)
        width = k if packed.order is None else packed.order.shape[0]
        # Rows at multiples of 16 bytes are what the GEMM reads.
        codes = torch.empty((*lead, round_up(width, 16)), dtype=torch.int8, device=x.device)[..., :width]
        scale = torch.empty((*lead, 1), dtype=torch.float32, device=x.device) if fmt.dynamic else None
        shift = None if fmt.symmetric else torch.empty_like(scale)
        fp = None
        if packed.fp_order is not None:
            fp = torch.empty((*lead, packed.fp_order.shape[0]), dtype=torch.float16, device=x.device)
        torch.ops.vitq.rows(
            codes, x, norm=packed.norm, weight=packed.weight, bias=packed.bias, eps=packed.eps, order=packed.order,
            scale=packed.scale, zero_point=packed.zero_point, bits=fmt.bits, row_scale=scale, row_shift=shift, fp_order=packed.fp_order,
            fp_out=fp, counted=packed.counted, starts=packed.starts, merge=packed.merge)
        return QTensor(codes, scale, 0, shift, fp) if fmt.dynamic else QTensor(codes, fmt.scale, fmt.zero_point, fp=fp)

    def run_wide(self, packed: PackedRows, x: Tensor) -> QTensor:
        """Rows of more than WIDEST_ROW features."""
        raise ValueError(f"rows of {x.shape[-1]} features; {self.name} takes up to {WIDEST_ROW}")


def readable(x: Tensor, merge: bool = False) -> Tensor:
    """x as the kernel reads it, x itself where it can be: a float of up to 32 bits, contiguous columns, rows in even groups."""
    if x.dtype not in FLOATS:
        x = x.float()
    if merge:
        return x.contiguous()
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        return x.contiguous()
    return x.contiguous() if x.ndim > 3 else x


@register("quantize", "cuda")
class CudaQuantize(CudaRows):
    name = "cuda-rows"

    def supports(self, spec: ActivationFormat) -> str | None:
        return self.why_not(spec)

    def pack(self, spec: ActivationFormat, device: torch.device) -> PackedRows:
        return self.pack_rows(spec, device)

    def run_wide(self, packed: PackedRows, x: Tensor) -> QTensor:
        from vitq.cuda.fallback import TritonQuantize

        if why := TritonQuantize().supports(packed.format):
            raise ValueError(f"rows of {x.shape[-1]} features; {self.name} takes up to {WIDEST_ROW}; triton-quantize: {why}")
        return TritonQuantize().run(packed.format, x)


@register("layer_norm_quantize", "cuda")
class CudaLayerNorm(CudaRows):
    name = "cuda-rows-layer-norm"

    def supports(self, spec: LayerNormSpec) -> str | None:
        return why_not_norm(spec.weight, spec.bias) or self.why_not(spec.output)

    def pack(self, spec: LayerNormSpec, device: torch.device) -> PackedRows:
        return self.pack_rows(spec.output, device, weight=vector(spec.weight, device), bias=vector(spec.bias, device),
                              eps=spec.eps, norm="rms_norm" if spec.rms else "layer_norm", merge=spec.merge)


@dataclass(frozen=True, eq=False)
class PackedTransform:
    """format: on the device; left, right: `layout.pack_transform` of its matrices; the rest as the operator takes it."""

    format: ActivationFormat
    left: Tensor | None
    right: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0
    norm: str = ""
    gate: str = ""

    @property
    def sizes(self) -> tuple[int, int]:
        transform = self.format.transform
        return (0, 0) if transform is None else tuple(0 if m is None else len(m) for m in (transform.left, transform.right))


class CudaTransformedRows:
    """Rows that are gated, normalised, multiplied with matrices or clipped, each with a range of its own, in one pass over memory."""

    def why_not(self, fmt: ActivationFormat) -> str | None:
        if not fmt.dynamic or not fmt.signed:
            return "it finds the ranges of signed codes itself"
        if fmt.columns is not None:
            return "it writes features in their order, and keeps none in float16"
        if fmt.transform is not None:
            for matrix in (fmt.transform.left, fmt.transform.right):
                if matrix is not None and len(matrix) > loader.TRANSFORM_SIZE:
                    return f"a matrix of {len(matrix)} numbers, more than the {loader.TRANSFORM_SIZE} that it takes"
        return loader.why_unavailable()

    def pack_rows(self, fmt: ActivationFormat, device: torch.device, **before: Any) -> PackedTransform:
        fmt = on_device(fmt, device)
        left, right = (None, None) if fmt.transform is None else (fmt.transform.left, fmt.transform.right)
        return PackedTransform(fmt, None if left is None else pack_transform(left, False), None if right is None else pack_transform(right, True), **before)

    def run(self, packed: PackedTransform, x: Tensor) -> QTensor:
        """x float [.., K], with a gate [.., 2 K] -> codes [.., K]."""
        fmt, sizes, k = packed.format, packed.sizes, x.shape[-1] // (2 if packed.gate else 1)
        if fmt.transform is not None:
            fmt.transform.sizes(k)  # whether they divide it
        if x.is_cuda and not fits(x.device.index, k, *sizes):
            return self.run_wide(packed, x)
        lead, rows = x.shape[:-1], readable(x)
        rows = rows.reshape(-1, rows.shape[-1])
        codes = torch.empty((len(rows), round_up(k, 16)), dtype=torch.int8, device=x.device)
        scale = torch.empty((*lead, 1), dtype=torch.float32, device=x.device)
        shift = None if fmt.symmetric else torch.empty_like(scale)
        torch.ops.vitq.transformed_rows(
            codes[:, :k], rows, scale, row_shift=shift, gate=packed.gate, norm=packed.norm, weight=packed.weight, bias=packed.bias, eps=packed.eps,
            left=packed.left, right=packed.right, left_size=sizes[0], right_size=sizes[1], clip=fmt.clip, bits=fmt.bits)
        return QTensor(codes.view(*lead, codes.shape[1])[..., :k], scale, 0, shift)

    def run_wide(self, packed: PackedTransform, x: Tensor) -> QTensor:
        """Rows of which a block cannot hold one: the reference's steps in torch."""
        if packed.gate:
            x = gated(x, packed.gate)
        if packed.norm:
            spec = LayerNormSpec(packed.weight, packed.bias, packed.eps, packed.format, rms=packed.norm == "rms_norm")
            return ReferenceLayerNorm().run(spec, x)
        return ReferenceQuantize().run(packed.format, x)


@functools.cache
def fits(device: int, columns: int, left_size: int, right_size: int) -> bool:
    """Whether `transformed_rows` takes such rows on this GPU."""
    with torch.cuda.device(device):
        return loader.library().vitq_transformed_rows_supports(columns, left_size, right_size) == 0


@register("quantize", "cuda")
class CudaTransform(CudaTransformedRows):
    name = "cuda-transformed-rows"

    def supports(self, spec: ActivationFormat) -> str | None:
        return self.why_not(spec)

    def pack(self, spec: ActivationFormat, device: torch.device) -> PackedTransform:
        return self.pack_rows(spec, device)


@register("layer_norm_quantize", "cuda")
class CudaNormTransform(CudaTransformedRows):
    name = "cuda-transformed-rows-norm"

    def supports(self, spec: LayerNormSpec) -> str | None:
        return ("it merges no patches" if spec.merge else None) or self.why_not(spec.output)

    def pack(self, spec: LayerNormSpec, device: torch.device) -> PackedTransform:
        return self.pack_rows(spec.output, device, weight=vector(spec.weight, device), bias=vector(spec.bias, device), eps=spec.eps,
                              norm="rms_norm" if spec.rms else "layer_norm")


@register("gated_quantize", "cuda")
class CudaGated(CudaTransformedRows):
    name = "cuda-transformed-rows-gated"

    def supports(self, spec: GatedSpec) -> str | None:
        return self.why_not(spec.output)

    def pack(self, spec: GatedSpec, device: torch.device) -> PackedTransform:
        return self.pack_rows(spec.output, device, gate=spec.activation)


@register("gated_quantize", "cuda")
class TorchGated(GatedByQuantize):
    name = "torch+cuda-rows"
    quantize = CudaQuantize()


@register("layer_norm", "cuda")
class CudaFloatNorm:
    name = "cuda-rows-layer-norm"

    def supports(self, spec: FloatNormSpec) -> str | None:
        return why_not_norm(spec.weight, spec.bias) or loader.why_unavailable()

    def pack(self, spec: FloatNormSpec, device: torch.device) -> tuple:
        return vector(spec.weight, device), vector(spec.bias, device), spec.eps

    def run(self, packed: tuple, x: Tensor, *, dtype: torch.dtype) -> Tensor:
        weight, bias, eps = packed
        x = readable(x)
        y = torch.empty(x.shape, dtype=dtype, device=x.device)
        torch.ops.vitq.rows(y, x, norm="layer_norm", weight=weight, bias=bias, eps=eps)
        return y


def why_not_norm(*parameters: Tensor | None) -> str | None:
    for parameter in parameters:
        if parameter is not None and parameter.numel() > WIDEST_ROW:
            return f"{parameter.numel()} features, more than the {WIDEST_ROW} that it takes"
    return None


def vector(x: Tensor | None, device: torch.device) -> Tensor | None:
    return None if x is None else x.detach().to(device, torch.float32).contiguous()


@register("quantize_patches", "cuda")
class CudaPatches:
    name = "cuda-patches"

    def supports(self, spec: PatchesSpec) -> str | None:
        if spec.format.dynamic or spec.format.columns is not None:
            return "it takes one static scale, and writes features in their order"
        return CudaRows().why_not(spec.format)

    def pack(self, spec: PatchesSpec, device: torch.device) -> tuple:
        return spec.patch, on_device(spec.format, device), float(spec.format.scale), int(spec.format.zero_point)

    def run(self, packed: tuple, images: Tensor) -> tuple[QTensor, Tensor]:
        """images float [B, C, H, W] -> codes [B, h·w, C·ph·pw], and `nan_guard(images)`."""
        (ph, pw), fmt, scale, zero_point = packed
        images = readable(images, merge=True)
        b, c, height, width = images.shape
        rows, columns = (height // ph) * (width // pw), c * ph * pw
        codes = torch.empty((b * rows, round_up(columns, 16)), dtype=torch.int8, device=images.device)[:, :columns]
        torch.ops.vitq.patches(codes, images, ph, pw, scale, zero_point, fmt.bits)
        return QTensor(codes.unflatten(0, (b, rows)), fmt.scale, fmt.zero_point), nan_guard(images)
