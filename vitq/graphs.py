"""A model as CUDA graphs: everything it launches, replayed by one call, so that the host's time does not count."""

from __future__ import annotations

import functools
import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger("vitq")

# Graphs that one compiled model keeps; beyond that the one that was not used for longest goes. Batch sizes take a few for
# each image size (see `GraphedModel`), so only a stream of ever new image sizes gets here.
MOST_GRAPHS = 16
WARMUP = 3


def compile(model: nn.Module, images: Tensor | None = None, *, clone: bool = True) -> nn.Module:
    """`model` on CUDA as a module that replays CUDA graphs: model(images [B, ...]) -> the same values.

    A graph is captured when a shape is first seen; `images` has one captured now, for batches of that size. A smaller
    batch, such as the last one, runs in a graph that is there already, filled up, if that is less than twice its size,
    and else has its own captured: all graphs share one memory pool, and those of one image size one input buffer if the
    largest came first. Images may lie on any device; they are copied into the graph's input.

    clone: False returns the graph's own output, which the next call overwrites.
    On a CPU there are no graphs: the model itself is returned, with a line in the log.
    Raises TypeError for what is not a module, ValueError for one in training mode (a batch that is filled up must not
    change its images' results), and RuntimeError for a model that cannot be captured, when it is.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if model.training:
        raise ValueError("the model is in training mode, in which images of a batch may depend on each other: call model.eval()")
    if isinstance(model, GraphedModel):
        model = model.model
    if (device := _device(model)).type != "cuda":
        log.warning("vitq.compile: the model is on %s, and CUDA graphs need a GPU; it is returned as it is", device)
        return model
    graphed = GraphedModel(model, clone=clone)
    if images is not None:
        graphed(images)
    return graphed


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: Any = None) -> Iterator[None]:
    """What runs inside is captured, as by torch.cuda.graph, on the current device's `side_stream`; RuntimeError where that is refused, after which all is as it was.

    torch's own leaves its stream the current one then, and up to 2.11 at least its generator as if the capture went on: the next random number on the GPU,
    such as a token that is sampled, fails. A capture that ends well ends that.
    """
    current = torch.cuda.current_stream()
    stream = side_stream(current.device)
    try:
        # thread_local: a data loader that pins memory meanwhile, or a backward pass in its own thread, does not spoil the capture
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            yield
    except RuntimeError:
        torch.cuda.set_stream(current)
        torch.cuda.synchronize()
        with suppress(torch.OutOfMemoryError):  # the first error is the one to be heard
            number = torch.zeros(1, device=current.device)
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
                number.zero_()
        raise


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The one of a device (with its index) on which work is captured: memory is kept by stream. torch.cuda.graph's own is of the device that came first, and what
    runs on another is not captured there."""
    return torch.cuda.Stream(device)


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return str(error).partition("\n")[0] or type(error).__name__


class Graph:
    """One captured call fn(static) -> output, both tensors at fixed addresses. Raises RuntimeError where a capture is not
    possible: the call synchronizes, copies from the host, or runs out of memory."""

    def __init__(self, fn: Callable[[Tensor], Any], static: Tensor, pool: Any = None, warmup: int = WARMUP):
        self.fn, self.static = fn, static  # a graph holds addresses only: weights and input live as long as it does
        with torch.inference_mode(), torch.cuda.device(static.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(warmup):
                    fn(static)
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with capturing(self._graph, pool):
                self.output = fn(static)

    def replay(self) -> None:
        self._graph.replay()


class GraphedModel(nn.Module):
    """What `vitq.compile` returns. `model` is the module that it runs; moving or loading that captures anew.

    Calls may come from several threads and streams; they run one after the other.
    """

    def __init__(self, model: nn.Module, *, clone: bool = True):
        super().__init__()
        self.model, self.clone = model, clone
        self.train(False)
        self._lock = threading.Lock()
        self._forget()

    def forward(self, images: Tensor) -> Tensor:
        if not isinstance(images, Tensor) or not images.ndim:
            raise TypeError(f"images must be a tensor [batch, ...], got {type(images).__name__}")
        if self._graphless(images):
            return self.model(images)
        with self._lock, torch.no_grad():
            if self._version != _version(self.model):
                self._forget()
            self._start()
            graph, count = self._graph_for(images), len(images)
            graph.static[:count].copy_(images)
            graph.replay()
            y = graph.output[:count]
            y = y.clone() if self.clone else y
            self._end()
        return y

    def batches(self) -> list[int]:
        """The batch sizes that have a graph."""
        return [shape[0] for _, shape in self._graphs]

    def _graphless(self, images: Tensor) -> bool:
        """An empty batch, a trace, and a capture by the caller run the model itself."""
        return (self._device.type != "cuda" or not images.numel() or torch.compiler.is_compiling()
                or torch.cuda.is_current_stream_capturing())

    def _graph_for(self, images: Tensor) -> Graph:
        count, rest = len(images), images.shape[1:]
        sizes = [(shape, key) for key in self._graphs for dtype, shape in [key] if dtype == images.dtype and shape[1:] == rest]
        fitting = [(shape[0], key) for shape, key in sizes if count <= shape[0] < 2 * count]
        if fitting:
            key = min(fitting)[1]
            self._graphs[key] = self._graphs.pop(key)  # now the last one used
            return self._graphs[key]
        larger = [(shape[0], key) for shape, key in sizes if shape[0] > count]
        with torch.inference_mode(False):  # a buffer made in it could only be written in it
            static = (self._graphs[max(larger)[1]].static[:count] if larger
                      else torch.empty(images.shape, dtype=images.dtype, device=self._device))
        static.copy_(images)
        try:
            graph = self._capture(static)
        except RuntimeError as error:
            raise RuntimeError(f"{type(self.model).__name__} cannot be captured as a CUDA graph for images {list(images.shape)} "
                               f"({first_line(error)}): call the model itself") from error
        if not isinstance(graph.output, Tensor) or graph.output.shape[:1] != (count,):
            raise TypeError(f"{type(self.model).__name__} must return one tensor [batch, ...] to be compiled, got "
                            f"{type(graph.output).__name__}")
        while len(self._graphs) >= MOST_GRAPHS:
            self._wait()
            del self._graphs[next(iter(self._graphs))]
        self._graphs[images.dtype, tuple(images.shape)] = graph
        return graph

    def _capture(self, static: Tensor) -> Graph:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return Graph(self.model, static, self._pool)

    def _forget(self) -> None:
        if getattr(self, "_graphs", None):
            self._wait()
        self._graphs: dict[tuple[torch.dtype, tuple[int, ...]], Graph] = {}
        self._pool, self._done = None, None
        self._version, self._device = _version(self.model), _device(self.model)

    def _start(self) -> None:
        """Let this stream wait for the last call's, which may be another."""
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)

    def _end(self) -> None:
        if self._done is None:
            self._done = torch.cuda.Event()
        self._done.record(torch.cuda.current_stream(self._device))

    def _wait(self) -> None:
        """Until the last replay is over: memory of a graph in flight must not be handed out again."""
        if self._done is not None:
            self._done.synchronize()

    def train(self, mode: bool = True):
        if mode:
            raise RuntimeError("a compiled model is not trained: train the model, put it in eval mode and compile it again")
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self._forget()
        return self

    def __getstate__(self) -> dict:
        """A copy captures its own graphs."""
        return {key: value for key, value in self.__dict__.items()
                if key not in ("_graphs", "_pool", "_done", "_lock", "_version", "_device")}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._lock = threading.Lock()
        self._forget()


MOST_NEW_TOKENS = 8  # of a step of generation that is worth a graph
MOST_STEPS = 8  # graphs that a cache keeps


class _StepGraphs(dict):
    """Those of one cache, which no copy of it has: they hold its addresses."""

    def __deepcopy__(self, memo: dict) -> _StepGraphs:
        return _StepGraphs()

    def __reduce__(self) -> tuple:
        return _StepGraphs, ()


def step(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """model(**inputs) of a few new tokens, whose static cache is among the inputs: from the second call of the same shapes on a CUDA graph is replayed.

    Graphs belong to the cache and go with it; what they give is copied. A step runs without one where it cannot be captured: a mask or positions that the
    model would make by reading lengths on the host, hidden states or attentions that are asked for.
    """
    cache = inputs.get("cache", inputs.get("past_key_values"))
    ids = inputs.get("input_ids")
    wanted = any(inputs.get(f"output_{name}") for name in ("hidden_states", "attentions"))
    if ids is None or ids.shape[1] > MOST_NEW_TOKENS or wanted or cache is None or (tensors := _step_tensors(inputs, cache)) is None:
        return model(**inputs)
    key = (id(model), _version(model), *(layer.keys.data_ptr() for layer in cache.layers),
           *((name, t.shape, t.dtype, t.stride()) for name, t in sorted(tensors.items())))
    graphs = cache.__dict__.setdefault("_step_graphs", _StepGraphs())
    if key not in graphs:
        while len(graphs) >= MOST_STEPS:
            torch.cuda.synchronize(ids.device)
            del graphs[next(iter(graphs))]
        graphs[key] = "seen once"  # which makes all that a first call makes
        return model(**inputs)
    if graphs[key] == "not captured":
        return model(**inputs)
    if graphs[key] == "seen once":
        try:
            graphs[key] = _captured_step(model, inputs, cache, tensors)
        except RuntimeError as error:
            graphs[key] = "not captured"
            log.warning("%s cannot be captured as a CUDA graph (%s); it generates without", type(model).__name__, first_line(error))
            return model(**inputs)
    graphs[key] = graph, static = graphs.pop(key)  # the one that was not used for longest goes first
    for layer in cache.layers:
        if hasattr(layer, "seen"):  # what the host knows of its tokens
            layer.count(ids.shape[1])
    for name, tensor in tensors.items():
        static[name].copy_(tensor)
    graph.replay()
    kind, name, logits = graph.output
    return kind(logits=logits.clone(), **{name: cache})


def _step_tensors(inputs: dict[str, Any], cache: Any) -> dict[str, Tensor] | None:
    """The tensors among the inputs by name, those of a dict of masks too; None where a graph could not take the inputs."""
    found = {}
    for name, value in inputs.items():
        if isinstance(value, dict):
            found.update({f"{name}/{part}": t for part, t in value.items()})
        elif not (value is None or value is cache or isinstance(value, (bool, int, str))):
            found[name] = value
    masks = [t for name, t in found.items() if name.startswith("attention_mask")]
    if not all(isinstance(t, Tensor) for t in found.values()) or "position_ids" not in found or not masks or any(t.ndim != 4 for t in masks):
        return None
    return found


def _captured_step(model: nn.Module, inputs: dict[str, Any], cache: Any, tensors: dict[str, Tensor]) -> tuple[Graph, dict[str, Tensor]]:
    """The graph and its inputs. The cache holds as many tokens as before: a capture runs nothing."""
    with torch.inference_mode(False):
        static = {name: t.clone() for name, t in tensors.items()}
    given = dict(inputs)
    for name, tensor in static.items():
        name, _, part = name.partition("/")
        given[name] = {**given[name], part: tensor} if part else tensor

    def run(ids: Tensor) -> tuple[type, str, Tensor]:
        output = model(**given)
        return type(output), "cache" if "cache" in output else "past_key_values", output.logits

    before = [getattr(layer, "seen", None) for layer in cache.layers]
    try:
        graph = Graph(run, static["input_ids"], warmup=0)
    finally:
        for layer, seen in zip(cache.layers, before):
            if seen is not None:
                layer.seen = seen
    graph.fn = None  # it holds the cache, which holds the graph
    return graph, static


def _version(model: nn.Module) -> tuple:
    """Changes when the model's tensors are replaced: a graph would go on reading them at their old addresses."""
    first = _first(model)
    return getattr(getattr(model, "vitq", None), "version", 0), None if first is None else first.data_ptr()


def _device(model: nn.Module) -> torch.device:
    first = _first(model)
    return torch.device("cpu") if first is None else first.device


def _first(model: nn.Module) -> Tensor | None:
    return next(itertools.chain(model.parameters(), model.buffers()), None)
