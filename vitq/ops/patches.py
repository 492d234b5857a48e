"""quantize_patches: images to the codes of their patches, in the order in which a patch embedding's GEMM reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitq.cpu import loader
from vitq.formats import ActivationFormat, QTensor
from vitq.ops.dispatch import register
from vitq.ops.quantize import CpuQuantize, ReferenceQuantize


@dataclass(frozen=True)
class PatchesSpec:
    """format: static, per tensor; patch: height and width of one patch in pixels."""

    format: ActivationFormat
    patch: tuple[int, int]


def nan_guard(images: Tensor) -> Tensor:
    """float32 [B]: 0, or NaN where the image holds NaN or infinity. One pass over the images, no synchronization."""
    return images.flatten(1).sum(dim=1, dtype=torch.float32) * 0


class PatchesByQuantize:
    """Quantize the pixels with the backend's own kernel, then put the codes in order: a fourth of float32's bytes to move."""

    quantize: ReferenceQuantize | CpuQuantize

    def pack(self, spec: PatchesSpec, device) -> tuple:
        return spec.patch, self.quantize.pack(spec.format, device)

    def run(self, packed: tuple, images: Tensor) -> tuple[QTensor, Tensor]:
        """images float [B, C, H, W] -> codes [B, h·w, C·ph·pw], features in the order of a convolution's weight (what is
        left over at the lower right is cut off), and `nan_guard(images)`."""
        (ph, pw), constants = packed
        b, c, height, width = images.shape
        h, w = height // ph, width // pw
        x = self.quantize.run(constants, images[:, :, : h * ph, : w * pw].contiguous())
        codes = x.codes.view(b, c, h, ph, w, pw).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w, c * ph * pw)
        return QTensor(codes, x.scale, x.zero_point), nan_guard(images)


@register("quantize_patches", "cpu")
class CpuPatches(PatchesByQuantize):
    name = "c-quantize+torch"
    quantize = CpuQuantize()

    def supports(self, spec: PatchesSpec) -> str | None:
        return loader.why_unavailable()


@register("quantize_patches", "reference")
class ReferencePatches(PatchesByQuantize):
    name = "torch"
    quantize = ReferenceQuantize()

    def supports(self, spec: PatchesSpec) -> str | None:
        return None
