"""Recipes: what ships, how rules merge, what overrides mean, and what the validator says."""

import re
import subprocess
import sys

import pytest

from vitq.recipe import LINEAR_ROLES, ROLES, LayerSpec, QuantSpec, Recipe, Rule, recipes

SHIPPED = ["w4a4", "w4a8", "w8a8", "w8a8-dynamic"]


def make(*rules, **top):
    return Recipe.from_dict({"name": "mine", "rules": list(rules), **top})


def bits(recipe, role, name=None):
    layer = recipe.resolve(role, name)
    return tuple(spec.bits for spec in (layer.weight, layer.input, layer.other) if spec is not None)


# --- what ships -------------------------------------------------------------------------------------------------------------------------------------


def test_shipped_names_and_descriptions():
    found = recipes()
    assert set(SHIPPED) <= set(found)
    assert all(len(text) > 50 and "\n" not in text for text in found.values())


@pytest.mark.parametrize("name", recipes())
def test_round_trip(name, tmp_path):
    recipe = Recipe.from_yaml(name)
    assert recipe.name == name
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    path = tmp_path / "copy.yaml"
    path.write_text(recipe.to_yaml())
    assert Recipe.from_yaml(path) == recipe == Recipe.from_yaml(str(path))
    for role in ROLES:
        layer = recipe.resolve(role, f"blocks.0.{role}")
        assert (layer.weight is None, layer.other is None) == (role in ("qk", "pv"), role not in ("qk", "pv"))


@pytest.mark.parametrize(("name", "static", "formats"), [
    ("w8a8-dynamic", False, {"patch_embed": (16, 16), "qkv": (8, 8), "head": (8, 8), "qk": (16, 16), "pv": (16, 16)}),
    ("w8a8", True, {"patch_embed": (8, 8), "qkv": (8, 8), "head": (8, 8), "qk": (8, 8), "pv": (8, 8)}),
    ("w4a8", True, {"patch_embed": (8, 8), "qkv": (4, 8), "fc2": (4, 8), "reduction": (4, 8), "head": (8, 8), "qk": (8, 8), "pv": (8, 8)}),
    ("w4a4", True, {"patch_embed": (8, 8), "qkv": (4, 4), "fc2": (4, 4), "head": (8, 8), "qk": (4, 4), "pv": (8, 4)}),
])
def test_shipped_formats(name, static, formats):
    recipe = Recipe.from_yaml(name)
    assert recipe.is_static is static
    assert {role: bits(recipe, role) for role in formats} == formats
    assert recipe.transforms == (("layernorm_fold",) if static else ())
    assert recipe.resolve("qkv").input.dynamic is not static
    assert recipe.resolve("pv").input.dynamic


def test_needs_no_torch():
    code = "import sys, vitq.recipe; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# --- merging ----------------------------------------------------------------------------------------------------------------------------------------


def test_defaults():
    recipe = Recipe("plain")
    assert recipe.resolve("qkv") == LayerSpec(QuantSpec(granularity="per_channel"), QuantSpec(symmetric=False), None)
    assert recipe.resolve("qk") == LayerSpec(None, QuantSpec(), QuantSpec())
    assert recipe.resolve("pv").input == QuantSpec(granularity="per_token", dynamic=True, observer="minmax")
    assert recipe.calib_size == 128 and recipe.solver == "rtn"


def test_later_rules_win_field_by_field():
    recipe = make({"weight": {"bits": 4, "observer": "percentile"}}, {"roles": ["qkv"], "weight": {"bits": 6}}, {"names": ["blocks.1.*"], "weight": {"bits": 3}})
    assert (recipe.resolve("qkv").weight.bits, recipe.resolve("qkv").weight.observer) == (6, "percentile")
    assert recipe.resolve("qkv", "blocks.1.attn.qkv").weight.bits == 3
    assert recipe.resolve("qkv", "blocks.10.attn.qkv").weight.bits == 6
    assert recipe.resolve("fc1").weight.bits == 4


def test_roles_and_names_both_have_to_match():
    recipe = make({"roles": ["fc1", "fc2"], "names": ["blocks.0.*", "*.11.*"], "weight": {"bits": 2}})
    assert bits(recipe, "fc1", "blocks.0.mlp.fc1") == bits(recipe, "fc2", "blocks.11.mlp.fc2") == (2, 8)
    assert bits(recipe, "proj", "blocks.0.attn.proj") == bits(recipe, "fc1", "blocks.5.mlp.fc1") == (8, 8)


def test_dynamic_brings_what_goes_with_it():
    recipe = make({"roles": ["qkv"], "input": {"dynamic": True}}, {"roles": ["fc1"], "input": {"dynamic": True}}, {"roles": ["fc1"], "input": {"dynamic": False}})
    assert recipe.resolve("qkv").input == QuantSpec(symmetric=True, granularity="per_token", dynamic=True)
    assert recipe.resolve("fc1").input == QuantSpec(symmetric=False)


def test_is_float_and_is_static():
    dynamic = {"roles": list(LINEAR_ROLES), "input": {"dynamic": True}}
    attention = {"roles": ["qk", "pv"], "input": {"bits": 16}}
    assert not make(dynamic, attention).is_static
    assert make(dynamic, attention).resolve("qk").is_float and not make(dynamic, attention).resolve("qkv").is_float
    assert make(dynamic).is_static and make(attention).is_static
    assert make(dynamic, attention, {"names": ["blocks.0.mlp.*"], "input": {"dynamic": False}}).is_static
    assert not make(dynamic, attention, {"names": ["*"], "weight": {"bits": 16}, "input": {"bits": 16}}).is_static


# --- overrides --------------------------------------------------------------------------------------------------------------------------------------


def test_top_level_overrides():
    recipe = Recipe.from_yaml("w8a8")
    changed = recipe.with_overrides(["calib_size=64", "transforms=[]", "solver=rtn"])
    assert (changed.calib_size, changed.transforms, changed.rules) == (64, (), recipe.rules)
    assert recipe.calib_size == 128 and recipe.with_overrides([]) == recipe
    assert recipe.with_overrides(["transforms=[layernorm_fold]"]) == recipe


@pytest.mark.parametrize(("item", "expected"), [
    ("qkv.weight.bits=4", {"qkv": (4, 8), "fc1": (8, 8)}),
    ("head.bits=16", {"head": (16, 16), "fc1": (8, 8)}),
    ("pv.bits=16", {"pv": (16, 16), "qk": (8, 8)}),
    ("weight.bits=4", {"qkv": (4, 8), "head": (4, 8), "patch_embed": (4, 8), "qk": (8, 8), "pv": (8, 8)}),
    ("input.bits=6", {"qkv": (8, 6), "head": (8, 6), "qk": (8, 8), "pv": (8, 8)}),
    ("bits=16", {"qkv": (16, 16), "qk": (8, 8)}),
    ("pv.other.bits=4", {"pv": (8, 4)}),
])
def test_role_and_operand_overrides(item, expected):
    recipe = Recipe.from_yaml("w8a8").with_overrides([item])
    assert {role: bits(recipe, role) for role in expected} == expected
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_name_overrides():
    recipe = Recipe.from_yaml("w8a8").with_overrides(["name:blocks.0.*.bits=16", "name:blocks.1.attn.qkv.weight.bits=4"])
    assert bits(recipe, "qkv", "blocks.0.attn.qkv") == bits(recipe, "qk", "blocks.0.attn.qk") == (16, 16)
    assert bits(recipe, "qkv", "blocks.1.attn.qkv") == (4, 8)
    assert bits(recipe, "fc1", "blocks.1.mlp.fc1") == (8, 8)
    assert recipe.rules[-1] == Rule(names=("blocks.1.attn.qkv",), weight={"bits": 4})


def test_overrides_in_order_and_as_one():
    recipe = Recipe.from_yaml("w8a8")
    assert bits(recipe.with_overrides(["qkv.weight.bits=4", "qkv.weight.bits=5"]), "qkv") == (5, 8)
    # neither half is a recipe by itself
    assert bits(recipe.with_overrides(["head.weight.bits=16", "head.input.bits=16"]), "head") == (16, 16)
    changed = recipe.with_overrides(["qkv.input.observer=minmax", "fc1.input.dynamic=true", "fc2.input.symmetric=yes"])
    assert changed.resolve("qkv").input.observer == "minmax"
    assert changed.resolve("fc1").input.dynamic and changed.resolve("fc2").input.symmetric


@pytest.mark.parametrize(("item", "message"), [
    ("calib_size", "override 'calib_size': give key=value"),
    ("=4", "override '=4': give key=value"),
    ("calib_sise=4", "calib_sise: unknown key; allowed: block_gradient or block_gradient.KEY, calib_size, execution, heads or heads.KEY, solver, solver_options, transform_options, transforms; ROLE.OPERAND.FIELD"),
    ("calib_sise=4", "(did you mean 'calib_size'?)"),
    ("redaction.weight.bits=4", "(did you mean 'reduction'?)"),
    ("qkv.wieght.bits=4", "(did you mean 'weight'?)"),
    ("qkv.weight.bit=4", "weight.bit: unknown key; allowed: bits, symmetric, granularity, dynamic, observer, segments, group_size, outliers, outlier_limit, outlier_threshold, levels, transform, clip_ratio (did you mean 'bits'?)"),
    ("weight.bits=9", "weight.bits: 9; allowed: 2 to 8, or 16"),
    ("weight.bits=four", "weight.bits: 'four' is str; give an integer"),
    ("weight.bits=[", "value '[' is not YAML"),
    ("calib_size=0", "calib_size: 0; allowed: 1 or more samples"),
    ("transforms=layernorm_fold", "transforms: 'layernorm_fold' is str; give a list"),
    ("solver=gptp", "solver: 'gptp' is not known; allowed: rtn, gptq, dual_grain, erq (did you mean 'gptq'?)"),
    ("qk.weight.bits=4", "rules[3].weight: qk has no such operand; it has input and other"),
    ("name:bits=4", "no layer name or no field"),
    ("name:blocks.0.*.colour=4", "name:blocks.0.*.colour: unknown key"),
    ("qkv.weight.bits=16", "rules[3].weight.bits: 16 for the weight of qkv; its input has 8"),
    ("patch_embed.input.bits=16", "rules[3].input.bits: 16 for the input of patch_embed; its weight has 8"),
    ("fc1.weight.segments=dual", "weight.segments: 'dual' is not known; allowed: one, dual_uniform"),
    ("fc1.input.segments=dual_uniform", "rules[3].input.segments: 'dual_uniform' for the input of fc1; it divides the columns of a weight"),
    ("patch_embed.weight.segments=dual_uniform", "for the weight of patch_embed; pixels are quantized in their order: one"),
    ("fc2.segments=dual_uniform", "fc2.segments: segments belongs to an operand; give fc2.weight.segments"),
    ("segments=dual_uniform", "segments: segments belongs to an operand; give weight.segments"),
    (7, "override 7: override: 7 is int; give a string"),
])
def test_override_messages(item, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        Recipe.from_yaml("w8a8").with_overrides([item])


# --- the validator ----------------------------------------------------------------------------------------------------------------------------------

WEIGHT, INPUT = ({"roles": ["qkv"], operand: None} for operand in ("weight", "input"))


@pytest.mark.parametrize(("top", "error", "message"), [
    ({"name": ""}, ValueError, "name: empty"),
    ({"name": 3}, TypeError, "name: 3 is int; give a string"),
    ({"description": ["a"]}, TypeError, "description: ['a'] is list; give a string"),
    ({"schema": 2}, ValueError, "schema: 2; this vitq knows 1 to 1: a newer recipe needs a newer vitq"),
    ({"schema": 2, "novelty": 1}, ValueError, "schema: 2;"),
    ({"schema": "1"}, TypeError, "schema: '1' is str; give an integer up to 1"),
    ({"calib_size": 0}, ValueError, "calib_size: 0; allowed: 1 or more samples"),
    ({"calib_size": 1.5}, TypeError, "calib_size: 1.5 is float; give an integer, at least 1"),
    ({"calib_size": True}, TypeError, "calib_size: True is bool"),
    ({"calibsize": 4}, ValueError, "calibsize: unknown key; allowed: name, description, schema, calib_size, transforms, transform_options, solver, solver_options, execution, heads, block_gradient, rules (did you mean 'calib_size'?)"),
    ({"transforms": ["layernorm_fould"]}, ValueError, "transforms[0]: 'layernorm_fould' is not known; allowed: layernorm_fold, smoothquant, clip_outliers (did you mean 'layernorm_fold'?)"),
    ({"transforms": ["layernorm_fold"] * 2}, ValueError, "transforms: layernorm_fold, layernorm_fold; give each one once"),
    ({"solver": None}, TypeError, "solver: None is NoneType; give one of rtn"),
    ({"rules": {"weight": {}}}, TypeError, "rules: {'weight': {}} is dict; give a list"),
])
def test_top_level_messages(top, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Recipe.from_dict({"name": "mine", **top})


@pytest.mark.parametrize(("rule", "error", "message"), [
    ("qkv", TypeError, "rules[1]: 'qkv' is str; give a mapping of roles, names, weight, input, other"),
    ({"role": ["qkv"]}, ValueError, "rules[1].role: unknown key; allowed: roles, names, weight, input, other (did you mean 'roles'?)"),
    ({"roles": "qkv", "weight": {"bits": 4}}, TypeError, "rules[1].roles: 'qkv' is str; give a list"),
    ({"roles": ["qvk"], "weight": {"bits": 4}}, ValueError, "rules[1].roles[0]: 'qvk' is not known; allowed: patch_embed, qkv"),
    ({"names": [3], "weight": {"bits": 4}}, TypeError, "rules[1].names[0]: 3 is int; give a layer name or a pattern"),
    ({"names": [""], "weight": {"bits": 4}}, ValueError, "rules[1].names[0]: empty"),
    ({"roles": ["qkv"]}, ValueError, "rules[1]: sets nothing; give at least one of weight, input, other"),
    ({"roles": ["qkv"], "other": {"bits": 4}}, ValueError, "rules[1].other: qkv has no such operand; it has weight and input"),
    ({"weight": 4}, TypeError, "rules[1].weight: 4 is int; give a mapping such as {bits: 8}"),
    ({"weight": {"bit": 4}}, ValueError, "rules[1].weight.bit: unknown key; allowed: bits, symmetric, granularity, dynamic, observer, segments, group_size, outliers, outlier_limit, outlier_threshold, levels, transform, clip_ratio (did you mean 'bits'?)"),
    *[({"weight": {"bits": b}}, ValueError, f"rules[1].weight.bits: {b}; allowed: 2 to 8, or 16 (left in floating point)") for b in (-4, 0, 1, 9, 15, 17, 32)],
    *[({"weight": {"bits": b}}, TypeError, f"rules[1].weight.bits: {b!r} is") for b in (True, 8.0, "8", None)],
    ({"input": {"symmetric": 1}}, TypeError, "rules[1].input.symmetric: 1 is int; give true or false"),
    ({"input": {"dynamic": "yes"}}, TypeError, "rules[1].input.dynamic: 'yes' is str; give true or false"),
    ({"input": {"observer": "mean"}}, ValueError, "rules[1].input.observer: 'mean' is not known; allowed: minmax, percentile, mse"),
    ({"input": {"granularity": "per_row"}}, ValueError, "rules[1].input.granularity: 'per_row' is not known; allowed: per_tensor, per_channel, per_token"),
    ({"weight": {"dynamic": True}}, ValueError, "rules[1].weight.dynamic: true for the weight of patch_embed; weights are static: false"),
    ({"weight": {"granularity": "per_token"}}, ValueError, "rules[1].weight.granularity: 'per_token' for the weight of patch_embed; allowed for weights: per_channel, per_tensor"),
    ({"weight": {"symmetric": False}}, ValueError, "rules[1].weight.symmetric: false for the weight of patch_embed; allowed for weights of more than 4 bits: true"),
    ({"roles": ["fc1"], "input": {"granularity": "per_channel"}}, ValueError, "rules[1].input.granularity: 'per_channel' for the input of fc1; allowed for static activations: per_tensor"),
    ({"roles": ["fc1"], "input": {"granularity": "per_token"}}, ValueError, "per_token needs dynamic: true"),
    ({"roles": ["fc1"], "input": {"dynamic": True, "granularity": "per_tensor"}}, ValueError, "rules[1].input.granularity: 'per_tensor' for the input of fc1; allowed for dynamic activations: per_token"),
    ({"roles": ["fc1"], "weight": {"levels": "log_sqrt2"}}, ValueError, "rules[1].weight.levels: 'log_sqrt2' for the weight of fc1; allowed for weights: uniform"),
    ({"roles": ["qk"], "input": {"levels": "log_sqrt2"}}, ValueError, "rules[1].input.levels: 'log_sqrt2' for the input of qk; for attention probabilities"),
    ({"roles": ["pv"], "input": {"levels": "log_sqrt2"}}, ValueError, "its scale is static, one a tensor: add dynamic: false, granularity: per_tensor"),
    ({"roles": ["pv"], "input": {"levels": "log_sqrt2", "dynamic": False, "granularity": "per_tensor"}}, ValueError, "or execution: simulated for the whole recipe"),
    ({"roles": ["pv"], "input": {"symmetric": False}}, ValueError, "rules[1].input.symmetric: false for the input of pv; allowed for dynamic q, k, v and probabilities: true"),
    ({"roles": ["fc1"], "input": {"outliers": -1}}, ValueError, "rules[1].input.outliers: -1; allowed: 0 (none) or more features"),
    ({"roles": ["fc1"], "input": {"outliers": 1.5}}, TypeError, "rules[1].input.outliers: 1.5 is float; give a number of features, 0 for none"),
    ({"roles": ["fc1"], "input": {"outlier_limit": 0.7}}, ValueError, "rules[1].input.outlier_limit: 0.7; allowed: 0 to 0.5"),
    ({"roles": ["fc1"], "input": {"outlier_threshold": "8"}}, TypeError, "rules[1].input.outlier_threshold: '8' is str; give a number"),
    ({"roles": ["fc1"], "weight": {"outliers": 16}}, ValueError, "rules[1].weight.outliers: 16 for the weight of fc1; features in float16 are those of a linear layer's input; 0"),
    ({"roles": ["qk"], "other": {"outliers": 16}}, ValueError, "rules[1].other.outliers: 16 for the other of qk"),
    ({"roles": ["patch_embed"], "input": {"outliers": 16}}, ValueError, "rules[1].input.outliers: 16 for the input of patch_embed"),
    ({"roles": ["qk"], "other": {"dynamic": True}}, ValueError, "rules[1].other.dynamic: true for the other of qk; q and k have static scales: false"),
    ({"roles": ["qk"], "other": {"granularity": "per_channel"}}, ValueError, "rules[1].other.granularity: 'per_channel' for the other of qk; allowed for q, k and v: per_tensor, per_head"),
    ({"roles": ["fc1"], "input": {"granularity": "per_head"}}, ValueError, "rules[1].input.granularity: 'per_head' for the input of fc1; allowed for static activations: per_tensor"),
    ({"roles": ["fc1"], "weight": {"granularity": "per_head"}}, ValueError, "rules[1].weight.granularity: 'per_head' for the weight of fc1; allowed for weights: per_channel, per_tensor"),
    ({"input": {"dynamic": False}}, ValueError, "rules[1].input.dynamic: false for the input of pv; attention probabilities have one dynamic scale a row: true"),
    ({"roles": ["pv"], "other": {"dynamic": True}}, ValueError, "rules[1].other.dynamic: true for the other of pv; the tokens of v are summed over"),
    ({"roles": ["fc1"], "weight": {"bits": 16}}, ValueError, "rules[1].weight.bits: 16 for the weight of fc1; its input has 8: integers are multiplied by integers; give the weight 2 to 8, or both 16"),
    ({"roles": ["fc1"], "weight": {"bits": 16}}, ValueError, "rules[1].weight.bits: 16 for the weight of fc1; its input has 8"),
    ({"names": ["blocks.*"], "weight": {"symmetric": False}}, ValueError, "rules[1].weight.symmetric: false for the weight of patch_embed"),
])
def test_rule_messages(rule, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make({"roles": ["head"], "weight": {"bits": 8}}, rule)


def test_what_meets_by_name_is_checked_when_it_meets():
    recipe = make({"names": ["blocks.0.*"], "input": {"granularity": "per_head"}})  # right for the attention matmuls of that block
    assert recipe.resolve("qk", "blocks.0.attn.qk").input.granularity == "per_head"
    with pytest.raises(ValueError, match=re.escape("rules[0].input.granularity: 'per_head' for the input of blocks.0.attn.qkv (qkv)")):
        recipe.resolve("qkv", "blocks.0.attn.qkv")
    with pytest.raises(ValueError, match=re.escape("role: 'qvk' is not known")):
        recipe.resolve("qvk")


def test_a_weight_alone_may_be_quantized():
    recipe = make({"roles": ["fc1"], "input": {"bits": 16}}, {"roles": ["fc1", "fc2"], "weight": {"symmetric": False}, "input": {"bits": 16}})
    assert recipe.resolve("fc1").weight_only and not recipe.resolve("fc1").is_float
    assert not recipe.resolve("qkv").weight_only and not recipe.resolve("qk").weight_only
    floats = {"roles": list(LINEAR_ROLES), "weight": {"bits": 16}, "input": {"bits": 16}}
    quantized = {"roles": ["qkv", "fc1"], "weight": {"bits": 4}}
    assert not make(floats, quantized, {"roles": ["qk", "pv"], "input": {"bits": 16}}).is_static


def test_built_in_python_is_checked_too():
    with pytest.raises(ValueError, match=re.escape("QuantSpec.bits: 12; allowed: 2 to 8, or 16")):
        QuantSpec(bits=12)
    with pytest.raises(ValueError, match=re.escape("rules[0].weight.bits: 12")):
        Recipe("mine", rules=(Rule(weight={"bits": 12}),))
    with pytest.raises(TypeError, match=re.escape("rules[0]: {'weight': {'bits': 4}} is dict; give a Rule")):
        Recipe("mine", rules=({"weight": {"bits": 4}},))
    with pytest.raises(ValueError, match="name: missing"):
        Recipe.from_dict({})
    with pytest.raises(TypeError, match="recipe: 'w8a8' is str"):
        Recipe.from_dict("w8a8")


@pytest.mark.parametrize(("text", "error", "message"), [
    ("- a", TypeError, "holds list; give a mapping of keys"),
    ("", TypeError, "holds NoneType"),
    ("name: [", ValueError, "not readable as YAML"),
    ("calib_size: 3\ncalib_size: 4", ValueError, "line 2: key 'calib_size' is given twice"),
    ("rules: [{weight: {bits: 9}}]", ValueError, "rules[0].weight.bits: 9"),
    ("calib_size: many", TypeError, "calib_size: 'many' is str"),
])
def test_bad_files_are_named(tmp_path, text, error, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(error, match=re.escape(message)) as caught:
        Recipe.from_yaml(path)
    assert str(path) in str(caught.value)


def test_file_name_serves_as_name_and_unknown_recipes_are_listed(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("calib_size: 3")
    assert Recipe.from_yaml(path).name == "mine"
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(ValueError, match="not readable as YAML"):
        Recipe.from_yaml(path)
    with pytest.raises(ValueError, match=re.escape("recipe 'w8a9': neither a file nor a shipped recipe; shipped: dgq-w4a8, dual-w4a4, dual-w8a8, erq-w3a3, erq-w3a3-paper, erq-w3a4, ")):
        Recipe.from_yaml("w8a9")
    with pytest.raises(ValueError, match=re.escape("(did you mean 'w8a8'?)")):
        Recipe.from_yaml("w8a9")


def test_what_is_simulated_may_hold_more() -> None:
    paper = Recipe.from_yaml("erq-w8a8-paper")
    assert paper.execution == "simulated" and paper.resolve("pv").input.levels == "log_sqrt2" and not paper.resolve("qkv").weight.symmetric
    with pytest.raises(ValueError, match="allowed for weights of more than 4 bits: true"):
        paper.with_overrides(["execution=integer"])
    with pytest.raises(ValueError, match="execution: 'fast' is not known; allowed: integer, simulated"):
        paper.with_overrides(["execution=fast"])
    asymmetric = Recipe.from_yaml("w4a4").with_overrides(["qkv.weight.symmetric=false"])
    assert not asymmetric.resolve("qkv").weight.symmetric and asymmetric.execution == "integer"
