"""How long calls take, and how much memory: medians in turns, the best 16-bit model, what a device can do at most."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TURN = 4  # timed calls of one case before the next has its turn


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: median, 10th and 90th percentile, and spread = (p90 − p10) / median."""

    median_ms: float
    p10: float
    p90: float
    spread: float


def time_model(fn: Callable[[Tensor], Any], images: Tensor, repeats: int = 20, warmup: int = 3) -> Timing:
    """Time fn(images) with the images where they are; on cuda by events, so that the host does not count."""
    return time_models({"": (fn, images)}, repeats, warmup)[""]


def time_models(cases: Mapping[str, tuple[Callable[[Tensor], Any], Tensor]], repeats: int = 20,
                warmup: int = 3) -> dict[str, Timing]:
    """Time several calls in turns of `TURN`, so that a machine that slows down or is shared slows all of them alike.

    Each turn opens with an untimed call: it refills the caches and the allocator after the case before, so that what is
    timed is each model running on its own, as it would in use.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be at least 1 and warmup at least 0, got {repeats} and {warmup}")
    times: dict[str, list[float]] = {name: [] for name in cases}
    with torch.inference_mode():
        for fn, images in cases.values():
            for _ in range(warmup):
                fn(images)
        for done in range(0, repeats, TURN):
            for name, (fn, images) in cases.items():
                if len(cases) > 1:
                    fn(images)
                times[name] += [_time_once(fn, images) for _ in range(min(TURN, repeats - done))]
    return {name: _timing(values) for name, values in times.items()}


def _time_once(fn: Callable[[Tensor], Any], images: Tensor) -> float:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        fn(images)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    began = time.perf_counter()
    fn(images)
    return (time.perf_counter() - began) * 1e3


def _timing(values: list[float]) -> Timing:
    points = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    low, median, high = torch.tensor(values, dtype=torch.float64).quantile(points).tolist()
    return Timing(median, low, high, (high - low) / median if median else 0.0)


def best_half(model: nn.Module, images: Tensor) -> tuple[torch.dtype, nn.Module]:
    """The 16-bit copy of a float model that is faster here, bfloat16 or float16: the one to beat."""
    found: list[tuple[float, torch.dtype, nn.Module]] = []
    for dtype in (torch.bfloat16, torch.float16):
        half, x = copy.deepcopy(model).to(dtype), images.to(dtype)
        first = time_model(half, x, repeats=1, warmup=0).median_ms
        # A CPU without float16 arithmetic takes minutes for it: one call is enough to see that.
        if not found or first < 5 * found[0][0]:
            found.append((time_model(half, x, repeats=3, warmup=0).median_ms, dtype, half))
    return min(found, key=lambda case: case[0])[1:]


def with_peak(build: Callable[[], nn.Module], images: Tensor) -> tuple[nn.Module, float | None]:
    """What `build` makes, warmed up on `images`, and the MiB it takes on the device at its peak (None on a CPU): its
    weights in every form it keeps them in, and all that one forward allocates."""
    start = torch.cuda.memory_allocated() if images.is_cuda else 0
    fn = build()
    with torch.inference_mode():
        fn(images)
        if not images.is_cuda:
            return fn, None
        torch.cuda.synchronize()
        built = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        fn(images)
        torch.cuda.synchronize()
    # What was there before the build (the float models) shows in its tensors instead.
    tensors = sum(t.numel() * t.element_size() for t in (*fn.parameters(), *fn.buffers()))
    return fn, (torch.cuda.max_memory_allocated() - built + max(tensors, built - start)) / 2**20
