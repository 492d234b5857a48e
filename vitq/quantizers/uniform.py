"""Uniform (affine) quantization: the reference that simulation, packing and every backend follow bit for bit.

    codes = clamp(round(x / scale) + zero_point, qmin, qmax)        x' = (codes - zero_point) * scale

Codes are signed; ``round`` is half to even; the division is a true float32 one whatever the dtype of ``x``. Values must be finite: a NaN has no code.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vitq.formats import RANGE_MIN, int_range
from vitq.recipe import QuantSpec

# The percentiles that ERQ tries for a weight row (1 = min-max); the first of equals wins.
WEIGHT_PERCENTILES = (0.97, 0.98, 0.99, 0.995, 0.9995, 0.9997, 0.9999, 0.99995, 0.99999, 1.0)
# Clip ratios of the mse search: coarse over all a row may need (2 bits want about 0.3 of the maximum), then fine around the best.
COARSE_RATIOS = tuple(1.0 - 0.02 * i for i in range(41))
FINE_STEPS = (-0.015, -0.01, -0.005, 0.005, 0.01, 0.015)
# Elements worked on at once: 1 MB of float32 stays in a core's cache, and temporaries stay small however large the weight is. On a GPU
# launches are the time: 64 MB.
CHUNK = 1 << 18
CHUNK_CUDA = 1 << 24


def _on(value: float | int | Tensor, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    # A divisor that is a Python number or a 0-d CPU tensor makes CUDA multiply by its reciprocal, which changes codes at ties: hence a tensor there.
    # Made by a fill, not a copy from the host, which no CUDA graph may hold.
    return value.to(x.device, dtype) if isinstance(value, Tensor) else torch.full((), value, dtype=dtype, device=x.device)


def _rounded(x: Tensor, scale: float | Tensor, zero_point: int | Tensor, bits: int) -> Tensor:
    qmin, qmax = int_range(bits)
    return x.float().div(_on(scale, x)).round_().add_(_on(zero_point, x)).clamp_(qmin, qmax)


def quantize(x: Tensor, scale: float | Tensor, zero_point: int | Tensor, bits: int) -> Tensor:
    """Codes of ``x`` as int8, in the shape of ``x``; ``scale`` and ``zero_point`` broadcast to it."""
    return _rounded(x, scale, zero_point, bits).to(torch.int8)


def dequantize(codes: Tensor, scale: float | Tensor, zero_point: int | Tensor) -> Tensor:
    """Numbers of integer ``codes``, float32."""
    return (codes.float() - _on(zero_point, codes)) * _on(scale, codes)


def fake_quantize(x: Tensor, scale: float | Tensor, zero_point: int | Tensor, bits: int) -> Tensor:
    """``dequantize(quantize(x))`` without the integer tensor between: float32, equal to it bit for bit."""
    return _rounded(x, scale, zero_point, bits).sub_(_on(zero_point, x)).mul_(_on(scale, x))


def _per_token(x: Tensor, bits: int, signed: bool, clip: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if x.dim() == 0:
        raise ValueError("per-token quantization needs rows: x is a scalar; give [..., K]")
    qmin, qmax = int_range(bits, signed)
    x = x.float()
    # A zero-size last dimension has no maximum; its rows get the scale of a zero row.
    if not x.shape[-1]:
        amax = x.new_zeros((*x.shape[:-1], 1))
    elif clip is None:
        amax = x.abs().amax(-1, keepdim=True)
    else:
        amax = torch.maximum(x.amin(-1, keepdim=True).neg() * clip[0], x.amax(-1, keepdim=True) * clip[1])
    scale = amax.clamp_min(RANGE_MIN).div(_on(qmax, x))
    return x.div(scale).round_().clamp_(qmin, qmax), scale


def quantize_per_token(x: Tensor, bits: int, signed: bool = True, clip: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Dynamic symmetric codes of each row of ``x`` [..., K] and its scale [..., 1] (float32).

    scale = max(row's largest absolute value, 1e-12) / qmax; zero point 0. ``signed=False`` is for attention probabilities (x >= 0): uint8 codes,
    the row's maximum is 2^bits - 1 and code 0 is 0. ``clip`` float32 [2]: the largest of -min * clip[0] and max * clip[1] in the place of the
    largest absolute value.
    """
    codes, scale = _per_token(x, bits, signed, clip)
    return codes.to(torch.int8 if signed else torch.uint8), scale


def quantize_per_token_asymmetric(x: Tensor, bits: int, clip: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Dynamic asymmetric codes of each row of ``x`` [..., K], K > 0, its scale and its shift [..., 1] (float32): x' = codes * scale + shift.

    scale = max(hi - lo, 1e-12) / (2^bits - 1), codes = round((x - lo) / scale) - 2^(bits - 1), shift = lo + 2^(bits - 1) * scale, with lo and
    hi the row's least and largest value: neither needs to be on either side of 0, and lo is met exactly (QUIK, arXiv 2310.09259). ``clip`` float32
    [2]: lo = clip[0] * min(least, 0) and hi = clip[1] * max(largest, 0).
    """
    qmin, qmax = int_range(bits)
    x = x.float()
    lo, hi = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    if clip is not None:
        lo, hi = lo.clamp_max(0.0) * clip[0], hi.clamp_min(0.0) * clip[1]
    span = hi - lo
    scale = span.clamp_min(RANGE_MIN).div(_on(qmax - qmin, x))
    codes = torch.minimum(x - lo, span).div(scale).round_().add_(qmin).clamp_(qmin, qmax)
    return codes.to(torch.int8), scale, lo + scale * float(-qmin)


def fake_quantize_per_token(x: Tensor, bits: int, signed: bool = True, clip: Tensor | None = None) -> Tensor:
    """The numbers that :func:`quantize_per_token` stands for, float32."""
    codes, scale = _per_token(x, bits, signed, clip)
    return codes.mul_(scale)


def scale_and_zero(lo: Tensor | float, hi: Tensor | float, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale (float32) and zero point (int32) of the range [lo, hi], elementwise.

    symmetric: scale = max(|lo|, |hi|) / qmax, zero point 0. Asymmetric: the range is widened to hold 0 (so that padding and zeros are exact),
    scale = (hi - lo) / (2^bits - 1), zero point = round(qmin - lo / scale). An empty range gives a small finite scale. ValueError for bounds
    that are not finite or where lo > hi.
    """
    qmin, qmax = int_range(bits)
    # float64: hi - lo of two large float32 numbers would overflow.
    lo = torch.as_tensor(lo).double()
    hi = torch.as_tensor(hi, device=lo.device).double()
    if not bool((torch.isfinite(lo) & torch.isfinite(hi) & (lo <= hi)).all()):
        raise ValueError("scale_and_zero: bounds must be finite with lo <= hi; check the statistics they come from for NaN and inf")
    if symmetric:
        scale = (torch.maximum(lo.abs(), hi.abs()).clamp_min(RANGE_MIN) / qmax).float()
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    lo, hi = lo.clamp_max(0.0), hi.clamp_min(0.0)
    scale = ((hi - lo).clamp_min(RANGE_MIN) / (qmax - qmin)).float()
    zero_point = (qmin - lo / scale.double()).round().clamp(qmin, qmax).to(torch.int32)
    return scale, zero_point


def weight_range(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale [N] (float32) and zero point [N] (int32) of ``weight`` [N, K], one pair an output channel (equal ones for ``per_tensor``).

    ``spec.observer``: minmax; percentile (ERQ's candidates, the least squared error wins, ties to the first); mse (clip ratios of the range, least
    squared error). Memory beyond the weight is a few MB (one copy of it for ``per_tensor`` percentile). ValueError for NaN or inf, for a shape
    that is not [N, K], or for an empty weight.
    """
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; give [N, K] with at least one element")
    weight = weight.detach()
    if spec.granularity == "per_tensor":
        scale, zero_point = _rows_range(weight.reshape(1, -1), spec)
        return scale.expand(weight.shape[0]).clone(), zero_point.expand(weight.shape[0]).clone()
    if spec.granularity != "per_channel":
        raise ValueError(f"weight granularity = {spec.granularity!r}; allowed: 'per_channel', 'per_tensor'")
    rows = max(1, _chunk(weight) // weight.shape[1])
    # Contiguous, so that sums have one order however the weight lies in memory: near-ties of ratios would be decided by it.
    parts = [_rows_range(part.contiguous(), spec) for part in weight.split(rows)]
    return torch.cat([scale for scale, _ in parts]), torch.cat([zero_point for _, zero_point in parts])


def _chunk(x: Tensor) -> int:
    return CHUNK_CUDA if x.is_cuda else CHUNK


def _rows_range(rows: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    lo, hi = rows.amin(1).float(), rows.amax(1).float()
    if not bool((torch.isfinite(lo) & torch.isfinite(hi)).all()):
        raise ValueError("the weight holds NaN or inf; repair or retrain it, or load another checkpoint")
    if spec.observer == "minmax":
        best = lo, hi
    elif spec.observer == "percentile":
        best = _least_squares(rows, spec, list(_quantiles(rows, WEIGHT_PERCENTILES)))
    elif spec.observer == "mse":
        ratio = _best_ratio(rows, spec, lo, hi, [torch.full_like(lo, r) for r in COARSE_RATIOS])
        ratio = _best_ratio(rows, spec, lo, hi, [ratio] + [(ratio + step).clamp(0.01, 1.0) for step in FINE_STEPS])
        best = lo * ratio, hi * ratio
    else:
        raise ValueError(f"weight observer = {spec.observer!r}, which nothing has learned here; allowed: 'minmax', 'percentile', 'mse'")
    return scale_and_zero(*best, spec.bits, spec.symmetric)


def _best_ratio(rows: Tensor, spec: QuantSpec, lo: Tensor, hi: Tensor, ratios: list[Tensor]) -> Tensor:
    best, least = ratios[0], torch.full_like(lo, torch.inf, dtype=torch.float64)
    for ratio in ratios:
        error = _squared_error(rows, spec, lo * ratio, hi * ratio)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, ratio, best)
    return best


def _least_squares(rows: Tensor, spec: QuantSpec, ranges: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The (lo, hi) of each row with the least squared error; the first of equals."""
    best_lo, best_hi = ranges[0]
    least = _squared_error(rows, spec, best_lo, best_hi)
    for lo, hi in ranges[1:]:
        error = _squared_error(rows, spec, lo, hi)
        better = error < least
        least = torch.where(better, error, least)
        best_lo, best_hi = torch.where(better, lo, best_lo), torch.where(better, hi, best_hi)
    return best_lo, best_hi


def _squared_error(rows: Tensor, spec: QuantSpec, lo: Tensor, hi: Tensor) -> Tensor:
    scale, zero_point = (t[:, None] for t in scale_and_zero(lo, hi, spec.bits, spec.symmetric))
    error = torch.zeros(rows.shape[0], dtype=torch.float64, device=rows.device)
    # Columns are split as well: a per-tensor weight is one long row.
    for part in rows.split(max(1, _chunk(rows) // rows.shape[0]), dim=1):
        error += fake_quantize(part, scale, zero_point, spec.bits).sub_(part).square_().sum(1)
    return error


def _quantiles(rows: Tensor, percentiles: tuple[float, ...]) -> list[tuple[Tensor, Tensor]]:
    """(quantile(1 - p), quantile(p)) of each row for each p, linear interpolation, any size (torch.quantile stops at 2^24 elements)."""
    ordered = torch.from_numpy(np.sort(rows.float().cpu().numpy(), axis=1))
    last = ordered.shape[1] - 1

    def at(p: float) -> Tensor:
        position = p * last
        below = min(int(position), last)
        return torch.lerp(ordered[:, below], ordered[:, min(below + 1, last)], position - below).to(rows.device)

    return [(at(1.0 - p), at(p)) for p in percentiles]
