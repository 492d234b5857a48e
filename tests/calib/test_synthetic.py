"""Calibration images made from the model alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import build
from safetensors.torch import save_file

import vitq
from vitq.calib import synthetic
from vitq.calib.synthetic import similarity_entropy, synthesize

CONFIG = {"input_size": [3, 64, 64], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "interpolation": "bicubic", "crop_pct": 1.0,
          "crop_mode": "center"}


def small(name: str = "deit_tiny_patch16_224", **kwargs):
    return build(name, img_size=64, num_classes=10, **{"depth": 2, **kwargs})


def test_entropy_tells_diverse_patches_from_equal_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    equal = torch.ones(1, 40, 8) + 0.01 * torch.randn(1, 40, 8, generator=generator)
    diverse = F.pad(torch.randn(1, 40, 2, generator=generator), (0, 6))  # the angles of points in a plane
    low, high = float(similarity_entropy(equal)), float(similarity_entropy(diverse))
    assert low < -0.5 < 0.3 < high < 0.7  # uniform over [-1, 1] has log 2
    assert similarity_entropy(torch.cat((equal, diverse))).tolist() == pytest.approx([low, high], abs=1e-5)


@pytest.mark.parametrize("model", [small(), build("swin_tiny_patch4_window7_224", img_size=64, window_size=4, depths=(1, 1), num_classes=10)])
def test_images_are_sure_of_a_class_and_possible(model) -> None:
    noise = synthesize(model, 4, CONFIG, steps=1, cache=None)
    images = synthesize(model, 4, CONFIG, steps=40, cache=None)
    assert images.shape == (4, 3, 64, 64) and images.dtype == torch.float32
    mean, std = (torch.tensor(CONFIG[key])[:, None, None] for key in ("mean", "std"))
    pixels = images * std + mean
    assert -1e-6 <= float(pixels.min()) and float(pixels.max()) <= 1 + 1e-6
    sure = [float(model(x).softmax(1).amax(1).mean()) for x in (noise, images)]
    assert sure[1] > 1.5 * sure[0]
    assert all(p.requires_grad for p in model.parameters())  # the given model is not touched


def test_what_cannot_be_kept_or_read_is_made_again(tmp_path, caplog) -> None:
    model = small()
    images = synthesize(model, 2, CONFIG, steps=2, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    for damaged in ({"images": images[:1]}, {"images": images * torch.nan}, {"other": images}):
        save_file(damaged, file)
        assert torch.equal(synthesize(model, 2, CONFIG, steps=2, cache=tmp_path), images)
    file.write_bytes(b"nothing")
    assert torch.equal(synthesize(model, 2, CONFIG, steps=2, cache=tmp_path), images)
    assert caplog.text.count("they are made again") == 4
    (tmp_path / "a file").touch()
    assert torch.equal(synthesize(model, 2, CONFIG, steps=2, cache=tmp_path / "a file"), images)  # no folder: nothing is lost
    assert "are not kept" in caplog.text


def test_they_are_kept_for_the_model_that_they_were_made_of(tmp_path, monkeypatch) -> None:
    model, calls = small(), []
    optimise = synthetic._optimise
    monkeypatch.setattr(synthetic, "_optimise", lambda *args: calls.append(args) or optimise(*args))
    first = synthesize(model, 3, CONFIG, steps=2, cache=tmp_path, batch_size=2)
    assert len(calls) == 2 and torch.equal(first, synthesize(model, 3, CONFIG, steps=2, cache=tmp_path, batch_size=2)) and len(calls) == 2
    assert not torch.equal(first, synthesize(model, 3, CONFIG, steps=2, cache=tmp_path, seed=1)) and len(calls) == 3
    with torch.no_grad():
        model.head.bias[0] += 1
    synthesize(model, 3, CONFIG, steps=2, cache=tmp_path)
    assert len(calls) == 4 and len(list(tmp_path.iterdir())) == 3


def test_they_calibrate(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("VITQ_CACHE", str(tmp_path))
    monkeypatch.setattr(synthetic.synthesize, "__kwdefaults__", {**synthetic.synthesize.__kwdefaults__, "steps": 2})
    model = small()
    data = vitq.open_images("synthetic", CONFIG, limit=8, model=model)
    assert (len(data.calib), len(data.eval), data.eval_labels_known, data.name) == (8, 16, False, "synthetic")
    (images, labels), = vitq.batches(data.calib, 8)
    assert labels.tolist() == [-1] * 8
    recipe = vitq.Recipe.from_yaml("w8a8").with_overrides(["calib_size=8"])
    assert vitq.convert(model, recipe, vitq.batches(data.calib, 4))(images).shape == (8, 10)


@pytest.mark.parametrize("change, message", [({"count": 0}, "count must be at least 1"), ({"steps": 0}, "steps must be at least 1")])
def test_mistakes(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        synthesize(small(), **{"count": 1, "data_config": CONFIG, "cache": None, **change})


def test_what_it_needs() -> None:
    with pytest.raises(ValueError, match="of which this model has none"):
        synthesize(build(depth=1, num_classes=0), 1, CONFIG)
    with pytest.raises(ValueError, match="give model="):
        vitq.open_images("synthetic", CONFIG)
