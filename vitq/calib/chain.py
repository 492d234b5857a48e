"""A prepared model as a chain of parts, of which one at a time is on the device: a stem, which makes the first hidden states,
`Prepared.stages` one after another, and a tail. Hidden states between them wait on the CPU, in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vitq.calib.runner import Operand
from vitq.models.adapter import replace
from vitq.models.sites import AttentionSite, CacheSite, LinearSite, Prepared

Hidden = list[Tensor | None]  # hidden states, one tensor a batch; before the stem there are none
Given = tuple[tuple, dict]  # what a block is given beside hidden states: masks, positions


@dataclass
class Part:
    """The stem, a block or the tail: what of the model's sites lies in it, and the operands to observe there, by key."""

    name: str
    groups: list[list[LinearSite]] = field(default_factory=list)
    attentions: list[AttentionSite] = field(default_factory=list)
    caches: list[CacheSite] = field(default_factory=list)
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
        self._given: list[list[Given]] = []  # of each batch, by block; equal tensors are kept once
        self._tensors: list[Tensor] = []
        self._in_tuple, self._at, self._hidden = False, 0, None

    def assign(self, wanted: Mapping[str, Operand]) -> None:
        """Give each part its sites and its operands of these."""
        early = self._early()
        last = len(self.parts) - 1

        def of(name: str) -> Part:
            inside = (i for i, stage in enumerate(self.prepared.stages, 1) if name.startswith(f"{stage}."))
            return self.parts[next(inside, 0 if name in early else last)]

        owner: dict[str, Part] = {}
        for sites in self.prepared.input_groups():
            part = of(sites[0].name)
            part.groups.append(sites)
            owner.update({site.name: part for site in sites})
        for site in self.prepared.attentions:
            part = owner[site.qk] = owner[site.pv] = of(site.name)
            part.attentions.append(site)
        for site in self.prepared.caches:
            of(site.name).caches.append(site)
        for key, operand in wanted.items():
            owner[key.rpartition(":")[0]].wanted[key] = operand

    @torch.no_grad()
    def _early(self) -> set[str]:
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
                    return self.call(index, self.given(index, batch), hidden).to("cpu")
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

    def given(self, index: int, batch: int) -> Given:
        """What block `index` is given of a batch, with tensors on the CPU."""
        return self._given[batch][index - 1]

    def call(self, index: int, given: Given, hidden: Tensor, parameters: dict[str, Tensor] | None = None) -> Tensor:
        """What block `index` returns of hidden states, on the device. parameters: to use in the place of its own, by their names in it."""
        args, kwargs = moved(given, lambda t: t.to(self.device))
        block, hidden = self.blocks[index - 1], hidden.to(self.device)
        if parameters is None:
            out = block(hidden, *args, **kwargs)
        else:
            out = functional_call(block, parameters, (hidden, *args), kwargs)
        self._in_tuple = isinstance(out, tuple)
        return out[0] if self._in_tuple else out

    def _met(self, index: int, hidden: Tensor, args: tuple, kwargs: dict) -> Any:
        """What stands for block `index` returns."""
        if self._at == 0:
            if index == 0:
                self._hidden = hidden.to("cpu")
            if self._record is not None:
                self._record.append(moved((args, kwargs), self._kept))
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

    def run(self, index: int, inputs: Hidden, until: Sequence[tuple[nn.Module, bool]], onward: bool) -> Hidden:
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


def moved(value: Any, move: Callable[[Tensor], Any]) -> Any:
    """Arguments of a block, with what `move` makes of their tensors in their places."""
    if isinstance(value, Tensor):
        return move(value)
    if type(value) in (tuple, list):
        return type(value)(moved(v, move) for v in value)
    return {k: moved(v, move) for k, v in value.items()} if type(value) is dict else value


def targets(wanted: Mapping[str, Operand]) -> list[tuple[nn.Module, bool]]:
    return [(operand.module, operand.at_input) for operand in wanted.values()]
