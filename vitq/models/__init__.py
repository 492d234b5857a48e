"""Adapters: the only model-specific knowledge. They know timm and transformers and nothing of quantization."""

from __future__ import annotations

import copy

import torch
from torch import nn

from vitq.models.adapter import UnsupportedModelError, check_covered, check_plain, check_weights
from vitq.models.sites import Prepared

__all__ = ["Prepared", "UnsupportedModelError", "prepare"]


def adapters_of(library: str) -> dict[type, object]:
    """class of timm or of transformers -> what finds its sites; the other library may not even be installed."""
    if library == "transformers":
        from vitq.models import decoder, falcon, opt
        from vitq.models.language import causal_models

        return {cls: family.fill for family in (decoder, falcon, opt) for cls in causal_models(family.FAMILIES)}
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.vision_transformer import VisionTransformer

    from vitq.models import swin, vit

    return {VisionTransformer: vit.fill, VisionTransformerDistilled: vit.fill, SwinTransformer: swin.fill}


def prepare(model: nn.Module, *, check: bool = True, weights: bool = True) -> Prepared:
    """A canonical float32 copy of `model` with its sites listed; the given model is not touched.

    check: False skips the search for NaN, for a model built without its weights.
    weights: False leaves the copy's on the meta device, for what is known of the sites without them; it takes no memory.
    Raises TypeError for what is not a module, ValueError for NaN or infinite weights, and UnsupportedModelError (a
    ValueError) naming the module or attribute that no adapter knows.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if getattr(model, "vitq", None) is not None:
        raise ValueError("the model is already quantized: give the float model to vitq.convert")
    adapters = adapters_of("transformers" if type(model).__module__.startswith("transformers.") else "timm")
    fill = adapters.get(type(model))
    if fill is None:
        known = ", ".join(sorted(t.__name__ for t in adapters))
        raise UnsupportedModelError(f"vitq has no adapter for {type(model).__module__}.{type(model).__name__}; "
                                    f"known there: {known}; build one of these")
    check_plain(model)
    if check:
        check_weights(model)
    with torch.no_grad():
        meta = {} if weights else {id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in model.parameters()}
        clone = copy.deepcopy(model, meta).to(torch.float32).eval().requires_grad_(False)
        prepared = Prepared(clone)
        fill(prepared)
    check_covered(prepared)
    return prepared
