"""LayerNorm fold: give a per-tensor quantizer the codes of a per-channel one (RepQ-ViT's scale reparameterisation).

A LayerNorm output has channels of very different ranges. With per-channel scale s_c and zero point z_c, r = s_c/s̃ and
t = s̃·(z̃ − z_c), the norm's γ ← γ/r, β ← β/r − t turn its output x into x' = x/r − t, and the linear's
W[:, c] ← W[:, c]·r_c, b ← b + W t undo it. Then x'/s̃ + z̃ = x/s_c + z_c, so that one scale s̃ and one zero point z̃ give
every channel the codes of its own quantizer. That holds exactly because z̃ is an integer. An RMSNorm has no β, so that only its scale can
move: ranges are then symmetric, and t is 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# A channel that is (nearly) constant has a vanishing scale, and dividing γ by it would blow up: its scale is held at
# this fraction of the mean one. It then uses fewer codes than it could, which costs nothing for a constant.
_SCALE_FLOOR = 1e-3


@torch.no_grad()
def fold(norm: nn.LayerNorm | nn.RMSNorm, linears: Sequence[nn.Linear], scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    """Fold per-channel `scale` [C] (> 0) and integer `zero_point` [C] of the norm's output into it and all linears that read it, in place. A
    linear without a bias gets one.

    A common zero point for all channels (symmetric ranges) leaves zero where it was (t = 0), which is what inputs that
    are padded with zeros after the norm need. Returns the per-tensor (s̃ float32 [], z̃ int32 []).
    Raises ValueError if the shapes do not match or the norm has no weight, or no bias and something to shift, to fold into.
    """
    channels = norm.normalized_shape[-1]
    features = {linear.in_features for linear in linears}
    if scale.shape != (channels,) or zero_point.shape != (channels,) or features != {channels}:
        raise ValueError(f"fold needs scale and zero point of shape [{channels}] and linears over {channels} inputs, "
                         f"got {list(scale.shape)}, {list(zero_point.shape)} and {sorted(features)}")
    if norm.weight is None:
        raise ValueError("fold needs a norm with a weight")
    scale, zero_point = scale.to(norm.weight.device), zero_point.to(norm.weight.device)
    scale = scale.double().clamp_min(float(scale.double().mean()) * _SCALE_FLOOR)
    z = zero_point.double()
    target_scale = scale.mean().float()  # rounded to float32 first: the quantizer will divide by this very number
    target_zero = z.mean().round()
    r = scale / target_scale.double()
    t = target_scale.double() * (target_zero - z)
    moves = bool((t != 0).any())
    if moves and getattr(norm, "bias", None) is None:
        raise ValueError("fold needs a norm with a bias where zero points differ; give symmetric ranges")
    norm.weight.copy_(norm.weight.double() / r)
    if getattr(norm, "bias", None) is not None:
        norm.bias.copy_(norm.bias.double() / r - t)
    for linear in linears:
        weight = linear.weight.double() * r
        if moves and linear.bias is None:
            linear.bias = nn.Parameter((weight @ t).to(linear.weight.dtype), requires_grad=False)
        elif moves:
            linear.bias.copy_(linear.bias.double() + weight @ t)
        linear.weight.copy_(weight)
    return target_scale, target_zero.to(torch.int32)
