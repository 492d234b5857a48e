"""Solvers choose the integer codes of a layer's weight. Each is a function registered here by its recipe name.

solver(weight [N, K] float32, spec) -> (codes int8 [N, K], scale float32 [N])
"""

from __future__ import annotations

from vitq.calib.solvers.rtn import rtn

SOLVERS = {"rtn": rtn}
