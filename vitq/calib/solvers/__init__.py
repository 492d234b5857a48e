"""Solvers choose the integer codes of a layer's weight. Each is a function registered here by its recipe name.

solver(Problem) -> Solution (`vitq.calib.solvers.problem`): weight, bias and the Gram matrix of the inputs in; codes, grid and bias out.
"""

from __future__ import annotations

from vitq.calib.solvers.dual_grain import dual_grain
from vitq.calib.solvers.erq import erq
from vitq.calib.solvers.gptq import gptq
from vitq.calib.solvers.rtn import rtn

SOLVERS = {"rtn": rtn, "gptq": gptq, "dual_grain": dual_grain, "erq": erq}
