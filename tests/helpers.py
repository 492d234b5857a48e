"""Shared by the tests: small models with healthy random weights, calibration batches, SQNR."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from types import ModuleType

import timm
import torch
from torch import Tensor, nn

import vitq
from vitq.models import prepare


def sqnr(reference: Tensor, x: Tensor) -> float:
    """dB; inf where they are equal."""
    reference, x = reference.double(), x.double()
    return float(10 * torch.log10(reference.square().sum() / (reference - x).square().sum()))


def build(name: str = "deit_tiny_patch16_224", *, num_classes: int = 10, seed: int = 0, **kwargs) -> nn.Module:
    """A timm model with random weights. timm's own initialisation leaves a class token of 1e-6, which the first LayerNorm
    blows up to noise, so every parameter is jittered."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(name, num_classes=num_classes, **kwargs).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.02 if parameter.ndim > 1 else 0.1))
    return model


def check_sites_without_weights(model: nn.Module) -> None:
    """What is known of a model prepared without its weights is what is known of it with them."""
    whole, empty = (prepare(model, weights=weights) for weights in (True, False))
    assert dataclasses.replace(whole, model=None) == dataclasses.replace(empty, model=None)
    parameters = dict(empty.model.named_parameters())
    assert {name: p.shape for name, p in parameters.items()} == {name: p.shape for name, p in whole.model.named_parameters()}
    assert all(p.is_meta for p in parameters.values()) and not any(p.is_meta for p in model.parameters())


def images(model: nn.Module, count: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, *model.patch_embed.img_size, generator=generator)


def quick(name: str, *overrides: str, calib_size: int = 4) -> vitq.Recipe:
    """A shipped recipe with a small calibration set and the cheap range search."""
    recipe = vitq.Recipe.from_yaml(name)
    changes = ["weight.observer=minmax", *overrides]
    return recipe.with_overrides([f"calib_size={calib_size}", *changes] if recipe.is_static else changes)


def convert(model: nn.Module, recipe: vitq.Recipe, **kwargs) -> nn.Module:
    calib = [images(model, recipe.calib_size, seed=2)] if recipe.is_static else None
    return vitq.convert(model, recipe, calib, **kwargs)


def run_tool(tool: ModuleType, *args: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command line's main, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = tool.main([str(a) for a in args])
    return code, out.getvalue(), err.getvalue()
