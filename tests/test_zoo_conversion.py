"""Every kind of timm ViT, DeiT and Swin converts and computes nearly what the float model computes, at two resolutions."""

from __future__ import annotations

import pytest
import torch
from helpers import build, images, quick, sqnr
from zoo_names import NAMES

import vitq

# dB of the logits against float, for random weights on random images: two to a few blocks deep, 8 bits stay above 20
# in every model; 4-bit rounding of both operands leaves little above noise, and below 3 dB something is broken.
FLOOR = {"w8a8": 20.0, "w4a4": 3.0}


@pytest.mark.parametrize("size", ["own", "other"])
@pytest.mark.parametrize("name", NAMES)
def test_converts_in_8_and_4_bits(name: str, size: str) -> None:
    kwargs, other = NAMES[name]
    model = build(name, **({**kwargs, "img_size": other} if size == "other" else kwargs))
    x, calib = images(model), [images(model, 4, seed=2)]
    reference = model(x)
    for recipe_name, floor in FLOOR.items():
        recipe = quick(recipe_name)
        statistics = vitq.calibrate(model, recipe, calib)
        converted = vitq.convert(model, recipe, statistics, dtype=torch.float32)
        y = converted(x)
        assert y.shape == reference.shape and y.dtype == torch.float32
        assert sqnr(reference, y) > floor, recipe_name
        executed_layers = {row.layer for row in vitq.explain(converted)}
        linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        assert linears <= executed_layers, f"silently skipped: {linears - executed_layers}"


def test_enough_names() -> None:
    assert len(NAMES) >= 25
