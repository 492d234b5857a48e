"""Divide the channels of a linear layer's input, where it comes from, and multiply the layer's columns: outliers move into the weight.

SmoothQuant (Xiao et al., ICML 2023, arXiv 2211.10438) weighs both sides; DGQ (arXiv 2310.04836) takes only outlier channels down, to a
percentile of the channels' largest values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_LEAST = 1e-5  # of a maximum, as in SmoothQuant's code
_LEAST_OF_ROWS = 1e-2  # of the median


def smoothquant_scale(largest: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """max|X_k|^alpha / max|W_k|^(1 - alpha), float64 [K], of inputs with these largest absolute values [K] and the weights [N, K] of all
    layers that read them. A channel that is always zero keeps its scale."""
    columns = torch.stack([w.abs().amax(0) for w in weights]).amax(0).double()
    scale = largest.to(columns).clamp_min(_LEAST) ** alpha / columns.clamp_min(_LEAST) ** (1.0 - alpha)
    return torch.where(largest.to(columns) > 0, scale.clamp_min(_LEAST), 1.0)


def clip_scale(largest: Tensor, top: float) -> Tensor:
    """max(max|X_k| / c, 1), float64 [K], with c the value that a part `top` of the channels that are not always zero, and at least one, are
    above."""
    ordered = largest[largest > 0].double().sort(descending=True).values
    if not len(ordered):
        return torch.ones_like(largest, dtype=torch.float64)
    clip = ordered[min(max(round(top * len(ordered)), 1), len(ordered) - 1)]
    return (largest.double() / clip).clamp_min(1.0)


def bounded_scale(scale: Tensor) -> Tensor:
    """`scale` [K] for `divide_rows`, around 1 and nowhere much below it: what the rows make is held in 16 bits before it is multiplied by what
    keeps it small, a gate."""
    return (scale / scale.median()).clamp_min(_LEAST_OF_ROWS)


@torch.no_grad()
def divide_norm(norm: nn.LayerNorm | nn.RMSNorm, scale: Tensor) -> None:
    """Divide each channel of a norm's output by `scale` [K], in place. Raises ValueError if the norm has no weight."""
    if norm.weight is None:
        raise ValueError("a norm without a weight has nothing to divide")
    for parameter in (norm.weight, getattr(norm, "bias", None)):
        if parameter is not None:
            parameter.copy_(parameter.double() / scale.to(parameter.device))


@torch.no_grad()
def divide_rows(linear: nn.Linear, first: int, scale: Tensor) -> None:
    """Divide the outputs of a linear layer from row `first` on by `scale` [K], in place."""
    rows = slice(first, first + len(scale))
    scale = scale.to(linear.weight.device)
    linear.weight[rows] = (linear.weight[rows].double() / scale[:, None]).to(linear.weight.dtype)
    if linear.bias is not None:
        linear.bias[rows] = (linear.bias[rows].double() / scale).to(linear.bias.dtype)


@torch.no_grad()
def multiply_columns(linear: nn.Linear, scale: Tensor) -> None:
    """Multiply each input feature's column by `scale` [K], in place."""
    linear.weight.copy_(linear.weight.double() * scale.to(linear.weight.device))
