"""`python -m vitq.cuda`: what the CUDA backend would run on this machine, and what it lacks."""

from __future__ import annotations

import importlib.util
import sys

import torch

from vitq.cuda.kernels import KERNELS, why_unavailable


def report() -> str:
    lines = [
        "CUDA library: not built. This version has none to build, so the fallback kernels run:",
        *(f"  {op:<20} {kernel.name}" for op, kernel in KERNELS.items()),
        f"PyTorch:      {torch.__version__} (CUDA {torch.version.cuda or 'not built in'})",
        f"Triton:       {_triton()}",
        f"GPU:          {_gpu()}",
    ]
    reason = why_unavailable()
    lines.append("The fallback kernels can run here." if reason is None else
                 f"The fallback kernels cannot run here: {reason}. On a CUDA device the torch reference would run instead.")
    return "\n".join(lines)


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed; it comes with PyTorch's CUDA wheels, or with `pip install triton`"
    import triton

    return triton.__version__


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that PyTorch sees; this needs an NVIDIA GPU, its driver and a CUDA build of PyTorch"
    names = [f"{torch.cuda.get_device_name(i)} (sm_{''.join(map(str, torch.cuda.get_device_capability(i)))})"
             for i in range(torch.cuda.device_count())]
    return ", ".join(names)


if __name__ == "__main__":
    print(report())
    sys.exit(0)
