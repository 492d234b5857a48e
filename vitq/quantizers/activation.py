"""Activations as their format has them, in float."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from vitq.formats import ActivationFormat, to_float16
from vitq.quantizers.uniform import fake_quantize, fake_quantize_per_token, quantize_per_token_asymmetric


def fake_activation(x: Tensor, fmt: ActivationFormat | None) -> Tensor:
    """The numbers that the codes of x [..., K], and its float16 columns, stand for, float32, each feature in its place, or transformed where the
    format says so; x itself without a format. x is [..., H, D] where each head has a scale."""
    if fmt is None:
        return x.float()
    clip = None if fmt.clip is None else fmt.clip.to(x.device)
    if fmt.transform is not None:
        x = fmt.transform.to(x.device).apply(x)
    if fmt.columns is not None and fmt.columns.fp is not None:
        kept, order = fmt.columns.fp.long().to(x.device), fmt.columns.order.long().to(x.device)
        fake = x.float().clone()
        fake[..., order] = fake_activation(x[..., order], replace(fmt, columns=None))
        fake[..., kept] = to_float16(x[..., kept]).float()
        return fake
    if fmt.dynamic and not fmt.symmetric:
        codes, scale, shift = quantize_per_token_asymmetric(x, fmt.bits, clip)
        return codes * scale + shift
    if fmt.dynamic:
        return fake_quantize_per_token(x, fmt.bits, clip=clip)
    scale, zero_point = (t.to(x.device).unsqueeze(-1) if t.ndim else t.to(x.device) for t in (fmt.scale, fmt.zero_point))
    return fake_quantize(x, scale, zero_point, fmt.bits)
