"""The ```python blocks of README.md and docs/*.md run, each file in one namespace and in order, on shallow models and without a hub."""

from __future__ import annotations

import inspect
import re
import types
from pathlib import Path

import pytest
import timm
import torch

import vitq

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line of its first line, code) of every fenced block of a language."""
    text = page.read_text(encoding="utf-8")
    return [(text[: m.start(1)].count("\n"), m.group(1)) for m in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)]


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch):
    """timm.create_model and vitq.load_model give two blocks with random weights, whatever is asked for."""
    create, load, push_to_hub = timm.create_model, vitq.load_model, vitq.push_to_hub

    def create_shallow(name: str, pretrained: bool = False, **kwargs):
        torch.manual_seed(0)
        return create(name, pretrained=False, **{"depth": 2, **kwargs})

    monkeypatch.setattr(timm, "create_model", create_shallow)
    monkeypatch.setattr(vitq, "load_model", lambda name, weights="auto": load(name, "random"))
    monkeypatch.setattr(vitq, "load_language_model", lambda name: tiny_language_model())
    monkeypatch.setattr(vitq, "push_to_hub", lambda model, name, **options: inspect.signature(push_to_hub).bind(model, name, **options))
    monkeypatch.setattr(vitq, "open_text", lambda data, tokenizer, seqlen: types.SimpleNamespace(
        calib=torch.randint(128, (128, 16)), eval=torch.randint(128, (2, 16))))


def tiny_language_model() -> types.SimpleNamespace:
    language_models = pytest.importorskip("language_models", reason="needs pip install vitq[llm]", exc_type=ImportError)
    import transformers
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"[UNK]": 0, **{f"w{i}": i for i in range(1, 128)}}, unk_token="[UNK]"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", model_input_names=["input_ids", "attention_mask"])
    return types.SimpleNamespace(model=language_models.build(), tokenizer=tokenizer)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_examples_run(page: Path, shallow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = blocks(page, "python")
    if any('"demo"' in text for _, text in code):
        pytest.importorskip("conformal_clip_data")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for line, text in code:
        # the empty lines in front make a traceback point into the page
        exec(compile("\n" * line + text, str(page), "exec"), namespace)
    if page.name == "README.md":
        x = torch.randn(2, 3, 224, 224)
        assert torch.equal(namespace["quantized"](x), namespace["again"](x))
        tokens = torch.randint(128, (1, 16))
        assert torch.equal(namespace["small"](tokens).logits, namespace["opened"](tokens).logits)


def test_the_recipe_of_the_docs_is_one(tmp_path: Path):
    (_, text), = blocks(ROOT / "docs" / "recipes.md", "yaml")
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    recipe = vitq.Recipe.from_yaml(path)
    assert recipe.resolve("fc1", "blocks.0.mlp.fc1").is_float
    assert recipe.resolve("qk", "blocks.0.attn.qk").is_float
    assert recipe.resolve("fc1", "blocks.1.mlp.fc1").weight.bits == 4


LEARN = ("block_gradient.epochs=2", "fc1.input.observer=learned")  # on dynamic inputs


# What the list says, and a recipe that holds it: recipe, changes, the field that is refused.
@pytest.mark.parametrize(("said", "name", "changes", "refused"), [
    ("`transform` of anything but a linear layer's input", "w8a8-dynamic", ["fc1.weight.transform=hadamard"], "transform"),
    ("(a patch embedding's is none)", "w8a8", ["patch_embed.input.transform=hadamard"], "transform"),
    ("and keys (`qk.other`)", "w8a8-dynamic", ["kv.bits=8", "pv.other.transform=hadamard"], "transform"),
    ("of static scales", "w8a8", ["fc1.input.transform=hadamard"], "transform"),
    ("beside `outliers`", "w8a8-dynamic", ["fc1.input.transform=hadamard", "fc1.input.outliers=16"], "transform"),
    ("or `segments: dual_uniform` of the weight that reads it", "w8a8-dynamic", ["fc1.input.transform=hadamard", "fc1.weight.segments=dual_uniform"],
     "segments"),
    ("`clip_ratio` below 1 of a weight", "w8a8-dynamic", ["fc1.weight.clip_ratio=0.9"], "clip_ratio"),
    ("of static activations, of probabilities", "w8a8", ["fc1.input.clip_ratio=0.9"], "clip_ratio"),
    ("of static activations, of probabilities", "w8a8", ["pv.input.clip_ratio=0.9"], "clip_ratio"),
    ("of probabilities, beside `observer: learned`", "w8a8-dynamic", [*LEARN, "fc1.input.clip_ratio=0.9"], "clip_ratio"),
    ("`observer: learned` of static activations", "w8a8", ["block_gradient.epochs=2", "fc1.input.observer=learned"], "observer"),
    ("of a weight that is asymmetric", "w8a8-dynamic", [*LEARN, "fc1.weight.bits=4", "fc1.weight.symmetric=false", "fc1.weight.observer=learned"], "observer"),
    ("not `per_channel`", "w8a8-dynamic", [*LEARN, "fc1.weight.granularity=per_tensor", "fc1.weight.observer=learned"], "observer"),
    ("in segments", "w8a8-dynamic", [*LEARN, "fc1.weight.segments=dual_uniform", "fc1.weight.observer=learned"], "observer"),
    ("or a patch embedding's", "w8a8", ["block_gradient.epochs=2", "patch_embed.weight.observer=learned"], "observer"),
    ("whose input is static", "w8a8", ["block_gradient.epochs=2", "fc1.weight.observer=learned"], "observer"),
    ("or has 16 bits", "w8a8-dynamic", ["block_gradient.epochs=2", "fc1.input.bits=16", "fc1.weight.observer=learned"], "observer"),
    ("`learned` anywhere without `block_gradient`", "w8a8-dynamic", ["fc1.input.observer=learned"], "block_gradient"),
    ("`block_gradient` where nothing is learned", "w8a8-dynamic", ["block_gradient.epochs=2"], "block_gradient"),
])
def test_combinations_that_the_list_calls_refused_are(said: str, name: str, changes: list[str], refused: str):
    text = " ".join((ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").split())
    assert said in text.partition("These combinations are refused:")[2].partition("`outliers` is QUIK's")[0]
    with pytest.raises(ValueError, match=rf"{refused}: |^[\w.]+: 'learned', and {refused} is missing"):
        vitq.Recipe.from_yaml(name).with_overrides(changes)


def test_every_field_that_check_layer_refuses_is_in_a_list():
    """A new refusal of a field that the list of refused combinations does not name yet."""
    section = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8").partition("These combinations are\nrefused:")[2].partition("\n\n`outliers` is")[0]
    fields = set(re.findall(r'refuse\([^,]+, "(\w+)"', inspect.getsource(vitq.recipe.checks.check_layer)))
    words = {"bits": "16 bits", "symmetric": "asymmetric", "levels": "log√2", "granularity": "`per_channel`"}
    assert len(fields) > 8 and [field for field in sorted(fields) if words.get(field, field) not in section] == []


def test_the_least_transformers_is_said_alike():
    places = ("pyproject.toml", r'"transformers([^"]*)"'), *((page, r"transformers from ([\d.]+) on") for page in ("pyproject.toml", "README.md"))
    said = [(page, re.findall(pattern, (ROOT / page).read_text(encoding="utf-8"))) for page, pattern in places]
    assert [len(found) for _, found in said] == [2, 1, 1]
    assert len({version.removeprefix(">=") for _, found in said for version in found}) == 1, said


def test_the_readme_lists_every_recipe():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in vitq.recipes() if f"| `{name.replace('-paper', '')}` |" not in text] == [] and "`erq-*-paper`" in text


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_files_named_in_the_design_exist():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:vitq|tests|tools|recipes|docs)/[\w/.-]+\.(?:py|c|yaml|md))`", text))
    assert named and [name for name in sorted(named) if not (ROOT / name).exists()] == []
