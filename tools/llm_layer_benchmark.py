#!/usr/bin/env python3
"""Time linear layers of language models on one GPU, by rows: fp16 by cuBLAS, the integer GEMM alone, and whole layers by recipe.

    python tools/llm_layer_benchmark.py --output layers.json                       # the shapes that QUIK and DUQ time, under ten minutes
    python tools/llm_layer_benchmark.py --shapes 4096x4096 --rows 1,16 --recipes gptq-w4a16

Every case is one CUDA graph that goes through copies of its weight, four times the L2 in all, since a model's next layer
finds none of its weights there. Times are medians of replays in turns. A recipe's row takes float16 inputs: where it
quantizes them, that is in its time. Codes are rounded to nearest, whatever a recipe's solver: that does not change the speed.
"""
from __future__ import annotations

import argparse
import copy
import datetime
import sys
from pathlib import Path
from typing import Any, Callable

import torch
from torch import nn

import vitq
from _cli import exit_code

# N x K: QUIK's layer benchmark, then the down and up projections of LLaMA 7B.
SHAPES = "4096x4096,8192x1024,8192x8192,4096x11088,28672x8192,8192x28672,11008x4096,4096x11008"
RECIPES = "w8a8-dynamic,dgq-w4a8,quik-w4a4,w4-per-channel,gptq-w4a16"
HALF = "fp16, cuBLAS"
GIVEN = {"W8A8, codes given": "w8a8-dynamic", "W4A8, codes given": "w4-per-channel"}
# Names of this tool for a recipe with changes.
CHANGED = {"w4-per-channel": ("w8a8-dynamic", ["fc1.weight.bits=4"])}
ROTATED = 4  # times the L2
HEADERS = ("N x K", "rows", "case", "us", "spread", "x fp16", "TB/s of weights", "runs as")


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shapes", default=SHAPES, help="NxK with commas (default: %(default)s)")
    p.add_argument("--rows", default="1,16,256,2048", help="of the input, with commas (default: %(default)s)")
    p.add_argument("--recipes", default=RECIPES, help=f"with commas; beside vitq's own {', '.join(CHANGED)} (default: %(default)s)")
    p.add_argument("--repeats", type=int, default=20, help="timed replays of each case (default 20)")
    p.add_argument("--device", help="default: cuda")
    p.add_argument("--output", type=Path, metavar="PATH", help="write every figure as JSON")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0: done; 2: a user's mistake, said in one line."""
    args = parse(argv)
    return exit_code("llm_layer_benchmark", lambda: run(args), "out of memory on the device: give smaller --shapes or fewer --rows")


def names(text: str) -> list[str]:
    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise ValueError("--shapes, --rows and --recipes: give at least one of each, with commas in between")
    return found


def sizes(text: str) -> list[tuple[int, int]]:
    """'4096x11008' -> [(4096, 11008)]."""
    found = []
    for name in names(text):
        parts = name.lower().split("x")
        if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise ValueError(f"--shapes: {name!r} is not NxK, as 4096x11008 of 11008 inputs and 4096 outputs")
        found.append((int(parts[0]), int(parts[1])))
    return found


def recipe_of(name: str) -> vitq.Recipe:
    """A recipe as it is timed: ranges of minimum and maximum, rounding to nearest."""
    base, changes = CHANGED.get(name, (name, []))
    recipe = vitq.Recipe.from_yaml(base)
    if recipe.execution == "simulated":
        raise ValueError(f"{name} is for simulation: nothing executes all that it holds")
    return recipe.with_overrides([*changes, "weight.observer=minmax", "solver=rtn", "solver_options={}"])


def run(args: argparse.Namespace) -> int:
    shapes, recipes = sizes(args.shapes), {name: recipe_of(name) for name in names(args.recipes)}
    if not all(m.isdecimal() and int(m) > 0 for m in names(args.rows)):
        raise ValueError(f"--rows must be numbers from 1 on with commas in between, got {args.rows}")
    rows = [int(m) for m in names(args.rows)]
    if args.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {args.repeats}")
    if args.output and not args.output.parent.is_dir():
        raise ValueError(f"cannot write {args.output}: there is no folder {args.output.parent}")
    device = vitq.pick_device(args.device)
    if device.type != "cuda" and args.device is None:
        raise ValueError("there is no GPU here; --device cpu goes through the motions, slowly")
    torch.manual_seed(0)
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    cache = gpu.L2_cache_size if gpu else 0
    words = f"{gpu.name}, L2 of {cache / 2**20:.0f} MB" if gpu else "no GPU, so these times say nothing of one"
    machine = f"{words}, {datetime.date.today()}, vitq {vitq.__version__}, torch {torch.__version__} (CUDA {torch.version.cuda})"
    print(f"{machine}\n")
    found = []
    for n, k in shapes:
        for row in time_shape(n, k, rows, recipes, cache, device, args.repeats):
            found.append(row)
            print(f"{row['shape']}, {row['rows']} rows, {row['case']}: {row['us']} us", file=sys.stderr, flush=True)
    print(vitq.report.markdown_table(HEADERS, [cells(row) for row in found]))
    if args.output:
        vitq.report.write_json(args.output, {"machine": machine, "rows": found})
        print(f"\nwrote {args.output}")
    return 0


def time_shape(n: int, k: int, rows: list[int], recipes: dict[str, vitq.Recipe], cache: int, device: torch.device,
               repeats: int) -> list[dict[str, Any]]:
    """One row of figures for each number of rows and each case."""
    linear = nn.Linear(k, n, device=device).requires_grad_(False)
    sample = torch.randn(min(k, 256), k, device=device)
    cases: dict[str, tuple[list[Callable], float, str]] = {}  # calls on copies of the weight, its bytes, what runs them

    def add(name: str, make: Callable[[], tuple[Callable, float, str]]) -> None:
        try:
            call, size, note = make()
            copies = 1 if not cache else max(2, -(-ROTATED * cache // int(size)))
            cases[name] = [call, *(copy.deepcopy(call) for _ in range(copies - 1))], size, note
        except (RuntimeError, ValueError) as error:
            cases[name] = [], 0, f"{type(error).__name__}: {str(error).splitlines()[0]}"

    def half() -> tuple[Callable, float, str]:
        layer = nn.Linear(k, n, bias=False, device=device, dtype=torch.float16).requires_grad_(False)
        return layer, 2.0 * n * k, "torch"

    def whole(recipe: vitq.Recipe) -> tuple[Callable, float, str]:
        layer = vitq.linear_module(linear, recipe, sample, dtype=torch.float16)
        row = layer.row("", "fc1")
        return layer, float(layer.own_bytes()), "; ".join(filter(None, [row.kernel, row.note]))

    add(HALF, half)
    for name, recipe in GIVEN.items():
        add(name, lambda recipe=recipe: whole(recipe_of(recipe)))
    for name, recipe in recipes.items():
        add(name, lambda recipe=recipe: whole(recipe))
    found = []
    for m in rows:
        x = torch.randn(m, k, device=device).half()
        codes = vitq.ops.quantize(x, bits=8)
        ready, notes = {}, {}
        for name, (calls, _, note) in cases.items():
            given = codes if name in GIVEN else None
            notes[name] = note
            if calls:
                try:
                    ready[name], reason = graph(calls, x, given)
                    notes[name] = "; ".join(filter(None, [note, reason]))
                except RuntimeError as error:
                    notes[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        timings = vitq.timing.time_models({name: (fn, x) for name, fn in ready.items()}, repeats)
        base = timings[HALF].median_ms / len(cases[HALF][0]) if HALF in timings else None
        for name, (calls, size, _) in cases.items():
            t = timings.get(name)
            ms = t.median_ms / len(calls) if t else None
            found.append({"shape": f"{n}x{k}", "rows": m, "case": name, "us": ms and round(1e3 * ms, 2), "spread": t and t.spread,
                          "speedup": ms and base and base / ms, "tb_per_s": ms and size / ms / 1e9, "note": notes[name]})
        ready.clear()  # graphs, before those of the next rows
    return found


def graph(calls: list[Callable], x: torch.Tensor, codes: Any = None) -> tuple[Callable, str]:
    """One call of each as a CUDA graph; and why it is none, if it could not be one."""
    def each(x: torch.Tensor) -> torch.Tensor:
        for call in calls:
            y = call(x if codes is None else codes)
        return y

    if not x.is_cuda:
        return each, ""
    replay, reason = vitq.evaluate.cuda_graph(each, x)
    return replay, f"no CUDA graph: {reason}" if reason else ""


def cells(row: dict[str, Any]) -> tuple:
    figures = (("us", "{:.2f}"), ("spread", "{:.1%}"), ("speedup", "{:.2f}"), ("tb_per_s", "{:.2f}"))
    return row["shape"], row["rows"], row["case"], *(None if row[key] is None else form.format(row[key]) for key, form in figures), row["note"]


if __name__ == "__main__":
    sys.exit(main())
