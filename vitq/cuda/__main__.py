"""`python -m vitq.cuda`: what the CUDA backend would run on this machine, and what it lacks."""

from __future__ import annotations

import importlib.util
import os
import sys

import torch

from vitq.cuda import fallback, loader, tuning
from vitq.ops.dispatch import registered

OPS = ("linear", "attention", "layer_norm_quantize", "quantize", "gated_quantize", "quantize_patches", "layer_norm")


def report() -> str:
    why = loader.why_unavailable()
    lines = [f"CUDA library: {_library()}", f"GPU:          {_gpu()}", f"Driver:       {_driver()}",
             f"PyTorch:      {torch.__version__} (CUDA {torch.version.cuda or 'not built in'})", f"Triton:       {_triton()}"]
    if forced := os.environ.get("VITQ_FORCE_ARCH"):
        lines.append(f"VITQ_FORCE_ARCH={forced}: " + (f"GEMMs of sm_{forced}" if forced in ("80", "90") else
                                                      "no such GEMMs, every one will be refused; it may be 80 or 90"))
    if why is None:
        try:
            lines += ["What runs:", *_kernels(0)]
        except ValueError as error:
            return "\n".join([*lines, f"  nothing: {error}"])
        lines.append(f"Tile choices: {len(tuning.cached(torch.cuda.current_device()))} measured here ({tuning.cache_folder()}), "
                     f"{len(tuning.shipped(torch.cuda.get_device_name()))} shipped for this GPU; the rest is estimated")
        return "\n".join(lines)
    lines += [f"The library's kernels do not run here: {why}", "What runs in their place:", *_kernels(-1)]
    if reason := fallback.why_unavailable():
        lines.append(f"Nor can those: {reason}. On a CUDA device the torch reference would run.")
    return "\n".join(lines)


def _library() -> str:
    try:
        return f"{loader.path()} ({loader.built_for()})"
    except RuntimeError:
        return "none"


def _kernels(which: int) -> list[str]:
    """The first choice for each op, or with -1 the last."""
    lines = []
    for op in OPS:
        names = [kernel.name for backend, kernel in registered(op) if backend == "cuda"]
        fallback_names = names[1:] or ["torch"]
        lines.append(f"  {op:<20} {names[0] if which == 0 else fallback_names[-1]}")
    return lines


def _driver() -> str:
    try:
        version = loader.library().vitq_driver_version()
    except RuntimeError:
        return "loaded" if torch.cuda.is_available() else "unknown: only the library asks for it"
    return f"runs CUDA up to {version // 1000}.{version % 1000 // 10}" if version else "none"


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed; it comes with PyTorch's CUDA wheels, or with `pip install triton`"
    import triton

    return triton.__version__


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that PyTorch sees; this needs an NVIDIA GPU, its driver and a CUDA build of PyTorch"
    names = [f"{torch.cuda.get_device_name(i)} (sm_{loader.capability(i)})" for i in range(torch.cuda.device_count())]
    return ", ".join(names)


if __name__ == "__main__":
    print(report())
    sys.exit(0)
