"""The GELU polynomials of csrc/epilogue.cuh, evaluated in float32 as the kernels do, against the exact functions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import vitq.cuda

SOURCE = (Path(vitq.cuda.__file__).parent / "csrc" / "epilogue.cuh").read_text(encoding="utf-8")


def fma(a: torch.Tensor, b: torch.Tensor, c: float | torch.Tensor) -> torch.Tensor:
    return (a.double() * b.double() + c).float()


def gelu(y: torch.Tensor, name: str) -> torch.Tensor:
    """As `gelu_of_units` of the source computes it, with the source's own coefficients."""
    numbers = re.search(rf"float {name}_\[8\] = {{(.*?)}}", SOURCE)[1]
    q = [torch.tensor(float(x.rstrip("f"))) for x in numbers.split(", ")]
    unit = float(re.search(r"GELU_UNIT = ([\d.]+)f", SOURCE)[1])
    v = y * torch.tensor(1 / unit)
    u = (v * v).clamp(0, 1)
    r = q[7].expand_as(u)
    for c in reversed(q[:7]):
        r = fma(r, u, c.double())
    return v * fma(v, r, 0.5).clamp(0, 1) * unit


@pytest.mark.parametrize("name, approximate", [("erf", "none"), ("tanh", "tanh")])
@pytest.mark.parametrize("width", [0.02, 0.1, 0.3, 0.6, 1.0, 1.5, 3.0, 10.0])
def test_few_codes_differ_whatever_the_width_of_the_input(name: str, approximate: str, width: float) -> None:
    y = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * width
    exact = F.gelu(y.double(), approximate=approximate)
    scale = (exact.max() - exact.min()) / 255
    codes, expected = torch.round(gelu(y, name).double() / scale), torch.round(exact / scale)
    assert (codes - expected).abs().max() <= 1
    assert (codes != expected).double().mean() <= 2.5e-4


@pytest.mark.parametrize("name, approximate", [("erf", "none"), ("tanh", "tanh")])
def test_error_and_tails(name: str, approximate: str) -> None:
    y = torch.linspace(-50, 50, 2_000_001)
    error = (gelu(y, name).double() - F.gelu(y.double(), approximate=approximate)).abs()
    inside = y.abs() <= 3.5
    assert (error[inside] / y[inside].abs().clamp(min=1e-3)).max() < 1e-5
    assert (error / y.abs().clamp(min=1e-3)).max() < 1.7e-4
    assert (gelu(y, name)[y > 4] - y[y > 4]).abs().max() <= 4e-6 and (gelu(y, name)[y < -4] == 0).all()
