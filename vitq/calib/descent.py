"""AdamW's descent of an error, a batch a step. On a GPU a step is a CUDA graph, replayed for each batch: a block's step is over a thousand small kernels,
which the host takes ten times as long to launch as the GPU to run."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitq.calib.chain import Given, moved
from vitq.graphs import capturing, first_line, side_stream

CLIP_RATE = 10.0  # how much faster clips are learned than matrices, as in FlatQuant's code
RATE_END = 1e-3  # the part of the learning rate that is left at the end of a cosine
WARMUP = 3  # steps with batches of a shape that are launched before one is captured: libraries make their workspaces in them
MOST_GRAPHS = 8  # batches of yet other shapes are launched

log = logging.getLogger("vitq")


class NotFinite(Exception):
    """The error is no longer finite, in epoch args[0]."""


class Batch(NamedTuple):
    """given: what a block is given beside hidden states; hidden, target: what it reads and what it is to return."""

    given: Given
    hidden: Tensor
    target: Tensor


class Static:
    """Tensors at fixed addresses that any batch of one shape is copied into."""

    def __init__(self, batch: Batch, device: torch.device) -> None:
        self._sources, self._copies = _tensors(batch), []

        def copied(tensor: Tensor) -> Tensor:
            self._copies.append(torch.empty(tensor.shape, dtype=tensor.dtype, device=device).copy_(tensor))
            return self._copies[-1]

        self.batch = Batch(*moved(tuple(batch), copied))

    def fill(self, batch: Batch) -> None:
        sources = _tensors(batch)
        for copy, source, last in zip(self._copies, sources, self._sources):
            if source is not last:  # batches share masks and positions
                copy.copy_(source)
        self._sources = sources


def _tensors(batch: Batch) -> list[Tensor]:
    found: list[Tensor] = []
    moved(tuple(batch), found.append)
    return found


def shape_of(batch: Batch) -> str:
    """Equal for batches that differ by what is in their tensors alone."""
    return repr(moved(tuple(batch), lambda t: (tuple(t.shape), t.dtype)))


def is_static(device: torch.device) -> bool:
    """Whether steps read batches and rates from fixed addresses, as a CUDA graph needs them."""
    return device.type == "cuda"


class Steps:
    """Steps of AdamW, called with a batch's index each. error(batch): that of a batch, on the device; rates: [steps][groups]; total: of errors so far, on the
    device. Where a capture fails, steps are launched from then on, with one warning in a process: what a failed capture has allocated is not given back."""

    refused = False  # by a capture that failed

    def __init__(self, groups: list[list[nn.Parameter]], error: Callable[[Batch], Tensor], batches: list[Batch], rates: list[list[float]],
                 device: torch.device) -> None:
        self.error, self.batches, self.device, self.static = error, batches, device, is_static(device)
        self.taken, cuda = 0, device.type == "cuda"
        self.total = torch.zeros((), device=device)
        # AdamW on a GPU takes rates in float32 alone; on a CPU a float64 one is a Python number's equal.
        self.rates = torch.tensor(rates, dtype=torch.float32, device=device) if cuda else torch.tensor(rates, dtype=torch.float64)
        self.rate = self.rates[0].clone()
        self.optimizer = torch.optim.AdamW([{"params": params, "lr": rate} for params, rate in zip(groups, self.rate.unbind() if self.static else rates[0])],
                                           weight_decay=0.0, fused=cuda, capturable=cuda)
        self.shapes = [shape_of(batch) for batch in batches]
        self.seen: Counter[str] = Counter()
        self.buffers: dict[str, Static] = {}
        self.graphs: dict[str, torch.cuda.CUDAGraph] = {}

    def __call__(self, i: int) -> None:
        batch, shape = self.batches[i], self.shapes[i]
        if self.static:
            self.rate.copy_(self.rates[self.taken])
        else:
            for group, rate in zip(self.optimizer.param_groups, self.rates[self.taken].tolist()):
                group["lr"] = rate
        self.taken += 1
        if self.static and (shape in self.buffers or len(self.buffers) < MOST_GRAPHS):
            if shape not in self.buffers:
                self.buffers[shape] = Static(batch, self.device)
            self.buffers[shape].fill(batch)
            batch = self.buffers[shape].batch
            if self.rates.is_cuda and not Steps.refused and shape not in self.graphs and self.seen[shape] >= WARMUP:
                self._capture(shape)
        self.seen[shape] += 1
        if shape in self.graphs:
            self.graphs[shape].replay()
        else:
            self._launch(batch)

    def _launch(self, batch: Batch) -> None:
        """All of a step that is on the device; nothing of it is read on the host."""
        self.optimizer.zero_grad(set_to_none=True)
        error = self.error(batch)
        (error / error.detach().clamp_min(1e-30)).backward()
        self.optimizer.step()
        self.total += error.detach()

    def _capture(self, shape: str) -> None:
        """Capture a step, which does not run it. All graphs share one pool: none reads what another, or itself before, has left there."""
        graph, pool = torch.cuda.CUDAGraph(), next((graph.pool() for graph in self.graphs.values()), None)
        self.optimizer.zero_grad(set_to_none=True)
        try:
            with capturing(graph, pool):
                self._launch(self.buffers[shape].batch)
        except RuntimeError as error:
            self.optimizer.zero_grad(set_to_none=True)  # which nothing has been written to
            Steps.refused = True
            log.warning("a step of block_gradient cannot be captured as a CUDA graph (%s); from now on steps are launched one by one",
                        first_line(error.__context__ or error))
        else:
            self.graphs[shape] = graph

    def release(self) -> None:
        """Give back the graphs and the gradients, which lie in their pool: the next capture, of another block, empties it."""
        self.optimizer.zero_grad(set_to_none=True)
        self.graphs.clear()
        self.buffers.clear()


@contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """Inside, work on a GPU goes to a stream that can be captured."""
    if device.type != "cuda":
        yield
        return
    current = torch.cuda.current_stream(device)
    side = side_stream(current.device)
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side):
            yield
    finally:
        current.wait_stream(side)


def rates_of(options: Mapping[str, Any], steps: int) -> Iterator[list[float]]:
    """Of matrices and of clips in each step: half a cosine, after a linear warm-up where there is to be one."""
    for step in range(steps):
        part = RATE_END + (1 - RATE_END) * 0.5 * (1 + math.cos(math.pi * step / steps))
        part *= min(1.0, 0.01 + 0.99 * step / options["warmup"]) if options["warmup"] else 1.0
        yield [rate * part for rate in (options["learning_rate"], CLIP_RATE * options["learning_rate"])]


def descend(modules: nn.Module, error: Callable[[Batch], Tensor], batches: list[Batch], options: Mapping[str, Any], device: torch.device,
            generator: torch.Generator) -> tuple[float, float]:
    """Learn the parameters of the modules from batches in a random order, `epochs` times. The squared error in the first and in the last epoch, as parts of
    the square of the targets. Raises NotFinite."""
    named, sums = list(modules.named_parameters()), []
    groups = [[p for name, p in named if p.requires_grad and ("clip" in name) == clips] for clips in (False, True)]
    energy = sum(float(batch.target.double().square().sum()) for batch in batches)
    with _aside(device):
        steps = Steps(groups, error, batches, list(rates_of(options, options["epochs"] * len(batches))), device)
        try:
            for epoch in range(options["epochs"]):
                steps.total.zero_()
                for i in torch.randperm(len(batches), generator=generator).tolist():
                    steps(i)
                sums.append(float(steps.total) / max(energy, 1e-30))
                if not math.isfinite(sums[-1]):
                    raise NotFinite(epoch)
        finally:
            steps.release()
    return sums[0], sums[-1]
