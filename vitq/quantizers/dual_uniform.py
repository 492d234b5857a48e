"""Dual uniform quantization (ERQ, TPAMI 2025; arXiv 2407.06794): two groups of a weight's input features, each with scales of its own.

Folding a LayerNorm multiplies whole columns of the next weight, so its outliers stand in columns. A row whose outlier columns have a scale of
their own need not spread its levels over them for all the other weights.

The groups run in one of two ways. In general as two segments, each with an accumulator: the columns are put in order, outliers first. With
up to 4 bits a row's two scales can be integer multiples of one: ``code * multiplier`` is an int8, and the layer runs as any 8-bit one.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of a row's positive and of its negative weights, the part that counts as outliers.
TAIL = 0.01
# ERQ moves one column for 20 output features; here the next whole step of the kernels, so that no column is padded.
OUTPUTS_A_COLUMN = 20
STEP = 32
OUTLIERS, OTHERS = 0, 1  # groups
# With multipliers up to this, two scales whose ratio is not above it are each met within 3 %.
ENOUGH = 15


def outlier_count(out_features: int, in_features: int) -> int:
    """How many columns of a weight [out_features, in_features] are outliers; 0 where it is too small to be divided."""
    count = -(-(out_features // OUTPUTS_A_COLUMN) // STEP) * STEP
    return max(min(count, (in_features - 1) // STEP * STEP), 0)


def column_groups(weight: Tensor, outliers: int) -> Tensor:
    """uint8 [K]: OUTLIERS for the ``outliers`` columns of ``weight`` [N, K] that are outliers in most rows, else OTHERS.

    A weight is an outlier of its row above the 99th percentile of the row's positive ones or below the 1st of its negative ones
    (interpolated linearly); of equals the first columns are taken. A row without weights of a sign has no outliers there.
    """
    if weight.dim() != 2 or not 0 <= outliers <= weight.shape[1]:
        raise ValueError(f"column_groups: weight has shape {tuple(weight.shape)}, outliers = {outliers}; give [N, K] and 0 to K")
    weight = weight.detach().float()
    counts = (weight > _tail(weight)).sum(0) + (-weight > _tail(-weight)).sum(0)
    groups = torch.full_like(counts, OTHERS, dtype=torch.uint8)
    groups[torch.argsort(counts, descending=True, stable=True)[:outliers]] = OUTLIERS
    return groups


def largest_multiplier(bits: int, symmetric: bool = True) -> int:
    """Up to which multiplier ``(code - zero_point) * multiplier`` is an int8 for every code of so many bits, and every zero point among them."""
    return 127 >> (bits - 1) if symmetric else 127 // (2**bits - 1)


def shares_scale(bits: int) -> bool:
    """Whether the two scales of a row are multiples of one; otherwise the groups are segments."""
    return largest_multiplier(bits) >= ENOUGH


def share_scale(scale: Tensor, bits: int, symmetric: bool = True) -> tuple[Tensor, Tensor]:
    """Two scales a row, [2, N] -> one, float32 [N], and multipliers int8 [2, N] whose products come nearest, as ratios.

    A ratio beyond the largest multiplier keeps the larger scale, so that nothing is clipped.
    """
    largest = largest_multiplier(bits, symmetric)
    steps = torch.arange(1, largest + 1, device=scale.device)
    # Each ratio once, in its smallest terms.
    pairs = torch.stack(torch.meshgrid(steps, steps, indexing="ij")).flatten(1)
    pairs = pairs[:, torch.gcd(pairs[0], pairs[1]) == 1]
    ratios, wanted = (pairs[0] / pairs[1]).double().log(), scale.double().log()
    nearest = ((wanted[0] - wanted[1])[:, None] - ratios).abs().argmin(1)
    multiplier = pairs[:, nearest]
    channel = (wanted - multiplier.double().log()).mean(0)
    beyond = (wanted[0] - wanted[1]).abs() > ratios.max()
    channel = torch.where(beyond, (wanted - multiplier.double().log()).max(0).values, channel)
    return channel.exp().float(), multiplier.to(torch.int8)


def _tail(weight: Tensor) -> Tensor:
    """[N, 1]: the percentile of each row's positive values above which they are outliers; infinity where there are none."""
    ordered = weight.sort(dim=1).values
    positive = (weight > 0).sum(1, keepdim=True)
    last = weight.shape[1] - 1
    position = last - TAIL * (positive - 1).clamp_min(0).double()
    below = position.floor().long()
    low, high = (ordered.gather(1, at.clamp_max(last)).double() for at in (below, below + 1))
    value = torch.lerp(low, high, position - below).float()
    return torch.where(positive > 0, value, torch.inf)
