"""Where a converted model's time goes: each kernel call of a forward beside its floor in bytes and in operations."""

from __future__ import annotations

import json
import re
import statistics
import tempfile
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitq.conversion import linear_module, model_info
from vitq.formats import QTensor
from vitq.nn.packed import PackedModule
from vitq.ops.functional import quantize
from vitq.recipe import ROLES, Recipe, operands
from vitq.timing import time_model

_BLOCK = re.compile(r"(.*\bblocks)\.\d+\b")
_RANGE = "vitq call "
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")


# --- floors -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Ceilings:
    """What a device reaches: bytes read and written a second, int8 operations a second (a multiply-add is two).

    rates: each rate that was measured, by what was run.
    """

    bytes_per_s: float
    ops_per_s: float
    rates: dict[str, float] = field(default_factory=dict)

    def floor_us(self, size: int, ops: int) -> tuple[float, float]:
        """Least microseconds for that many bytes, and for that many operations."""
        return size / self.bytes_per_s * 1e6, ops / self.ops_per_s * 1e6


def measure_ceilings(device: torch.device, *, copy_bytes: int | None = None, side: int | None = None) -> Ceilings:
    """Time a copy, and int8 GEMMs of side³ by torch._int_mm and by vitq's fused linear layer; the faster one counts.

    copy_bytes: default 1 GiB on a GPU and 256 MiB on a CPU. side: default 8192 on a GPU and 1024 on a CPU.
    """
    on_gpu = device.type == "cuda"
    copy_bytes = copy_bytes or (1 << 30 if on_gpu else 1 << 28)
    side = side or (8192 if on_gpu else 1024)
    source = torch.zeros(copy_bytes, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copied = 2 * copy_bytes / time_model(target.copy_, source, repeats=10).median_ms * 1e3
    del source, target
    rates = {"copy": copied}
    x = torch.randint(-127, 128, (side, side), dtype=torch.int8, device=device)
    if on_gpu:
        weight = x.flip(0)
        rates["torch._int_mm"] = 2 * side**3 / time_model(lambda a: torch._int_mm(a, weight.t()), x, 10).median_ms * 1e3
        del weight
    fused, codes = int8_layer(side, side, x.float())
    rates["vitq linear"] = 2 * side**3 / time_model(lambda _: fused(codes), x, 10).median_ms * 1e3
    return Ceilings(copied, max(rate for name, rate in rates.items() if name != "copy"), rates)


def int8_layer(in_features: int, out_features: int, x: Tensor, recipe: str = "w8a8") -> tuple[nn.Module, QTensor]:
    """A static integer layer with random weights on x's device, and x [.., in_features] as the codes that it reads."""
    linear = nn.Linear(in_features, out_features, device=x.device)
    layer = linear_module(linear, quick_recipe(recipe), x)
    fmt = layer.input_format()
    return layer, quantize(x, fmt.bits, fmt.scale, int(fmt.zero_point))


def quick_recipe(name: str, calib_size: int = 8) -> Recipe:
    """A recipe for timing: few calibration images, no search for ranges and nothing learned, which does not change the speed. What would be learned of an
    input are Hadamard's matrices and a fixed clip."""
    recipe = Recipe.from_yaml(name)
    changes = ["weight.observer=minmax"]
    if recipe.learns:
        changes += ["block_gradient={}", "transforms=[]"]
        for role in ROLES:
            for operand in operands(role):
                spec = getattr(recipe.resolve(role), operand)
                changes += [f"{role}.{operand}.transform=hadamard"] if spec.transform == "learned" else []
                changes += [f"{role}.{operand}.observer=minmax", f"{role}.{operand}.clip_ratio=0.9"] if spec.dynamic and spec.observer == "learned" else []
    if recipe.needs_data:
        changes += [f"calib_size={calib_size}", "input.observer=minmax"]
    return recipe.with_overrides(changes)


# --- calls --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class Call:
    """One kernel call of a forward: its layer, what the kernel must read and write at least, and its multiply-adds
    times two. `where` is the stage of blocks it belongs to ("blocks", "layers.0.blocks"), "" outside of them. run()
    makes the call again, on the same tensors; arguments and output are kept."""

    layer: str
    where: str
    role: str
    op: str
    kernel: str
    bytes: int
    ops: int
    run: Callable[[], Any]
    args: tuple
    kwargs: dict[str, Any]
    output: Any


def record_calls(model: nn.Module, images: Tensor) -> list[Call]:
    """Every kernel call of one forward of a converted model, in order. TypeError for a model vitq did not convert."""
    calls: list[Call] = []

    def keep(name: str, module: PackedModule, op: str, args: tuple, kwargs: dict, run: Callable[[], Any]) -> Any:
        output = run()
        calls.append(_describe(model, name, module, op, run, args, kwargs, output))
        return output

    with torch.inference_mode(), _watched(model, keep):
        model(images)
    return calls


@contextmanager
def _watched(model: nn.Module, handle: Callable[..., Any]) -> Iterator[None]:
    """Within, handle(name, module, op, args, kwargs, run) stands for each kernel call; run() makes it."""
    model_info(model)
    packed = [(name, module) for name, module in model.named_modules() if isinstance(module, PackedModule)]

    def through(name: str, module: PackedModule, call: Callable[..., Any], op: str, *args: Any, **kwargs: Any) -> Any:
        return handle(name, module, op, args, kwargs, partial(call, op, *args, **kwargs))

    try:
        for name, module in packed:
            module.call = partial(through, name, module, module.call)
        yield
    finally:
        for _, module in packed:
            module.__dict__.pop("call", None)


def _describe(model: nn.Module, name: str, module: PackedModule, op: str, run: Callable[[], Any], args: tuple, kwargs: dict,
              output: Any) -> Call:
    kernel, op = module.packed()[op][0].kernel.name, op.partition(":")[0]
    role = "norm" if "norm" in op else model.vitq.roles.get(name, "attention")
    read = [value for key, value in kwargs.items() if key != "out"]  # which is the output
    size, ops = _bytes((args, read, output)), 0
    if op == "linear":
        size += module.own_bytes()
        ops = 2 * output.shape.numel() * module.in_features
    elif op == "attention":
        q, k = args[:2]
        window = kwargs.get("window")
        keys = k.shape[1] if window is None else window.tokens
        ops = 4 * q.numel() * keys  # heads · dim is q's own last two sizes
    block = _BLOCK.match(name)
    return Call(name, block[1] if block else "", role, op, kernel, size, ops, run, args, kwargs, output)


def _bytes(value: Any) -> int:
    """Of every tensor in `value`, broadcast dimensions once."""
    if isinstance(value, QTensor):
        return _bytes(value.codes) + _bytes(value.scale)
    if isinstance(value, Tensor):
        sizes = (size if stride else 1 for size, stride in zip(value.shape, value.stride()))
        return torch.Size(sizes).numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, (tuple, list)) else 0


# --- times --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Part:
    """Calls of one kind, averaged over the blocks of a stage. kernels: microseconds a call, by name. calls: in one
    forward. bytes, ops: of one call; both 0 where nothing is known of it."""

    where: str
    role: str
    kernels: dict[str, float]
    calls: int
    bytes: int
    ops: int

    @property
    def us(self) -> float:
        return sum(self.kernels.values())


@dataclass(frozen=True)
class Profile:
    """parts in order of execution, what belongs to no layer last; blocks: how many each stage has; clock: how it was timed."""

    parts: list[Part]
    blocks: dict[str, int]
    clock: str


def profile(model: nn.Module, images: Tensor, repeats: int = 5) -> Profile:
    """Time every kernel of a converted model's forward, run kernel by kernel and not as a graph.

    On cuda by CUPTI through torch.profiler; where that gives nothing (no permission, another profiler holds it), by
    events around each call, which include the gaps between launches. On a CPU by the clock around each call.
    """
    calls = record_calls(model, images)
    names = [(call.where, call.role, call.op, call.kernel, call.bytes, call.ops) for call in calls]
    layers = [call.layer for call in calls]
    del calls  # and with them the tensors they keep
    clock, found = "CUPTI", _by_cupti(model, images, repeats, len(names)) if images.is_cuda else None
    if found is None:
        clock = "events around each call, gaps between launches included" if images.is_cuda else "the clock around each call"
        found = _by_clock(model, images, repeats, [name[3] for name in names])
    times, rest = found
    groups: dict[tuple, list[int]] = {}
    for i, (where, role, op, *_) in enumerate(names):
        groups.setdefault((where, role, op), []).append(i)
    parts = []
    for (where, role, _), members in groups.items():
        kernels: Counter[str] = Counter()
        for i in members:
            for kernel, us in times[i].items():
                kernels[kernel] += us / len(members)
        size, ops = (sum(names[i][k] for i in members) // len(members) for k in (4, 5))
        parts.append(Part(where, role, dict(kernels), len(members), size, ops))
    parts += [Part("", "other", {kernel: us}, 1, 0, 0) for kernel, us in sorted(rest.items(), key=lambda item: -item[1])]
    blocks = {where: len({_BLOCK.match(layer)[0] for layer, name in zip(layers, names) if name[0] == where})
              for where in dict.fromkeys(name[0] for name in names) if where}
    return Profile(parts, blocks, clock)


Times = tuple[list[dict[str, float]], dict[str, float]]  # microseconds by kernel: of each call, and outside of all calls


def _by_clock(model: nn.Module, images: Tensor, repeats: int, kernels: list[str]) -> Times:
    def now() -> Any:
        if not images.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(start: Any, end: Any) -> float:
        return start.elapsed_time(end) * 1e3 if images.is_cuda else (end - start) * 1e6

    spans: list[tuple[Any, Any]] = []

    def timed(name: str, module: nn.Module, op: str, args: tuple, kwargs: dict, run: Callable[[], Any]) -> Any:
        start = now()
        output = run()
        spans.append((start, now()))
        return output

    runs, rests = [], []
    with torch.inference_mode(), _watched(model, timed):
        for _ in range(repeats):
            spans.clear()
            start = now()
            model(images)
            end = now()
            if images.is_cuda:
                torch.cuda.synchronize(images.device)
            each = [between(*span) for span in spans]
            runs.append([{kernel: us} for kernel, us in zip(kernels, each)])
            rests.append(between(start, end) - sum(each))
    return [_median(of) for of in zip(*runs)], {"": statistics.median(rests)}


def _by_cupti(model: nn.Module, images: Tensor, repeats: int, calls: int) -> Times | None:
    """None where the profiler reports no kernels."""
    activities = torch.profiler.ProfilerActivity
    if activities.CUDA not in torch.profiler.supported_activities():
        return None
    count = iter(range(calls * repeats))

    def ranged(name: str, module: nn.Module, op: str, args: tuple, kwargs: dict, run: Callable[[], Any]) -> Any:
        with torch.profiler.record_function(f"{_RANGE}{next(count)}"):
            return run()

    with torch.inference_mode(), _watched(model, ranged), tempfile.TemporaryDirectory() as folder:
        with torch.profiler.profile(activities=[activities.CPU, activities.CUDA]) as profiler:
            for _ in range(repeats):
                model(images)
            torch.cuda.synchronize(images.device)
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return _from_trace(json.loads(path.read_text(encoding="utf-8")), calls, repeats)


def _from_trace(trace: dict[str, Any], calls: int, repeats: int) -> Times | None:
    """Device times of a Chrome trace, given to the range in which each kernel was launched."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    device = [event for event in events if event.get("cat") in _ON_DEVICE]
    if not device:
        return None
    ranges = sorted((float(event["ts"]), float(event["dur"]), int(event["name"][len(_RANGE):])) for event in events
                    if event.get("cat") == "user_annotation" and event["name"].startswith(_RANGE))
    starts = [start for start, *_ in ranges]
    launched = {event["args"]["correlation"]: float(event["ts"]) for event in events
                if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})}
    runs: list[list[Counter[str]]] = [[Counter() for _ in range(repeats)] for _ in range(calls)]
    rest: Counter[str] = Counter()
    for event in device:
        at = launched.get(event.get("args", {}).get("correlation"))
        i = -1 if at is None else bisect_right(starts, at) - 1
        name, us = short_name(event["name"]), float(event["dur"])
        if i >= 0 and at <= ranges[i][0] + ranges[i][1]:
            step, call = divmod(ranges[i][2], calls)
            runs[call][step][name] += us
        else:
            rest[name] += us / repeats
    return [_median(of) for of in runs], dict(rest)


def _median(runs: Any) -> dict[str, float]:
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: statistics.median(run.get(name, 0.0) for run in runs) for name in names}


def short_name(kernel: str) -> str:
    """A kernel's own name without return type, namespaces, template arguments and parameters; at most 48 characters."""
    text = kernel.replace("(anonymous namespace)::", "").removeprefix("void ")
    head = re.split(r"[<(]", text, maxsplit=1)[0].strip()
    return (head.rsplit("::", 1)[-1] or kernel)[:48]
