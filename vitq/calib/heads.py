"""Which heads matter less: scores of the units of each attention, from calibration data and the float model, and the choice by them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import floor
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitq.calib.runner import checked, exact_float32, fingerprint, reported
from vitq.calib.statistics import Statistics
from vitq.models import prepare
from vitq.models.heads import PARTS, check_chosen, check_heads, columns_of, rows_of, units_of
from vitq.models.sites import HeadSite, Prepared
from vitq.quantizers.uniform import fake_quantize_per_token
from vitq.recipe import FLOAT_BITS, Recipe

ROWS = 256  # of log-probabilities at once


class Bits(NamedTuple):
    """What the sensitivity of a unit is measured with; 16 leaves floats."""

    qkv: int = 4
    proj: int = 4
    proj_input: int = 8


def head_scores(model: nn.Module, calib: Iterable, score: str = "contribution", *, cascade: bool = False, weight_bits: int = 4, input_bits: int = 8,
                limit: int = 128, seed: int = 0) -> dict[str, Tensor]:
    """How much each head of each attention matters, by the attention's name: float64 [units], of sum 1. A unit is a key and value head with the
    query heads that share it, O_h what it hands to the output projection, W_o,h the columns there that read it.

    model, calib: as for `vitq.convert`, of which at most `limit` images or sequences are read. A sequence counts whole, since a batch of token
        ids says nothing of padding: give windows without.
    score: `l1`, the mean of |O_h|; `contribution`, ‖O_h W_o,hᵀ‖_F, what it adds to the residual stream; `sensitivity`, the KL divergence of the
        model's outputs where this unit alone has weights of `weight_bits` and an O_h of `input_bits`, which runs the model once for each
        unit; `random`, by `seed`.
    cascade: the mean of a layer's scores and those of all layers before it.

    Raises ValueError for a model whose heads cannot be told apart, and as `vitq.convert` for data; TypeError likewise.
    """
    prepared = prepare(model)
    check_heads(prepared)
    bits = Bits(weight_bits, weight_bits, input_bits)
    return scores_of(prepared, calib, score, cascade=cascade, limit=limit, seed=seed, bits=lambda site: bits)


@torch.no_grad()
def scores_of(prepared: Prepared, data: Iterable | None, score: str, *, cascade: bool, limit: int, seed: int,
              bits: Callable[[HeadSite], Bits], progress: Callable[[int], None] | None = None) -> dict[str, Tensor]:
    """As `head_scores`, of a prepared model. data: None will do for `random`. progress: called with the number of images of each batch."""
    measures = {"l1": _l1, "contribution": _contribution, "sensitivity": partial(_sensitivity, bits=bits)}
    if score == "random":
        generator = torch.Generator().manual_seed(seed)
        found = {site.name: torch.rand(site.units, generator=generator, dtype=torch.float64) for site in prepared.heads}
    elif score in measures:
        batches = reported(checked(data, limit, prepared), progress)
        with exact_float32():
            found = measures[score](prepared, batches)
    else:
        raise ValueError(f"score must be one of {', '.join([*measures, 'random'])}; got {score!r}")
    if len(found) < len(prepared.heads):
        raise ValueError("no calibration data: give at least one batch")
    for name, scores in found.items():
        if not torch.isfinite(scores).all():
            raise ValueError(f"what the heads of {name!r} write holds NaN or infinity")
        found[name] = scores / scores.sum() if scores.sum() > 0 else torch.full_like(scores, 1 / len(scores))
    return _cascaded(found) if cascade else found


def choose_heads(prepared: Prepared, recipe: Recipe, data: Iterable | None, progress: Callable[[int], None] | None = None) -> Recipe:
    """The recipe with its choice in it, `heads.chosen`: the units of each attention that are to be `least`.

    data: iterable again; None where the recipe chooses without (`Recipe.scores_heads`). progress: as of `scores_of`. Raises ValueError where model
    and recipe do not fit.
    """
    check_heads(prepared)
    heads = recipe.heads
    if all(_specs(recipe, site, "least") == _specs(recipe, site, "rest") for site in prepared.heads):
        raise ValueError(f"recipe {recipe.name!r} has heads, and no rule that tells them from the others: add rules with names: ['*.least'], "
                         "or ['*.rest']")
    if "chosen" in heads:
        check_chosen(prepared, heads["chosen"])
        return recipe

    def bits(site: HeadSite) -> Bits:
        qkv, proj = _specs(recipe, site, "least")
        return Bits(qkv.weight.bits, proj.weight.bits, proj.input.bits)

    score = heads.get("score", "contribution")
    if score == "sensitivity" and all(min(bits(site)) == FLOAT_BITS for site in prepared.heads):
        raise ValueError(f"recipe {recipe.name!r}: heads.score: 'sensitivity' measures what the bits of '*.least' do, and they have 16")
    if heads.get("least") == 0:
        chosen: dict[str, list[int]] = {site.name: [] for site in prepared.heads}
    else:
        scores = scores_of(prepared, data, score, cascade=heads.get("cascade", False), limit=recipe.calib_size, seed=heads.get("seed", 0), bits=bits,
                           progress=progress)
        chosen = _within(prepared, recipe, scores, heads["budget"]) if "budget" in heads else \
            {site.name: _lowest(scores[site.name], _count(site, heads["least"])) for site in prepared.heads}
    return replace(recipe, heads={**heads, "chosen": chosen})


def statistics_of_parts(stats: Statistics, prepared: Prepared, chosen: Mapping[str, Sequence[int]]) -> Statistics:
    """What was seen of a model, as of `prepared`, which is that model with these heads in parts. An input of which a part reads some features, and
    that was not observed by channel, is left out."""
    moved: dict[str, list[tuple[str, list[int] | None]]] = {}
    for site in prepared.heads:
        units = units_of(site, chosen)
        moved[f"{site.qkv}:input"] = [(f"{site.qkv}.{part}:input", None) for part in units]
        moved[f"{site.proj}:input"] = [(f"{site.proj}.{part}:input", columns_of(site, of)) for part, of in units.items()]
        for key in (f"{site.name}.{operand}" for operand in ("qk:input", "qk:other", "pv:other")):  # of image models, whose heads are units
            if key in stats and stats[key].channels is not None:
                moved[key] = [(key, [unit for of in units.values() for unit in of])]
    found = Statistics(fingerprint(prepared.model), stats.samples)
    for key in stats:
        for name, channels in moved.get(key, [(key, None)]):
            if channels is None:
                found[name] = stats[key]
            elif stats[key].channels is not None:
                found[name] = stats[key].selected(channels)
    return found


def check_choice_of_heads(prepared: Prepared, recipe: Recipe) -> None:
    """Raises ValueError for what `choose_heads` would refuse whatever the data say."""
    check_heads(prepared)
    check_chosen(prepared, recipe.heads.get("chosen", {}))
    for site in prepared.heads:
        _count(site, recipe.heads.get("least", 0))


def _specs(recipe: Recipe, site: HeadSite, part: str) -> tuple:
    """LayerSpecs of that part of qkv and of proj."""
    return recipe.resolve("qkv", f"{site.qkv}.{part}"), recipe.resolve("proj", f"{site.proj}.{part}")


def _count(site: HeadSite, least: float) -> int:
    """Units for that many query heads, or that part of them, at least one."""
    heads = site.units * site.queries
    if isinstance(least, int) and least > heads:
        raise ValueError(f"heads.least: {least}; {site.name!r} has {heads} query heads: give that many at most, or a part of them (0.5)")
    wanted = (least if isinstance(least, int) else least * heads) / site.queries
    return max(floor(wanted + 0.5), int(wanted > 0))


def _lowest(scores: Tensor, count: int) -> list[int]:
    return sorted(scores.argsort(stable=True)[:count].tolist())


def _within(prepared: Prepared, recipe: Recipe, scores: Mapping[str, Tensor], budget: float) -> dict[str, list[int]]:
    """The units that are lowest over the whole model, as many as it takes until the weights of q, k, v and o have `budget` bits on average."""
    saved, bits, weights = {}, 0, 0
    for site in prepared.heads:
        qkv, proj = (prepared.model.get_submodule(name) for name in (site.qkv, site.proj))
        sizes = sum(site.sections) * qkv.in_features, site.columns * proj.out_features  # of one unit
        least, rest = (sum(size * spec.weight.bits for size, spec in zip(sizes, _specs(recipe, site, part))) for part in PARTS)
        saved[site.name] = rest - least
        bits, weights = bits + site.units * rest, weights + site.units * sum(sizes)
    chosen: dict[str, list[int]] = {site.name: [] for site in prepared.heads}
    order = sorted((float(value), i, unit) for i, site in enumerate(prepared.heads) for unit, value in enumerate(scores[site.name]))
    for _, i, unit in order:
        if bits <= budget * weights:
            break
        name = prepared.heads[i].name
        chosen[name].append(unit)
        bits -= saved[name]
    if bits > budget * weights:
        raise ValueError(f"heads.budget: {budget:g}; with all heads in the part 'least' the weights of q, k, v and o have {bits / weights:g} bits: "
                         "give that or more, or '*.least' fewer bits")
    return {name: sorted(units) for name, units in chosen.items()}


def _cascaded(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    total = None
    for i, (name, own) in enumerate(scores.items(), 1):
        if total is not None and len(total) != len(own):
            raise ValueError(f"heads.cascade: {name!r} has {len(own)} heads, the layers before it {len(total)}")
        total = own if total is None else total + own
        found[name] = total / i
    return found


@contextmanager
def _written(prepared: Prepared, see: Callable[[HeadSite, Tensor], None]) -> Iterator[None]:
    """Inside, `see` gets what each attention hands to its output projection, [tokens, units, columns]."""
    def hook(site: HeadSite, module: nn.Module, args: tuple) -> None:
        see(site, args[0].reshape(-1, site.units, site.columns))

    handles = [prepared.model.get_submodule(site.proj).register_forward_pre_hook(partial(hook, site)) for site in prepared.heads]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _l1(prepared: Prepared, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    sums = {site.name: torch.zeros(site.units, dtype=torch.float64) for site in prepared.heads}
    counts = dict.fromkeys(sums, 0)

    def see(site: HeadSite, written: Tensor) -> None:
        sums[site.name] += written.abs().double().sum((0, 2)).cpu()
        counts[site.name] += len(written) * site.columns

    with _written(prepared, see):
        for batch in batches:
            prepared.run(batch)
    return {name: total / max(counts[name], 1) for name, total in sums.items()}


def _contribution(prepared: Prepared, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """‖O Wᵀ‖² = tr(W C Wᵀ) with C the Gram matrix of O: what is written need not be kept."""
    grams: dict[str, Tensor] = {}

    def see(site: HeadSite, written: Tensor) -> None:
        by_unit = written.double().transpose(0, 1)
        gram = by_unit.transpose(1, 2) @ by_unit
        grams[site.name] = grams[site.name] + gram if site.name in grams else gram

    with _written(prepared, see):
        for batch in batches:
            prepared.run(batch)
    found = {}
    for site in prepared.heads:
        weight = prepared.model.get_submodule(site.proj).weight.double()
        parts = weight.view(len(weight), site.units, site.columns).transpose(0, 1)  # [units, N, columns]
        found[site.name] = ((parts @ grams[site.name]) * parts).sum((1, 2)).clamp_min(0).sqrt().cpu()
    return found


def _sensitivity(prepared: Prepared, batches: Iterable[Tensor], bits: Callable[[HeadSite], Bits]) -> dict[str, Tensor]:
    found = {site.name: torch.zeros(site.units, dtype=torch.float64) for site in prepared.heads}
    count = 0
    for batch in batches:
        expected = prepared.run(batch).flatten(0, -2)
        count += len(expected)
        for site in prepared.heads:
            for unit in range(site.units):
                with _fake_unit(prepared.model, site, unit, bits(site)):
                    found[site.name][unit] += _divergence(expected, prepared.run(batch).flatten(0, -2))
    return {name: (total / max(count, 1)).clamp_min(0) for name, total in found.items()}


def _divergence(expected: Tensor, logits: Tensor) -> float:
    """Σ KL(softmax(expected) ‖ softmax(logits)) over the rows."""
    pairs = zip(expected.split(ROWS), logits.split(ROWS))
    return sum(float(F.kl_div(q.double().log_softmax(-1), p.double().log_softmax(-1), log_target=True, reduction="sum")) for p, q in pairs)


@contextmanager
def _fake_unit(model: nn.Module, site: HeadSite, unit: int, bits: Bits) -> Iterator[None]:
    """Inside, this unit's rows of qkv and columns of proj have one symmetric range a row, and what it hands to proj one a token."""
    qkv, proj = (model.get_submodule(name) for name in (site.qkv, site.proj))
    before = qkv.weight.data, proj.weight.data
    rows, columns = rows_of(site, [unit]), slice(unit * site.columns, (unit + 1) * site.columns)

    def faked(x: Tensor, to: int) -> Tensor:
        return x if to == FLOAT_BITS else fake_quantize_per_token(x, to)

    def hook(module: nn.Module, args: tuple) -> tuple:
        x = args[0].clone()
        x[..., columns] = faked(x[..., columns], bits.proj_input)
        return (x, *args[1:])

    handle = proj.register_forward_pre_hook(hook)
    try:
        qkv.weight.data, proj.weight.data = (weight.clone() for weight in before)
        qkv.weight[rows] = faked(before[0][rows], bits.qkv)
        proj.weight[:, columns] = faked(before[1][:, columns], bits.proj)
        yield
    finally:
        handle.remove()
        qkv.weight.data, proj.weight.data = before
