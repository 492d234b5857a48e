"""log√2 quantization of attention probabilities (RepQ-ViT, arXiv 2212.08254; ERQ): levels scale · √2^−q, and 0.

Neighbouring levels differ by a factor that is no integer, so no integer product multiplies them: for simulation only.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fake_log_sqrt2(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The numbers that the codes of x [...] (0 and above) stand for, float32: q = round(−2·log2(x / scale)) of 0 .. 2^bits − 1; what is
    smaller is 0, what is larger than scale is scale."""
    code = torch.round(-2.0 * torch.log2(x.float() / scale)).clamp_min(0.0)
    return torch.where(code < 2**bits, scale * torch.exp2(-code / 2.0), 0.0)
