"""Adapters: the canonical float copy computes what the source computes, and every linear layer is found."""

from __future__ import annotations

import pytest
import torch
from helpers import build, check_sites_without_weights, images
from torch import nn
from zoo_names import NAMES

from vitq.models import prepare


@pytest.mark.parametrize("name", NAMES)
def test_prepared_model_equals_the_source(name: str) -> None:
    model = build(name, **NAMES[name][0])
    x = images(model, 1)
    prepared = prepare(model)
    expected = model(x)
    assert (prepared.model(x) - expected).norm() / expected.norm() < 1e-4
    found = {site.name for site in prepared.linears}
    assert {n for n, m in model.named_modules() if isinstance(m, nn.Linear)} <= found
    assert len(found) == len(prepared.linears), "a layer was listed twice"


@pytest.mark.parametrize("name", NAMES)
def test_sites_are_known_without_weights(name: str) -> None:
    check_sites_without_weights(build(name, **NAMES[name][0]))


def test_half_precision_source_is_prepared_in_float32() -> None:
    model = build(depth=1).bfloat16()
    assert all(p.dtype == torch.float32 for p in prepare(model).model.parameters())
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
