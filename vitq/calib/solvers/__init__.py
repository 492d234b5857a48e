"""Solvers choose the integer codes of a layer's weight. Each is a function registered here by its recipe name.

solver(weight [N, K] float32, grid, bits) -> codes int8 [N, K]

grid: the scales, chosen before (`vitq.quantizers.grid`).
"""

from __future__ import annotations

from vitq.calib.solvers.rtn import rtn

SOLVERS = {"rtn": rtn}
