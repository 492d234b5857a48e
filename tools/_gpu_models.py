"""Whole models for gpu_benchmark.py: compiled 16-bit, every recipe and torchao, timed in turn as CUDA graphs."""
from __future__ import annotations

import contextlib
import copy
import gc
import importlib.util
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import torch
from torch import nn

import vitq

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
COMPILED, MAX_AUTOTUNE = " compiled", " max-autotune"
PEERS = ("torchao int8", "torchao fp8")
# In a process of its own each model takes 20 to 60 s to compile; what inductor makes of it stays in its cache on disk.
WORKERS = 5
AHEAD_S = 240.0


@dataclass
class Case:
    """One way to run a model. peak_mib: weights and what a forward allocates; weight_bytes: of a converted model's layers."""

    timing: vitq.timing.Timing | None = None
    peak_mib: float | None = None
    weight_bytes: int | None = None
    note: str = ""


def float_model(name: str, device: torch.device) -> nn.Module:
    return vitq.load_model(name, "random").model.to(device).requires_grad_(False)


def random_images(model: nn.Module, batch: int, dtype: torch.dtype) -> torch.Tensor:
    device = next(model.parameters()).device
    return torch.randn(batch, *vitq.data_config(model)["input_size"], device=device).to(dtype)


def graphed(fn: Callable[[torch.Tensor], Any], x: torch.Tensor) -> tuple[Callable[[torch.Tensor], Any], str]:
    """fn as a CUDA graph on x, and "" or why it could not be one."""
    if not x.is_cuda:
        return fn, ""
    replay, reason = vitq.evaluate.cuda_graph(fn, x)
    return replay, f"no CUDA graph: {reason}" if reason else ""


def time_cases(model: nn.Module, batch: int, kinds: list[str], repeats: int) -> dict[str, Case]:
    """Build each kind, capture it, time all of them in turn. A kind that fails has a note in place of figures."""
    x = random_images(model, batch, torch.float16)
    cases: dict[str, Case] = {}
    ready: dict[str, tuple] = {}
    torch.compiler.reset()  # a second batch size would otherwise be compiled for sizes unknown
    try:
        for kind in kinds:
            case = cases[kind] = Case()
            half = HALVES.get(kind.split()[0], torch.bfloat16 if kind in PEERS else torch.float16)
            try:
                fn, case.peak_mib = vitq.timing.with_peak(lambda: build(model, kind, x), x.to(half))
                if hasattr(fn, "vitq"):
                    case.weight_bytes = sum(row.bytes for row in vitq.explain(fn) if row.format.startswith("W"))
                fn, case.note = graphed(fn, x.to(half))
                ready[kind] = fn, x.to(half)
            except Exception as error:  # compilers and peers fail in many ways; the other rows must not suffer
                case.note = first_line(error)
            print(f"  built {kind}" + (f": {case.note}" if case.note else ""), flush=True)
        for kind, timing in vitq.timing.time_models(ready, repeats).items():
            cases[kind].timing = timing
    finally:
        ready.clear()
        gc.collect()
        if x.is_cuda:
            torch.cuda.empty_cache()
    return cases


def build(model: nn.Module, kind: str, x: torch.Tensor) -> nn.Module:
    """A float16 or bfloat16 copy, compiled or not; a peer's quantized and compiled copy; or a recipe's conversion."""
    if kind in PEERS:
        return torch.compile(quantized_by_torchao(model, kind), dynamic=False)
    if kind.split()[0] not in HALVES:
        recipe = vitq.profiling.quick_recipe(kind, len(x[:8]))
        return vitq.convert(model, recipe, [x[:8].float()] if recipe.needs_data else None)
    half = copy.deepcopy(model).to(HALVES[kind.split()[0]])
    if kind.endswith(COMPILED):
        return torch.compile(half, dynamic=False)
    return torch.compile(half, dynamic=False, mode="max-autotune-no-cudagraphs") if kind.endswith(MAX_AUTOTUNE) else half


def has_torchao() -> bool:
    return importlib.util.find_spec("torchao") is not None


def quantized_by_torchao(model: nn.Module, kind: str) -> nn.Module:
    if not has_torchao():
        raise ImportError("torchao is not installed")
    from torchao import quantization

    half = copy.deepcopy(model).to(torch.bfloat16)
    if kind == "torchao int8":
        config = quantization.Int8DynamicActivationInt8WeightConfig()
    else:
        config = quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow())
    quantization.quantize_(half, config)
    torch._inductor.config.coordinate_descent_tuning = False  # torchao's other settings stay; this one times variants for minutes a model
    return half


def base_kinds(model: nn.Module, batch: int, compiled: bool, max_autotune: bool) -> list[str]:
    """The 16-bit cases to compare with: fp16, and bf16 where it is 2 % faster uncompiled, since compiling both takes long."""
    if not compiled:
        return ["fp16"]
    eager = {half: (copy.deepcopy(model).to(dtype), random_images(model, batch, dtype)) for half, dtype in HALVES.items()}
    times = {half: timing.median_ms for half, timing in vitq.timing.time_models(eager, repeats=8).items()}
    halves = [half for half, ms in times.items() if half == "fp16" or ms < 0.98 * times["fp16"]]
    return ["fp16", *(half + COMPILED for half in halves), *(half + MAX_AUTOTUNE for half in halves if max_autotune)]


def best_half_ms(cases: dict[str, Case]) -> float | None:
    """Of the 16-bit cases, compiled or not: the time to beat."""
    return min((case.timing.median_ms for kind, case in cases.items() if case.timing and kind.split()[0] in HALVES), default=None)


def rows(cases: dict[str, Case]) -> list[tuple]:
    """Cells of HEADERS for each case."""
    best, found = best_half_ms(cases), []
    for kind, case in cases.items():
        t = case.timing
        figures = (None,) * 3 if t is None else (f"{t.median_ms:.3f}", f"{100 * t.spread:.0f} %",
                                                 f"{best / t.median_ms:.2f}" if best else None)
        found.append((kind, *figures, *(None if v is None else f"{v:.0f}" for v in (
            case.peak_mib, case.weight_bytes and case.weight_bytes / 2**20)), case.note))
    return found


HEADERS = ("case", "ms a batch", "spread", "x best 16-bit", "peak MiB", "weights MiB", "note")


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:140]}" if lines else type(error).__name__


# --- compiling ahead ----------------------------------------------------------------------------------------------

def compile_ahead(jobs: list[tuple[str, int, str]], device: torch.device) -> None:
    """Fill inductor's cache on disk in several processes at once, so that this one, which takes the times, only reads it.

    jobs: (model, batch, kind), the longest first. A job that fails is left to this process, which then says why.
    """
    shares = [jobs[i::WORKERS] for i in range(min(WORKERS, len(jobs)))]
    env = {**os.environ, "OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "3"}
    script = str(Path(__file__).with_name("gpu_benchmark.py"))
    command = [sys.executable, script, "--device", str(device), "--compile-only"]
    running = [subprocess.Popen([*command, ",".join(":".join(map(str, job)) for job in share)], env=env,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for share in shares]
    deadline = time.monotonic() + AHEAD_S
    try:
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for process in running:
            process.kill()


def compile_only(jobs: list[tuple[str, int, str]], device: torch.device) -> None:
    """What a process of `compile_ahead` does."""
    for name, batch, kind in jobs:
        with contextlib.suppress(Exception), torch.inference_mode():
            torch.compiler.reset()
            model = float_model(name, device)
            x = random_images(model, batch, HALVES.get(kind.split()[0], torch.bfloat16))
            build(model, kind, x)(x)


def parse_jobs(text: str) -> list[tuple[str, int, str]]:
    return [(name, int(batch), kind) for name, batch, kind in (job.split(":") for job in text.split(","))]
