"""Heads with formats of their own (partial-head quantization): attentions in parts, scores of heads, the choice by them, what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import build, images, quick, sqnr
from torch import Tensor, nn

import vitq
from vitq.calib import heads as scoring
from vitq.conversion import quantize
from vitq.models import prepare
from vitq.models.heads import part_heads
from vitq.models.sites import HeadSite, LinearSite, Prepared
from vitq.recipe import Recipe

pytest.importorskip("transformers", reason="needs pip install vitq[llm]")
import language_models  # noqa: E402
from language_models import CASES, GQA, ids  # noqa: E402

DEIT = "deit_tiny_patch16_224"


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    yield


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return build(DEIT, depth=2, img_size=64, embed_dim=96, num_heads=4)


@pytest.fixture(scope="module")
def decoder() -> nn.Module:
    return language_models.build("Qwen2", hidden_size=128, num_attention_heads=8, num_key_value_heads=4)


def data(model: nn.Module, count: int = 4) -> Tensor:
    return ids(count, 40) if hasattr(model, "config") else images(model, count)


def logits(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return getattr(y, "logits", y).float()


def recipe_of(name: str = "phq-mixed", *changes: str) -> Recipe:
    return quick(name, "calib_size=4", *changes)


# --- parts ------------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, kwargs", [case for case in CASES if not case[1].get("alibi") and case != ("Falcon", {})])
def test_a_language_model_in_parts_computes_the_same(family: str, kwargs: dict) -> None:
    model, x = language_models.build(family, **kwargs), ids()
    for chosen in (lambda site: [site.units - 1], lambda site: [0, site.units - 1], lambda site: range(site.units), lambda site: []):
        prepared = prepare(model)
        names = [site.name for site in prepared.linears]
        part_heads(prepared, {site.name: sorted(set(chosen(site))) for site in prepared.heads})
        assert (prepared.run(x) - model(x).logits).abs().max() < 1e-5
        assert {name.removesuffix(".least").removesuffix(".rest") for name in (site.name for site in prepared.linears)} == set(names)
        assert all(isinstance(prepared.model.get_submodule(site.name), nn.Linear) for site in prepared.linears)


@pytest.mark.parametrize("kwargs", [{}, {"qk_norm": True}, {"qkv_bias": False}, {"init_values": 0.3}], ids=str)
def test_a_vit_in_parts_computes_the_same(kwargs: dict) -> None:
    model = build(DEIT, depth=2, img_size=64, embed_dim=96, num_heads=4, **kwargs)
    prepared, x = prepare(model), images(model)
    part_heads(prepared, {"blocks.0.attn": [1, 3]})
    assert (prepared.run(x) - model(x)).abs().max() < 1e-5
    attn = prepared.model.blocks[0].attn
    assert (attn.qkv.least.out_features, attn.proj.least.in_features) == (144, 48) and not hasattr(prepared.model.blocks[1].attn.qkv, "least")


def test_rows_and_columns_are_those_of_the_heads() -> None:
    """Each head's numbers are all its own index: rows of q, k and v of one head, and columns of proj, go together."""
    for sections in ((4, 2, 2), (8,)):
        site = HeadSite("a", "a.qkv", "a.proj", 3, sections, 4, 2)
        owner = torch.tensor([float(unit) for width in sections for unit in range(3) for _ in range(width)])
        model = nn.ModuleDict({"a": nn.ModuleDict({"qkv": nn.Linear(5, 24), "proj": nn.Linear(12, 5)})})
        model["a"]["qkv"].weight = nn.Parameter(owner[:, None].expand(24, 5))
        model["a"]["qkv"].bias = nn.Parameter(owner)
        model["a"]["proj"].weight = nn.Parameter(torch.tensor([0.0, 1, 2]).repeat_interleave(4).expand(5, 12))
        prepared = Prepared(model, [LinearSite("a.qkv", "qkv"), LinearSite("a.proj", "proj")], heads=[site])
        part_heads(prepared, {"a": [1]})
        parts = model["a"]
        assert parts["qkv"].least.weight.eq(1).all() and parts["qkv"].least.bias.eq(1).all() and parts["proj"].least.weight.eq(1).all()
        assert set(parts["qkv"].rest.weight.unique().tolist()) == set(parts["proj"].rest.weight.unique().tolist()) == {0, 2}


# --- executed ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, changes", [
    ("phq-w8", []), ("phq-mixed", []), ("phq-mixed", ["solver=rtn", "heads.least=1.0"]), ("phq-mixed", ["heads.budget=6.5", "solver=erq"]),
    ("phq-mixed", ["name:*.least.input.bits=16", "name:*.least.weight.granularity=per_group"]), ("phq-mixed", ["heads.least=0"]),
    ("w8a8", ["heads={least: 0.5}", "name:*.least.weight.bits=4", "proj.input.symmetric=true"])])
@pytest.mark.parametrize("kind", ["vit", "decoder"])
def test_what_is_simulated_runs_and_reloads(kind: str, name: str, changes: list[str], request: pytest.FixtureRequest, tmp_path) -> None:
    model, recipe = request.getfixturevalue(kind), recipe_of(name, *changes)
    x = data(model)
    executed, simulated = vitq.convert(model, recipe, [x], dtype=torch.float32), vitq.simulate(model, recipe, [x])
    assert sqnr(logits(simulated, x), logits(executed, x)) > 35 and sqnr(logits(model, x), logits(executed, x)) > 12
    made = executed.vitq.recipe
    assert made.heads == {**recipe.heads, "chosen": made.heads["chosen"]} and not made.scores_heads
    widths = {site.name: site.units for site in prepare(model).heads}
    assert set(made.heads["chosen"]) == set(widths)
    rows = {row.layer: row.format for row in vitq.explain(executed) if row.role in ("qkv", "proj")}
    parts = {(a, part) for a, units in made.heads["chosen"].items() for part, there in (("least", units), ("rest", len(units) < widths[a])) if there}
    assert {(layer.rpartition(".")[0].rpartition(".")[0], layer.rpartition(".")[2]) for layer in rows} == parts and len(rows) == 2 * len(parts)
    sizes = {"depth": 2, "img_size": 64, "embed_dim": 96, "num_heads": 4, "num_classes": 10}
    folder = vitq.save(executed, tmp_path / "c", source={"name": DEIT, "model_kwargs": sizes} if kind == "vit" else None)
    loaded = vitq.load(folder)
    assert torch.equal(logits(loaded, x), logits(executed, x)) and loaded.vitq.recipe == made
    if kind == "decoder":
        tokens = [m.generate(ids(2, 6), attention_mask=torch.ones(2, 6), max_new_tokens=6, do_sample=False) for m in (executed, loaded)]
        assert tokens[0].shape == (2, 12) and torch.equal(*tokens)
    else:
        coded = {layer for layer, fmt in rows.items() if fmt.startswith("W")}
        notes = [row.note for row in vitq.explain(executed) if row.role == "qk"]
        assert all(("q, k, v pass through float (qkv is in parts)" in note) == (name == "w8a8") for note in notes)
        assert coded and {row.layer for row in vitq.evaluate.layer_sqnr(model, executed, x)} > coded


@pytest.mark.parametrize("stream", ["float", "quantized"])
def test_block_by_block(stream: str, decoder: nn.Module, tmp_path) -> None:
    recipe, x = recipe_of(), data(decoder)
    whole = vitq.convert(decoder, recipe, [x], dtype=torch.float32)
    parts = [vitq.convert(decoder, recipe, [x], dtype=torch.float32, stream=stream, resume=tmp_path / "run") for _ in range(2)]
    assert parts[0].vitq.recipe == whole.vitq.recipe and torch.equal(logits(parts[0], x), logits(parts[1], x))
    if stream == "float":
        assert torch.equal(logits(parts[0], x), logits(whole, x))
    assert sqnr(logits(decoder, x), logits(parts[0], x)) > 12


@pytest.mark.parametrize("stream", ["float", "quantized"])
@pytest.mark.parametrize("changes", [[], ["transforms=[]", "solver=rtn"]], ids=str)
def test_a_run_that_goes_on_keeps_its_choice(changes: list[str], stream: str, decoder: nn.Module, tmp_path, monkeypatch) -> None:
    """It is not made again, by batches of another size; the data it was made by must be the same, also where nothing else looks at them."""
    recipe, x = recipe_of("phq-mixed", *changes), data(decoder)
    first = quantize(decoder, recipe, [x], stream=stream, resume=tmp_path / "run")
    (tmp_path / "run" / "0002.safetensors").unlink()
    chosen = first[1].recipe.heads["chosen"]
    others = {name: [unit for unit in range(4) if unit not in units] for name, units in chosen.items()}
    monkeypatch.setattr(scoring, "_lowest", lambda scores, count: others["model.layers.0.self_attn"])
    again = quantize(decoder, recipe, list(x.split(1)), stream=stream, resume=tmp_path / "run")
    assert again[1].recipe == first[1].recipe and again[1].layers.keys() == first[1].layers.keys()
    with pytest.raises(ValueError, match="holds a run of other calibration data; give another folder"):
        quantize(decoder, recipe, [x.flip(0)], stream=stream, resume=tmp_path / "run")
    with pytest.raises(ValueError, match="holds a run of .*another recipe"):
        quantize(decoder, recipe.with_overrides(["heads.least=2"]), [x], stream=stream, resume=tmp_path / "run")
    monkeypatch.undo()
    small = language_models.build("Qwen2", hidden_size=128, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1)
    with pytest.raises(ValueError, match="holds a run of another model or other weights"):
        quantize(small, recipe, [x], stream=stream, resume=tmp_path / "run")


def test_a_parted_model_traces_into_one_graph(vit: nn.Module) -> None:
    executed, x = vitq.convert(vit, recipe_of(), [data(vit)], "reference", dtype=torch.float32), data(vit, 2)
    torch.testing.assert_close(torch.compile(executed, fullgraph=True, backend="eager")(x), executed(x))


def test_low_bits_hurt_least_where_heads_matter_least() -> None:
    """Heads that matter twenty times less are found, and bits are better taken from these than from the others."""
    model = build(DEIT, depth=2, img_size=64, embed_dim=96, num_heads=4)
    for block in model.blocks:
        block.attn.proj.weight[:, 24:72] *= 0.05  # heads 1 and 2
    x, recipe = data(model), recipe_of("phq-mixed", "solver=rtn", "name:*.least.weight.bits=2")
    least = vitq.convert(model, recipe, [x], dtype=torch.float32)
    assert least.vitq.recipe.heads["chosen"] == {"blocks.0.attn": [1, 2], "blocks.1.attn": [1, 2]}
    others = vitq.convert(model, recipe.with_overrides(["heads.chosen={blocks.0.attn: [0, 3], blocks.1.attn: [3, 0]}"]), [x], dtype=torch.float32)
    assert others.vitq.recipe.heads["chosen"]["blocks.1.attn"] == [3, 0], "what is given is kept as it is"
    assert sqnr(model(x), least(x)) > sqnr(model(x), others(x)) + 3
    assert vitq.report.bits_per_weight(least) == vitq.report.bits_per_weight(others)


def test_bits_count_the_heads_that_stay_in_float(vit: nn.Module) -> None:
    """Half of q, k, v and o, 4·96² weights a block, in the 16 bits of the float type; the other half and the MLP, 8·96², in 8."""
    executed = vitq.convert(vit, recipe_of("phq-w8"), [data(vit)], dtype=torch.bfloat16)
    bits = vitq.report.bits_per_weight(executed).linears
    assert (2 * 16 + 10 * 8) / 12 < bits < (2 * 16 + 10 * 8) / 12 + 0.6, bits


# --- scores -----------------------------------------------------------------------------------------------------------------------------------------


def tiny(written: Tensor, weight: Tensor) -> Prepared:
    """A model whose attention hands `written` [T, 2·2] to its projection, whatever it reads."""
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(3, 12), nn.Linear(4, len(weight), bias=False)
            self.proj.weight = nn.Parameter(weight)

    prepared = Prepared(Model(), heads=[HeadSite("attn", "qkv", "proj", 2, (2, 2, 2), 2)])
    prepared.run = lambda batch: prepared.model.proj(written)  # type: ignore[method-assign]
    return prepared


def test_l1_and_contribution_by_hand() -> None:
    """Head 0 writes (1, -2) and (3, 0), head 1 (0, 1) and (2, -2). Means of |O|: 6/4 and 5/4. W of head 0 is (1, 1), so that O Wᵀ is
    (-1, 3), of norm √10; W of head 1 is (2, 1), of (1, 2) √5."""
    prepared = tiny(torch.tensor([[1.0, -2, 0, 1], [3, 0, 2, -2]]), torch.tensor([[1.0, 1, 2, 1]]))
    assert torch.allclose(scoring._l1(prepared, [None])["attn"], torch.tensor([1.5, 1.25], dtype=torch.float64))
    expected = torch.tensor([10.0, 5.0], dtype=torch.float64)
    assert torch.allclose(scoring._contribution(prepared, [None])["attn"], expected.sqrt())
    assert torch.allclose(scoring._contribution(prepared, [None, None])["attn"], (2 * expected).sqrt()), "batches add up"


@pytest.mark.parametrize("score", ["l1", "contribution", "sensitivity", "random"])
@pytest.mark.parametrize("kind", ["vit", "decoder"])
def test_scores_of_a_model(kind: str, score: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(kind)
    x = data(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = vitq.head_scores(model, [x[:3], x[3:]], score, weight_bits=3)
    assert len(found) == 2 and all(s.shape == (4,) and float(s.sum()) == pytest.approx(1) and (s > 0).all() for s in found.values())
    whole = vitq.head_scores(model, [x], score, weight_bits=3)
    assert all(torch.allclose(found[name], whole[name], rtol=1e-3) for name in found), "however images come in batches"
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    first, second = found.values()
    cascade = list(vitq.head_scores(model, [x[:3], x[3:]], score, weight_bits=3, cascade=True).values())
    assert torch.allclose(cascade[0], first) and torch.allclose(cascade[1], (first + second) / 2)


@pytest.mark.parametrize("score", ["l1", "contribution", "sensitivity"])
def test_a_head_that_is_made_to_matter_is_first(score: str) -> None:
    model = build(DEIT, depth=2, img_size=64, embed_dim=96, num_heads=4)
    model.blocks[1].attn.qkv.weight[2 * 96 + 48: 2 * 96 + 72] *= 30  # the values of head 2
    model.blocks[0].attn.qkv.weight[2 * 96: 2 * 96 + 24] *= 1e-3  # of head 0
    model.blocks[0].attn.qkv.bias[2 * 96: 2 * 96 + 24] *= 1e-3
    found = vitq.head_scores(model, [data(model)], score)
    assert int(found["blocks.1.attn"].argmax()) == 2 and int(found["blocks.0.attn"].argmin()) == 0


def test_sensitivity_is_the_divergence_of_that_unit_alone(decoder: nn.Module) -> None:
    """Of a grouped-query model, against weights and inputs changed by hand."""
    x, prepared = data(decoder), prepare(decoder)
    site = prepared.heads[1]
    found = scoring._sensitivity(prepared, [x], lambda _: scoring.Bits(3, 4, 5))[site.name][2]
    other = prepare(decoder)
    qkv, proj = other.model.get_submodule(site.qkv), other.model.get_submodule(site.proj)

    def rounded(t: Tensor, bits: int) -> Tensor:
        scale = t.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        return (t / scale).round() * scale

    heads = slice(4 * 16, 6 * 16)  # two query heads of 16, key 2 after the 128 rows of q, value 2 after the 64 of k
    for rows in (heads, slice(128 + 32, 128 + 48), slice(192 + 32, 192 + 48)):
        qkv.weight[rows] = rounded(qkv.weight[rows], 3)
    proj.weight[:, heads] = rounded(proj.weight[:, heads], 4)
    proj.register_forward_pre_hook(lambda module, args: torch.cat((args[0][..., :64], rounded(args[0][..., heads], 5), args[0][..., 96:]), -1))
    p, q = logits(decoder, x).double().log_softmax(-1), other.run(x).double().log_softmax(-1)
    assert float(found) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)


def test_random_depends_on_the_seed_alone(vit: nn.Module) -> None:
    one, same, other = (vitq.head_scores(vit, [data(vit, n)], "random", seed=seed) for n, seed in ((1, 3), (2, 3), (1, 4)))
    assert all(torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name]) for name in one)
    recipe = recipe_of("phq-mixed", "transforms=[]", "solver=rtn", "heads.score=random")
    chosen = vitq.convert(vit, recipe).vitq.recipe.heads["chosen"]  # without data
    assert chosen == vitq.convert(vit, recipe, [data(vit, 2)]).vitq.recipe.heads["chosen"]
    drawn = [str(vitq.convert(vit, recipe.with_overrides([f"heads.seed={seed}"])).vitq.recipe.heads["chosen"]) for seed in range(8)]
    assert len(set(drawn)) > 1


# --- the choice -------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("least, units", [(0, 0), (2, 1), (3, 2), (1, 1), (8, 4), (0.5, 2), (0.3, 1), (0.0, 0), (1.0, 4)])
def test_how_many(least: float, units: int, decoder: nn.Module) -> None:
    """Of 8 query heads, two to a key and value head: whole units, halves up, one at least."""
    recipe = scoring.choose_heads(prepare(decoder), recipe_of("phq-mixed", f"heads.least={least}"), [data(decoder)])
    assert [len(chosen) for chosen in recipe.heads["chosen"].values()] == [units, units]


@pytest.mark.parametrize("budget", [16, 8, 6.5, 5.01, 4])
def test_a_budget_is_met_and_no_unit_too_many(budget: float, vit: nn.Module) -> None:
    x, recipe = data(vit), recipe_of("phq-mixed", f"heads.budget={budget}")
    chosen = scoring.choose_heads(prepare(vit), recipe, [x]).heads["chosen"]
    count = sum(map(len, chosen.values()))
    assert 8 - 4 * count / 8 <= budget and (count == 0 or 8 - 4 * (count - 1) / 8 > budget)
    scores = torch.stack(list(vitq.head_scores(vit, [x]).values()))
    taken = torch.zeros(2, 4, dtype=torch.bool)
    for i, units in enumerate(chosen.values()):
        taken[i, units] = True
    assert count in (0, 8) or scores[taken].max() <= scores[~taken].min(), "the lowest of the whole model"


def test_what_is_chosen_needs_no_data_to_be(vit: nn.Module) -> None:
    recipe = recipe_of("phq-mixed", "transforms=[]", "solver=rtn", "heads={chosen: {blocks.1.attn: [3]}}")
    assert not recipe.needs_data and recipe_of("phq-mixed", "transforms=[]", "solver=rtn").needs_data
    rows = {row.layer for row in vitq.explain(vitq.convert(vit, recipe))}
    assert "blocks.1.attn.qkv.least" in rows and "blocks.0.attn.qkv.least" not in rows and "blocks.0.attn.qkv.rest" in rows


def test_overrides_of_one_key() -> None:
    recipe = Recipe.from_yaml("phq-w8")
    assert recipe.with_overrides(["heads.least=4", "heads.score=l1"]).heads == {"score": "l1", "least": 4}
    assert recipe.with_overrides(["heads.budget=6.5"]).heads == {"score": "contribution", "budget": 6.5}
    assert recipe.with_overrides(["heads.chosen={a: [1]}", "heads.seed=2"]).heads == {"score": "contribution", "least": 0.5, "seed": 2}
    with pytest.raises(ValueError, match=r"override 'heads.lest=4': heads.lest: unknown key; .*did you mean 'least'"):
        recipe.with_overrides(["heads.lest=4"])


# --- refused ----------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads, message", [
    ("[]", "heads: \\[\\] is list; give a mapping"), ("{lest: 2}", "heads.lest: unknown key; .*did you mean 'least'"),
    ("{score: l1}", "heads: how many is missing; give least, budget or chosen"),
    ("{least: 4, score: contributions}", "heads.score: 'contributions' is not known; allowed: l1, contribution, .*did you mean 'contribution'"),
    ("{least: 1.5}", "heads.least: 1.5; allowed"), ("{least: -1}", "heads.least: -1; allowed"), ("{least: true}", "heads.least: True; allowed"),
    ("{least: half}", "heads.least: 'half' is str"), ("{least: 4, budget: 6}", "heads.budget: 6 with least: 4; give one of the two"),
    ("{budget: 1}", "heads.budget: 1; allowed: 2 to 16"), ("{least: 4, cascade: 1}", "heads.cascade: 1 is int; give true or false"),
    ("{least: 4, seed: 0.5}", "heads.seed: 0.5 is float"), ("{chosen: [1]}", "heads.chosen: \\[1\\] is list"),
    ("{chosen: {a: 1}}", "heads.chosen.a: 1 is int; give a list"), ("{chosen: {a: [x]}}", "heads.chosen.a: 'x' is str"),
    ("{chosen: {a: [1, 1]}}", "heads.chosen.a: \\[1, 1\\]; give each head once")])
def test_a_mistake_in_a_recipe(heads: str, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Recipe.from_yaml("phq-w8").with_overrides([f"heads={heads}"])


@pytest.mark.parametrize("changes, message", [
    (["heads.chosen={blocks.7.attn: [0]}"], "no attention 'blocks.7.attn'; the model's are blocks.0.attn, blocks.1.attn"),
    (["heads.chosen={blocks.1.attn: [4]}"], "'blocks.1.attn' has no head 4; its 4 key and value heads are 0 to 3"),
    (["heads.least=5"], "heads.least: 5; 'blocks.0.attn' has 4 query heads"),
    (["heads.budget=3"], "heads.budget: 3; with all heads in the part 'least' the weights of q, k, v and o have 4 bits"),
    (["name:*.least.weight.bits=8"], "has heads, and no rule that tells them from the others"),
    (["name:*.least.bits=16", "heads.score=sensitivity"], "they have 16"),
    (["name:*.lest.weight.bits=4"], "the name pattern '\\*.lest' matches no layer"),
    (["heads={}"], "the name pattern '\\*.least' matches no layer")])
def test_what_does_not_fit_the_model(changes: list[str], message: str, vit: nn.Module) -> None:
    with pytest.raises(ValueError, match=message):
        vitq.convert(vit, recipe_of("phq-mixed", *changes), [data(vit)])


@pytest.mark.parametrize("model, message", [
    (lambda: build("swin_tiny_patch4_window7_224", depths=(1, 1), embed_dim=24, num_heads=(1, 2)), "a Swin block runs quantized as a"),
    (lambda: language_models.build("Falcon"), "has one key and value head for all query heads"),
    (lambda: language_models.build("Falcon", **GQA, alibi=True), "ALiBi gives each head a slope by its place"),
    (lambda: language_models.build(num_key_value_heads=1), "has one key and value head for all query heads"),
    (lambda: build(DEIT, depth=1, img_size=64, embed_dim=48, num_heads=2, scale_attn_norm=True), "has a norm over all heads")])
def test_heads_that_cannot_be_told_apart(model, message: str) -> None:
    model = model()
    for act in (lambda: vitq.convert(model, recipe_of("phq-mixed"), [data(model)]), lambda: vitq.head_scores(model, [data(model)])):
        with pytest.raises(ValueError, match=message):
            act()


@pytest.mark.parametrize("kind, name, changes", [
    ("vit", "phq-w8", []), ("decoder", "phq-mixed", []), ("vit", "phq-mixed", ["heads.least=1.0"]), ("decoder", "phq-w8", ["heads.least=0"]),
    ("vit", "w8a8", ["qk.input.granularity=per_head", "qk.other.granularity=per_head", "pv.other.granularity=per_head"]),
    ("decoder", "w8a8", ["transforms=[]"]), ("vit", "quik-w4a4", ["input.outliers=16", "input.outlier_limit=0.3", "name:*.rest.input.outliers=0"]),
    ("decoder", "w8a8", ["name:*_proj.least.input.dynamic=true"])])
def test_statistics_of_the_whole_layers_serve_their_parts(kind: str, name: str, changes: list[str], request: pytest.FixtureRequest, tmp_path) -> None:
    """From a file that another recipe was measured for too, in one run and block by block: formats and choice are those of the data."""
    model = request.getfixturevalue(kind)
    x, own = data(model, 16), [] if name.startswith("phq") else ["heads={least: 0.5, score: l1}", "name:*.least.weight.bits=3"]
    ends = [f"{operand}.observer=minmax" for operand in ("input", "qk.input", "qk.other", "pv.other")]
    recipe = quick(name, "calib_size=16", *ends, *own, *changes)
    vitq.calibrate(model, [quick("w8a8", "calib_size=16"), recipe], [x]).save(tmp_path / "s")
    statistics, (prepared, wanted) = vitq.Statistics.load(tmp_path / "s"), quantize(model, recipe, [x])
    for kwargs in ({}, {"stream": "float", "resume": tmp_path / "run"}):
        found = quantize(model, recipe, [x], statistics=statistics, **kwargs)[1]
        assert found.recipe == wanted.recipe and found.notes == wanted.notes and found.layers.keys() == wanted.layers.keys()
        for layer, params in found.layers.items():
            for operand in ("input", "q", "k", "v"):
                one, other = (getattr(of, operand, None) for of in (params, wanted.layers[layer]))
                if other is not None and not other.dynamic:
                    torch.testing.assert_close(one.scale, other.scale, rtol=1e-4, atol=0, msg=f"{layer}: {operand}")
                if other is not None and other.columns is not None:
                    assert torch.equal(one.columns.fp, other.columns.fp)
    assert not (tmp_path / "run" / "statistics.safetensors").exists(), "they are not of the whole layers"
    assert sqnr(logits(vitq.simulate(model, recipe, [x]), x), logits(vitq.simulate(model, recipe, [x], statistics=statistics), x)) > 20


def test_a_choice_that_was_made_needs_statistics_alone(vit: nn.Module) -> None:
    x, recipe = data(vit), recipe_of("phq-w8")
    statistics = vitq.calibrate(vit, recipe, [x])
    chosen = dataclasses.replace(recipe, heads={"chosen": {"blocks.0.attn": [3, 1], "blocks.1.attn": []}})
    assert sqnr(vitq.convert(vit, chosen, [x], dtype=torch.float32)(x), vitq.convert(vit, chosen, statistics, dtype=torch.float32)(x)) > 40
    vitq.check(vit, recipe, statistics)


def test_what_statistics_do_not_tell(vit: nn.Module) -> None:
    x, recipe = data(vit), recipe_of("phq-w8")
    statistics = vitq.calibrate(vit, quick("w8a8", "transforms=[]"), [x])
    with pytest.raises(ValueError, match="chooses heads by what they write, which statistics do not tell: give the calibration images as calib= and"):
        vitq.convert(vit, recipe, vitq.calibrate(vit, recipe, [x]))
    static = quick("w8a8", "transforms=[]", "heads={least: 0.5}", "name:*.least.weight.bits=4")
    for act in (lambda: vitq.convert(vit, static, [x], statistics=statistics), lambda: vitq.check(vit, static, statistics)):
        with pytest.raises(ValueError, match="no fitting statistics for 'blocks.0.attn.proj(.least)?:input'"):
            act()
    other = build(DEIT, depth=2, img_size=64, embed_dim=96, num_heads=4, seed=3)
    with pytest.raises(ValueError, match="collected on another model"):
        vitq.convert(other, static, [x], statistics=vitq.calibrate(vit, static, [x]))
    with pytest.raises(ValueError, match="'blocks.0.attn' has 4 query heads"):
        vitq.calibrate(vit, recipe_of("phq-w8", "heads.least=5"), [x])


def test_data_that_does_not_do(vit: nn.Module, decoder: nn.Module) -> None:
    recipe = recipe_of("phq-mixed", "transforms=[]", "solver=rtn")
    with pytest.raises(ValueError, match="chooses heads by what they write: give calib="):
        vitq.convert(vit, recipe)
    with pytest.raises(ValueError, match="needs at least 2; give more images"):
        vitq.convert(vit, dataclasses.replace(recipe, calib_size=32), [data(vit, 1)])
    with pytest.raises(ValueError, match="token ids must be 0 to 127"):
        vitq.head_scores(decoder, [torch.full((1, 4), 200)])
    with pytest.raises(ValueError, match="score must be one of l1, contribution, sensitivity, random; got 'l2'"):
        vitq.head_scores(vit, [data(vit)], "l2")
    broken = build(DEIT, depth=1, img_size=64, embed_dim=96, num_heads=4)
    broken.blocks[0].attn.qkv.weight *= 1e30
    with pytest.raises(ValueError, match="what the heads of 'blocks.0.attn' write holds NaN or infinity"):
        vitq.head_scores(broken, [data(broken)])
