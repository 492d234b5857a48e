"""Seconds and peak memory of a block of code, on a GPU or in this process."""
from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch


@contextlib.contextmanager
def measured(device: torch.device, into: list[tuple[float, float]]) -> Iterator[None]:
    """Appends (seconds, MB): the time of the block, and the most memory in it beyond what was in use before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        started = time.perf_counter()
        yield
        torch.cuda.synchronize(device)
        into.append((time.perf_counter() - started, (torch.cuda.max_memory_allocated(device) - before) / 1e6))
        return
    peak, stop = [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            peak[0] = max(peak[0], resident_mb())

    before, thread = resident_mb(), threading.Thread(target=watch, daemon=True)
    thread.start()
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - started
        stop.set()
        thread.join()
    into.append((seconds, max(peak[0], resident_mb()) - before))


def resident_mb() -> float:
    """Of this process; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    return 0.0
