"""Which kernel runs an op, and why not the one that was asked for.

A kernel is registered per (op, backend). `choose` walks the preferences of a backend on a device, takes the first that
supports the case, and keeps the reason of every one it passed over, so that `vitq.explain` can print it; a fallback is
logged once per reason.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

log = logging.getLogger("vitq")

BACKENDS = ("auto", "reference", "cpu", "cuda")


class Kernel(Protocol):
    """One implementation of one op. `pack` prepares constants once; `run` takes what pack returned first. Of a linear layer it may have
    `unpack(packed) -> int8 [N, K]` too, the codes that were packed: the layer holds them in that form alone where these are its own, bit for bit."""

    name: str

    def supports(self, spec: Any) -> str | None:
        """None if this kernel can run `spec` on this machine, else the reason in a few words."""

    def pack(self, spec: Any, device: torch.device) -> Any: ...

    def run(self, packed: Any, *args: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class Choice:
    """The kernel that runs, its backend, and why a preferred one does not (None if nothing was passed over)."""

    kernel: Kernel
    backend: str
    reason: str | None = None


_REGISTRY: dict[tuple[str, str], list[Kernel]] = {}
_LOGGED: set[str] = set()


def register(op: str, backend: str):
    """Class decorator: an instance becomes the next preference for `op` on `backend`."""

    def add(cls: type) -> type:
        _REGISTRY.setdefault((op, backend), []).append(cls())
        return cls

    return add


def check_backend(backend: str, device: torch.device | None = None) -> str:
    """Raises ValueError for a backend that does not exist, or that was asked for by name on another kind of device."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if device is not None and backend in ("cpu", "cuda") and device.type != backend:
        raise ValueError(f"backend {backend!r} cannot run on {device.type}: move the model to {backend}, or use 'auto' or "
                         "'reference'")
    return backend


def choose(op: str, backend: str, spec: Any, device: torch.device) -> Choice:
    """The kernel for `spec` on `device`. `backend='auto'` means the device's own; every chain ends in `reference`."""
    wanted = device.type if backend == "auto" and device.type in ("cpu", "cuda") else backend
    reasons = []
    if wanted in ("cpu", "cuda"):
        if wanted != device.type:
            reasons.append(f"backend {wanted} needs tensors on {wanted}, they are on {device.type}")
        else:
            if wanted == "cuda":
                import vitq.cuda  # noqa: F401  (registers its kernels)
            for kernel in _REGISTRY.get((op, wanted), ()):
                why = kernel.supports(spec)
                if why is None:
                    return Choice(kernel, wanted, _log_once(op, kernel.name, reasons))
                reasons.append(f"{kernel.name}: {why}")
    kernel = _REGISTRY[op, "reference"][0]
    return Choice(kernel, "reference", _log_once(op, kernel.name, reasons))


def registered(op: str) -> list[tuple[str, Kernel]]:
    """(backend, kernel) of every implementation of `op`: what tests are parametrised over."""
    return [(backend, kernel) for (o, backend), kernels in _REGISTRY.items() if o == op for kernel in kernels]


def tune(run: Callable[[], Any], device: torch.device) -> dict[str, dict[str, float]]:
    """Times every tile of every GEMM that `run()` calls on a GPU and writes the fastest to the cache that later runs read.

    Returns microseconds by case and tile, fastest first. Raises ValueError where the CUDA library does not run.
    """
    if device.type != "cuda":
        raise ValueError(f"tiles are tuned on a GPU, and the model is on {device.type}: move it to cuda")
    import vitq.cuda.loader as loader
    import vitq.cuda.tuning as tuning

    if why := loader.why_unavailable():
        raise ValueError(f"there is nothing to tune without the CUDA library: {why}")
    with tuning.recording() as cases:
        run()
    ordered = sorted(cases, key=lambda case: (case.key, case.m))
    results = tuning.tune(ordered, torch.cuda.current_device() if device.index is None else device.index)
    return {f"{case.m} rows, {case.key}": times for case, times in results.items()}


def _log_once(op: str, used: str, reasons: list[str]) -> str | None:
    if not reasons:
        return None
    reason = "; ".join(reasons)
    if (line := f"{op} runs on {used} ({reason})") not in _LOGGED:
        _LOGGED.add(line)
        log.warning(line)
    return reason


@functools.cache
def cpu_int8_isa() -> str | None:
    """'amx', 'vnni', or None: the instructions that oneDNN's int8 GEMM would use. Without either its fallback may
    saturate 16-bit intermediates, so the exact reference is used instead."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.onednn, "qlinear_prepack"):
        return None
    if torch.cpu._is_amx_tile_supported():
        return "amx"
    return "vnni" if torch.cpu._is_vnni_supported() else None


@functools.cache
def default_dtype(device_type: str) -> torch.dtype:
    """For what stays in float: float16 on cuda, bfloat16 on a CPU with AMX or AVX512-BF16, else float32."""
    if device_type == "cuda":
        return torch.float16
    if device_type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return torch.bfloat16
    return torch.float32


def device_of(model: nn.Module) -> torch.device:
    """Where the model's tensors are."""
    return next(itertools.chain(model.parameters(), model.buffers())).device


def pick_device(name: str | None = None) -> torch.device:
    """The device that a command line names; cuda where there is one if it names none. Raises ValueError if it cannot be used."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if name.split(":")[0] not in ("cpu", "cuda"):
            raise RuntimeError("not cpu or cuda")
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"device {name!r} cannot be used ({str(error).splitlines()[0]}): give cpu, or cuda or cuda:N where "
                         "there is a GPU") from error
    return device
