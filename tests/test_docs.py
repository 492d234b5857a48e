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
    return types.SimpleNamespace(model=language_models.build(), tokenizer=None)


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
