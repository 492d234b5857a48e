"""Shared steps of every adapter: walk a model by module class, refuse what is not known, by name."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from vitq.models.sites import FloatSite, LinearSite, Prepared

# Modules that carry parameters and are left in float everywhere: they hold a sliver of the weights and of the time.
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.BatchNorm2d)


def kind(module: nn.Module) -> str:
    """The class name of one of timm's or torch's own modules; another's is given with its origin, so that a class that
    only shares a known name is not taken for it."""
    cls = type(module)
    return cls.__name__ if cls.__module__.split(".")[0] in ("timm", "torch") else f"{cls.__module__}.{cls.__qualname__}"


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _NORMS) or (type(module).__module__.startswith("timm.layers") and "Norm" in type(module).__name__)


def check_plain(model: nn.Module) -> None:
    """Raises UnsupportedModelError, naming the module, for what a swap of modules would lose without a word: forward hooks,
    a forward set on the instance, parametrizations."""
    for name, module in model.named_modules():
        where = f"{name or 'the root module'!r} ({type(module).__name__})"
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            raise UnsupportedModelError(f"{where} has forward hooks or a replaced forward, which the integer module could not "
                                        "keep: remove them (old-style weight_norm too) and convert again")
        if parametrize.is_parametrized(module):
            raise UnsupportedModelError(f"{where} is parametrized: merge it first with "
                                        "torch.nn.utils.parametrize.remove_parametrizations")


def check_children(name: str, module: nn.Module, known: set[str]) -> None:
    """Raises UnsupportedModelError if a module that is about to be replaced has a child or parameter nobody takes over."""
    unknown = [child for child, _ in (*module.named_children(), *module.named_parameters(recurse=False)) if child not in known]
    if unknown:
        raise UnsupportedModelError(f"vitq does not know {name}.{unknown[0]} of {type(module).__name__}: it would be lost")


class UnsupportedModelError(ValueError):
    """The model has a part that no adapter knows."""


def activation_name(module: nn.Module) -> str | None:
    """gelu | gelu_tanh | relu for the activations that integer kernels fuse; None for any other."""
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return {"GELUTanh": "gelu_tanh", "GELU": "gelu", "ReLU": "relu"}.get(kind(module))


def is_plain_layer_norm(module: nn.Module) -> bool:
    """A LayerNorm over the last dimension whose forward is F.layer_norm (timm's subclasses included, 2-D ones not)."""
    if not isinstance(module, nn.LayerNorm) or len(module.normalized_shape) != 1:
        return False
    return kind(module) in ("LayerNorm", "LayerNormFp32")


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the dotted `name` stands."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, leaf, new)


def fold_layer_scale(block: nn.Module, scale_name: str, linear: nn.Linear) -> None:
    """γ·(Wx + b) = (γW)x + γb: LayerScale costs nothing once it lives in the linear before it."""
    scale = getattr(block, scale_name, None)
    if scale is None or isinstance(scale, nn.Identity):
        return
    gamma = scale.gamma.detach()
    with torch.no_grad():
        linear.weight.mul_(gamma[:, None])
        if linear.bias is not None:
            linear.bias.mul_(gamma)
    setattr(block, scale_name, nn.Identity())


def check_covered(prepared: Prepared) -> None:
    """Every parameter must belong to a site, a norm, or a named float part; else refuse, naming module and class.

    Raises UnsupportedModelError: a layer that no rule can reach would otherwise stay in float without a word.
    """
    model = prepared.model
    for site in prepared.linears:
        linear = model.get_submodule(site.name)
        if type(linear) not in (nn.Linear, nn.Conv2d):
            raise UnsupportedModelError(f"{site.name!r} is a {type(linear).__name__}, which may compute something else than "
                                        "nn.Linear: merge it into a plain one (LoRA: merge the adapter) and convert again")
    known = {site.name for site in prepared.linears} | {site.name for site in prepared.floats}
    for name, module in model.named_modules():
        own = [p for p, _ in module.named_parameters(recurse=False)]
        if not own or _is_norm(module):
            continue
        if name in known or any(name.startswith(f"{k}.") for k in known if k):
            continue
        raise UnsupportedModelError(
            f"vitq does not know {name or 'the root module'!r} ({type(module).__name__}, parameters "
            f"{', '.join(own)}) of {type(model).__name__}: it would stay in float unseen. "
            "Open an issue with the model's name, or convert a model built from the known blocks.")


def check_weights(model: nn.Module) -> None:
    """Raises ValueError naming the first parameter that holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            bad = int((~torch.isfinite(parameter)).sum())
            raise ValueError(f"weight {name!r} holds {bad} NaN or infinite values: the checkpoint is damaged or diverged")


def float_part(prepared: Prepared, name: str, reason: str) -> None:
    prepared.floats.append(FloatSite(name, reason))


def plain_linears(prepared: Prepared, prefix: str, role: str) -> None:
    """Every nn.Linear under `prefix` gets `role`: each is quantized on its own, what is around it stays as it was."""
    for name, module in prepared.model.get_submodule(prefix).named_modules():
        if isinstance(module, nn.Linear):
            prepared.linears.append(LinearSite(f"{prefix}.{name}" if name else prefix, role))
