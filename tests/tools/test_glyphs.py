"""tools/train_demo.py --task glyphs and tools/compare_methods.py: from fonts to a table, at their smallest."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import vitq

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
for package in ("rendercv_fonts", "pymupdf_fonts", "font_source_serif_pro", "font_manrope"):
    if importlib.util.find_spec(package) is None:
        pytest.skip("needs pip install vitq[glyphs]", allow_module_level=True)

import _glyphs  # noqa: E402
import compare_methods  # noqa: E402
import train_demo  # noqa: E402

pytestmark = pytest.mark.xdist_group("glyphs")


@pytest.fixture(scope="module")
def glyphs() -> _glyphs.Glyphs:
    return _glyphs.Glyphs()


def test_there_are_hundreds_of_classes(glyphs) -> None:
    assert len(glyphs.classes) >= 500 and list(glyphs.classes) == sorted(glyphs.classes)
    assert not set(_glyphs.TRAIN) & set(_glyphs.TEST)
    for alike in ("A\u0391\u0410", "o\u03bf\u043e"):  # Latin, Greek, Cyrillic
        assert len({glyphs.class_of[ord(c)] for c in alike}) == 1
    assert len({glyphs.class_of[ord(c)] for c in "cCoO0Il1|\u00e0\u00e1\u00e2"}) == 12


def test_images_show_their_class(glyphs) -> None:
    """Undistorted images are the renderings of their own class; distorted ones differ from draw to draw, and repeat with the seed."""
    ink, label = glyphs.render("test")
    assert int(torch.bincount(label, minlength=len(glyphs.classes)).min()) >= _glyphs.IN_TEST
    wanted = torch.randint(len(glyphs.classes), (40,), generator=torch.Generator().manual_seed(0))
    tiles = _glyphs.Sampler(ink, label, len(glyphs.classes), 0).tiles(wanted)
    for tile, y in zip(tiles, wanted):
        assert any(torch.equal(tile[0] * 255, own.float()) for own in ink[label == y])
    first, second, third = (_glyphs.Sampler(ink, label, len(glyphs.classes), seed).images(wanted) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, third)
    assert first.shape == (40, 1, _glyphs.SIDE, _glyphs.SIDE) and 0 <= float(first.min()) and float(first.max()) <= 1


def test_distortion_waits_for_the_model(glyphs) -> None:
    ink, label = glyphs.render("train")
    batches = _glyphs.Batches(ink[:2000], label[:2000] % 3, 3, 32, 4, 0)
    assert batches(0.0)[0].shape == (4, 3, 32, 32) and batches.strength == 0.0
    batches(0.9)
    assert batches.strength == _glyphs.PACE


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """Weights that have seen almost nothing, and the folder of images."""
    folder = tmp_path_factory.mktemp("glyphs")
    assert train_demo.main(["--output", str(folder), "--task", "glyphs", "--arch", "test_vit", "--device", "cpu", "--limit", "8",
                            "--batch-size", "4", "--epochs", "1", "--test-images", "1"]) == 0
    return folder / "test_vit.glyphs.safetensors", folder / "glyphs"


def test_methods_are_compared(trained, tmp_path, capsys) -> None:
    weights, data = trained
    assert train_demo.main(["--output", str(data.parent), "--task", "glyphs", "--images-only", "--limit", "8"]) == 0  # they are there already
    run = ["--models", f"test_vit={weights}", "--data", str(data), "--device", "cpu", "--limit", "20", "--draws", "2", "--calib-size", "4",
           "--output", str(tmp_path)]
    assert compare_methods.main([*run, "--recipes", "erq-w4a4", "--methods", "baselines,one segment", "--simulate"]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "methods.json").read_text())["models"][0]
    assert found["images"] == 20 and [r["method"] for r in found["rows"]] == ["rtn", "fold", "fold+gptq", "recipe", "one segment"]
    for r in found["rows"]:
        assert len(r["drops"]) == 2 and r["low"] <= r["drop"] <= r["high"] and r["seconds"] > 0 and 0 < r["size"] < 1
        assert r["drop"] == pytest.approx(sum(r["drops"]) / 2) and r["top1"] == pytest.approx(found["float"] - r["drop"])
        assert abs(r["executed_less_simulated"]) <= 10  # two of 20 images
    said = "erq-w4a4: q, k and v have 4 bits in int8 storage; probabilities are unsigned, 8 bits, uniform"
    assert found["notes"][0].startswith(said) and said in out and said in (tmp_path / "methods.md").read_text()
    assert "fold+gptq" in out and (tmp_path / "methods.png").read_bytes()[:4] == b"\x89PNG" and "| erq-w4a4 | rtn |" in (tmp_path / "methods.md").read_text()
    assert compare_methods.main([*run, "--recipes", "erq-w4a4-paper", "--methods", "recipe"]) == 0
    assert json.loads((tmp_path / "methods.json").read_text())["models"][0]["rows"][0]["size"] is None


@pytest.mark.parametrize("args, message", [
    (["--methods", "magic"], "unknown method magic"), (["--draws", "0"], "--draws must be at least 1"), (["--recipes", "w9"], "w9"), (["--crop-pct", "2"], "--crop-pct must be"),
    (["--calib-size", "999"], "lower --draws or --calib-size"), (["--models", "nothing"], "unknown model")])
def test_mistakes_of_compare_methods(trained, args, message, capsys) -> None:
    weights, data = trained
    assert compare_methods.main(["--models", f"test_vit={weights}", "--data", str(data), "--device", "cpu", *args]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("args, message", [
    (["--epochs", "0"], "--epochs must be at least 1"), (["--arch", "nothing"], "unknown model"), (["--images-only"], "--images-only is for"),
    (["--arch", "swin_t"], "taught by patch tokens")])
def test_mistakes_of_train_demo(args, message, tmp_path, capsys) -> None:
    assert train_demo.main(["--output", str(tmp_path), *args]) == 2
    assert message in capsys.readouterr().err


def test_every_method_is_a_recipe() -> None:
    args = compare_methods.parse(["--models", "x", "--data", "y", "--recipes", "erq-w4a4,erq-w8a8", "--methods", ",".join(compare_methods.METHODS)])
    recipes = compare_methods.rows_of(args)
    assert len(recipes) == 2 * len(compare_methods.METHODS)
    assert all(name in compare_methods.METHODS for names in compare_methods.SETS.values() for name in names.split(","))
    assert recipes["erq-w4a4", "rtn"].transforms == () and recipes["erq-w4a4", "fold"].solver == "rtn"
    assert recipes["erq-w4a4", "one segment"].resolve("qkv").weight.segments == "one" and isinstance(recipes["erq-w4a4", "recipe"], vitq.Recipe)
