"""Choose scales, zero points and codes: statistics and weights in, a `Plan` out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from vitq.calib.gram import GRAM_MEMORY, Gram, collect_grams
from vitq.calib.histogram import LEAST_BINS, Histogram
from vitq.calib.online import clip_of, divide_input, hadamard_input, install, mixed_values, row_format
from vitq.calib.runner import fingerprint, heads_of, specs, transform_of
from vitq.calib.solvers import SOLVERS
from vitq.calib.solvers.problem import Problem
from vitq.calib.statistics import Statistics
from vitq.formats import ActivationFormat, Columns
from vitq.models.sites import AttentionSite, CacheSite, HeadSite, LinearSite, Prepared
from vitq.plan import AttentionParams, CacheParams, LinearParams, Plan
from vitq.quantizers.log_sqrt2 import fake_log_sqrt2
from vitq.quantizers.outliers import outlier_columns, outlier_count
from vitq.quantizers.uniform import scale_and_zero
from vitq.recipe import LayerSpec, QuantSpec, Recipe, Rule
from vitq.transforms.layernorm_fold import fold
from vitq.transforms.smooth import bounded_scale, clip_scale, smoothquant_scale

log = logging.getLogger("vitq")


@torch.no_grad()
def choose(prepared: Prepared, recipe: Recipe, stats: Statistics | None, data: Iterable | None = None,
           memory: float = GRAM_MEMORY, progress: Callable[[int], None] | None = None) -> Plan:
    """Fold, choose formats, solve. Changes `prepared.model` by the transforms only.

    stats may be None for a recipe with no static operand. data: the calibration images, to be iterated again, for a solver that looks
    at the inputs; memory: bytes that the Gram matrices may take at once; progress: as of `collect_grams`. Raises ValueError
    naming the layer for NaN weights, and for statistics that were collected on another model or without an operand that this recipe needs.
    """
    if stats is not None:
        check_statistics(stats, prepared)
    plan = Plan(recipe, specs(prepared, recipe), samples=0 if stats is None else stats.samples)
    formats: dict[str, ActivationFormat | None] = {}
    heads = mixed_values(prepared, plan.specs)
    for sites in prepared.input_groups():
        formats.update(input_formats(prepared.model, sites, recipe, stats, plan))
        install_hadamard(prepared.model, sites, plan, formats, heads)
    check_transformed(plan)
    if recipe.needs_inputs and data is None:
        raise ValueError(f"recipe {recipe.name!r}: the solver {recipe.solver!r} looks at the inputs of each layer, so it needs the "
                         f"calibration {prepared.samples} themselves, not statistics of them")
    grams = collect_grams(prepared, formats, data, recipe.calib_size, memory, progress) if recipe.needs_inputs else ((name, None) for name in formats)
    for name, gram in grams:
        plan.layers[name] = solved(prepared.model, name, plan, formats[name], gram)
    for site in prepared.attentions:
        if not plan.specs[site.qk].is_float:
            plan.layers[site.name] = attention_params(prepared.model, site, plan, stats)
    plan.layers.update(cache_params(prepared, prepared.caches, plan))
    record_thresholds(prepared, plan)
    return plan


def install_hadamard(model: nn.Module, sites: list[LinearSite], plan: Plan, formats: dict[str, ActivationFormat | None],
                     heads: Mapping[str, HeadSite]) -> None:
    """The matrices that need no learning, of sites that share an input."""
    for site in sites:
        params = hadamard_input(site.name, plan.specs[site.name], model.get_submodule(site.name).weight[0].numel(), heads)
        if params is not None:
            install(model, [site], params, plan, formats, heads)


def record_thresholds(prepared: Prepared, plan: Plan) -> None:
    """Layers that were to have outliers and have none get a rule of their own, so that the recipe alone says what a model is."""
    without = [name for name, params in plan.layers.items() if isinstance(params, LinearParams) and params.input is not None
               and params.weight_fp is None
               and outlier_count(plan.specs[name].input, prepared.model.get_submodule(name).weight[0].numel())]
    if without:
        plan.recipe = replace(plan.recipe, rules=(*plan.recipe.rules, Rule(names=tuple(without), input={"outliers": 0})))
        for name in without:
            plan.specs[name] = replace(plan.specs[name], input=replace(plan.specs[name].input, outliers=0))


def check_statistics(stats: Statistics, prepared: Prepared) -> None:
    """Raises ValueError for those of another model."""
    if stats.model != fingerprint(prepared.model):
        raise ValueError(f"these statistics were collected on another model or other weights ({stats.model}, this one is "
                         f"{fingerprint(prepared.model)}): calibrate again")


def check_transformed(plan: Plan) -> None:
    """Warns where the recipe's transform changed nothing."""
    if plan.recipe.transforms and not plan.notes:
        log.warning("recipe %r: the transform %s found no layer to change: none has an integer input behind a norm with a weight", plan.recipe.name,
                    plan.recipe.transforms[0])


def solved(model: nn.Module, name: str, plan: Plan, fmt: ActivationFormat | None, gram: Gram | None, ratios: Tensor | None = None) -> LinearParams:
    """Codes of the linear layer `name`, whose inputs have this format. Raises ValueError that names it."""
    try:
        return linear_params(model.get_submodule(name), plan.specs[name], plan.recipe, fmt, gram, ratios)
    except ValueError as error:
        raise ValueError(f"weight of {name!r}: {error}") from error


def attention_params(model: nn.Module, site: AttentionSite, plan: Plan, stats: Statistics | None) -> AttentionParams:
    """The formats of an attention that is quantized."""
    qk, pv, attention = plan.specs[site.qk], plan.specs[site.pv], model.get_submodule(site.name)
    log_scale = _log_scale(find_histogram(stats, f"{site.pv}:input", None), pv.input.bits) if pv.input.levels == "log_sqrt2" else None
    q, k, v = (static_format(stats, key, spec, heads_of(attention, spec)) for key, spec in (
        (f"{site.qk}:input", qk.input), (f"{site.qk}:other", qk.other), (f"{site.pv}:other", pv.other)))
    return AttentionParams(q, k, v, p_bits=pv.input.bits, p_log_scale=log_scale)


def cache_params(prepared: Prepared, sites: Iterable[CacheSite], plan: Plan) -> dict[str, CacheParams]:
    """Of those of the attentions that quantize their keys or values, by the name of the module these go through."""
    found = {}
    for site in sites:
        features = prepared.model.get_submodule(site.name).head_dim
        k, v = (None if name not in plan.specs else row_format(plan.specs[name].cached, features) for name in (site.qk, site.pv))
        if k is not None or v is not None:
            found[site.kv] = CacheParams(k, v)
    return found


def linear_params(module: nn.Module, spec: LayerSpec, recipe: Recipe, input_format: ActivationFormat | None,
                  gram: Gram | None = None, ratios: Tensor | None = None) -> LinearParams:
    """Codes of one linear (or patch convolution) by the recipe's solver. ratios: of its weight's range, where that was learned. Raises ValueError for
    NaN or infinite weights."""
    weight = module.weight.detach().float().flatten(1)
    bias = None if module.bias is None else module.bias.detach().float().clone()
    columns, kept = None if input_format is None else input_format.columns, None
    if columns is not None:
        weight, kept = weight[:, columns.order.long()], weight[:, columns.fp.long()]
        gram = None if gram is None else gram.ordered(torch.cat((columns.order, columns.fp)))
    if input_format is not None and input_format.transform is not None:
        weight = input_format.transform.to(weight.device).inverse_transposed(weight)
    solution = SOLVERS[recipe.solver](Problem(weight, bias, spec.weight, gram, recipe.solver_options, spec.weight_only, kept, ratios))
    weight_fp = None if solution.kept is None else solution.kept.half()
    codes, grid, bits = solution.codes, solution.grid, spec.weight.bits
    if spec.weight_only:
        return LinearParams(codes, bits, grid.scale, solution.bias, None, weight_zero=grid.zero_point, column_group=grid.group)
    if grid.multiplier is not None or grid.zero_point is not None and bits <= 4:  # codes less zero points, times multipliers, fit int8
        multiplier, group, zero_point = grid.multiplier, grid.group, grid.zero_point
        if multiplier is None:
            multiplier, group = torch.ones_like(grid.scale, dtype=torch.int8)[None], torch.zeros_like(codes[0], dtype=torch.uint8)
            zero_point = grid.zero_point[None]
        return LinearParams(codes, bits, grid.scale, solution.bias, input_format, weight_zero=zero_point, weight_fp=weight_fp,
                            weight_multiplier=multiplier, column_group=group)
    if grid.group is None:
        return LinearParams(codes, bits, grid.scale, solution.bias, input_format, weight_zero=grid.zero_point, weight_fp=weight_fp)
    order = torch.argsort(grid.group, stable=True)  # the groups become segments
    ends = tuple(grid.group.bincount().cumsum(0).tolist())
    features = order.to(torch.int32) if columns is None else columns.order[order.cpu()]
    columns = Columns(features, ends, None if columns is None else columns.fp)
    return LinearParams(codes[:, order], bits, grid.scale, solution.bias, replace(input_format, columns=columns), weight_zero=grid.zero_point,
                        weight_fp=weight_fp)


def observed_format(sample: Tensor | Histogram | None, spec: QuantSpec) -> ActivationFormat:
    """The format that `spec` chooses for activations like `sample`, [..., K]; None will do for a dynamic one without outliers."""
    seen = Statistics()
    if isinstance(sample, Histogram):
        seen[":input"] = sample
    elif sample is not None:
        seen[":input"] = Histogram(sample.shape[-1] if spec.outliers else None)
        seen[":input"].update(sample)
    features = (seen[":input"].channels or 0) if ":input" in seen else 0
    return layer_format(seen, "", spec, features)


def input_formats(model: nn.Module, sites: list[LinearSite], recipe: Recipe, stats: Statistics | None,
                  plan: Plan) -> dict[str, ActivationFormat | None]:
    """The formats of those of the sites, which share an input, that are quantized; None for an input in floating point. Applies the
    recipe's transform to the model."""
    linears = [model.get_submodule(site.name) for site in sites]
    quantized = {site.name: plan.specs[site.name] for site in sites if not plan.specs[site.name].is_float}
    integer = {name: spec.input for name, spec in quantized.items() if not spec.weight_only}
    transform, divisor, folded = transform_of(sites, plan.specs, recipe, model), None, None
    if transform == "layernorm_fold":
        folded = _fold(model, sites, linears, *next(iter(integer.items())), stats, plan)
    elif transform is not None:
        divisor = _smooth(model, sites, linears, recipe, stats, plan)

    def of(name: str, spec: QuantSpec) -> ActivationFormat:
        if folded is not None and not spec.dynamic:
            return folded
        # The first site of those that share an input stands for all where nothing but the largest values are wanted.
        return layer_format(stats, sites[0].name if spec.dynamic else name, spec, linears[0].weight[0].numel(), divisor)

    return {name: of(name, integer[name]) if name in integer else None for name in quantized}


def _fold(model: nn.Module, sites: list[LinearSite], linears: list[nn.Linear], name: str, spec: QuantSpec, stats: Statistics | None,
          plan: Plan) -> ActivationFormat:
    """Move the scale and zero point of each channel of the sites' input, observed at the site `name`, into their norm and weights."""
    # Where zeros are padded in after the norm, or it has no bias, only a scale may move: symmetric ranges give every channel zero point 0.
    norm = model.get_submodule(sites[0].norm)
    bare = any(plan.specs[site.name].is_float and linear.bias is None for site, linear in zip(sites, linears))
    unshifted = "windows are zero-padded" if sites[0].zero_padded else "the norm has no bias" if getattr(norm, "bias", None) is None else \
        "a layer that stays in float has no bias" if bare else ""
    symmetric = spec.symmetric or bool(unshifted)
    lo, hi = find_histogram(stats, f"{name}:input", linears[0].in_features).range(spec.bits, symmetric, spec.observer)
    scale, zero_point = fold(norm, linears, *scale_and_zero(lo, hi, spec.bits, symmetric))
    for site in sites:
        plan.notes[site.name] = "LayerNorm fold" + (f" of the scale only ({unshifted})" if unshifted else "")
    return ActivationFormat(spec.bits, scale=scale, zero_point=zero_point)


def _smooth(model: nn.Module, sites: list[LinearSite], linears: list[nn.Linear], recipe: Recipe, stats: Statistics | None,
            plan: Plan) -> Tensor:
    """Move a scale of each channel from the sites' input into their weights; what it was divided by, float64 [K]."""
    first, options = sites[0], recipe.transform_options
    seen = find_histogram(stats, f"{first.name}:input", linears[0].in_features, LEAST_BINS)
    largest = torch.maximum(seen.min.abs(), seen.max.abs())
    if recipe.transforms[0] == "smoothquant":
        alpha = options.get("alpha", 0.5)
        scale, note = smoothquant_scale(largest, [linear.weight for linear in linears], alpha), f"SmoothQuant, α {alpha:g}"
    else:
        scale, note = clip_scale(largest, options.get("top", 0.005)), "outlier channels divided"
    if first.norm is None:
        scale = bounded_scale(scale)
    divide_input(model, sites, scale)
    plan.notes.update({site.name: note for site in sites})
    return scale


def static_format(stats: Statistics | None, key: str, spec: QuantSpec, channels: int | None = None) -> ActivationFormat:
    """What `spec` chooses for an operand of which these statistics hold a histogram."""
    return _chosen(find_histogram(stats, key, channels), spec)


def layer_format(stats: Statistics | None, name: str, spec: QuantSpec, features: int, divisor: Tensor | None = None) -> ActivationFormat:
    """What `spec` chooses for a layer's input, whose channels were divided by `divisor` [K] after these statistics of it were taken."""
    if spec.dynamic and not spec.outliers:
        return _dynamic(spec)
    if divisor is None and not spec.outliers:
        return static_format(stats, f"{name}:input", spec)
    seen = find_histogram(stats, f"{name}:input", features, LEAST_BINS if spec.dynamic else LEAST_BINS + 1)
    return _chosen_by_channel(seen, torch.ones(features) if divisor is None else divisor, spec)


def _dynamic(spec: QuantSpec, columns: Columns | None = None) -> ActivationFormat:
    return ActivationFormat(spec.bits, dynamic=True, columns=columns, symmetric=spec.symmetric, clip=clip_of(spec))


def _chosen_by_channel(histogram: Histogram, divisor: Tensor, spec: QuantSpec) -> ActivationFormat:
    """Of inputs whose channels were divided by `divisor` [K] after they were observed."""
    divisor, columns = divisor.double().cpu(), None
    largest = torch.maximum(histogram.min.abs(), histogram.max.abs()).double().cpu() / divisor
    count = outlier_count(spec, len(largest))
    if count and float(largest.max()) > torch.finfo(torch.float16).max:
        raise ValueError(f"inputs reach {float(largest.max()):.3g}, more than the float16 of outliers holds: give smoothquant or outliers: 0")
    if count and float(largest.max()) > spec.outlier_threshold:
        columns = outlier_columns(largest, count)
    if spec.dynamic:
        return _dynamic(spec, columns)
    return replace(_chosen(histogram.merged(divisor, None if columns is None else columns.order.long()), spec), columns=columns)


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


def find_histogram(stats: Statistics | None, key: str, channels: int | None, bins: int = LEAST_BINS + 1) -> Histogram:
    """What was seen of an operand, by channel or of all together, with at least so many bins."""
    seen = None if stats is None or key not in stats else stats[key]
    if seen is not None and seen.bins < bins:
        raise ValueError(f"the statistics of {key!r} are largest values alone, which tell no static range: calibrate with this recipe, or choose one "
                         "whose inputs are dynamic")
    if seen is not None and channels is None and seen.channels is not None:
        seen = seen.merged(torch.ones(seen.channels))
    if seen is None or seen.channels != channels:
        raise ValueError(f"no fitting statistics for {key!r}: they were collected for another recipe; calibrate with this one")
    return seen
