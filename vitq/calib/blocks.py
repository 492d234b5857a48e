"""Calibration block by block: the parts of a `Chain` are measured and solved one after another, while one of them is on the device.

A part's inputs are streamed through it to measure and to solve, then once more, or in the same pass, for those of the next part.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from vitq.calib.chain import Chain, Hidden, Part, targets
from vitq.calib.block_gradient import DEFAULTS, check_learned, fitted, integer_sites, learn, learns
from vitq.calib.choose import (attention_params, cache_params, check_statistics, check_transformed, input_formats, install_hadamard, layer_format,
                               record_thresholds, solved)
from vitq.calib.gram import GRAM_MEMORY, Gram, divided, gathering
from vitq.calib.online import clamp_weights, install, learned_cache, mixed_values
from vitq.calib.resume import Done, Folder, fingerprint_of, fingerprint_of_learned, on_cpu
from vitq.calib.runner import Operand, check_sample_count, checked, exact_float32, fingerprint, observing, operands_of, specs, transform_of
from vitq.calib.simulate import fake_operands, fake_weight
from vitq.calib.statistics import Statistics
from vitq.formats import ActivationFormat
from vitq.models.sites import AttentionSite, LinearSite, Prepared
from vitq.plan import AttentionParams, CacheParams, InputParams, LinearParams, Plan
from vitq.recipe import Recipe

STREAMS = ("float", "quantized")
STATISTICS = "statistics.safetensors"  # in the folder of a finished run
_Formats = dict[str, ActivationFormat | None]

log = logging.getLogger("vitq")


def _mixed(chain: Chain, index: int, plan: Plan, formats: _Formats, hidden: Hidden, targets: Hidden | None,
           done: Done | None, given: Mapping[str, InputParams] | None) -> tuple[dict[str, InputParams], dict[str, CacheParams], dict[str, Tensor]]:
    """Learn of a part's inputs what is to be learned, or take it from what was done or is `given` (`fitted`), and put it, and Hadamard's matrices, into the
    model and into `formats`.
    Returns what was learned, how keys and values are quantized, and the ranges of weights (`InputParams.ratios`) by layer."""
    part, model, recipe = chain.parts[index], chain.model, plan.recipe
    heads = mixed_values(chain.prepared, plan.specs)
    inputs, caches = {}, cache_params(chain.prepared, part.caches, plan)
    if done is not None:
        inputs, caches = done.inputs, {name: done.layers[name] for name in caches}
    elif given is not None:
        inputs = {ours[0].name: given[ours[0].name] for sites in part.groups if (ours := integer_sites(sites, plan))}
        for site in part.caches:
            if site.kv in caches:
                caches[site.kv] = learned_cache(site, caches[site.kv], given)
    elif recipe.learns:
        options = {**DEFAULTS, **recipe.block_gradient}
        specs = {site.name: plan.specs[site.name] for sites in part.groups for site in sites}
        cached = [plan.specs[name].cached for site in part.caches for name in (site.qk, site.pv) if name in plan.specs]
        wanted = learns(specs.values(), options) or any("learned" in (spec.transform, spec.observer) for spec in cached)
        if wanted and 0 < index <= len(chain.blocks):  # elsewhere at most diagonals are asked for (`check_learned`)
            found = learn(model, part.name, part.groups, part.caches, caches, plan, heads,
                          partial(chain.call, index), [chain.given(index, i) for i in range(len(hidden))], hidden, targets)
            inputs, caches = found.inputs, {**caches, **found.caches}
            log.info("%s: squared error %.4g of the output's in the first epoch, %.4g in the last", part.name, *found.errors)
    ratios = {}
    for sites in part.groups:
        install_hadamard(model, sites, plan, formats, heads)
        if sites and (ours := integer_sites(sites, plan)) and (params := inputs.get(ours[0].name)) is not None:
            install(model, sites, params, plan, formats, heads)
            if params.ratios is not None:
                sizes = [model.get_submodule(site.name).out_features for site in ours]
                for site, of in zip(ours, params.ratios.split(sizes)):
                    if params.clamped:
                        clamp_weights(model.get_submodule(site.name), formats[site.name], of)
                    ratios[site.name] = torch.ones_like(of) if params.clamped else of
    return inputs, caches, ratios


class FloatStream:
    """Each part reads what the float model gives it. plain: hidden states of the model as it is, which statistics are of; folded: of the model
    with the recipe's transforms in it, which Gram matrices are of. Either is None where nobody looks at it. learned: of `fitted`, or
    None."""

    def __init__(self, chain: Chain, plan: Plan, memory: float, statistics: Statistics | None, learned: Mapping[str, InputParams] | None) -> None:
        self.chain, self.plan, self.memory, self.given, self.learned = chain, plan, memory, statistics, learned
        recipe, start = plan.recipe, [None] * len(chain.batches)
        self.plain: Hidden | None = start if recipe.learns and learned is None or statistics is None and any(part.wanted for part in chain.parts) else None
        self.folded: Hidden | None = start if recipe.needs_inputs and (recipe.transforms or self.plain is None) else None

    def skip(self, index: int, onward: bool) -> None:
        """Make the hidden states after a part that is solved elsewhere."""
        for name in ("plain", "folded"):
            if getattr(self, name) is not None:
                setattr(self, name, self.chain.run(index, getattr(self, name), (), onward))

    def part(self, index: int, done: Done | None, onward: bool) -> Done:
        """Calibrate and solve a part, or apply what was done; with `onward`, the hidden states after it are made."""
        chain, plan = self.chain, self.plan
        part, model, recipe, before = chain.parts[index], chain.model, plan.recipe, self.plain
        stats = Statistics() if done is None else done.statistics
        if self.plain is not None:
            wanted = part.wanted if done is None and self.given is None else {}
            with observing(wanted, stats):
                self.plain = chain.run(index, self.plain, targets(wanted), onward)
        formats: _Formats = {}
        for sites in part.groups:
            formats.update(input_formats(model, sites, recipe, stats if self.given is None else self.given, plan))
        learned, caches, ratios = _mixed(chain, index, plan, formats, before or [], None, done, self.learned)
        layers = {} if done is None else done.layers
        passes = divided(model, formats, self.memory) if recipe.needs_inputs and done is None else []
        inputs = before if self.folded is None else self.folded
        for i, names in enumerate(passes or [{}]):
            last = onward and self.folded is not None and i == max(len(passes) - 1, 0)
            with gathering(model, names) as grams:
                after = chain.run(index, inputs or [], [(model.get_submodule(name), True) for name in names], last)
            if last:
                self.folded = after
            for name in list(grams):
                layers[name] = on_cpu(solved(model, name, plan, formats[name], grams.pop(name), ratios.get(name)))
        if not recipe.needs_inputs and done is None:
            layers = {name: on_cpu(solved(model, name, plan, fmt, None, ratios.get(name))) for name, fmt in formats.items()}
        if done is None:
            layers.update(caches)
            for site in part.attentions:
                if not plan.specs[site.qk].is_float:
                    layers[site.name] = on_cpu(attention_params(model, site, plan, stats if self.given is None else self.given))
        return Done(stats, layers, learned)


class _Fake:
    """A layer of the model as its simulation, which can be turned into the float layer and back."""

    def __init__(self, module: nn.Module, params: LinearParams | AttentionParams | CacheParams) -> None:
        self.module, self.params = module, params
        self.other = {name: p.data.clone() for name, p in module.named_parameters(recurse=False)}
        fake_weight(module, params)
        self.handles = fake_operands(module, params)

    def turn(self) -> None:
        for name, p in self.module.named_parameters(recurse=False):
            p.data, self.other[name] = self.other[name], p.data
        if self.handles:
            for handle in self.handles:
                handle.remove()
            self.handles = []
        else:
            self.handles = fake_operands(self.module, self.params)


def _turn(fakes: list[_Fake]) -> None:
    for fake in fakes:
        fake.turn()


class QuantizedStream:
    """Each part reads what the quantized ones before it give, and in a part each group of layers that share an input what the quantized groups
    before it give. floats: the hidden states of the float model, beside them, for solvers that look at both; else None. learned: of `fitted`, or None."""

    def __init__(self, chain: Chain, plan: Plan, memory: float, learned: Mapping[str, InputParams] | None) -> None:
        self.chain, self.plan, self.memory, self.learned = chain, plan, memory, learned
        self.learning = plan.recipe.learns and learned is None
        self.ratios: dict[str, Tensor] = {}  # of the part that is being solved
        self.quantized: Hidden = [None] * len(chain.batches)
        self.floats: Hidden | None = [None] * len(chain.batches) if plan.recipe.needs_inputs or self.learning else None

    def part(self, index: int, done: Done | None, onward: bool) -> Done:
        """As `FloatStream.part`."""
        chain, plan = self.chain, self.plan
        part, model, recipe = chain.parts[index], chain.model, plan.recipe
        stats, layers, fakes, early, learned = Statistics(), {}, [], {}, {}
        # Rows of an earlier layer are divided before that layer is solved, by what its float weight makes. What mixes inputs is found of the block as
        # a whole, and changes earlier layers too.
        mixed = recipe.learns or any(plan.specs[site.name].input.transform != "none" for sites in part.groups for site in sites)
        rows = [sites for sites in part.groups if mixed or sites[0].norm is None and transform_of(sites, plan.specs, recipe, model) is not None]
        onward_floats = None
        if done is None:
            if not mixed:
                layers = cache_params(chain.prepared, part.caches, plan)
                fakes = [_Fake(model.get_submodule(name), params) for name, params in layers.items()]
            self._observe(index, {key: part.wanted[key] for sites in rows for key in self._keys(part, sites)}, stats)
            for sites in rows:
                early.update(input_formats(model, sites, recipe, stats, plan))
            if mixed:
                if self.learning and 0 < index <= len(chain.blocks):
                    onward_floats = chain.run(index, self.floats, (), True)
                learned, layers, self.ratios = _mixed(chain, index, plan, early, self.quantized, onward_floats, None, self.learned)
                fakes = [_Fake(model.get_submodule(name), params) for name, params in layers.items()]
            for step in self._steps(index):
                found = self._attention(index, step) if isinstance(step, AttentionSite) else self._group(index, step, early, fakes, stats)
                fakes += [_Fake(model.get_submodule(name), params) for name, params in found.items()]
                layers.update({name: on_cpu(params) for name, params in found.items()})
        else:
            stats, layers, learned = done
            for sites in sorted(part.groups, key=lambda sites: sites not in rows):
                early.update(input_formats(model, sites, recipe, stats, plan))
            if self.learning and self.floats is not None:
                onward_floats = chain.run(index, self.floats, (), onward)
            _mixed(chain, index, plan, early, [], None, done, self.learned)
            fakes = [_Fake(model.get_submodule(name), params) for name, params in layers.items()] if onward else []
        self.quantized = chain.run(index, self.quantized, (), onward)
        _turn(fakes)
        if self.floats is not None:
            self.floats = chain.run(index, self.floats, (), onward) if onward_floats is None else onward_floats
        return Done(stats, layers, learned)

    def _keys(self, part: Part, sites: list[LinearSite]) -> list[str]:
        return [key for key in (f"{site.name}:input" for site in sites) if key in part.wanted]

    def _steps(self, index: int) -> list[list[LinearSite] | AttentionSite]:
        """The part's groups and attentions as the model runs them, a group where its first layer does."""
        part, model, seen, handles = self.chain.parts[index], self.chain.model, [], []
        names = {site.name: sites for sites in part.groups for site in sites} | {site.name: site for site in part.attentions}
        try:
            for name, step in names.items():
                module = model.get_submodule(name)
                if isinstance(step, AttentionSite):
                    handles.append(module.tap_p.register_forward_hook(lambda module, args, output, name=name: seen.append(name)))
                else:
                    handles.append(module.register_forward_pre_hook(lambda module, args, name=name: seen.append(name)))
            if self.quantized and names:
                self.chain.step(index, 0, self.quantized[0])
        finally:
            for handle in handles:
                handle.remove()
        steps: list[list[LinearSite] | AttentionSite] = []
        for name in [*seen, *names]:
            if not any(names[name] is step for step in steps):
                steps.append(names[name])
        return steps

    def _observe(self, index: int, wanted: Mapping[str, Operand], stats: Statistics) -> None:
        with observing(wanted, stats):
            self.chain.run(index, self.quantized, targets(wanted), False)

    def _attention(self, index: int, site: AttentionSite) -> dict[str, AttentionParams]:
        if self.plan.specs[site.qk].is_float:
            return {}
        stats, wanted = Statistics(), self.chain.parts[index].wanted
        self._observe(index, {key: operand for key, operand in wanted.items() if key.rpartition(":")[0] in (site.qk, site.pv)}, stats)
        return {site.name: attention_params(self.chain.model, site, self.plan, stats)}

    def _group(self, index: int, sites: list[LinearSite], early: _Formats, fakes: list[_Fake], stats: Statistics) -> dict[str, LinearParams]:
        """Measure and solve the layers that share an input. What is measured of it before the transforms is added to `stats`."""
        part, model, plan = self.chain.parts[index], self.chain.model, self.plan
        now = Statistics()
        changed = any(site.name in early for site in sites)
        keys = [key for key in self._keys(part, sites) if not changed or not plan.specs[key.rpartition(":")[0]].input.dynamic]
        self._observe(index, {key: part.wanted[key] for key in keys}, now)
        if changed:  # its rows are divided already: the range is that of the channels as they are now
            formats = {site.name: early[site.name] for site in sites if site.name in early}
            for name, fmt in formats.items():
                if fmt is not None and not fmt.dynamic:
                    formats[name] = layer_format(now, name, plan.specs[name].input, model.get_submodule(name).in_features)
        else:
            for key in now:
                stats[key] = now[key]
            formats = input_formats(model, sites, plan.recipe, now, plan)
        if not plan.recipe.needs_inputs:
            return {name: solved(model, name, plan, fmt, None, self.ratios.get(name)) for name, fmt in formats.items()}
        found = {}
        for names in divided(model, formats, self.memory):
            for name, gram in self._grams(index, names, fakes):
                found[name] = solved(model, name, plan, formats[name], gram, self.ratios.get(name))
        return found

    def _grams(self, index: int, names: _Formats, fakes: list[_Fake]) -> Iterator[tuple[str, Gram]]:
        model = self.chain.model
        until = [(model.get_submodule(name), True) for name in names]
        with gathering(model, names, paired=True) as grams:
            for i, (hidden, float_hidden) in enumerate(zip(self.quantized, self.floats)):
                _turn(fakes)
                self.chain.step(index, i, float_hidden, until)
                _turn(fakes)
                self.chain.step(index, i, hidden, until)
        while grams:
            name = next(iter(grams))
            yield name, grams.pop(name)


@torch.no_grad()
def quantize_blocks(prepared: Prepared, recipe: Recipe, data: Iterable | None, *, stream: str, device: torch.device | None = None,
                    statistics: Statistics | None = None, memory: float = GRAM_MEMORY, resume: str | Path | None = None,
                    share: tuple[int, int] = (0, 1), progress: Callable[[int], None] | None = None,
                    learned: Mapping[str, InputParams] | None = None) -> tuple[Plan, Statistics]:
    """As `choose` after `collect`, with one block on `device` at a time: the plan, and the statistics of a float stream. Changes
    `prepared.model` by the transforms only.

    stream: `float`: layers do not depend on one another, and the plan is that of `choose`, bit for bit on one device; `quantized`: each reads
    what the quantized ones before it give. data: None only for a recipe that needs none (or statistics alone, which a float stream may be
    given). resume: a folder to keep each finished part in, and to take those from that are there. share: (rank, processes), of a float stream with such a
    folder: this process does every so many-th part that is left and takes the others' from the folder, when they are there. progress: called once a block,
    with the number of images. learned: what was learned elsewhere, in the place of learning.

    Raises ValueError as those do, and for a folder of another run; torch.OutOfMemoryError that says what is kept and what to lower.
    """
    if statistics is not None:
        if stream == "quantized":
            raise ValueError("stream='quantized' measures what its quantized blocks give: leave out statistics=, which are of the float model")
        check_statistics(statistics, prepared)
    batches = [] if data is None else list(checked(data, recipe.calib_size, prepared))
    if recipe.learns and len({(batch.dtype, batch.shape[1:]) for batch in batches}) == 1:  # a batch is what a step of the descent sees
        batches = list(torch.cat(batches).split({**DEFAULTS, **recipe.block_gradient}["batch_size"]))
    samples = sum(map(len, batches))
    if data is not None:
        check_sample_count(samples, recipe, prepared)
    chain, wanted = Chain(prepared, device, batches), operands_of(prepared, [recipe])
    plan = Plan(recipe, specs(prepared, recipe))
    check_learned(prepared, plan.specs, recipe)
    learned = None if learned is None else fitted(prepared, plan, learned)
    of_model = fingerprint(prepared.model)
    folder = None if resume is None else Folder(resume, {
        "model": of_model, "recipe": recipe.to_dict(), "data": fingerprint_of(batches), "stream": stream, "blocks": prepared.stages,
        "statistics": None if statistics is None else statistics.fingerprint(), "learned": None if learned is None else fingerprint_of_learned(learned)})
    with _memory_errors(chain, chain.parts[0], folder, memory), exact_float32():
        chain.assign(wanted)
    # What was done is read first: a damaged file is an error before any work.
    filled = [bool(part.groups or part.attentions) for part in chain.parts]
    done = [folder.load(i, part.name) if folder is not None and filled[i] else None for i, part in enumerate(chain.parts)]
    to_do = [i for i in range(len(done)) if filled[i] and done[i] is None]
    rank, processes = share
    if processes > 1 and (stream != "float" or folder is None):
        raise ValueError("several processes share the blocks of a float stream by way of a folder: give stream='float' and resume=")
    others = [i for i in to_do if i % processes != rank]  # whatever is done already when a process looks
    to_do = [i for i in to_do if i not in others]
    running = FloatStream(chain, plan, memory, statistics, learned) if stream == "float" else QuantizedStream(chain, plan, memory, learned)
    for i, part in enumerate(chain.parts):
        onward = any(later > i for later in to_do)
        with _memory_errors(chain, part, folder, memory), chain.at(i), exact_float32():
            if i in others:
                running.skip(i, onward)
            else:
                done[i] = running.part(i, done[i], onward)
        if folder is not None and i in to_do:
            folder.save(i, part.name, done[i])
        if progress is not None and 0 < i <= len(chain.blocks) and i not in others:
            progress(samples)
    for i in others:
        kept = folder.wait(i, chain.parts[i].name)
        with chain.at(i), exact_float32():
            done[i] = running.part(i, kept, onward=False)
        if progress is not None and 0 < i <= len(chain.blocks):
            progress(samples)
    seen = Statistics(of_model, samples)
    for kept in done:
        plan.layers.update(kept.layers)
        for key in kept.statistics:
            seen[key] = kept.statistics[key]
    check_transformed(plan)
    record_thresholds(prepared, plan)
    plan.samples = statistics.samples if statistics is not None else samples if wanted else 0
    if folder is not None and stream == "float" and len(seen) and not recipe.heads and rank == 0:  # whose statistics are of the parts
        seen.save(folder.path / STATISTICS)
    return plan, seen


@torch.no_grad()
def collect_blocks(prepared: Prepared, recipes: Sequence[Recipe], data: Iterable, *, device: torch.device | None = None,
                   progress: Callable[[int], None] | None = None) -> Statistics:
    """As `collect`, with one block on `device` at a time. progress: called once a block, with the number of images."""
    most = max(recipes, key=lambda recipe: recipe.calib_size)
    batches = list(checked(data, most.calib_size, prepared))
    stats = Statistics(fingerprint(prepared.model), sum(map(len, batches)))
    check_sample_count(stats.samples, most, prepared)
    chain = Chain(prepared, device, batches)
    with _memory_errors(chain, chain.parts[0], None, None), exact_float32():
        chain.assign(operands_of(prepared, recipes))
    hidden: Hidden = [None] * len(batches)
    last = max((i for i, part in enumerate(chain.parts) if part.wanted), default=-1)
    for i, part in enumerate(chain.parts[: last + 1]):
        with _memory_errors(chain, part, None, None), chain.at(i), exact_float32(), observing(part.wanted, stats):
            hidden = chain.run(i, hidden, targets(part.wanted), i < last)
        if progress is not None and 0 < i <= len(chain.blocks):
            progress(stats.samples)
    return stats


@contextmanager
def _memory_errors(chain: Chain, part: Part, folder: Folder | None, memory: float | None) -> Iterator[None]:
    """Say of a torch.OutOfMemoryError what is kept and what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        lower = f"a smaller batch size of calib (now {max(map(len, chain.batches), default=0)})"
        if memory is not None:
            lower += f" or a smaller memory= (now {memory:g} bytes of Gram matrices)"
        if folder is None:
            message = f"nothing is kept; call again with {lower}" + ("" if memory is None else ", and with resume=FOLDER, to keep what is finished")
        else:
            kept = sum(folder.file(i + 1).exists() for i in range(len(chain.blocks)))
            message = f"{kept} of {len(chain.blocks)} blocks are kept in {folder.path}; call again with the same resume= and {lower}"
        raise torch.OutOfMemoryError(f"out of memory on {chain.device} in {part.name!r}: {message}") from error
