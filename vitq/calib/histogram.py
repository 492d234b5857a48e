"""A histogram of one activation operand, filled batch by batch, and the range that suits a bit width.

Memory does not grow with the number of images, and the result does not depend on their order or on how they are batched.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitq.quantizers.uniform import scale_and_zero

# ERQ's candidates for activations, and min-max (a histogram of few elements has no tail to cut).
PERCENTILES = (0.999, 0.9999, 0.99999, 1.0)
# Clip ratios of the mse search, 6 % apart: even an outlier 100 times the useful range is found.
RATIOS = tuple(0.94**i for i in range(75))
# Then around the best of those, where 8 bits still tell the difference.
FINE = (1.0, 0.955, 0.97, 0.985, 1.015, 1.03)
# Elements bucketed at once: the temporaries stay in a core's cache (1.2e9 elements/s on two cores; 0.09e9 with 2^20).
CHUNK = 1 << 18
CHUNK_CUDA = 1 << 24  # where each chunk costs launches and a wait
# Of a histogram that is kept for its minimum and maximum.
LEAST_BINS = 4
# Smallest exponent of a range: below whatever a 16-bit model distinguishes, and large enough that scaling by its inverse stays in float32.
MIN_EXPONENT = -60


class Histogram:
    """Counts of ``bins`` equal buckets over [-2^e, 2^e), with the exact minimum and maximum; per tensor, or per channel of dimension ``dim``.

    2^e is the smallest power of two above every absolute value seen. When e grows, bucket pairs merge without loss, so what came first does not
    matter. ``channels`` None: one histogram of all elements (4096 bins by default); else one a channel (512 bins by default).
    """

    def __init__(self, channels: int | None = None, bins: int | None = None, dim: int = -1) -> None:
        if channels is not None and channels < 1:
            raise ValueError(f"Histogram: channels = {channels}; give None for one histogram, or at least 1")
        bins = (4096 if channels is None else 512) if bins is None else bins
        if bins < LEAST_BINS or bins % 2:
            raise ValueError(f"Histogram: bins = {bins}; give an even number, at least {LEAST_BINS}")
        self.channels, self.bins, self.dim = channels, bins, dim
        rows = channels or 1
        self.counts = torch.zeros(rows, bins, dtype=torch.int64)
        self.exponent = torch.full((rows,), MIN_EXPONENT, dtype=torch.int32)
        self.min = torch.full((rows,), torch.inf)
        self.max = torch.full((rows,), -torch.inf)

    @property
    def count(self) -> int:
        """Elements seen, of one channel."""
        return int(self.counts[0].sum())

    # Calibration runs in inference mode: a histogram made of its tensors could not be updated again outside it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Add ``x``: any shape, device, strides and floating dtype. ValueError for NaN or inf (nothing is then added) or another channel count."""
        if not x.is_floating_point():
            raise TypeError(f"activations are {x.dtype}; give a floating tensor")
        if self.channels is not None:
            if x.dim() == 0 or not -x.dim() <= self.dim < x.dim() or x.shape[self.dim] != self.channels:
                raise ValueError(f"activations have shape {tuple(x.shape)}; dimension {self.dim} must have {self.channels} channels")
            x = x.movedim(self.dim, -1)
        if x.numel() == 0:
            return
        x = x.reshape(-1) if self.channels is None else x.reshape(-1, self.channels)
        if self.channels is None:
            low, high = (t.float().reshape(1).cpu() for t in torch.aminmax(x))
        else:
            # two passes: aminmax along a dimension is six times slower
            low, high = x.amin(0).float().cpu(), x.amax(0).float().cpu()
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
            raise ValueError("activations hold NaN or inf")
        self._grow(torch.maximum(low.abs(), high.abs()))
        self.min, self.max = torch.minimum(self.min, low), torch.maximum(self.max, high)
        self._add(x)

    def _grow(self, amax: Tensor) -> None:
        # amax = m * 2^e with 1/2 <= m < 1, so 2^e is the smallest power of two above it
        needed = torch.frexp(amax).exponent.clamp_min(MIN_EXPONENT).to(torch.int32)
        shift = (needed - self.exponent).clamp_min(0)
        if not bool(shift.any()):
            return
        # floor(i / 2^k) is exact for the merged buckets because bucket edges are multiples of the width; the centre stays the centre.
        half = self.bins // 2
        index = torch.arange(-half, half).expand(self.counts.shape)
        moved = torch.bitwise_right_shift(index, shift[:, None].clamp_max(62)) + half
        self.counts = torch.zeros_like(self.counts).scatter_add_(1, moved, self.counts)
        self.exponent = self.exponent + shift

    def _add(self, x: Tensor) -> None:
        half = self.bins // 2
        # x * factor is exact: a power of two. Rows of the flat count are c * bins; their start is added in int64 where float32 cannot hold it.
        factor = torch.pow(2.0, -self.exponent.double()).mul_(half).float().to(x.device)
        total = self.counts.numel()
        start = torch.arange(0, total, self.bins, device=x.device).add_(half)
        start = start.to(torch.int32) if total < 2**31 else start
        flat = torch.zeros(total, dtype=torch.int64, device=x.device)
        # A chunk is at least twice the histogram, or clearing the histogram would dominate.
        for part in x.split(max(1, max(CHUNK_CUDA if x.is_cuda else CHUNK, 2 * total) // (x.shape[1] if x.dim() == 2 else 1))):
            index = (part.float() * factor).floor_().to(start.dtype).add_(start)
            flat += torch.bincount(index.reshape(-1), minlength=total)
        self.counts += flat.cpu().view_as(self.counts)

    def range(self, spec_bits: int, symmetric: bool, observer: str) -> tuple[Tensor, Tensor]:
        """(lo, hi) to quantize in, float32 of shape [] or [C].

        ``observer``: minmax; percentile (PERCENTILES, least squared error of the histogram, the first of equals); mse (clip ratios of both ends
        together, then of each end alone, least squared error). ValueError where nothing has been seen.
        """
        if self.count == 0:
            raise ValueError("no activations have been observed; calibrate on at least one batch")
        if observer == "minmax":
            lo, hi = self.min.double(), self.max.double()
        elif observer == "percentile":
            lo, hi = self._best([self._quantiles(p) for p in PERCENTILES], spec_bits, symmetric)
        elif observer == "mse":
            # Every quantizer's range holds 0, so a channel that never comes near it is clipped from 0 outwards.
            low, high = self.min.double().clamp_max(0.0), self.max.double().clamp_min(0.0)
            lo, hi = self._best([(low * r, high * r) for r in RATIOS], spec_bits, symmetric)
            lo, hi = self._best([(lo * r, hi * r) for r in FINE], spec_bits, symmetric)
            if not symmetric:
                lo, hi = self._best([(lo, hi)] + [(lo, high * r) for r in RATIOS], spec_bits, symmetric)
                lo, hi = self._best([(lo, hi)] + [(low * r, hi) for r in RATIOS], spec_bits, symmetric)
        else:
            raise ValueError(f"observer = {observer!r}; allowed: 'minmax', 'percentile', 'mse'")
        shape = () if self.channels is None else (self.channels,)
        return lo.float().reshape(shape), hi.float().reshape(shape)

    def merged(self, divisor: Tensor, channels: Tensor | None = None) -> Histogram:
        """One histogram of all channels, or of those whose indices are given, each divided by its `divisor` [C] (> 0): minimum and maximum exact,
        elements at the middles of their buckets."""
        channels = slice(None) if channels is None else channels.cpu()
        divisor, counts = divisor.double().cpu()[channels], self.counts[channels]
        one = Histogram()
        low, high = self.min.double()[channels] / divisor, self.max.double()[channels] / divisor
        one.min, one.max = low.min().float().reshape(1), high.max().float().reshape(1)
        one._grow(torch.maximum(one.min.abs(), one.max.abs()))
        half = one.bins // 2
        value = (self.middles()[channels] / divisor[:, None]).clamp(low[:, None], high[:, None])
        index = (value * (half / 2.0 ** int(one.exponent))).floor().long().clamp(-half, half - 1) + half
        one.counts.view(-1).scatter_add_(0, index.reshape(-1), counts.reshape(-1))
        return one

    def selected(self, channels: Sequence[int]) -> Histogram:
        """What is here of these channels, in this order."""
        index = torch.tensor(channels)
        return Histogram.from_state({name: tensor[index] for name, tensor in self.state().items()}, len(channels), self.dim)

    def quantile(self, p: float) -> Tensor:
        """Of each channel, float64 [C]; see `_quantiles`."""
        return self._quantiles(p)[1]

    def middles(self) -> Tensor:
        """Of the buckets, float64 [C, bins]."""
        edges = self._edges()
        return (edges[:, 1:] + edges[:, :-1]) / 2

    def _edges(self) -> Tensor:
        """Bucket edges [C, bins + 1], float64."""
        half = self.bins // 2
        width = torch.pow(2.0, self.exponent.double()) / half
        return torch.arange(-half, half + 1, dtype=torch.float64) * width[:, None]

    def _quantiles(self, p: float) -> tuple[Tensor, Tensor]:
        """(quantile(1 - p), quantile(p)) of each channel, linear within a bucket, never outside the exact minimum and maximum."""
        if p == 1.0:
            return self.min.double(), self.max.double()
        edges, below = self._edges(), self.counts.cumsum(1).double()
        last = self.count - 1

        def element(rank: int) -> Tensor:
            # The element of that rank, were its bucket's elements evenly spread.
            bucket = torch.searchsorted(below, below.new_full((below.shape[0], 1), rank), right=True)
            inside = self.counts.gather(1, bucket).double()
            before = below.gather(1, bucket) - inside
            left, right = edges.gather(1, bucket), edges.gather(1, bucket + 1)
            value = left + (right - left) * ((rank - before + 0.5) / inside)
            return value[:, 0].clamp(self.min.double(), self.max.double())

        def at(q: float) -> Tensor:
            rank = q * last
            return torch.lerp(element(int(rank)), element(min(int(rank) + 1, last)), rank - int(rank))

        return at(1.0 - p), at(p)

    def _best(self, ranges: list[tuple[Tensor, Tensor]], bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
        """The (lo, hi) of each channel with the least squared error; the first of equals."""
        # Elements are taken as uniform within their bucket [a, b], where the mean of (t - q(t))^2 in units of the scale is
        # (F(b) - F(a)) / (b - a), F(t) = r / 12 + (t - r)^3 / 3, r = clamp(round(t)): exact for rounding and clipping alike, however the bucket
        # width compares with the scale. Summed by parts, sum_i n_i (F(e_i+1) - F(e_i)) needs F once an edge.
        # The outer buckets end at the exact minimum and maximum (a constant channel is then a point, not a bucket).
        edges = self._edges()
        margin = 1e-4 * (edges[:, 1:2] - edges[:, :1])
        edges = edges.clamp(self.min.double()[:, None] - margin, self.max.double()[:, None] + margin)
        density = torch.where(self.counts > 0, self.counts / edges.diff(dim=1), 0.0)
        padded = torch.nn.functional.pad(density, (1, 1))
        drops = padded[:, :-1] - padded[:, 1:]
        best_lo, best_hi = ranges[0]
        least = torch.full_like(best_lo, torch.inf)
        qmin, qmax = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        for lo, hi in ranges:
            scale, zero_point = (t.double()[:, None] for t in scale_and_zero(lo, hi, bits, symmetric))
            t = edges / scale
            nearest = torch.minimum(torch.maximum(t.round(), qmin - zero_point), qmax - zero_point)
            t.sub_(nearest).pow_(3).mul_(4.0).add_(nearest)
            error = t.mul_(drops).sum(1) * scale[:, 0] ** 3
            better = error < least
            least = torch.where(better, error, least)
            best_lo, best_hi = torch.where(better, lo, best_lo), torch.where(better, hi, best_hi)
        return best_lo, best_hi

    def state(self) -> dict[str, Tensor]:
        """All there is to know, for :meth:`from_state` (``dim`` apart)."""
        return {"counts": self.counts, "exponent": self.exponent, "min": self.min, "max": self.max}

    @classmethod
    def from_state(cls, state: dict[str, Tensor], channels: int | None, dim: int = -1) -> Histogram:
        """Undo :meth:`state`. ValueError for a missing or extra tensor, or one whose shape, dtype or values no histogram has."""
        expected = {"counts": torch.int64, "exponent": torch.int32, "min": torch.float32, "max": torch.float32}
        if set(state) != set(expected):
            raise ValueError(f"histogram has {sorted(state)}; it needs {sorted(expected)}")
        rows = channels or 1
        for name, dtype in expected.items():
            tensor, dims = state[name], 2 if name == "counts" else 1
            if tensor.dtype != dtype or tensor.dim() != dims or tensor.shape[0] != rows:
                raise ValueError(f"histogram {name} is {tensor.dtype} {tuple(tensor.shape)}; expected {dtype} with {rows} rows")
        if bool((state["counts"] < 0).any()) or bool(torch.isnan(state["min"]).any() | torch.isnan(state["max"]).any()):
            raise ValueError("histogram holds negative counts or NaN bounds")
        if bool(((state["exponent"] < MIN_EXPONENT) | (state["exponent"] > 128)).any()):
            raise ValueError(f"histogram exponents are outside {MIN_EXPONENT}..128")
        histogram = cls(channels, state["counts"].shape[1], dim)
        for name, tensor in state.items():
            setattr(histogram, name, tensor.clone())
        return histogram
