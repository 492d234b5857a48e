"""vitq.evaluate: scores against hand-counted ones, layer errors against independently taken outputs."""
import math

import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vitq
from vitq.evaluate import compare, cuda_graph, evaluate, evaluate_models, layer_sqnr, score, sqnr_db
from vitq.nn.attention import QuantAttention

LOGITS = torch.tensor([[3.0, 1, 0], [0, 2, 1], [0, 1, 2], [5, 0, 0], [0, 0, 1]])
LABELS = torch.tensor([0, 1, 1, 0, -1])


class Brightness(nn.Module):
    """Logits that are a known function of the image: its mean in each of three channels."""

    def forward(self, x):
        return x.mean((2, 3))


# --- accuracy -----------------------------------------------------------------------------------------------------

def test_score_counts_labelled_images_only():
    e = score(LOGITS, LABELS)
    assert (e.n, e.top1, e.top5) == (5, 0.75, None)  # three classes: top-5 would say nothing
    assert e.per_class == {0: 1.0, 1: 0.5} and e.support == {0: 2, 1: 2}


def test_top5():
    logits = torch.arange(10.0).repeat(4, 1)  # class 9 first, class 5 fifth
    e = score(logits, torch.tensor([9, 5, 4, 0]))
    assert (e.top1, e.top5) == (0.25, 0.5)


def test_without_labels_there_is_no_accuracy():
    e = score(LOGITS, torch.full((5,), -1))
    assert e.top1 is None and e.top5 is None and e.per_class == {} and e.n == 5


def test_datasets_loaders_and_batches_give_the_same():
    images, labels = torch.rand(7, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    data = TensorDataset(images, labels)
    want = score(images.mean((2, 3)), labels)
    seen = []
    for source in (data, DataLoader(data, batch_size=2), [(images[:5], labels[:5]), (images[5:], labels[5:])],
                   [(x, int(y)) for x, y in data]):
        got = evaluate(Brightness(), source, batch_size=3, progress=seen.append)
        assert torch.equal(got.logits, want.logits) and torch.equal(got.labels, labels) and got.top1 == want.top1
    assert seen == [3, 3, 1, 2, 2, 2, 1, 5, 2, 3, 3, 1]
    assert evaluate(Brightness(), images).top1 is None  # images alone: no labels
    assert evaluate(Brightness(), data, labels=False).top1 is None


def test_models_see_each_image_once():
    images = (torch.full((3, 2, 2), float(i)) for i in range(4))  # a generator: cannot be read twice
    both = evaluate_models({"a": Brightness(), "b": Brightness()}, images, batch_size=3)
    assert both["a"].n == 4 and torch.equal(both["a"].logits, both["b"].logits)


@pytest.mark.parametrize("data, message", [
    ([], "no images"), ([(torch.full((1, 3, 2, 2), math.nan), [0])], "logits of model hold NaN.*image 0"),
    ([(torch.ones(1, 3, 2, 2), [3])], "label 3 has no class.*0..2"), ([(torch.ones(2, 3, 2, 2), [1])], "2 images and 1 labels")])
def test_bad_data_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        evaluate(Brightness(), data)


def test_bad_arguments_are_refused():
    with pytest.raises(TypeError, match="must yield images"):
        evaluate(Brightness(), ["x.png"])
    with pytest.raises(ValueError, match="batch_size"):
        evaluate(Brightness(), [torch.ones(3, 2, 2)], batch_size=0)
    with pytest.raises(TypeError, match="must return logits"):
        evaluate(nn.Identity(), [torch.ones(3, 2, 2)])


def test_agreement_and_sqnr():
    same = compare(LOGITS, LOGITS)
    assert (same.equal, same.sqnr_db) == (1.0, math.inf)
    other = LOGITS.clone()
    other[0] = torch.tensor([0.0, 9, 0])
    assert compare(LOGITS, other).equal == 0.8
    assert sqnr_db(torch.tensor([3.0, 4]), torch.tensor([3.0, 4.5])) == pytest.approx(20.0)
    assert sqnr_db(torch.zeros(2), torch.ones(2)) == -math.inf
    for a, b in ((LOGITS, LOGITS[:2]), (LOGITS[:0], LOGITS[:0])):
        with pytest.raises(ValueError, match="same images"):
            compare(a, b)


# --- SQNR by layer ------------------------------------------------------------------------------------------------

def model_of(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=7, **kwargs).eval()


MODELS = {
    "vit": ("vit_tiny_patch16_224", dict(img_size=32, depth=2, embed_dim=32, num_heads=2, init_values=0.1)),
    "qk-norm": ("vit_tiny_patch16_224", dict(img_size=32, depth=2, embed_dim=32, num_heads=2, qk_norm=True)),
    "swin": ("swin_tiny_patch4_window7_224", dict(img_size=40, window_size=4, embed_dim=32, depths=(2, 2), num_heads=(2, 4))),
}


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-dynamic"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_quantized_layer_has_a_plausible_error(kind, recipe):
    name, kwargs = MODELS[kind]
    model = model_of(name, **kwargs)
    images = torch.randn(5, 3, kwargs["img_size"], kwargs["img_size"], generator=torch.Generator().manual_seed(1))
    recipe = vitq.Recipe.from_yaml(recipe).with_overrides(["calib_size=5"])
    quantized = vitq.convert(model, recipe, [images] if recipe.is_static else None, dtype=torch.float32)
    seen = []
    rows = layer_sqnr(model, quantized, images, batch_size=2, progress=seen.append)
    assert seen == [2, 2, 1]
    explained = [r.layer for r in vitq.explain(quantized) if r.format.startswith(("W", "P")) or r.layer.endswith(".pv")]
    blocks = [n for n, _ in quantized.named_modules() if n.split(".")[-2:-1] == ["blocks"]]
    assert sorted(r.layer for r in rows) == sorted(explained + blocks)
    assert [r.sqnr_db for r in rows] == sorted(r.sqnr_db for r in rows)
    assert rows[0].sqnr_db > 18, rows[0]  # a mixed-up layout, activation or residual is below 10 dB
    # Nothing is left behind.
    attentions = [m for m in quantized.modules() if isinstance(m, QuantAttention)]
    assert attentions and not any("attend" in m.__dict__ for m in attentions)
    assert not any(m._forward_hooks for m in quantized.modules())


def test_layer_errors_are_those_of_the_outputs():
    name, kwargs = MODELS["vit"]
    model, images = model_of(name, **{**kwargs, "init_values": None}), torch.randn(4, 3, 32, 32)
    recipe = vitq.Recipe.from_yaml("w8a8").with_overrides(["calib_size=4"])
    quantized = vitq.convert(model, recipe, [images], dtype=torch.float32)
    rows = {r.layer: r for r in layer_sqnr(model, quantized, images)}

    def streams(m):
        """What enters block 1, its norm2, and what leaves it."""
        kept, block = {}, m.blocks[1]
        hooks = [block.register_forward_pre_hook(lambda _, a: kept.update(start=a[0].clone())),
                 block.norm2.register_forward_pre_hook(lambda _, a: kept.update(middle=a[0].clone())),
                 block.register_forward_hook(lambda _, a, y: kept.update(end=y.clone()))]
        with torch.no_grad():
            kept["logits"] = m(images)
        for hook in hooks:
            hook.remove()
        return kept

    a, b = streams(model), streams(quantized)
    assert rows["blocks.1"].role == "block"
    for layer, take in (("blocks.1", lambda s: s["end"]), ("blocks.1.attn.proj", lambda s: s["middle"] - s["start"]),
                        ("blocks.1.mlp.fc2", lambda s: s["end"] - s["middle"]), ("head", lambda s: s["logits"])):
        assert rows[layer].sqnr_db == pytest.approx(sqnr_db(take(a), take(b)), abs=0.02), layer


def test_layer_sqnr_refuses_what_are_no_images():
    with pytest.raises(ValueError, match="images must be a tensor"):
        layer_sqnr(nn.Identity(), nn.Identity(), torch.zeros(0, 3, 4, 4))


# --- graphs -------------------------------------------------------------------------------------------------------

def test_a_graph_needs_cuda():
    fn, reason = cuda_graph(torch.sin, torch.zeros(2))
    assert fn is torch.sin and "CUDA" in reason


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_graph_replays():
    x = torch.zeros(4, device="cuda")
    fn, reason = cuda_graph(torch.cos, x)
    assert reason is None and torch.equal(fn(x), torch.ones_like(x))
    assert cuda_graph(lambda t: t.sum().item(), x)[1]  # reads the result on the host: cannot be captured
