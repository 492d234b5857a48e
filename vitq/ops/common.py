"""Small pieces that every op's reference shares."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vitq.formats import ActivationFormat, QTensor, int_range


@dataclass(frozen=True)
class OutputFormat:
    """Requantize an op's result: code = clamp(round(y / scale) + zero_point).

    scale, zero_point: float32 and int32, [] or one per output column [N]. signed_only: the consumer takes int8 codes;
    otherwise a backend may hand over uint8 codes (signed + 128), whichever its next kernel reads best.
    """

    bits: int
    scale: Tensor
    zero_point: Tensor
    signed_only: bool = False

    @classmethod
    def of(cls, fmt: ActivationFormat) -> OutputFormat | None:
        """The format in which a static consumer wants its input; None for one that quantizes it itself: with a dynamic scale, or
        with columns in an order of its own."""
        return None if fmt.dynamic or fmt.columns is not None else cls(fmt.bits, fmt.scale, fmt.zero_point)

    def to(self, device: torch.device) -> OutputFormat:
        """The same on a device, contiguous, the zero point as long as the scale."""
        scale = self.scale.detach().to(device, torch.float32).contiguous()
        zero_point = self.zero_point.detach().to(device, torch.int32).expand(scale.shape).contiguous()
        return replace(self, scale=scale, zero_point=zero_point)


def fma32(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a·b + c of float32 tensors with one rounding to float32, as the hardware's fused multiply-add has it: every backend's
    epilogue is made of these, so that results are equal bit for bit."""
    # The product is exact in float64. The sum is rounded there first, which changes the result once in 2^29 cases at most.
    return (a.double() * b.double() + c.double()).float()


def activate(y: Tensor, activation: str | None) -> Tensor:
    if activation is None:
        return y
    if activation == "relu":
        return F.relu(y)
    if activation == "silu":
        return F.silu(y)
    return F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")


def requantize(y: Tensor, output: OutputFormat) -> QTensor:
    """float32 [..., N] -> int8 codes, by the package's one rounding rule."""
    qmin, qmax = int_range(output.bits)
    scale, zero_point = output.scale.to(y.device), output.zero_point.to(y.device)
    codes = torch.clamp(torch.round(y / scale) + zero_point, qmin, qmax).to(torch.int8)
    return QTensor(codes, scale, zero_point)


def signed(x: QTensor) -> Tensor:
    """int8 codes of a QTensor that may hold uint8 ones (signed + 128)."""
    return (x.codes ^ 0x80).view(torch.int8) if x.codes.dtype == torch.uint8 else x.codes


def unsigned(x: QTensor) -> Tensor:
    """uint8 codes (signed + 128) of a QTensor that may hold int8 ones."""
    return x.codes if x.codes.dtype == torch.uint8 else x.codes.view(torch.uint8) ^ 0x80


def even_groups(group: Tensor | None, k: int) -> int | None:
    """How many neighbours each group of k columns has, a multiple of 32, the last group perhaps fewer; None where they are not so. group:
    [k], the group of each column, or None for one group."""
    size = k if group is None else int((group == 0).sum())
    if size == k:
        return k + -k % 32
    even = size > 0 and size % 32 == 0 and torch.equal(group.long(), torch.arange(k, device=group.device) // size)
    return size if even else None
