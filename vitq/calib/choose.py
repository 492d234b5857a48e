"""Choose scales, zero points and codes: statistics and weights in, a `Plan` out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from vitq.calib.gram import GRAM_MEMORY, Gram, collect_grams
from vitq.calib.runner import fingerprint, heads_of, is_folded, specs
from vitq.calib.solvers import SOLVERS
from vitq.calib.solvers.problem import Problem
from vitq.calib.statistics import Histogram, Statistics
from vitq.formats import ActivationFormat, Columns
from vitq.models.sites import LinearSite, Prepared
from vitq.plan import AttentionParams, LinearParams, Plan
from vitq.quantizers.log_sqrt2 import fake_log_sqrt2
from vitq.quantizers.uniform import scale_and_zero
from vitq.recipe import LayerSpec, QuantSpec, Recipe
from vitq.transforms.layernorm_fold import fold


@torch.no_grad()
def choose(prepared: Prepared, recipe: Recipe, stats: Statistics | None, data: Iterable | None = None,
           memory: float = GRAM_MEMORY) -> Plan:
    """Fold, choose formats, solve. Changes `prepared.model` by the transforms only.

    stats may be None for a recipe with no static operand. data: the calibration images, to be iterated again, for a solver that looks
    at the inputs; memory: bytes that the Gram matrices may take at once. Raises ValueError naming the layer for NaN weights, and for
    statistics that were collected on another model or without an operand that this recipe needs.
    """
    if stats is not None and stats.model != fingerprint(prepared.model):
        raise ValueError(f"these statistics were collected on another model or other weights ({stats.model}, this one is "
                         f"{fingerprint(prepared.model)}): calibrate again")
    plan = Plan(recipe, specs(prepared, recipe), samples=0 if stats is None else stats.samples)
    formats = {}
    for site in prepared.linears:
        if not plan.specs[site.name].is_float:
            formats[site.name] = _linear_input(prepared.model, site, plan.specs[site.name], recipe, stats, plan)
    if recipe.needs_inputs and data is None:
        raise ValueError(f"recipe {recipe.name!r}: the solver {recipe.solver!r} looks at the inputs of each layer, so it needs the "
                         "calibration images themselves, not statistics of them")
    grams = collect_grams(prepared, formats, data, recipe.calib_size, memory) if recipe.needs_inputs else ((name, None) for name in formats)
    for name, gram in grams:
        try:
            plan.layers[name] = linear_params(prepared.model.get_submodule(name), plan.specs[name], recipe, formats[name], gram)
        except ValueError as error:
            raise ValueError(f"weight of {name!r}: {error}") from error
    for site in prepared.attentions:
        qk, pv = plan.specs[site.qk], plan.specs[site.pv]
        if not qk.is_float:
            log_scale = _log_scale(_histogram(stats, f"{site.pv}:input", None), pv.input.bits) if pv.input.levels == "log_sqrt2" else None
            attention = prepared.model.get_submodule(site.name)
            q, k, v = (_format(stats, key, spec, heads_of(attention, spec)) for key, spec in (
                (f"{site.qk}:input", qk.input), (f"{site.qk}:other", qk.other), (f"{site.pv}:other", pv.other)))
            plan.layers[site.name] = AttentionParams(q, k, v, p_bits=pv.input.bits, p_log_scale=log_scale)
    return plan


def linear_params(module: nn.Module, spec: LayerSpec, recipe: Recipe, input_format: ActivationFormat,
                  gram: Gram | None = None) -> LinearParams:
    """Codes of one linear (or patch convolution) by the recipe's solver. Raises ValueError for NaN or infinite weights."""
    weight = module.weight.detach().float().flatten(1)
    bias = None if module.bias is None else module.bias.detach().float().clone()
    solution = SOLVERS[recipe.solver](Problem(weight, bias, spec.weight, gram, recipe.solver_options))
    codes, grid, bits = solution.codes, solution.grid, spec.weight.bits
    centred = bits <= 4  # codes less their zero points, times their multipliers, fit int8
    if centred and (grid.multiplier is not None or grid.zero_point is not None):
        multiplier = torch.ones_like(grid.scale, dtype=torch.int8)[None] if grid.multiplier is None else grid.multiplier
        group = torch.zeros_like(codes[0], dtype=torch.uint8) if grid.group is None else grid.group
        offset = None if grid.zero_point is None else (-grid.zero_point * multiplier).to(torch.int8)
        return LinearParams(codes, bits, grid.scale, solution.bias, input_format, weight_multiplier=multiplier, weight_offset=offset,
                            column_group=group)
    if grid.group is None:
        return LinearParams(codes, bits, grid.scale, solution.bias, input_format, weight_zero=grid.zero_point)
    order = torch.argsort(grid.group, stable=True)  # the groups become segments
    ends = tuple(grid.group.bincount().cumsum(0).tolist())
    return LinearParams(codes[:, order], bits, grid.scale, solution.bias,
                        replace(input_format, columns=Columns(order.to(torch.int32), ends)), weight_zero=grid.zero_point)


def observed_format(sample: Tensor, spec: QuantSpec) -> ActivationFormat:
    """The static format that `spec` chooses for activations like `sample`."""
    histogram = Histogram()
    histogram.update(sample)
    return _chosen(histogram, spec)


def _linear_input(model: nn.Module, site: LinearSite, spec: LayerSpec, recipe: Recipe, stats: Statistics | None,
                  plan: Plan) -> ActivationFormat:
    if spec.input.dynamic:
        return ActivationFormat(spec.input.bits, dynamic=True)
    if not is_folded(site, spec, recipe, model):
        return _format(stats, f"{site.name}:input", spec.input)
    # Where zeros are padded in after the norm, or it has no bias, only a scale may move: symmetric ranges give every channel zero point 0.
    unshifted = "windows are zero-padded" if site.zero_padded else "the norm has no bias" if getattr(
        model.get_submodule(site.norm), "bias", None) is None else ""
    symmetric = spec.input.symmetric or bool(unshifted)
    channels = model.get_submodule(site.name).in_features
    lo, hi = _histogram(stats, f"{site.name}:input", channels).range(spec.input.bits, symmetric, spec.input.observer)
    scale, zero_point = scale_and_zero(lo, hi, spec.input.bits, symmetric)
    scale, zero_point = fold(model.get_submodule(site.norm), model.get_submodule(site.name), scale, zero_point)
    plan.notes[site.name] = "LayerNorm fold" + (f" of the scale only ({unshifted})" if unshifted else "")
    return ActivationFormat(spec.input.bits, scale=scale, zero_point=zero_point)


def _format(stats: Statistics | None, key: str, spec: QuantSpec, channels: int | None = None) -> ActivationFormat:
    return _chosen(_histogram(stats, key, channels), spec)


def _chosen(histogram: Histogram, spec: QuantSpec) -> ActivationFormat:
    lo, hi = histogram.range(spec.bits, spec.symmetric, spec.observer)
    scale, zero_point = scale_and_zero(lo, hi, spec.bits, spec.symmetric)
    return ActivationFormat(spec.bits, scale=scale, zero_point=zero_point)


def _log_scale(histogram: Histogram, bits: int) -> Tensor:
    """Of log√2 levels, float32 []: the percentile (ERQ's) whose codes lose least, in squared error at the middles of the buckets."""
    middles, counts = histogram.middles()[0].clamp_min(0.0), histogram.counts[0].double()
    scales = [histogram.quantile(p)[0].clamp_min(torch.finfo(torch.float32).tiny) for p in (0.999, 0.9999, 0.99999)]
    errors = [float(((fake_log_sqrt2(middles, scale, bits).double() - middles).square() * counts).sum()) for scale in scales]
    return scales[errors.index(min(errors))].float()


def _histogram(stats: Statistics | None, key: str, channels: int | None) -> Histogram:
    if stats is None or key not in stats or stats[key].channels != channels:
        raise ValueError(f"no fitting statistics for {key!r}: they were collected for another recipe; calibrate with this one")
    return stats[key]
