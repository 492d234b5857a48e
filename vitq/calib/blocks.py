"""Calibration block by block: one block is on the device at a time, and what goes from one to the next waits on the CPU, in float32.

The model is a stem, which makes the first hidden states, `Prepared.stages` one after another, and a tail. Each of these is a part: its inputs
are streamed through it to measure and to solve, then once more, or in the same pass, to get those of the next part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitq.calib.choose import attention_params, check_statistics, check_transformed, input_formats, solved, static_format
from vitq.calib.gram import GRAM_MEMORY, Gram, divided, gathering
from vitq.calib.resume import Done, Folder, fingerprint_of, on_cpu
from vitq.calib.runner import Operand, check_sample_count, checked, exact_float32, fingerprint, observing, operands_of, specs, transform_of
from vitq.calib.simulate import fake_operands, fake_weight
from vitq.calib.statistics import Statistics
from vitq.formats import ActivationFormat
from vitq.models.adapter import replace
from vitq.models.sites import AttentionSite, LinearSite, Prepared
from vitq.plan import AttentionParams, LinearParams, Plan
from vitq.recipe import Recipe

STREAMS = ("float", "quantized")
STATISTICS = "statistics.safetensors"  # in the folder of a finished run
_Hidden = list[Tensor | None]  # hidden states, one tensor a batch; before the stem there are none
_Formats = dict[str, ActivationFormat | None]


@dataclass
class Part:
    """The stem, a block or the tail: what of the model's sites lies in it, and the operands to observe there, by key."""

    name: str
    groups: list[list[LinearSite]] = field(default_factory=list)
    attentions: list[AttentionSite] = field(default_factory=list)
    wanted: dict[str, Operand] = field(default_factory=dict)


class _Seen(Exception):
    """All that a pass was to see has been seen."""


class _Stop(Exception):
    """The first hidden states are there."""


class _Stub(nn.Module):
    """In the place of a block: `met(hidden, args, kwargs)` says what it returns. Attributes that a model looks at are the block's."""

    def __init__(self, block: nn.Module, met: Callable[[Tensor, tuple, dict], Any]) -> None:
        super().__init__()
        self.__dict__.update(block=block, met=met)  # the block is not to be its child

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.met(hidden, args, kwargs)


@contextmanager
def placed(module: nn.Module, device: torch.device, home: torch.device) -> Iterator[None]:
    """The module on `device` inside, back at `home` afterwards."""
    module.to(device)
    try:
        yield
    finally:
        module.to(home)


class Chain:
    """A prepared model as its parts, and the batches that go through it. parts[0] is the stem, parts[-1] the tail."""

    def __init__(self, prepared: Prepared, device: torch.device | None, batches: list[Tensor]) -> None:
        self.prepared, self.model, self.batches = prepared, prepared.model, batches
        self.home = next(self.model.parameters()).device
        self.device = self.home if device is None else device
        self.blocks = [self.model.get_submodule(name) for name in prepared.stages]
        self.parts = [Part("what lies before the blocks"), *map(Part, prepared.stages), Part("what lies after the blocks")]
        # What each block is given beside hidden states (masks, positions), of each batch; equal tensors are kept once.
        self._given: list[list[tuple[tuple, dict]]] = []
        self._tensors: list[Tensor] = []
        self._in_tuple, self._at, self._hidden = False, 0, None
        self._early = self._found_early()
        for sites in prepared.input_groups():
            self.parts[self._place(sites[0].name)].groups.append(sites)
        for site in prepared.attentions:
            self.parts[self._place(site.name)].attentions.append(site)

    def observe(self, wanted: Mapping[str, Operand]) -> None:
        """Give each part its operands of these."""
        for part in self.parts:
            layers = {site.name for sites in part.groups for site in sites} | {name for site in part.attentions for name in (site.qk, site.pv)}
            part.wanted = {key: operand for key, operand in wanted.items() if key.rpartition(":")[0] in layers}

    def _place(self, name: str) -> int:
        for i, stage in enumerate(self.prepared.stages):
            if name.startswith(f"{stage}."):
                return i + 1
        return 0 if name in self._early else len(self.parts) - 1

    @torch.no_grad()
    def _found_early(self) -> set[str]:
        """The linear layers that run before the first block. Without data nobody asks."""
        found: set[str] = set()
        modules = {site.name: self.model.get_submodule(site.name) for site in self.prepared.linears}
        handles = [module.register_forward_pre_hook(lambda module, args, name=name: found.add(name)) for name, module in modules.items()]
        try:
            if self.batches:
                with self.at(0):
                    self.step(0, 0, None)
        finally:
            for handle in handles:
                handle.remove()
        return found

    @contextmanager
    def at(self, index: int) -> Iterator[None]:
        """The part on the device, ready to run; nothing else of the model is there."""
        if 0 < index <= len(self.blocks):
            with placed(self.blocks[index - 1], self.device, self.home):
                yield
            return
        for i, (name, block) in enumerate(zip(self.prepared.stages, self.blocks)):
            replace(self.model, name, _Stub(block, partial(self._met, i)))
        try:
            with placed(self.model, self.device, self.home):
                yield
        finally:
            for name, block in zip(self.prepared.stages, self.blocks):
                replace(self.model, name, block)

    def step(self, index: int, batch: int, hidden: Tensor | None, until: Sequence[tuple[nn.Module, bool]] = ()) -> Tensor | None:
        """One batch through the part, within `at`: hidden states in and out, on the CPU. None where all of `until`, modules whose inputs (or
        outputs) are to be seen, were, or from the tail."""
        with _stopping(until):
            try:
                if 0 < index <= len(self.blocks):
                    args, kwargs = _moved(self._given[batch][index - 1], lambda t: t.to(self.device))
                    out = self.blocks[index - 1](hidden.to(self.device), *args, **kwargs)
                    self._in_tuple = isinstance(out, tuple)
                    return (out[0] if self._in_tuple else out).to("cpu")
                self._at, self._hidden = index, hidden
                record = [] if index == 0 and len(self._given) == batch else None
                self._record = record
                self.prepared.run(self.batches[batch])
                return None  # of the tail
            except _Seen:
                return None
            except _Stop:
                if record is not None:
                    self._given.append(record)
                return self._hidden

    def _met(self, index: int, hidden: Tensor, args: tuple, kwargs: dict) -> Any:
        """What stands for block `index` returns."""
        if self._at == 0:
            if index == 0:
                self._hidden = hidden.to("cpu")
            if self._record is not None:
                self._record.append(_moved((args, kwargs), self._kept))
            if self._record is None or index == len(self.blocks) - 1:
                raise _Stop
            return hidden
        if index == len(self.blocks) - 1:
            hidden = self._hidden.to(self.device)
        return (hidden,) if self._in_tuple else hidden

    def _kept(self, tensor: Tensor) -> Tensor:
        tensor = tensor.to("cpu")
        same = next((t for t in self._tensors if t is tensor or t.dtype == tensor.dtype and torch.equal(t, tensor)), None)
        if same is None:
            self._tensors.append(tensor)
        return tensor if same is None else same

    def run(self, index: int, inputs: _Hidden, until: Sequence[tuple[nn.Module, bool]], onward: bool) -> _Hidden:
        """All batches through the part, as far as `until`, or with `onward` to the end; its outputs."""
        if not onward and not until:
            return inputs
        return [self.step(index, i, hidden, () if onward else until) for i, hidden in enumerate(inputs)]


@contextmanager
def _stopping(until: Sequence[tuple[nn.Module, bool]]) -> Iterator[None]:
    """Inside, a forward ends with `_Seen` once all of these modules were given an input (True) or gave an output (False)."""
    left, handles = set(range(len(until))), []

    def seen(i: int, *of: Any) -> None:
        left.discard(i)
        if not left:
            raise _Seen

    try:
        for i, (module, at_input) in enumerate(until):
            hook = module.register_forward_pre_hook if at_input else module.register_forward_hook
            handles.append(hook(partial(seen, i)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _moved(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """Arguments of a block with their tensors moved."""
    if isinstance(value, Tensor):
        return move(value)
    if type(value) in (tuple, list):
        return type(value)(_moved(v, move) for v in value)
    return {k: _moved(v, move) for k, v in value.items()} if type(value) is dict else value


def _targets(wanted: Mapping[str, Operand]) -> list[tuple[nn.Module, bool]]:
    return [(operand.module, operand.at_input) for operand in wanted.values()]


class FloatStream:
    """Each part reads what the float model gives it. plain: hidden states of the model as it is, which statistics are of; folded: of the model
    with the recipe's transforms in it, which Gram matrices are of. Either is None where nobody looks at it."""

    def __init__(self, chain: Chain, plan: Plan, memory: float, statistics: Statistics | None) -> None:
        self.chain, self.plan, self.memory, self.given = chain, plan, memory, statistics
        recipe, start = plan.recipe, [None] * len(chain.batches)
        self.plain: _Hidden | None = start if statistics is None and any(part.wanted for part in chain.parts) else None
        self.folded: _Hidden | None = start if recipe.needs_inputs and (recipe.transforms or self.plain is None) else None

    def part(self, index: int, done: Done | None, onward: bool) -> Done:
        """Calibrate and solve a part, or apply what was done; with `onward`, the hidden states after it are made."""
        chain, plan = self.chain, self.plan
        part, model, recipe, before = chain.parts[index], chain.model, plan.recipe, self.plain
        stats = Statistics() if done is None else done.statistics
        if self.plain is not None:
            wanted = part.wanted if done is None else {}
            with observing(wanted, stats):
                self.plain = chain.run(index, self.plain, _targets(wanted), onward)
        formats: _Formats = {}
        for sites in part.groups:
            formats.update(input_formats(model, sites, recipe, stats if self.given is None else self.given, plan))
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
                layers[name] = on_cpu(solved(model, name, plan, formats[name], grams.pop(name)))
        if not recipe.needs_inputs and done is None:
            layers = {name: on_cpu(solved(model, name, plan, fmt, None)) for name, fmt in formats.items()}
        if done is None:
            for site in part.attentions:
                if not plan.specs[site.qk].is_float:
                    layers[site.name] = on_cpu(attention_params(model, site, plan, stats if self.given is None else self.given))
        return Done(stats, layers)


class _Fake:
    """A layer of the model as its simulation, which can be turned into the float layer and back."""

    def __init__(self, module: nn.Module, params: LinearParams | AttentionParams) -> None:
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
    before it give. floats: the hidden states of the float model, beside them, for solvers that look at both; else None."""

    def __init__(self, chain: Chain, plan: Plan, memory: float) -> None:
        self.chain, self.plan, self.memory = chain, plan, memory
        self.quantized: _Hidden = [None] * len(chain.batches)
        self.floats: _Hidden | None = [None] * len(chain.batches) if plan.recipe.needs_inputs else None

    def part(self, index: int, done: Done | None, onward: bool) -> Done:
        """As `FloatStream.part`."""
        chain, plan = self.chain, self.plan
        part, model, recipe = chain.parts[index], chain.model, plan.recipe
        stats, layers, fakes = Statistics(), {}, []
        # Rows of an earlier layer are divided before that layer is solved, by what its float weight makes.
        rows = [sites for sites in part.groups if sites[0].norm is None and transform_of(sites, plan.specs, recipe, model) is not None]
        if done is None:
            early: _Formats = {}
            self._observe(index, {key: part.wanted[key] for sites in rows for key in self._keys(part, sites)}, stats)
            for sites in rows:
                early.update(input_formats(model, sites, recipe, stats, plan))
            for step in self._steps(index):
                found = self._attention(index, step) if isinstance(step, AttentionSite) else self._group(index, step, early, fakes, stats)
                fakes += [_Fake(model.get_submodule(name), params) for name, params in found.items()]
                layers.update({name: on_cpu(params) for name, params in found.items()})
        else:
            stats, layers = done
            for sites in sorted(part.groups, key=lambda sites: sites not in rows):
                input_formats(model, sites, recipe, stats, plan)
            fakes = [_Fake(model.get_submodule(name), params) for name, params in layers.items()] if onward else []
        self.quantized = chain.run(index, self.quantized, (), onward)
        _turn(fakes)
        if self.floats is not None:
            self.floats = chain.run(index, self.floats, (), onward)
        return Done(stats, layers)

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
            if self.quantized:
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
            self.chain.run(index, self.quantized, _targets(wanted), False)

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
                    formats[name] = static_format(now, f"{name}:input", plan.specs[name].input)
        else:
            for key in now:
                stats[key] = now[key]
            formats = input_formats(model, sites, plan.recipe, now, plan)
        if not plan.recipe.needs_inputs:
            return {name: solved(model, name, plan, fmt, None) for name, fmt in formats.items()}
        found = {}
        for names in divided(model, formats, self.memory):
            for name, gram in self._grams(index, names, fakes):
                found[name] = solved(model, name, plan, formats[name], gram)
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
                    progress: Callable[[int], None] | None = None) -> tuple[Plan, Statistics]:
    """As `choose` after `collect`, with one block on `device` at a time: the plan, and the statistics of a float stream. Changes
    `prepared.model` by the transforms only.

    stream: `float`: layers do not depend on one another, and the plan is that of `choose`, bit for bit on one device; `quantized`: each reads
    what the quantized ones before it give. data: None only for a recipe that needs none (or statistics alone, which a float stream may be
    given). resume: a folder to keep each finished part in, and to take those from that are there. progress: called once a block, with the number
    of images.

    Raises ValueError as those do, and for a folder of another run; torch.OutOfMemoryError that says what is kept and what to lower.
    """
    if statistics is not None:
        if stream == "quantized":
            raise ValueError("stream='quantized' measures what its quantized blocks give: leave out statistics=, which are of the float model")
        check_statistics(statistics, prepared)
    batches = [] if data is None else list(checked(data, recipe.calib_size, prepared))
    samples = sum(map(len, batches))
    if data is not None:
        check_sample_count(samples, recipe, prepared)
    chain = Chain(prepared, device, batches)
    wanted = operands_of(prepared, [recipe])
    chain.observe(wanted)
    plan = Plan(recipe, specs(prepared, recipe))
    of_model = fingerprint(prepared.model)
    folder = None if resume is None else Folder(resume, {
        "model": of_model, "recipe": recipe.to_dict(), "data": fingerprint_of(batches), "stream": stream, "blocks": prepared.stages,
        "statistics": None if statistics is None else statistics.fingerprint()})
    # What was done is read first: a damaged file is an error before any work.
    filled = [bool(part.groups or part.attentions) for part in chain.parts]
    done = [folder.load(i, part.name) if folder is not None and filled[i] else None for i, part in enumerate(chain.parts)]
    to_do = [i for i in range(len(done)) if filled[i] and done[i] is None]
    running = FloatStream(chain, plan, memory, statistics) if stream == "float" else QuantizedStream(chain, plan, memory)
    seen = Statistics(of_model, samples)
    for i, part in enumerate(chain.parts):
        kept = done[i]
        with _memory_errors(chain, part, folder, memory), chain.at(i), exact_float32():
            kept = running.part(i, kept, onward=any(later > i for later in to_do))
        if folder is not None and i in to_do:
            folder.save(i, part.name, kept)
        plan.layers.update(kept.layers)
        for key in kept.statistics:
            seen[key] = kept.statistics[key]
        if progress is not None and 0 < i <= len(chain.blocks):
            progress(samples)
    check_transformed(plan)
    plan.samples = statistics.samples if statistics is not None else samples if wanted else 0
    if folder is not None and stream == "float" and len(seen):
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
    chain.observe(operands_of(prepared, recipes))
    hidden: _Hidden = [None] * len(batches)
    last = max((i for i, part in enumerate(chain.parts) if part.wanted), default=-1)
    for i, part in enumerate(chain.parts[: last + 1]):
        with _memory_errors(chain, part, None, None), chain.at(i), exact_float32(), observing(part.wanted, stats):
            hidden = chain.run(i, hidden, _targets(part.wanted), i < last)
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
            message = f"{kept} of {len(chain.blocks)} blocks are kept in {folder.path}; call again with the same resume= and {lower}, and it goes on after them"
        raise torch.OutOfMemoryError(f"out of memory on {chain.device} in {part.name!r}: {message}") from error
