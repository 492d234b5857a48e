"""What compare_methods.py changes in a recipe for each method."""
from __future__ import annotations

_ONE = ["weight.segments=one"]
_DUAL = ["qkv.weight.segments=dual_uniform", "fc1.weight.segments=dual_uniform"]


def _erq(compensate: bool, rounding: str, columns: str = "sequence") -> list[str]:
    return ["solver=erq", f"solver_options={{compensate: {str(compensate).lower()}, rounding: {rounding}, columns: {columns}}}"]


# What a method changes in the recipe it is applied to.
METHODS: dict[str, list[str]] = {
    "recipe": [],
    "rtn": ["transforms=[]", "solver=rtn", "solver_options={}", *_ONE],
    "fold": ["solver=rtn", "solver_options={}", *_ONE],
    "fold+gptq": ["solver=gptq", "solver_options={}", *_ONE],
    # The parts of ERQ, each added to those before it.
    "fold+aqer": _erq(False, "nearest") + _ONE,
    "+dual": _erq(False, "nearest") + _DUAL,
    "+rounding": _erq(False, "descent") + _DUAL,
    "+compensation": _erq(True, "descent") + _DUAL,
    # ERQ's own order of columns, with its rule of rounding and with the exact one; all of it with one grid.
    "halves+gradient": _erq(True, "gradient", "halves") + _DUAL,
    "halves+descent": _erq(True, "descent", "halves") + _DUAL,
    "one segment": _erq(True, "descent") + _ONE,
    "scales per head": [f"{operand}.granularity=per_head" for operand in ("qk.input", "qk.other", "pv.other")],
    "asymmetric attention": [f"{operand}.symmetric=false" for operand in ("qk.input", "qk.other", "pv.other")],
    # Dual uniform weights in one more role each.
    "dual in proj": [*_DUAL, "proj.weight.segments=dual_uniform"],
    "dual in fc2": [*_DUAL, "fc2.weight.segments=dual_uniform"],
}
SETS = {"baselines": "rtn,fold,fold+gptq,recipe",
        "ablation": "rtn,fold,fold+aqer,+dual,+rounding,+compensation,halves+gradient,halves+descent,one segment,dual in proj,dual in fc2,"
                    "scales per head,asymmetric attention"}
