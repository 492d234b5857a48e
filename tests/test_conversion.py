"""vitq.convert: what it promises of its result, and what it refuses."""

from __future__ import annotations

import copy
import re

import pytest
import timm
import torch
from helpers import build, convert, images, quick, sqnr
from torch.utils.data import DataLoader, TensorDataset

import vitq
from vitq.formats import QTensor
from vitq.models import prepare

DEPTH = {"depth": 2}


@pytest.fixture(scope="module")
def model():
    return build(**DEPTH)


@pytest.fixture(scope="module")
def static(model):
    return convert(model, quick("w8a8"))


# What runs is what was simulated -------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["w8a8-dynamic", "w8a8", "w4a8", "dual-w8a8"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_execution_equals_simulation(name: str, recipe: str, backend: str) -> None:
    model = build(name, **(DEPTH if "deit" in name else {"depths": (1, 1, 2, 1)}))
    chosen = quick(recipe)
    statistics = vitq.calibrate(model, chosen, [images(model, 4, seed=2)]) if chosen.is_static else None
    executed = vitq.convert(model, chosen, statistics, backend, dtype=torch.float32)
    x = images(model)
    assert sqnr(vitq.simulate(model, chosen, statistics)(x), executed(x)) > 35


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("recipe", ["w4a4", "dual-w4a4", "erq-w3a3"])
def test_w4a4_equals_its_simulation_block_by_block(recipe: str, symmetric: bool) -> None:
    model, recipe = build(depth=4), quick(recipe, *(f"{role}.weight.symmetric={symmetric}".lower() for role in ("qkv", "proj", "fc1", "fc2")))
    calib = [images(model, 4, seed=2)]
    executed, simulated = vitq.convert(model, recipe, calib, dtype=torch.float32), vitq.simulate(model, recipe, calib)
    seen = []
    for block in simulated.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append((args[0].clone(), output.clone())))
    simulated(images(model))
    for (x, y), block in zip(seen, executed.blocks, strict=True):
        assert sqnr(y, block(x)) > 40


def test_attention_with_scales_and_zero_points_of_each_head() -> None:
    """q and k per head, v of all heads together, then all per head; with qk-norm, where q, k and v pass through float, too."""
    each = ["qk.input.granularity=per_head", "qk.other.granularity=per_head", "qk.input.symmetric=false"]
    for name, kwargs in (("deit_tiny_patch16_224", DEPTH), ("deit_tiny_patch16_224", {**DEPTH, "qk_norm": True}),
                         ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 2, 1)})):
        model = build(name, **kwargs)
        for changes in (each, [*each, "pv.other.granularity=per_head", "pv.other.symmetric=false"]):
            recipe, calib = quick("w8a8", *changes), [images(model, 4, seed=2)]
            executed = vitq.convert(model, recipe, calib, dtype=torch.float32)
            attention = next(m for m in executed.modules() if hasattr(m, "operand_scale"))
            assert attention.operand_scale.shape == (3, attention.num_heads) and attention.operand_scale[1].unique().numel() > 1
            assert (attention.operand_scale[2].unique().numel() > 1) == (changes is not each)
            assert sqnr(vitq.simulate(model, recipe, calib)(images(model)), executed(images(model))) > 35
            assert any("static per head" in row.format for row in vitq.explain(executed))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("role", ["qkv", "proj", "fc1", "fc2", "head"])
def test_dual_uniform_in_any_role(role: str, bits: int) -> None:
    """Also where the input comes as codes of another kernel, and with dynamic inputs."""
    model = build(**DEPTH, num_classes=40)
    for name in ("w8a8", "w8a8-dynamic"):
        recipe = quick(name, f"{role}.weight.segments=dual_uniform", f"{role}.weight.bits={bits}")
        statistics = vitq.calibrate(model, recipe, [images(model, 4, seed=2)]) if recipe.is_static else None
        executed = vitq.convert(model, recipe, statistics, dtype=torch.float32)
        assert sqnr(vitq.simulate(model, recipe, statistics)(images(model)), executed(images(model))) > 35
        rows = [row for row in vitq.explain(executed) if row.role == role]
        assert rows and all(("segments" if bits == 8 else "columns") in row.format for row in rows)
        through_float = bits == 8 and name == "w8a8" and role in ("proj", "fc2")
        assert all(("comes as floats" in row.note) == through_float for row in rows)


def test_a_layer_too_small_to_divide_says_so() -> None:
    converted = convert(build(depth=1, num_classes=10), quick("w8a8", "head.weight.segments=dual_uniform"))
    assert "too small to divide its columns" in next(row.note for row in vitq.explain(converted) if row.role == "head")
    assert "segments" not in repr(converted.head)


def test_dual_uniform_wins_back_outlier_columns() -> None:
    """Columns stretched as a LayerNorm fold does it: at 4 bits two scales a row keep what one loses."""
    model = build(**DEPTH)
    with torch.no_grad():
        for block in model.blocks:
            for norm, linear in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
                norm.weight[:20] /= 12
                norm.bias[:20] /= 12
                linear.weight[:, :20] *= 12
    x = images(model)
    found = {name: sqnr(model(x), convert(model, quick("w4a8", *changes))(x)) for name, changes in {
        "one": ["transforms=[]"], "dual": ["transforms=[]", "qkv.weight.segments=dual_uniform", "fc1.weight.segments=dual_uniform"]}.items()}
    assert found["dual"] > found["one"] + 3


def test_backends_agree_and_repeat(model) -> None:
    recipe, x = quick("w8a8"), images(model)
    statistics = vitq.calibrate(model, recipe, [images(model, 4, seed=2)])
    runs = {b: vitq.convert(model, recipe, statistics, b, dtype=torch.float32) for b in ("reference", "cpu")}
    assert sqnr(runs["reference"](x), runs["cpu"](x)) > 40
    again = vitq.convert(model, recipe, statistics, "cpu", dtype=torch.float32)
    assert torch.equal(again(x), runs["cpu"](x)) and torch.equal(again(x), again(x))


def test_batches_do_not_change_an_image(static, model) -> None:
    x = images(model, 5)
    assert torch.equal(static(x)[:1], static(x[:1]))


@pytest.mark.parametrize("classes", [1, 3, 10, 37])
def test_odd_heads_take_the_fast_path(classes: int) -> None:
    model = build(num_classes=classes, depth=1)
    converted = convert(model, quick("w8a8"), backend="cpu")
    row = next(r for r in vitq.explain(converted) if r.role == "head")
    assert row.backend == "cpu" or "neither AMX nor AVX512-VNNI" in row.note
    assert sqnr(model(images(model)), converted(images(model))) > 20


# timm's surface -------------------------------------------------------------------------------------------------------


def test_source_is_untouched() -> None:
    model = build(**DEPTH)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kinds = [type(m) for m in model.modules()]
    convert(model, quick("w8a8"))
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_timm_surface(model, static) -> None:
    x = images(model)
    assert static.num_classes == model.num_classes and static.pretrained_cfg == model.pretrained_cfg
    features = static.forward_features(x)
    assert features.shape == model.forward_features(x).shape
    assert torch.equal(static.forward_head(features), static(x))
    final, kept = static.forward_intermediates(x)
    reference, expected = model.forward_intermediates(x)
    assert [k.shape for k in kept] == [e.shape for e in expected]
    # a fused block may overwrite its own temporaries, never what a caller kept
    assert all(sqnr(e, k.float()) > 25 for k, e in zip(kept, expected))
    assert isinstance(static, type(model))


def test_swin_surface() -> None:
    model = build("swin_tiny_patch4_window7_224", depths=(1, 1, 2, 1))
    converted = convert(model, quick("w8a8"))
    x = images(model)
    expected = model.forward_intermediates(x, intermediates_only=True)
    assert all(sqnr(e, k.float()) > 20 for k, e in zip(converted.forward_intermediates(x, intermediates_only=True), expected))


STEMS = ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2",
         "vit_base_patch16_clip_224", "vit_medium_patch16_gap_240", "vit_base_patch16_siglip_224"]


@pytest.mark.parametrize("name", STEMS)
def test_the_fused_stem_is_timms(name: str) -> None:
    """In float32 nothing is rounded in between: class, distillation and register tokens, norm_pre, any position embedding."""
    model = build(name, depth=1, embed_dim=64, num_heads=2, img_size=56)
    converted = convert(model, quick("w8a8"), backend="reference", dtype=torch.float32)
    assert converted.vitq.stem is not None
    x = images(model, 2)
    features = converted.forward_features(x)
    assert torch.equal(converted.forward_intermediates(x)[0], features)
    assert torch.equal(converted.forward_head(features), converted(x))
    with pytest.raises(ValueError, match=re.escape("images must be [batch, 3, 56, 56], got [1, 3, 56, 48]")):
        converted(x[:1, :, :, :48])


@pytest.mark.parametrize("kwargs", [{"dynamic_img_size": True}, {"pos_embed": "none"}, {"patch_drop_rate": 0.5},
                                    {"pos_drop_rate": 0.1}])
def test_other_stems_run_timms_code(kwargs: dict) -> None:
    model = build("vit_tiny_patch16_224", depth=1, **kwargs)
    converted = convert(model, quick("w8a8"), dtype=torch.float32)
    assert converted.vitq.stem is None
    assert sqnr(model(images(model)), converted(images(model))) > 20


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_hooks_see_every_token_and_the_logits_stay(name: str, backend: str) -> None:
    """Without hooks the last block computes what the head reads, and blocks write over their input."""
    model = build(name, depth=3)
    converted, x, seen = convert(model, quick("w8a8"), backend=backend), images(model), {}
    for masks in ({}, {"is_causal": True}):
        expected = converted(x, **masks)
        handles = [module.register_forward_hook(lambda m, a, y, at=at: seen.__setitem__(at, (a[0], a[0].clone(), y, y.clone())))
                   for at, module in enumerate([*converted.blocks, converted.norm])]
        assert torch.equal(converted(x, **masks), expected)
        for taken, taken_then, given, given_then in seen.values():
            assert given.shape == (2, model.pos_embed.shape[1], 192)
            assert torch.equal(taken, taken_then) and torch.equal(given, given_then), "what a hook kept was overwritten"
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name, parts", [("deit_tiny_patch16_224", ("patch_embed", "blocks", "pos_drop")),
                                         ("swin_tiny_patch4_window7_224", ("layers", "layers.1", "layers.1.blocks"))])
def test_hooks_on_what_the_fast_path_leaves_out_fire(name: str, parts: tuple[str, ...]) -> None:
    model = build(name, **({"depths": (1, 1)} if "swin" in name else {"depth": 2}))
    converted, x, seen = convert(model, quick("w8a8"), dtype=torch.float32), images(model), []
    expected = converted(x)
    for part in parts:
        handle = converted.get_submodule(part).register_forward_hook(lambda m, a, y: seen.append(y.shape))
        assert sqnr(expected, converted(x)) > 60 and len(seen) == 1
        handle.remove()
        seen.clear()


def test_a_check_copies_no_weights(monkeypatch) -> None:
    """Unless statistics are to be compared with them."""
    model, made = build(depth=1, img_size=64, embed_dim=96, num_heads=4), []
    monkeypatch.setattr("vitq.conversion.prepare", lambda *args, **kwargs: made.append(prepare(*args, **kwargs)) or made[-1])
    vitq.check(model, ["w8a8", "quik-w4a4", "phq-w8"])
    assert len(made) == 1 and all(p.is_meta for p in made[0].model.parameters())
    vitq.check(model, "w8a8", vitq.calibrate(model, quick("w8a8"), [images(model, 4)]))
    with pytest.raises(ValueError, match="matches no layer"):
        vitq.check(model, vitq.Recipe.from_yaml("w8a8").with_overrides(["name:block.0.*.weight.bits=8"]))
    model.blocks[0].mlp.fc1.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match="'blocks.0.mlp.fc1.weight' holds 1 NaN"):
        vitq.check(model, "w8a8")


@pytest.mark.parametrize("name, changes, readings", [
    ("w8a8", [], ["statistics"]), ("erq-w4a4", [], ["statistics", "Gram matrices"]), ("gptq-w4a16", [], ["Gram matrices"]),
    ("phq-mixed", ["solver=gptq"], ["scores", "statistics", "Gram matrices"])])
def test_progress_says_each_reading_of_the_data(name: str, changes: list[str], readings: list[str]) -> None:
    model, seen = build(depth=1, img_size=64, embed_dim=96, num_heads=4), []
    recipe, data = quick(name, "calib_size=4", *changes), images(model, 5).split(3)
    vitq.convert(model, recipe, data, progress=seen.append)
    assert seen == [3, 1] * len(readings)
    if "Gram matrices" in readings:
        layers, seen[:] = sum(row.format.startswith("W") for row in vitq.explain(vitq.convert(model, recipe, data))), []
        vitq.convert(model, recipe, data, memory=1.0, progress=seen.append)
        assert seen == [3, 1] * (len(readings) - 1 + layers), "a reading for each layer's matrix"


def test_no_head_gives_features() -> None:
    model = build(num_classes=0, depth=1)
    converted = convert(model, quick("w8a8"))
    assert converted(images(model)).dtype == torch.float32
    assert sqnr(model(images(model)), converted(images(model))) > 20


def test_dynamic_image_size() -> None:
    model = build("vit_tiny_patch16_224", depth=2, dynamic_img_size=True)
    with pytest.raises(ValueError, match="multiple of the patch size"):
        vitq.convert(model, quick("w8a8"), torch.zeros(4, 3, 150, 150))
    converted = convert(model, quick("w8a8"))
    x = torch.randn(1, 3, 160, 192, generator=torch.Generator().manual_seed(3))
    assert sqnr(model(x), converted(x)) > 20


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-dynamic"])
def test_swin_of_any_size_pads_with_the_code_of_zero(recipe: str) -> None:
    model = build("swin_tiny_patch4_window7_224", depths=(1, 1, 2, 1), strict_img_size=False)
    converted = convert(model, quick(recipe), dtype=torch.float32)
    x = torch.randn(1, 3, 200, 248, generator=torch.Generator().manual_seed(3))
    assert sqnr(model(x), converted(x)) > 20


def test_attention_masks(model) -> None:
    """Against the simulation: a mask that calibration did not see moves activations out of their ranges in both."""
    x, recipe = images(model), quick("w8a8")
    statistics = vitq.calibrate(model, recipe, [images(model, 4, seed=2)])
    static, simulated = vitq.convert(model, recipe, statistics, dtype=torch.float32), vitq.simulate(model, recipe, statistics)
    n = model.pos_embed.shape[1]
    keep = torch.ones(n, n, dtype=torch.bool)
    keep[:, n // 2:] = False
    for kwargs in ({"attn_mask": keep}, {"is_causal": True}):
        assert sqnr(simulated(x, **kwargs), static(x, **kwargs)) > 35
        assert sqnr(simulated(x), static(x, **kwargs)) < 30, "the mask must change the result"
    for shape in ((2, 3, n, n), (3, n, n)):
        with pytest.raises(ValueError, match="differs between heads"):
            static(x, attn_mask=torch.zeros(shape))


def test_copies_and_state_dict(model, static) -> None:
    x = images(model)
    y = static(x)
    clone = copy.deepcopy(static)
    assert torch.equal(clone(x), y)
    other = convert(build(seed=5, **DEPTH), quick("w8a8"))
    assert not torch.equal(other(x), y)
    other.load_state_dict(static.state_dict())
    assert torch.equal(other(x), y), "packed weights must follow load_state_dict"
    assert torch.equal(static.to("cpu")(x), y) and torch.equal(static.eval()(x), y)


@pytest.mark.parametrize("act", [lambda m: m.half(), lambda m: m.train(), lambda m: m.to(torch.float16), lambda m: m.bfloat16(),
                                 lambda m: m.double(), lambda m: m.float(), lambda m: m.type(torch.float16),
                                 lambda m: m.blocks.half()])
def test_refuses_what_integers_cannot_follow(static, act) -> None:
    with pytest.raises(RuntimeError, match="quantized model"):
        act(static)


def test_refuses_pickle(static, tmp_path) -> None:
    with pytest.raises(TypeError, match="vitq.save"):
        torch.save(static, tmp_path / "model.pt")


# Calibration data -----------------------------------------------------------------------------------------------------


def test_every_form_of_calibration_data_gives_the_same_model(model) -> None:
    recipe, x = quick("w8a8"), images(model, 4, seed=2)
    labels = torch.zeros(4, dtype=torch.long)
    forms = [x, [x], [x[:2], x[2:]], [(x, labels)], [{"image": x}], DataLoader(TensorDataset(x, labels), batch_size=3),
             (batch for batch in [x]), vitq.calibrate(model, recipe, [x])]
    expected = vitq.convert(model, recipe, [x]).state_dict()
    for form in forms:
        found = vitq.convert(model, recipe, form).state_dict()
        assert all(torch.equal(found[k], v) for k, v in expected.items())


def test_reads_no_more_than_calib_size(model) -> None:
    read = []

    def data():
        for i in range(100):
            read.append(i)
            yield images(model, 2, seed=i)

    statistics = vitq.calibrate(model, quick("w8a8", calib_size=5), data())
    assert statistics.samples == 5 and len(read) == 3


def test_one_calibration_serves_several_recipes(model) -> None:
    """What is observed by channel for one is merged for another; few bins do where the largest values are all."""
    data = [images(model, 4, seed=2)]
    names = ["w8a8", "smoothquant-w8a8", "dgq-w4a8", "w4a4"]
    plain = quick("w8a8", "transforms=[]", "input.observer=percentile")
    recipes = [*(quick(name) for name in names), plain]
    shared = vitq.calibrate(model, recipes, data)
    x = images(model, 2, seed=5)
    for recipe in recipes:
        kept = data if recipe.needs_inputs else None
        alone, of_all = (vitq.convert(model, recipe, kept, statistics=s)(x) for s in (vitq.calibrate(model, recipe, data), shared))
        assert torch.equal(alone, of_all) or recipe is plain and sqnr(alone, of_all) > 20, recipe.name
    with pytest.raises(ValueError, match="they were collected for another recipe"):  # its bins are too few for a static scale
        vitq.convert(model, quick("w8a8", "transforms=[smoothquant]"), vitq.calibrate(model, quick("smoothquant-w8a8"), data))
    with pytest.raises(ValueError, match="no recipe to calibrate for"):
        vitq.calibrate(model, [], data)


def test_saved_statistics(model, tmp_path) -> None:
    recipe = quick("w8a8")
    statistics = vitq.calibrate(model, recipe, [images(model, 4, seed=2)])
    statistics.save(tmp_path / "stats.safetensors")
    loaded = vitq.Statistics.load(tmp_path / "stats.safetensors")
    a, b = (vitq.convert(model, recipe, s).state_dict() for s in (statistics, loaded))
    assert all(torch.equal(a[k], v) for k, v in b.items())
    with pytest.raises(ValueError, match="another model"):
        vitq.convert(build(depth=1), recipe, loaded)
    with pytest.raises(ValueError, match="other weights"):
        vitq.convert(build(seed=3, **DEPTH), recipe, loaded)
    with pytest.raises(ValueError, match="another recipe"):
        vitq.convert(model, recipe, vitq.calibrate(model, quick("w8a8", "transforms=[]"), [images(model, 4, seed=2)]))


def test_bad_calibration_data(model) -> None:
    recipe = quick("w8a8", calib_size=64)
    good = images(model, 4)
    nan = good.clone()
    nan[1, 0, 3, 3] = float("nan")
    for data, error, match in [
        ([], ValueError, "holds 0 images"),
        ([good[:3]], ValueError, "needs at least 4"),
        ([nan], ValueError, "image 1 of a batch holds NaN"),
        ([good[:, :1]], ValueError, r"\[batch, 3, height, width\]"),
        ([good[..., :100]], ValueError, "must be 224x224"),
        ([(good * 255).to(torch.uint8)], TypeError, "must be floating point"),
        (["image.png"], TypeError, "image batches"),
        ([good[0]], ValueError, r"\[batch, 3, height, width\]"),
    ]:
        with pytest.raises(error, match=match):
            vitq.convert(model, recipe, data)


# Refusals -------------------------------------------------------------------------------------------------------------


def test_static_recipe_without_data_names_the_dynamic_one(model) -> None:
    with pytest.raises(ValueError, match="w8a8-dynamic"):
        vitq.convert(model, "w8a8")


def test_one_argument_is_dynamic(model) -> None:
    converted = vitq.convert(model)
    assert converted.vitq.recipe.name == "w8a8-dynamic"
    assert sqnr(model(images(model)), converted(images(model))) > 20


def test_default_recipe_with_data_is_static(model) -> None:
    with pytest.raises(ValueError, match="w8a8"):
        vitq.convert(model, calib=[images(model, 4)])  # fewer than 128/16


def test_damaged_weights_are_named() -> None:
    model = build(depth=1)
    model.blocks[0].mlp.fc1.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=re.escape("'blocks.0.mlp.fc1.weight' holds 1 NaN")):
        vitq.convert(model)


def test_overflowing_activations_are_named() -> None:
    model = build(depth=1)
    model.blocks[0].mlp.fc1.weight.mul_(1e38)
    with pytest.raises(ValueError, match=re.escape("activation 'blocks.0.mlp.fc2:input'")):
        convert(model, quick("w8a8"))


def test_unknown_parts_are_refused_by_name() -> None:
    with pytest.raises(vitq.UnsupportedModelError, match="no adapter for timm.models.resnet.ResNet"):
        vitq.convert(timm.create_model("resnet18"))
    model = build(depth=1)
    model.blocks[0].attn = torch.nn.MultiheadAttention(192, 3)
    with pytest.raises(vitq.UnsupportedModelError, match=re.escape("'blocks.0.attn' (MultiheadAttention)")):
        vitq.convert(model)
    model = build(depth=1)
    model.extra = torch.nn.Linear(4, 4)
    with pytest.raises(vitq.UnsupportedModelError, match=re.escape("'extra' (Linear")):
        vitq.convert(model)


def test_what_a_swap_would_lose_is_refused() -> None:
    class Attention(timm.layers.Attention):
        """Shares timm's name and computes something else."""

    class LoraLinear(torch.nn.Linear):
        pass

    def changed(change):
        model = build(depth=1)
        change(model.blocks[0])
        return model

    def other_class(module, cls):
        module.__class__ = cls

    for change, match in [
        (lambda b: other_class(b.attn, Attention), "attention 'blocks.0.attn'"),
        (lambda b: other_class(b.mlp.fc1, LoraLinear), "LoraLinear, which may compute"),
        (lambda b: torch.nn.utils.parametrizations.weight_norm(b.mlp.fc1), "parametrized"),
        (lambda b: setattr(b.attn, "extra", torch.nn.Linear(4, 4)), "blocks.0.attn.extra"),
        (lambda b: b.attn.register_forward_hook(lambda m, a, o: o * 0), "forward hooks"),
        (lambda b: setattr(b, "norm1", type("NormMixer", (torch.nn.Linear,), {})(192, 192)), "NormMixer"),
    ]:
        with pytest.raises(vitq.UnsupportedModelError, match=match):
            vitq.convert(changed(change))


def test_broken_images_give_nan_like_the_float_model(static, model) -> None:
    x = images(model, 3)
    x[1, 0, 5, 5] = float("nan")
    y = static(x)
    assert torch.isnan(y[1]).all() and torch.isfinite(y[[0, 2]]).all()
    assert torch.equal(y[[0, 2]], static(x[[0, 2]]))
    with pytest.raises(TypeError, match="preprocessed"):
        static((x * 255).to(torch.uint8))
    assert static(images(model).double()).dtype == torch.float32


def test_name_patterns_that_match_nothing(model) -> None:
    with pytest.raises(ValueError, match=re.escape("'blocsk.0.*' matches no layer")):
        vitq.convert(model, quick("w8a8-dynamic", "name:blocsk.0.*.bits=16"))


def test_explicit_backend_of_another_device(model) -> None:
    with pytest.raises(ValueError, match="cannot run on cpu"):
        vitq.convert(model, backend="cuda")


@pytest.mark.parametrize("kwargs, match", [
    ({"backend": "tpu"}, "backend must be one of"), ({"dtype": torch.int8}, "dtype must be one of"),
    ({"recipe": "w9a9"}, "w8a8"),
])
def test_bad_arguments(model, kwargs: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        vitq.convert(model, **kwargs)


def test_not_a_model_and_twice(static) -> None:
    with pytest.raises(TypeError, match="torch.nn.Module"):
        vitq.convert("deit_small_patch16_224")
    with pytest.raises(ValueError, match="already quantized"):
        vitq.convert(static)
    with pytest.raises(TypeError, match="vitq.convert"):
        vitq.explain(build(depth=1))


# Recipes reach the layers ---------------------------------------------------------------------------------------------


def test_layers_left_in_float(model) -> None:
    recipe = quick("w8a8", "head.bits=16", "patch_embed.bits=16", "qk.bits=16", "pv.bits=16", "name:blocks.1.mlp.*.bits=16")
    converted = convert(model, recipe)
    rows = {row.layer: row for row in vitq.explain(converted)}
    for name in ("head", "patch_embed.proj", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2"):
        assert rows[name].kernel == "torch" and "leaves it in float" in rows[name].note
    assert rows["blocks.0.attn.qk"].kernel == "sdpa"
    assert rows["blocks.0.mlp.fc1"].format.startswith("W8A8")
    assert converted(images(model)).dtype == torch.float32
    assert sqnr(model(images(model)), converted(images(model))) > 20


def test_half_an_attention_is_refused(model) -> None:
    with pytest.raises(ValueError, match="qk and pv both"):
        convert(model, quick("w8a8", "qk.bits=16"))


@pytest.mark.parametrize("bits, note", [(3, "3-bit codes are stored in 4 bits"), (6, "6-bit codes are stored in 8 bits"), (8, "")])
def test_explain_says_where_storage_is_wider(bits: int, note: str) -> None:
    rows = vitq.explain(vitq.convert(build(**DEPTH), quick("w8a8-dynamic", f"fc1.weight.bits={bits}")))
    notes = [row.note for row in rows if row.role == "fc1"]
    assert notes and all(("are stored in" in found) == bool(note) and note in found for found in notes)


def test_explain_rows(model) -> None:
    rows = vitq.explain(convert(model, quick("w4a8"), backend="reference"))
    roles = {row.role for row in rows}
    assert {"patch_embed", "qkv", "qk", "pv", "proj", "fc1", "fc2", "head"} <= roles
    assert all(row.backend == "reference" for row in rows if row.kernel != "torch")
    fc1 = next(row for row in rows if row.layer == "blocks.0.mlp.fc1")
    assert fc1.bytes < 192 * 768 and "packed int4" in fc1.note and "LayerNorm fold" in fc1.note


def test_float_norms_are_explained_and_keep_their_names(model) -> None:
    converted = convert(model, quick("w8a8"), dtype=torch.float16)
    row = next(r for r in vitq.explain(converted) if r.layer == "norm")
    assert (row.role, row.format, row.bytes) == ("norm", "float16", 2 * 4 * 192)
    swin = convert(build("swin_tiny_patch4_window7_224", depths=(1, 1, 2, 1)), quick("w8a8"))
    names = {"patch_embed.norm", "layers.1.downsample.norm", "layers.0.blocks.0.norm1", "norm"}
    assert names <= {r.layer for r in vitq.explain(swin) if r.role == "norm"}
    assert {f"{name}.{leaf}" for name in names for leaf in ("weight", "bias")} <= swin.state_dict().keys()


def test_fallback_is_said(model, monkeypatch) -> None:
    from vitq.ops import linear

    monkeypatch.setattr(linear, "cpu_int8_isa", lambda: None)
    row = next(r for r in vitq.explain(convert(model, quick("w8a8"))) if r.role == "fc1")
    assert row.backend == "reference" and "neither AMX nor AVX512-VNNI" in row.note


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-dynamic"])
def test_every_float_dtype_runs(model, recipe: str, dtype: torch.dtype) -> None:
    converted = convert(model, quick(recipe), dtype=dtype)
    assert converted.pos_embed.dtype == dtype and converted.head.weight_scale.dtype == torch.float32
    assert sqnr(model(images(model)), converted(images(model))) > 20


def test_linear_module() -> None:
    linear = torch.nn.Linear(40, 24)
    x = torch.randn(3, 7, 40, generator=torch.Generator().manual_seed(0))
    for recipe, floor in (("w8a8-dynamic", 35), ("w8a8", 33), ("w4a8", 14)):
        module = vitq.linear_module(linear, recipe, x, dtype=torch.float32)
        assert sqnr(linear(x), module(x)) > floor
    with pytest.raises(ValueError, match="sample="):
        vitq.linear_module(linear, "w8a8")


def test_blocks_hand_over_codes(static) -> None:
    """Nothing in float between norm and fc2 of a fused block."""
    seen = {}
    block = static.blocks[0]
    for name in ("norm1", "attn.qkv", "norm2", "mlp.fc1"):
        block.get_submodule(name).register_forward_hook(lambda m, a, o, name=name: seen.__setitem__(name, type(o)))
    static(torch.zeros(1, 3, 224, 224))
    assert set(seen.values()) == {QTensor} and len(seen) == 4


# Tuning ---------------------------------------------------------------------------------------------------------------


def test_tuning_needs_a_gpu_and_a_converted_model(static, model) -> None:
    with pytest.raises(ValueError, match="tuned on a GPU"):
        vitq.tune(static, images(model))
    with pytest.raises(TypeError, match="vitq.convert"):
        vitq.tune(model, images(model))


@pytest.mark.gpu
def test_tuned_tiles_are_remembered_and_change_nothing(static, model, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("VITQ_CACHE", str(tmp_path))
    on_gpu, x = copy.deepcopy(static).cuda(), images(model).cuda()
    before = on_gpu(x)
    times = vitq.tune(on_gpu, x)
    assert times and all(list(found.values()) == sorted(found.values()) for found in times.values())
    assert list(tmp_path.glob("tuning-*.json"))
    assert torch.equal(on_gpu(x), before)
