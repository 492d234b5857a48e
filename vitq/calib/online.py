"""Inputs that are transformed before they are quantized: how large the matrices of each layer are, and how the model and the formats take them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from vitq.formats import ActivationFormat, Kronecker
from vitq.models.sites import CacheSite, HeadSite, LinearSite, Prepared
from vitq.plan import CacheParams, InputParams, Plan
from vitq.quantizers.kronecker import LARGEST, hadamard, sizes
from vitq.recipe import LayerSpec, QuantSpec
from vitq.transforms.smooth import divide_norm, divide_rows, multiply_columns
from vitq.transforms.values import mix_values

Sizes = tuple[int | None, int | None]


def mixed_values(prepared: Prepared, specs: Mapping[str, LayerSpec]) -> dict[str, HeadSite]:
    """The attentions whose values may be mixed in the weights that make them, by the name of the layer that reads what they add up to: those whose
    values are not rounded by scales that were measured before."""
    there = {site.name for site in prepared.linears}
    return {site.proj: site for site in prepared.heads if {site.qkv, site.proj} <= there and site.head_dim <= LARGEST
            and ((spec := specs.get(f"{site.name}.pv")) is None or spec.is_float)}


def input_sizes(name: str, spec: LayerSpec, features: int, heads: Mapping[str, HeadSite]) -> Sizes:
    """Of the matrices that the input of layer `name` is multiplied by at run time, (None, None) where there are none. heads: of `mixed_values`."""
    if spec.is_float or spec.weight_only or spec.input.transform == "none":
        return None, None
    site = heads.get(name)
    return sizes(features, None if site is None else site.query_heads)


def hadamard_input(name: str, spec: LayerSpec, features: int, heads: Mapping[str, HeadSite]) -> InputParams | None:
    """What a recipe's `transform: hadamard` makes of the input of layer `name`."""
    if spec.is_float or spec.weight_only or spec.input.transform != "hadamard":
        return None
    online = [None if n is None else hadamard(n).half() for n in input_sizes(name, spec, features, heads)]
    site = heads.get(name)
    values = None if site is None else hadamard(site.head_dim).float()
    return InputParams(values=values, transform=None if online == [None, None] else Kronecker(*online))


def row_format(spec: QuantSpec, features: int) -> ActivationFormat:
    """Of keys or values that enter a cache, rows of so many numbers: as `spec` has it, with Hadamard's matrix where it is to be that."""
    transform = Kronecker(right=hadamard(features).half()) if spec.transform == "hadamard" else None
    return ActivationFormat(spec.bits, dynamic=True, symmetric=spec.symmetric, transform=transform, clip=clip_of(spec))


def with_learned(fmt: ActivationFormat, params: InputParams) -> ActivationFormat:
    """The format with these transform and clip, where there are any."""
    return replace(fmt, transform=params.transform or fmt.transform, clip=fmt.clip if params.clip is None else params.clip)


def learned_cache(site: CacheSite, params: CacheParams, given: Mapping[str, InputParams]) -> CacheParams:
    """How an attention's keys and values are quantized, with what is given of its matmuls."""
    pair = ((params.k, site.qk), (params.v, site.pv))
    return CacheParams(*(None if fmt is None else with_learned(fmt, given[name]) for fmt, name in pair))


def divisible(model: nn.Module, sites: list[LinearSite]) -> bool:
    """Whether the channels of the sites' common input can be divided where they are made (`divide_input`): by the norm that feeds it, or else by rows."""
    first = sites[0]
    return first.rows is not None if first.norm is None else model.get_submodule(first.norm).weight is not None


def clip_of(spec: QuantSpec) -> torch.Tensor | None:
    """Of a dynamic format, None where whole ranges are kept."""
    return None if spec.clip_ratio == 1.0 else torch.full((2,), spec.clip_ratio)


@torch.no_grad()
def install(model: nn.Module, sites: list[LinearSite], params: InputParams, plan: Plan, formats: dict[str, ActivationFormat | None],
            heads: Mapping[str, HeadSite]) -> None:
    """Put what changes the sites' common input into the model, whose float output stays as it was, and into their formats."""
    if params.divisor is not None:
        divide_input(model, sites, params.divisor)
    for site in sites:
        if params.values is not None and site.name in heads:
            of = heads[site.name]
            mix_values(model.get_submodule(of.qkv), of.first_value, model.get_submodule(site.name), params.values)
        if formats.get(site.name) is not None:
            formats[site.name] = with_learned(formats[site.name], params)
            done = [*filter(None, (plan.notes.get(site.name), described(params)))]
            if done:
                plan.notes[site.name] = "; ".join(done)


@torch.no_grad()
def clamp_weights(linear: nn.Linear, fmt: ActivationFormat, ratios: torch.Tensor) -> None:
    """Set the weights that lie beyond these parts, [N, 2], of the least and the largest of their row to them, in place, as the input's transform has the
    rows. Others stay as they are, bit for bit."""
    transform = None if fmt.transform is None else fmt.transform.to(linear.weight.device)
    rows = linear.weight if transform is None else transform.inverse_transposed(linear.weight)
    low, high = (end * ratio for end, ratio in zip(rows.aminmax(dim=1, keepdim=True), ratios.to(rows.device).split(1, 1)))
    beyond = rows.clamp(low, high) - rows
    changed = (beyond != 0).any(1)
    linear.weight[changed] += beyond[changed] if transform is None else transform.transposed(beyond[changed])


@torch.no_grad()
def divide_input(model: nn.Module, sites: list[LinearSite], divisor: torch.Tensor) -> None:
    """Divide the channels of the sites' common input where they are made, a norm or rows of a linear layer, and multiply the sites' columns."""
    first = sites[0]
    if first.norm is not None:
        divide_norm(model.get_submodule(first.norm), divisor)
    else:
        divide_rows(model.get_submodule(first.rows[0]), first.rows[1], divisor)
    for site in sites:
        multiply_columns(model.get_submodule(site.name), divisor)


def described(params: InputParams) -> str:
    """What was done, in a few words, for `vitq.explain`."""
    parts = []
    if params.transform is not None:
        a, b = (None if m is None else len(m) for m in (params.transform.left, params.transform.right))
        parts.append(f"input times {a} x {b} matrices" if a and b else f"input times {a or b} x {a or b} matrices")
    if params.values is not None:
        parts.append("values mixed")
    if params.divisor is not None:
        parts.append("channels scaled")
    if params.clip is not None:
        parts.append("ranges clipped")
    return ", ".join(parts)
