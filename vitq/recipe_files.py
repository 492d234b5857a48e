"""Where recipes are, how YAML is read, and what ``--set key=value`` means. Knows text and mappings only; :mod:`vitq.recipe` makes recipes of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vitq.recipe_checks import FIELD_CHECKS, FLOAT_BITS, LINEAR_ROLES, MATMUL_ROLES, OPERANDS, ROLES, check_type, closest, operands

TOP_LEVEL = ("block_gradient", "calib_size", "execution", "heads", "solver", "solver_options", "transform_options", "transforms")
KEYS = (
    "allowed: block_gradient or block_gradient.KEY, calib_size, execution, heads or heads.KEY, solver, solver_options, transform_options, transforms; ROLE.OPERAND.FIELD or ROLE.bits; OPERAND.FIELD (weight or input of every linear layer); bits=16; "
    "kv.bits or kv.symmetric (a language model's cache); "
    "name:PATTERN.OPERAND.FIELD or name:PATTERN.bits"
)


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice: YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise ValueError(f"line {key.start_mark.line + 1}: key {key.value!r} is given twice")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def recipe_files() -> dict[str, Path]:
    """Name -> file of each shipped recipe: the installed folder, else the one of the source tree."""
    here = Path(__file__).resolve().parent
    folder = here / "_recipes" if (here / "_recipes").is_dir() else here.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def read_recipe(path_or_name: str | Path) -> tuple[dict[str, Any], str]:
    """The mapping a recipe file holds, and the file's name for messages. A shipped name wins over a file of that name in the current folder."""
    shipped = recipe_files()
    path = shipped.get(str(path_or_name), Path(path_or_name))
    if not path.is_file():
        names = ", ".join(shipped) or "none found"
        raise ValueError(
            f"recipe {str(path_or_name)!r}: neither a file nor a shipped recipe; shipped: {names}{closest(str(path_or_name), shipped)}"
        )
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"recipe {path}: not readable as YAML: {error}") from error
    if not isinstance(data, Mapping):
        raise TypeError(f"recipe {path}: holds {type(data).__name__}; give a mapping of keys")
    return {"name": path.stem, **data}, str(path)


def parse_override(item: str) -> tuple[str, Any]:
    """What one ``key=value`` asks for: a top-level key and its value, or ``("rule", mapping)`` to append.

    - ``calib_size=64``, ``solver=rtn``, ``transforms=[]``; ``heads.least=4``: one key of `heads`
    - ``ROLE.weight.bits=4``; ``ROLE.bits=16`` sets every operand of the role
    - ``weight.bits=4``, ``input.observer=minmax``: every linear layer (patch embedding and head too), never the attention matmuls, whose operands
      have to be named (``qk.input.bits=4``); ``bits=16``: both operands of every linear layer
    - ``kv.bits=8``, ``kv.symmetric=false``: attention in floating point, keys and values quantized as they enter the cache
    - ``name:blocks.0.*.weight.bits=8``, ``name:blocks.0.*.bits=16``: every layer whose name matches, whatever its role, attention matmuls too
    """
    check_type(item, str, "override", "a string, key=value")
    key, equals, text = item.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ValueError("give key=value")
    try:
        value = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"value {text!r} is not YAML") from error
    if key in TOP_LEVEL or key.startswith(("heads.", "block_gradient.")):
        return key, value

    rule: dict[str, Any] = {}
    by_name = key.startswith("name:")
    if by_name:
        # the pattern itself has dots: the operand and the field are what the key ends in
        parts = key.removeprefix("name:").split(".")
        tail = parts[-2:] if len(parts) > 2 and parts[-2] in OPERANDS else parts[-1:]
        pattern = ".".join(parts[: len(parts) - len(tail)])
        if not pattern:
            raise ValueError(f"{key}: no layer name or no field; {KEYS}")
        rule["names"], present = [pattern], OPERANDS
    elif key in ("kv.bits", "kv.symmetric"):
        return "rule", {"roles": list(MATMUL_ROLES), "input": {"bits": FLOAT_BITS}, "other": {"dynamic": True, key.removeprefix("kv."): value}}
    else:
        tail = key.split(".")
        if tail[0] in ROLES:
            rule["roles"], present = [tail[0]], operands(tail[0])
            tail = tail[1:]
        else:
            rule["roles"], present = list(LINEAR_ROLES), ("weight", "input")
    if len(tail) == 2 and tail[0] in OPERANDS:
        rule[tail[0]] = {tail[1]: value}
    elif tail == ["bits"]:
        rule.update({operand: {"bits": value} for operand in present})
    else:
        if tail[-1] in FIELD_CHECKS and len(tail) == 1:
            raise ValueError(f"{key}: {tail[0]} belongs to an operand; give {key.removesuffix(tail[0])}{present[0]}.{tail[0]}; {KEYS}")
        known = [*TOP_LEVEL, *ROLES, *OPERANDS, *FIELD_CHECKS]
        wrong = next((part for part in tail if part not in known), key)
        raise ValueError(f"{key}: unknown key; {KEYS}{closest(wrong, known)}")
    return "rule", rule
