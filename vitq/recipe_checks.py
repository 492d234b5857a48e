"""What a recipe may hold, and the checks behind :mod:`vitq.recipe`. Each message names the key, what was given and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

SCHEMA = 1
ROLES = ("patch_embed", "qkv", "proj", "fc1", "fc2", "reduction", "head", "qk", "pv", "pool")
MATMUL_ROLES = ("qk", "pv")
LINEAR_ROLES = tuple(role for role in ROLES if role not in MATMUL_ROLES)
OPERANDS = ("weight", "input", "other")
FLOAT_BITS = 16
# What `transform_options` may hold for each transform: a number between these.
TRANSFORM_OPTIONS: dict[str, dict[str, tuple[float, float]]] = {
    "layernorm_fold": {},
    "smoothquant": {"alpha": (0.0, 1.0)},
    "clip_outliers": {"top": (0.0, 0.5)},
}
TRANSFORMS = tuple(TRANSFORM_OPTIONS)
# What `solver_options` may hold for each solver: a positive number, true or false, or one of these words.
SOLVER_OPTIONS: dict[str, dict[str, Any]] = {
    "rtn": {},
    "gptq": {"damping": float, "act_order": bool},
    "dual_grain": {"rounding": ("nearest", "sequence"), "damping": float},
    "erq": {"input_ridge": float, "weight_ridge": float, "absolute_ridge": bool, "reduce_inputs": bool, "compensate": bool,
            "columns": ("sequence", "halves"), "rounding": ("nearest", "gradient", "descent")},
}
SOLVERS = tuple(SOLVER_OPTIONS)
HEAD_SCORES = ("l1", "contribution", "sensitivity", "random")
HEADS_KEYS = ("score", "least", "budget", "cascade", "seed", "chosen")
GRANULARITIES = ("per_tensor", "per_channel", "per_token", "per_head", "per_group")
OBSERVERS = ("minmax", "percentile", "mse", "learned")
ONLINE_TRANSFORMS = ("none", "learned", "hadamard")
# What `block_gradient` may hold: a number between these, true or false, or one of these words.
BLOCK_GRADIENT: dict[str, Any] = {
    "epochs": (int, 1, 10_000), "batch_size": (int, 1, 1 << 20), "learning_rate": (float, 0.0, 10.0), "diagonal": bool, "matrices": ("svd", "direct"),
    "warmup": (int, 0, 1 << 20), "mixed_precision": bool, "seed": (int, 0, 1 << 62),
}
SEGMENTS = ("one", "dual_uniform")
LEVELS = ("uniform", "log_sqrt2")
EXECUTIONS = ("integer", "simulated")


def operands(role: str) -> tuple[str, str]:
    """The operands a role has: weight and input, or input and other for the attention matmuls."""
    return ("input", "other") if role in MATMUL_ROLES else ("weight", "input")


def check_type(value: Any, kind: type | tuple[type, ...], key: str, allowed: str) -> None:
    # bool is an int in Python, never in a recipe
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        raise TypeError(f"{key}: {value!r} is {type(value).__name__}; give {allowed}")


def check_choice(value: Any, choices: Iterable[str], key: str) -> None:
    choices = list(choices)
    check_type(value, str, key, f"one of {', '.join(choices)}")
    if value not in choices:
        raise ValueError(f"{key}: {value!r} is not known; allowed: {', '.join(choices)}{closest(value, choices)}")


def closest(value: str, choices: Iterable[str]) -> str:
    near = difflib.get_close_matches(value, list(choices), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def check_keys(data: Mapping[Any, Any], known: Iterable[str], key: str) -> None:
    known = list(known)
    for name in data:
        if name not in known:
            where = f"{key}.{name}" if key else str(name)
            raise ValueError(f"{where}: unknown key; allowed: {', '.join(known)}{closest(str(name), known)}")


def check_schema(schema: Any) -> None:
    check_type(schema, int, "schema", f"an integer up to {SCHEMA}")
    if not 1 <= schema <= SCHEMA:
        raise ValueError(f"schema: {schema}; this vitq knows 1 to {SCHEMA}: a newer recipe needs a newer vitq")


def as_tuple(value: Any, key: str) -> tuple[Any, ...]:
    check_type(value, (list, tuple), key, "a list")
    return tuple(value)


def _check_bits(value: Any, key: str) -> None:
    check_type(value, int, key, "an integer, 2 to 8, or 16 for floating point")
    if not 2 <= value <= 8 and value != FLOAT_BITS:
        raise ValueError(f"{key}: {value}; allowed: 2 to 8, or 16 (left in floating point)")


def _check_group_size(value: Any, key: str) -> None:
    check_type(value, int, key, "a multiple of 32")
    if value < 32 or value % 32:
        raise ValueError(f"{key}: {value}; allowed: multiples of 32, the steps of the kernels")


def _check_outliers(value: Any, key: str) -> None:
    check_type(value, int, key, "a number of features, 0 for none")
    if value < 0:
        raise ValueError(f"{key}: {value}; allowed: 0 (none) or more features")


def _check_number(least: float, most: float) -> Callable[[Any, str], None]:
    def check(value: Any, key: str) -> None:
        check_type(value, (int, float), key, "a number")
        if isinstance(value, bool) or not least <= value <= most:
            raise ValueError(f"{key}: {value!r}; allowed: {least:g} to {most:g}")

    return check


FIELD_CHECKS: dict[str, Callable[[Any, str], None]] = {
    "bits": _check_bits,
    "symmetric": lambda value, key: check_type(value, bool, key, "true or false"),
    "granularity": lambda value, key: check_choice(value, GRANULARITIES, key),
    "dynamic": lambda value, key: check_type(value, bool, key, "true or false"),
    "observer": lambda value, key: check_choice(value, OBSERVERS, key),
    "segments": lambda value, key: check_choice(value, SEGMENTS, key),
    "group_size": _check_group_size,
    "outliers": _check_outliers,
    "outlier_limit": _check_number(0.0, 0.5),
    "outlier_threshold": _check_number(0.0, 1e30),
    "levels": lambda value, key: check_choice(value, LEVELS, key),
    "transform": lambda value, key: check_choice(value, ONLINE_TRANSFORMS, key),
    "clip_ratio": _check_number(0.1, 1.0),
}


def check_fields(given: Any, key: str) -> None:
    """``given``: the fields one rule sets for one operand."""
    check_type(given, Mapping, key, f"a mapping of {', '.join(FIELD_CHECKS)}")
    check_keys(given, FIELD_CHECKS, key)
    for name, value in given.items():
        FIELD_CHECKS[name](value, f"{key}.{name}")


def check_header(name: Any, description: Any, schema: Any, calib_size: Any, transforms: Any, transform_options: Any, solver: Any,
                 solver_options: Any, execution: Any) -> None:
    """The top-level keys of a recipe but its rules."""
    check_choice(execution, EXECUTIONS, "execution")
    check_type(name, str, "name", "a string")
    if not name:
        raise ValueError("name: empty; give the recipe a name")
    check_type(description, str, "description", "a string")
    check_schema(schema)
    check_type(calib_size, int, "calib_size", "an integer, at least 1")
    if calib_size < 1:
        raise ValueError(f"calib_size: {calib_size}; allowed: 1 or more samples")
    for i, transform in enumerate(as_tuple(transforms, "transforms")):
        check_choice(transform, TRANSFORMS, f"transforms[{i}]")
    if len(set(transforms)) != len(transforms):
        raise ValueError(f"transforms: {', '.join(transforms)}; give each one once")
    if len(transforms) > 1:
        raise ValueError(f"transforms: {', '.join(transforms)}; each of them scales the same channels, so give one")
    allowed = {key: limits for transform in transforms for key, limits in TRANSFORM_OPTIONS[transform].items()}
    check_type(transform_options, Mapping, "transform_options", f"a mapping of {', '.join(allowed) or 'nothing'}")
    check_keys(transform_options, allowed, "transform_options")
    for key, value in transform_options.items():
        low, high = allowed[key]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise ValueError(f"transform_options.{key}: {value!r}; allowed: {low:g} to {high:g}")
    check_choice(solver, SOLVERS, "solver")
    check_type(solver_options, Mapping, "solver_options", f"a mapping of {', '.join(SOLVER_OPTIONS[solver]) or 'nothing'}")
    check_keys(solver_options, SOLVER_OPTIONS[solver], "solver_options")
    for key, value in solver_options.items():
        kind, where = SOLVER_OPTIONS[solver][key], f"solver_options.{key}"
        if isinstance(kind, tuple):
            check_choice(value, kind, where)
        elif kind is bool:
            check_type(value, bool, where, "true or false")
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            hint = " (YAML takes 1e3 for text: write 1000 or 1.0e+3)" if isinstance(value, str) else ""
            raise ValueError(f"{where}: {value!r}; allowed: a number above 0{hint}")
    if solver_options.get("rounding") == "gradient" and solver_options.get("columns", "sequence") != "halves":
        raise ValueError("solver_options.rounding: 'gradient' goes with columns: halves; with sequence: descent, nearest")


def check_heads(heads: Any) -> None:
    """The key ``heads``: an empty mapping where attentions stay whole."""
    check_type(heads, Mapping, "heads", f"a mapping of {', '.join(HEADS_KEYS)}")
    check_keys(heads, HEADS_KEYS, "heads")
    if not heads:
        return
    check_choice(heads.get("score", "contribution"), HEAD_SCORES, "heads.score")
    if "least" in heads:
        least = heads["least"]
        check_type(least, (int, float), "heads.least", "a number of query heads a layer, or a part of them (0.5)")
        if isinstance(least, bool) or least < 0 or isinstance(least, float) and not least <= 1:
            raise ValueError(f"heads.least: {least!r}; allowed: an integer from 0 on, a number of query heads a layer; or a part of them, 0.0 to 1.0")
    if "budget" in heads:
        check_type(heads["budget"], (int, float), "heads.budget", "an average of bits")
        if isinstance(heads["budget"], bool) or not 2 <= heads["budget"] <= FLOAT_BITS:
            raise ValueError(f"heads.budget: {heads['budget']!r}; allowed: 2 to {FLOAT_BITS}, the average bits of the weights of q, k, v and o")
        if "least" in heads:
            raise ValueError(f"heads.budget: {heads['budget']!r} with least: {heads['least']!r}; give one of the two")
    check_type(heads.get("cascade", False), bool, "heads.cascade", "true or false")
    check_type(heads.get("seed", 0), int, "heads.seed", "an integer")
    if "chosen" in heads:
        check_type(heads["chosen"], Mapping, "heads.chosen", "a mapping such as {blocks.0.attn: [1, 4]}")
        for name, units in heads["chosen"].items():
            check_type(name, str, "heads.chosen", "names of attentions")
            for unit in as_tuple(units, f"heads.chosen.{name}"):
                check_type(unit, int, f"heads.chosen.{name}", "integers, the places of heads")
            if len(set(units)) != len(units):
                raise ValueError(f"heads.chosen.{name}: {list(units)}; give each head once")
    elif "least" not in heads and "budget" not in heads:
        raise ValueError("heads: how many is missing; give least, budget or chosen")


def check_block_gradient(given: Any) -> None:
    """The key ``block_gradient``: an empty mapping where nothing is learned by gradients."""
    check_type(given, Mapping, "block_gradient", f"a mapping of {', '.join(BLOCK_GRADIENT)}")
    check_keys(given, BLOCK_GRADIENT, "block_gradient")
    for key, value in given.items():
        kind, where = BLOCK_GRADIENT[key], f"block_gradient.{key}"
        if kind is bool:
            check_type(value, bool, where, "true or false")
        elif isinstance(kind[0], str):
            check_choice(value, kind, where)
        else:
            number, least, most = kind
            hint = " (YAML takes 1e-3 for text: write 0.001 or 1.0e-3)" if isinstance(value, str) and number is float else ""
            check_type(value, number if number is int else (int, float), where, "an integer" if number is int else f"a number{hint}")
            if isinstance(value, bool) or not least <= value <= most or number is float and value == 0:
                raise ValueError(f"{where}: {value!r}; allowed: {'above ' if number is float else ''}{least:g} to {most:g}")


def check_rule(roles: tuple[Any, ...], names: tuple[Any, ...], given: Mapping[str, Any], key: str) -> None:
    """One rule: ``given`` maps each operand to the fields it sets (an operand without any is an empty mapping)."""
    for i, role in enumerate(roles):
        check_choice(role, ROLES, f"{key}.roles[{i}]")
    for i, name in enumerate(names):
        check_type(name, str, f"{key}.names[{i}]", "a layer name or a pattern such as 'blocks.0.*'")
        if not name:
            raise ValueError(f"{key}.names[{i}]: empty; give a layer name or a pattern such as 'blocks.0.*'")
    for operand in OPERANDS:
        check_fields(given[operand], f"{key}.{operand}")
        for role in roles:
            if given[operand] and operand not in operands(role):
                raise ValueError(f"{key}.{operand}: {role} has no such operand; it has {' and '.join(operands(role))}")
    if not any(given[operand] for operand in OPERANDS):
        raise ValueError(f"{key}: sets nothing; give at least one of {', '.join(OPERANDS)}")


def check_layer(layer: str, role: str, specs: Mapping[str, Any], sources: Mapping[tuple[str, str], str], simulated: bool = False) -> None:
    """The merged operands of one layer. ``sources`` says which key gave a field: (operand, field) -> 'rules[2].weight.bits'. ``simulated``:
    what no integer kernel computes is allowed too."""

    def refuse(operand: str, name: str, allowed: str) -> NoReturn:
        where = sources.get((operand, name), f"{role}.{operand}.{name}")
        value = getattr(specs[operand], name)
        given = str(value).lower() if isinstance(value, bool) else repr(value)
        raise ValueError(f"{where}: {given} for the {operand} of {layer}; {allowed}")

    for operand in operands(role):
        spec = specs[operand]
        if spec.bits == FLOAT_BITS:
            continue
        if spec.transform != "none" and not (operand == "input" and role not in (*MATMUL_ROLES, "patch_embed") or (role, operand) == ("qk", "other")):
            refuse(operand, "transform", "what mixes the numbers of a row is for the input of a linear layer, or for keys (qk.other) that enter a "
                   "cache: none")
        if spec.transform != "none" and (not spec.dynamic or spec.outliers):
            refuse(operand, "transform", "codes of transformed rows have scales found at run time, and features that stay in float16 would lose "
                   "their columns: with dynamic: true and outliers: 0, or none")
        if spec.clip_ratio != 1.0 and (not spec.dynamic or spec.observer == "learned" or (role, operand) == ("pv", "input")):
            refuse(operand, "clip_ratio", "a part of each row's range is kept of dynamic activations, where it is not learned: 1.0")
        if spec.observer == "learned" and operand != "weight" and not spec.dynamic:
            refuse(operand, "observer", f"what is clipped of a row's range is learned for dynamic activations: dynamic: true, or "
                   f"{', '.join(OBSERVERS[:-1])}")
        if spec.outliers and (operand != "input" or role in MATMUL_ROLES or role == "patch_embed"):
            refuse(operand, "outliers", "features in float16 are those of a linear layer's input; 0")
        if operand == "weight":
            if spec.dynamic:
                refuse(operand, "dynamic", "weights are static: false")
            if spec.granularity in ("per_token", "per_head"):
                refuse(operand, "granularity", "allowed for weights: per_channel, per_tensor, per_group")
            weight_only = specs["input"].bits == FLOAT_BITS
            if not spec.symmetric and spec.bits > 4 and not simulated and not weight_only:
                refuse(operand, "symmetric", "allowed for weights of more than 4 bits: true (code less zero point would not be an int8); "
                       "false with execution: simulated, or with an input of 16 bits")
            if spec.levels != "uniform":
                refuse(operand, "levels", "allowed for weights: uniform")
            if spec.observer == "learned" and (not spec.symmetric or spec.granularity != "per_channel" or spec.segments != "one" or role == "patch_embed"):
                refuse(operand, "observer", "learned is one symmetric range for each output of a linear layer: with symmetric: true, granularity: "
                       "per_channel, segments: one")
            if spec.observer == "learned" and (weight_only or not specs["input"].dynamic):
                refuse(operand, "observer", "ranges of weights are learned with those of dynamic inputs: with input.dynamic: true and fewer than 16 bits, or "
                       f"{', '.join(OBSERVERS[:-1])}")
            if spec.segments != "one" and specs["input"].transform != "none":
                refuse(operand, "segments", "a transform mixes input features, so no column is an outlier's: one, or input.transform: none")
            if spec.segments != "one" and role == "patch_embed":
                refuse(operand, "segments", "pixels are quantized in their order: one")
            if spec.segments != "one" and weight_only:
                refuse(operand, "segments", "an input in floating point needs no accumulators of its own; one, with granularity: per_group")
            if spec.granularity == "per_group" and spec.segments != "one":
                refuse(operand, "segments", "columns are divided one way; with granularity per_group: one")
            if spec.granularity == "per_group" and spec.bits > 4 and not weight_only:
                refuse(operand, "granularity", "a code of more than 4 bits times the multiplier of its group would not be an int8; "
                       "per_channel, or an input of 16 bits")
            continue
        if spec.segments != "one":
            refuse(operand, "segments", "it divides the columns of a weight; allowed for activations: one")
        if spec.levels == "log_sqrt2":
            if (role, operand) != ("pv", "input"):
                refuse(operand, "levels", "for attention probabilities (pv.input) alone; allowed: uniform")
            if spec.dynamic or spec.granularity != "per_tensor":
                refuse(operand, "levels", "its scale is static, one a tensor: add dynamic: false, granularity: per_tensor")
            if not simulated:
                refuse(operand, "levels", "no integer product multiplies such codes: uniform, or execution: simulated for the whole recipe")
            continue
        if operand == "other" and spec.dynamic and specs["input"].bits == FLOAT_BITS:  # quantized as they enter a cache
            if spec.granularity != "per_token":
                refuse(operand, "granularity", "keys and values of a cache have one scale for each token and head: per_token")
            continue
        if (role, operand) == ("pv", "input") and not spec.dynamic:
            refuse(operand, "dynamic", "attention probabilities have one dynamic scale a row: true (roles: [...] limits a rule to other layers)")
        if (role, operand) == ("pv", "other") and spec.dynamic:
            refuse(operand, "dynamic", "the tokens of v are summed over, so one scale a token cannot be applied: false; true "
                   "with an input of 16 bits, in a cache")
        if role == "qk" and spec.dynamic:
            refuse(operand, "dynamic", "q and k have static scales: false; true for other (k) with an input of 16 bits, in a cache")
        wanted = ("per_token",) if spec.dynamic else ("per_tensor", "per_head") if role in MATMUL_ROLES else ("per_tensor",)
        if spec.granularity not in wanted:
            what = "dynamic activations" if spec.dynamic else "q, k and v" if role in MATMUL_ROLES else "static activations"
            refuse(operand, "granularity", f"allowed for {what}: {', '.join(wanted)}" + ("" if spec.dynamic else " (per_token needs dynamic: true)"))
        if not spec.symmetric and spec.dynamic and role in MATMUL_ROLES:
            refuse(operand, "symmetric", "allowed for dynamic q, k, v and probabilities: true")
    if role in MATMUL_ROLES:
        return
    if specs["weight"].bits == FLOAT_BITS and specs["input"].bits != FLOAT_BITS:
        refuse("weight", "bits", f"its input has {specs['input'].bits}: integers are multiplied by integers; give the weight 2 to 8, or both 16")
    if specs["input"].bits == FLOAT_BITS and specs["weight"].bits != FLOAT_BITS and role == "patch_embed":
        refuse("input", "bits", f"its weight has {specs['weight'].bits}, and a patch embedding runs in integers or in float; give both 16, or both 2 to 8")
