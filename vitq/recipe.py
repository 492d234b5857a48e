"""Recipes: how each layer of a model is quantized, as data. Frozen dataclasses <-> YAML, every key checked; no model and no torch needed.

A recipe is a list of rules over defaults. Rules merge field by field and later ones win. A rule that changes ``dynamic`` also resets the operand's
``granularity`` and ``symmetric`` to what suits the new value, unless it gives them itself. ``bits: 16`` leaves an operand in floating point.

An operand belongs to a role: linear layers have ``weight`` and ``input``; ``qk`` has ``input`` (q) and ``other`` (k); ``pv`` has ``input`` (the
softmax probabilities: unsigned, one scale a row, so that code 0 is probability 0) and ``other`` (v). With an ``input`` of 16 bits and a dynamic ``other``
the attention of a language model runs in floating point on keys or values that are quantized as they enter its cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from vitq import recipe_checks as checks
from vitq.recipe_checks import FLOAT_BITS, LINEAR_ROLES, MATMUL_ROLES, OPERANDS, ROLES, SCHEMA, operands
from vitq.recipe_files import parse_override, read_recipe, recipe_files

__all__ = ["FLOAT_BITS", "LINEAR_ROLES", "MATMUL_ROLES", "OPERANDS", "ROLES", "SCHEMA", "LayerSpec", "QuantSpec", "Recipe", "Rule", "default_spec",
           "operands", "recipes"]


@dataclass(frozen=True)
class QuantSpec:
    """How one operand is quantized. ``bits`` is 2..8, or 16 for floating point (the other fields then say nothing). ``segments``: of a weight,
    whether its input features are divided into ranges that have scales of their own, and how. ``levels``: of attention probabilities, uniform, or
    powers of √2 for simulation. ``group_size``: of a weight with granularity per_group, the input features of a group. ``outliers``: of a linear
    layer's input, how many features with the largest values stay in float16, at most the part ``outlier_limit`` of them all; none where no value
    exceeds ``outlier_threshold``. ``transform``: of a dynamic linear input, or of keys that enter a cache: the matrices that mix the numbers of a
    row before it is quantized, ``learned`` or ``hadamard``. ``observer: learned``: of a weight or a dynamic activation, how far ranges are clipped
    is learned too; ``clip_ratio``: of a dynamic activation, the part of each row's range that is kept."""

    bits: int = 8
    symmetric: bool = True
    granularity: str = "per_tensor"
    dynamic: bool = False
    observer: str = "mse"
    segments: str = "one"
    levels: str = "uniform"
    group_size: int = 128
    outliers: int = 0
    outlier_limit: float = 0.0625
    outlier_threshold: float = 0.0
    transform: str = "none"
    clip_ratio: float = 1.0

    def __post_init__(self) -> None:
        checks.check_fields({f.name: getattr(self, f.name) for f in fields(self)}, "QuantSpec")


@dataclass(frozen=True)
class LayerSpec:
    """What :meth:`Recipe.resolve` returns: the operands of one layer. Linear layers have no ``other``, attention matmuls no ``weight``."""

    weight: QuantSpec | None
    input: QuantSpec
    other: QuantSpec | None

    @property
    def is_float(self) -> bool:
        """True where the whole layer runs in floating point: its weight is left in 16 bits, or an operand of an attention matmul."""
        operands = (self.input, self.other) if self.weight is None else (self.weight,)
        return any(spec.bits == FLOAT_BITS for spec in operands)

    @property
    def cached(self) -> QuantSpec | None:
        """Of an attention matmul in floating point: how keys (of qk) or values (of pv) are quantized as they enter the cache, or None."""
        if self.weight is not None or self.input.bits != FLOAT_BITS or self.other.bits == FLOAT_BITS or not self.other.dynamic:
            return None
        return self.other

    @property
    def weight_only(self) -> bool:
        """Whether a quantized weight meets inputs in floating point."""
        return not self.is_float and self.weight is not None and self.input.bits == FLOAT_BITS

    @property
    def is_dynamic(self) -> bool:
        """Whether a quantized weight meets codes whose range is found at run time."""
        return self.weight is not None and not self.is_float and not self.weight_only and self.input.dynamic


@dataclass(frozen=True)
class Rule:
    """Fields to set for some layers: those of any of ``roles`` whose name matches any of ``names`` (fnmatch). Neither given: every layer."""

    roles: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    weight: Mapping[str, Any] = field(default_factory=dict)
    input: Mapping[str, Any] = field(default_factory=dict)
    other: Mapping[str, Any] = field(default_factory=dict)

    def check(self, key: str) -> None:
        """ValueError or TypeError, with ``key`` before the field's name, for what no recipe may say."""
        checks.check_rule(self.roles, self.names, {operand: getattr(self, operand) for operand in OPERANDS}, key)

    def matches(self, role: str, name: str | None) -> bool:
        """Whether the rule holds for a layer; ``name=None`` asks about any layer of the role, which a rule by name does not reach."""
        by_name = not self.names or (name is not None and any(fnmatchcase(name, pattern) for pattern in self.names))
        return by_name and (not self.roles or role in self.roles)

    def to_dict(self) -> dict[str, Any]:
        """The given keys only, as YAML has them."""
        data: dict[str, Any] = {key: list(getattr(self, key)) for key in ("roles", "names") if getattr(self, key)}
        data.update({key: dict(getattr(self, key)) for key in OPERANDS if getattr(self, key)})
        return data


@dataclass(frozen=True)
class Recipe:
    """A named way to quantize a model. Building one checks everything that can be known without the model; a mistake is a ValueError or TypeError
    that names the key (``rules[2].weight.bits``), what was given and what is allowed. ``execution: simulated`` allows what no integer kernel computes;
    `vitq.simulate` runs such a recipe, `vitq.convert` refuses it."""

    name: str
    description: str = ""
    schema: int = SCHEMA
    calib_size: int = 128
    transforms: tuple[str, ...] = ()
    transform_options: Mapping[str, Any] = field(default_factory=dict)
    solver: str = "rtn"
    solver_options: Mapping[str, Any] = field(default_factory=dict)
    execution: str = "integer"
    heads: Mapping[str, Any] = field(default_factory=dict)
    block_gradient: Mapping[str, Any] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        checks.check_header(self.name, self.description, self.schema, self.calib_size, self.transforms, self.transform_options, self.solver,
                            self.solver_options, self.execution)
        checks.check_heads(self.heads)
        checks.check_block_gradient(self.block_gradient)
        for i, rule in enumerate(checks.as_tuple(self.rules, "rules")):
            checks.check_type(rule, Rule, f"rules[{i}]", "a Rule (Recipe.from_dict takes plain mappings)")
            rule.check(f"rules[{i}]")
        for role in ROLES:
            self._resolve(role, None, self.rules)
        for i, rule in enumerate(self.rules):
            if rule.names:
                self._check_named(i, rule)
        self._check_learning()

    def _check_learning(self) -> None:
        layers = {role: self._resolve(role, None, self.rules) for role in ROLES}
        said = [(f"{role}.{operand}", getattr(layers[role], operand)) for role in ROLES for operand in operands(role)]
        learned = [f"{key}.{name}" for key, spec in said for name in ("transform", "observer")
                   if spec.bits != FLOAT_BITS and getattr(spec, name) == "learned"]
        learned += [f"rules[{i}].{operand}.{key}" for i, rule in enumerate(self.rules) if rule.names for operand in OPERANDS
                    for key in ("transform", "observer") if getattr(rule, operand).get(key) == "learned"]
        if learned and not self.block_gradient:
            raise ValueError(f"{learned[0]}: 'learned', and block_gradient is missing, which learns it: give block_gradient: {{epochs: 15}}")
        dynamic = any(layers[role].is_dynamic for role in LINEAR_ROLES)
        if self.block_gradient and not learned and not (self.block_gradient.get("diagonal", False) and dynamic):
            raise ValueError("block_gradient: nothing is to be learned; give transform: learned, observer: learned, or block_gradient.diagonal: true, with "
                             "inputs of dynamic: true")

    def _check_named(self, index: int, rule: Rule) -> None:
        # Which roles the pattern will meet is known only with the model; a rule that is wrong for all it could meet is a mistake now.
        given = {operand for operand in OPERANDS if getattr(rule, operand)}
        roles = [role for role in rule.roles or ROLES if given <= set(operands(role))]
        problem: ValueError | None = None
        for role in roles:
            try:
                self._resolve(role, None, self.rules[:index] + (replace(rule, names=()),))
                return
            except ValueError as error:
                problem = problem or error
        if problem is not None:
            raise problem

    def resolve(self, role: str, name: str | None = None) -> LayerSpec:
        """The operands of layer ``name`` with that role. ValueError where the rules that meet there do not go together."""
        checks.check_choice(role, ROLES, "role")
        return self._resolve(role, name, self.rules)

    def _resolve(self, role: str, name: str | None, rules: tuple[Rule, ...]) -> LayerSpec:
        specs: dict[str, QuantSpec | None] = dict.fromkeys(OPERANDS)
        sources: dict[tuple[str, str], str] = {}
        for operand in operands(role):
            spec = default_spec(role, operand)
            for i, rule in enumerate(rules):
                given = getattr(rule, operand)
                if given and rule.matches(role, name):
                    dynamic = given.get("dynamic", spec.dynamic)
                    if dynamic != spec.dynamic:
                        spec = replace(spec, symmetric=dynamic or default_spec(role, operand).symmetric,
                                       granularity="per_token" if dynamic else "per_tensor")
                    spec = replace(spec, **given)
                    sources.update({(operand, key): f"rules[{i}].{operand}.{key}" for key in given})
            specs[operand] = spec
        checks.check_layer(role if name is None else f"{name} ({role})", role, specs, sources, self.execution == "simulated")
        if "layernorm_fold" in self.transforms and specs["input"].outliers and not specs["input"].dynamic and specs["input"].bits != FLOAT_BITS:
            raise ValueError(f"{sources[('input', 'outliers')]}: {specs['input'].outliers} with the transform layernorm_fold, after which all "
                             "channels have one range; allowed: 0, or dynamic: true")
        return LayerSpec(**specs)

    @property
    def is_static(self) -> bool:
        """Whether statistics of activations are needed: some layer's have a static scale or outliers, or a transform looks at them. A rule by
        name counts as if its layers exist."""
        if self.transforms and self.transforms[0] != "layernorm_fold":
            return True
        named = [i for i, rule in enumerate(self.rules) if rule.names]
        for kept in [set(named), set()] + [{i} for i in named]:
            rules = tuple(replace(rule, names=()) for i, rule in enumerate(self.rules) if not rule.names or i in kept)
            for role in ROLES:
                try:
                    layer = self._resolve(role, None, rules)
                except ValueError:
                    continue  # rules by name that never meet on one layer
                if not layer.is_float and any(s is not None and s.bits != FLOAT_BITS and (not s.dynamic or s.outliers)
                                              for s in (layer.input, layer.other)):
                    return True
        return False

    @property
    def needs_data(self) -> bool:
        """Whether converting reads images: for statistics, for the solver, to learn from, or to choose heads."""
        return self.is_static or self.needs_inputs or self.learns or self.scores_heads

    @property
    def learns(self) -> bool:
        """Whether blocks are run again and again on calibration images, to learn transforms and ranges by gradients."""
        return bool(self.block_gradient)

    @property
    def scores_heads(self) -> bool:
        """Whether heads are chosen by what data say of them."""
        heads = self.heads
        return bool(heads) and "chosen" not in heads and heads.get("score", "contribution") != "random" and heads.get("least") != 0

    @property
    def needs_inputs(self) -> bool:
        """Whether the solver looks at the inputs of each layer, so that calibration images are read twice."""
        return self.solver != "rtn"

    @classmethod
    def from_yaml(cls, path_or_name: str | Path) -> Recipe:
        """Read a YAML file, or a shipped recipe by its name (see :func:`recipes`)."""
        data, source = read_recipe(path_or_name)
        try:
            return cls.from_dict(data)
        except (TypeError, ValueError) as error:
            raise type(error)(f"recipe {source}: {error}") from error

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Build from the mapping a YAML file holds; unknown keys are refused with the nearest known one."""
        checks.check_type(data, Mapping, "recipe", "a mapping of keys")
        # before the keys: a newer schema may well have keys unknown here
        checks.check_schema(data.get("schema", SCHEMA))
        checks.check_keys(data, [f.name for f in fields(cls)], "")
        if "name" not in data:
            raise ValueError("name: missing; give the recipe a name")
        values = dict(data)
        for key in ("transforms", "rules"):
            values[key] = checks.as_tuple(values.get(key, ()), key)
        values["rules"] = tuple(_rule(rule, f"rules[{i}]") for i, rule in enumerate(values["rules"]))
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and dicts; ``Recipe.from_dict(recipe.to_dict()) == recipe``."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**data, "transforms": list(self.transforms), "transform_options": dict(self.transform_options),
                "solver_options": dict(self.solver_options), "heads": self._heads_dict(), "block_gradient": dict(self.block_gradient),
                "rules": [rule.to_dict() for rule in self.rules]}

    def _heads_dict(self) -> dict[str, Any]:
        heads = dict(self.heads)
        if "chosen" in heads:
            heads["chosen"] = {name: list(units) for name, units in heads["chosen"].items()}
        return heads

    def to_yaml(self) -> str:
        """The recipe as YAML text."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)

    def with_overrides(self, overrides: Iterable[str]) -> Recipe:
        """A copy with ``key=value`` settings applied in order (``--set``); :func:`vitq.recipe_files.parse_override` lists the keys."""
        items = list(overrides)
        changes: dict[str, Any] = {}
        rules = self.rules
        for item in items:
            try:
                key, value = parse_override(item)
                if key == "rule":
                    where = f"rules[{len(rules)}]"
                    rules = (*rules, _rule(value, where))
                    rules[-1].check(where)
                elif key.startswith("heads."):
                    changes["heads"] = _with_head_key(changes.get("heads", self.heads), key.removeprefix("heads."), value)
                    replace(self, heads=changes["heads"])
                elif key.startswith("block_gradient."):
                    changes["block_gradient"] = {**changes.get("block_gradient", self.block_gradient), key.partition(".")[2]: value}
                    checks.check_block_gradient(changes["block_gradient"])
                else:
                    changes[key] = checks.as_tuple(value, key) if key == "transforms" else value
                    if not key.startswith(("solver", "transform", "block_gradient")):  # these and their options are checked together
                        replace(self, **{key: changes[key]})
            except (TypeError, ValueError) as error:
                raise type(error)(f"override {item!r}: {error}") from error
        for what, options in (("solver", "solver_options"), ("transforms", "transform_options")):
            if what in changes and changes[what] != getattr(self, what):
                changes.setdefault(options, {})  # those of another say nothing here
        try:
            # All at once: head.weight.bits=16 is complete only with head.input.bits=16.
            return replace(self, rules=rules, **changes)
        except (TypeError, ValueError) as error:
            raise type(error)(f"override {', '.join(map(repr, items))}: {error}") from error


def _rule(data: Any, key: str) -> Rule:
    checks.check_type(data, Mapping, key, "a mapping of roles, names, weight, input, other")
    checks.check_keys(data, [f.name for f in fields(Rule)], key)
    values = {name: checks.as_tuple(data[name], f"{key}.{name}") for name in ("roles", "names") if name in data}
    for operand in OPERANDS:
        if operand in data:
            checks.check_type(data[operand], Mapping, f"{key}.{operand}", "a mapping such as {bits: 8}")
            values[operand] = dict(data[operand])
    return Rule(**values)


def _with_head_key(heads: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The mapping with a key set; what would speak against it goes: a choice that was made, or the other way to say how many."""
    others = {"chosen", "least", "budget"} if key in ("least", "budget") else set() if key == "chosen" else {"chosen"}
    return {**{name: of for name, of in heads.items() if name not in others}, key: value}


def default_spec(role: str, operand: str) -> QuantSpec:
    """What an operand is before any rule: 8 bits, static (the probabilities of pv: dynamic)."""
    if operand == "weight":
        return QuantSpec(granularity="per_channel")
    if (role, operand) == ("pv", "input"):
        return QuantSpec(granularity="per_token", dynamic=True, observer="minmax")
    return QuantSpec(symmetric=role in MATMUL_ROLES)


def recipes() -> dict[str, str]:
    """Name -> description of each shipped recipe."""
    return {name: Recipe.from_yaml(path).description for name, path in recipe_files().items()}
