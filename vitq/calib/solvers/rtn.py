"""Round to nearest."""

from __future__ import annotations

from torch import Tensor

from vitq.quantizers.grid import WeightGrid
from vitq.quantizers.uniform import quantize


def rtn(weight: Tensor, grid: WeightGrid, bits: int) -> Tensor:
    """See `vitq.calib.solvers`."""
    return quantize(weight, grid.columns(), 0, bits)
