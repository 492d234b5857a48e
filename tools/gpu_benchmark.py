#!/usr/bin/env python3
"""Everything docs/benchmarks.md says of one GPU, measured in one run: whole models, small batches, one GEMM, each layer.

    python tools/gpu_benchmark.py --markdown tables.md --json tables.json      # all of it; torchao takes most of the time
    python tools/gpu_benchmark.py --sections gemm,layers                       # under a minute
    python tools/gpu_benchmark.py --sections models --models deit_s,vit_l --recipes w8a8

Times are medians of CUDA-graph replays, taken in turns, with random weights and random images that are already on the GPU:
neither changes the speed. The 16-bit model to beat is the fastest of timm's own, compiled by torch.compile in this run.
Every section is printed and written as soon as it is done.
"""
from __future__ import annotations

import argparse
import contextlib
import datetime
import shlex
import subprocess
import sys
import time
import traceback
from pathlib import Path

import timm
import torch

import _gpu_kernels as kernels
import _gpu_models as models
import vitq
from _gpu_report import GOAL_HEADERS, Goal, Results

SECTIONS = ("gemm", "layers", "models", "small-batches", "peers")
MODELS = ("deit_s", "deit_b", "vit_l", "swin_t", "swin_b")
SMALL = ("deit_s", "deit_b")  # also those whose layers are timed
# What W8A8 must reach over the best compiled 16-bit model, and what it aims at.
GOALS = {"deit_s": (2.0, 2.6), "deit_b": (2.1, 2.5), "vit_l": (2.1, 2.4), "swin_t": (2.2, 3.5), "swin_b": (2.2, 3.5)}
SMALL_GOALS = {1: 1.0, 8: 1.2, 32: 1.6}
KNOWN = ("w8a8", "w4a8", "w4a4")
H200_TBS, H200_TOPS = 4.3, 1600.0  # what floors are reckoned with there: a copy, and the best int8 GEMM of any shape


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sections", default=",".join(SECTIONS), help=f"with commas, of {', '.join(SECTIONS)} (default: all)")
    p.add_argument("--models", default=",".join(MODELS), help="of the section models (default: %(default)s)")
    p.add_argument("--small-models", default=",".join(SMALL), help="of the others (default: %(default)s)")
    p.add_argument("--batch", type=int, default=200)
    p.add_argument("--small-batches", default="1,8,32")
    p.add_argument("--recipes", help=f"with commas (default: {', '.join(KNOWN)} and every dual-uniform one there is)")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="time torch.compile")
    p.add_argument("--ahead", action=argparse.BooleanOptionalAction, default=True, help="compile in several processes first")
    p.add_argument("--max-autotune", action="store_true", help="fp16 by mode='max-autotune-no-cudagraphs' too (minutes more)")
    p.add_argument("--side", type=int, default=8192, help="of the GEMM (default 8192)")
    p.add_argument("--bandwidth", type=float, metavar="TB/S", help=f"for floors (default: {H200_TBS} on an H200, else measured)")
    p.add_argument("--peak", type=float, metavar="TOPS", help=f"for floors (default: {H200_TOPS:g} on an H200, else measured)")
    p.add_argument("--repeats", type=int, default=24, help="timed calls of each case (default 24)")
    p.add_argument("--device", help="default: cuda where there is one")
    p.add_argument("--json", type=Path, metavar="PATH")
    p.add_argument("--markdown", type=Path, metavar="PATH")
    p.add_argument("--compile-only", help=argparse.SUPPRESS)  # how the processes of --ahead are started
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0: done; 1: a section failed; 2: a user's mistake, said in one line."""
    args = parse(argv)
    try:
        return run(args, argv)
    except (ValueError, TypeError, OSError) as error:
        print(f"gpu_benchmark: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace, argv: list[str] | None) -> int:
    torch.manual_seed(0)
    device = vitq.pick_device(args.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    if args.compile_only:
        models.compile_only(models.parse_jobs(args.compile_only), device)
        return 0
    sections = names(args.sections)
    if unknown := [name for name in sections if name not in SECTIONS]:
        raise ValueError(f"unknown section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    whole, small = names(args.models), names(args.small_models)
    for name in (*whole, *small):
        vitq.resolve_name(name)
    if not all(b.isdecimal() for b in names(args.small_batches)):
        raise ValueError(f"--small-batches must be numbers with commas in between, got {args.small_batches}")
    batches = [int(b) for b in names(args.small_batches)]
    for flag, value in (("--batch", args.batch), ("--repeats", args.repeats), ("--side", args.side),
                        *(("--small-batches", b) for b in batches)):
        if value < 1:
            raise ValueError(f"{flag} must be at least 1, got {value}")
    if device.type != "cuda" and args.device is None:
        raise ValueError("there is no GPU here; --device cpu goes through the motions, slowly")
    for path in filter(None, (args.json, args.markdown)):
        if not path.parent.is_dir():
            raise ValueError(f"cannot write {path}: there is no folder {path.parent}")
    known = names(args.recipes) if args.recipes else [*KNOWN, *(name for name in vitq.recipes() if "dual" in name)]
    for name in known:
        vitq.Recipe.from_yaml(name)

    gpu = gpu_and_driver(device) if device.type == "cuda" else "no GPU, so these times say nothing of one"
    command = shlex.join(["python", "tools/gpu_benchmark.py", *(sys.argv[1:] if argv is None else argv)])
    results = Results(args, f"{gpu}, {datetime.date.today()}, vitq {vitq.__version__}, torch {torch.__version__} "
                            f"(CUDA {torch.version.cuda}), timm {timm.__version__}: `{command}`")
    print(results.machine, flush=True)
    ceilings = find_ceilings(args, device)
    if args.compile and args.ahead and device.type == "cuda":
        ahead(sections, whole, small, batches, args.batch, device)

    failed = 0
    for title, job in jobs(args, sections, known, whole, small, batches, device, ceilings):
        print(f"\n{title} …", flush=True)
        try:
            results.add(title, *job())
        except Exception as error:  # one failure must not lose the rest
            failed += 1
            traceback.print_exc()
            results.add(f"{title}: failed", ("reason",), [(models.first_line(error),)], [])
    if results.goals:
        print("\nAll goals\n" + vitq.report.table(GOAL_HEADERS, [goal.cells() for goal in results.goals]))
    return 1 if failed else 0


def timed_whole(sections, whole, small) -> list[str]:
    """The models that are timed at the large batch: the peers alone are timed beside fewer of them."""
    return whole if "models" in sections else small if "peers" in sections else []


def jobs(args, sections, recipes, whole, small, batches, device, ceilings):
    """(title, what returns its headers, rows and goals) in the order in which they run: short ones first."""
    if "gemm" in sections:
        yield f"GEMM {args.side}³", lambda: gemm(args, device)
    for name in small if "layers" in sections else ():
        yield f"{name}, W8A8, each kernel of a block at batch {args.batch}", lambda n=name: layers(n, args, device, ceilings)
    peers = models.PEERS if "peers" in sections else ()
    for name in timed_whole(sections, whole, small):
        yield f"{name}, batch {args.batch}", lambda n=name: whole_model(n, args.batch, args, recipes, peers, device)
    for name in small if "small-batches" in sections else ():
        for batch in batches:
            yield f"{name}, batch {batch}", lambda n=name, b=batch: small_batch(n, b, args, device)


def gemm(args, device) -> tuple:
    tops, rows = kernels.time_gemm(args.side, device, args.repeats)
    plain, fused = tops.get(kernels.PLAIN), tops.get(kernels.FUSED)
    goals = []
    if plain and fused:
        goals = [Goal("GEMM, over torch._int_mm", fused / plain, 1.45), Goal("GEMM, TOPS", fused, None, 1450)]
    return kernels.GEMM_HEADERS, rows, goals


def layers(name: str, args, device, ceilings) -> tuple:
    ratios, rows = kernels.time_layers(name, args.batch, device, args.repeats, ceilings)
    return kernels.LAYER_HEADERS, rows, [Goal(f"{name} {role}, time over its floor", ratios[role], 2.0, 1.6, at_least=False)
                                         for role in ("qkv", "proj", "fc1", "fc2") if role in ratios]


def whole_model(name: str, batch: int, args, recipes: list[str], peers: tuple[str, ...], device) -> tuple:
    model = models.float_model(name, device)
    kinds = models.base_kinds(model, batch, args.compile, args.max_autotune) + recipes + list(peers)
    cases = models.time_cases(model, batch, kinds, args.repeats)
    return models.HEADERS, models.rows(cases), model_goals(name, cases, GOALS.get(name))


def small_batch(name: str, batch: int, args, device) -> tuple:
    kinds = ["fp16"] + ["fp16" + models.COMPILED] * args.compile + ["w8a8", "w4a8", "dual-w4a4"]
    cases = models.time_cases(models.float_model(name, device), batch, kinds, args.repeats)
    best, t = models.best_half_ms(cases), cases["w8a8"].timing
    goals = [Goal(f"{name} at batch {batch}, W8A8 over the best 16-bit", best / t.median_ms, SMALL_GOALS[batch])] \
        if best and t and batch in SMALL_GOALS else []
    return models.HEADERS, models.rows(cases), goals


def model_goals(name: str, cases: dict, limits: tuple[float, float] | None) -> list[Goal]:
    """Limits for one model's rows: speed and memory of W8A8, time and weights of the others."""
    best, int8, goals = models.best_half_ms(cases), cases.get("w8a8"), []
    if int8 is None or int8.timing is None or limits is None:
        return goals
    if best:
        goals.append(Goal(f"{name}, W8A8 over the best 16-bit", best / int8.timing.median_ms, *limits))
    peaks = [case.peak_mib for kind, case in cases.items() if kind.startswith("fp16") and case.peak_mib]
    if peaks and int8.peak_mib:
        goals.append(Goal(f"{name}, W8A8 peak memory over fp16's lowest", int8.peak_mib / min(peaks), 0.75, at_least=False))
    for kind, case in cases.items():
        if not case.weight_bytes or case.timing is None or kind == "w8a8":
            continue
        slower = case.timing.median_ms / int8.timing.median_ms
        goals.append(Goal(f"{name}, {kind} time over W8A8's", slower, 1.10 if kind in KNOWN else 1.15, at_least=False))
        if kind in KNOWN:
            goals.append(Goal(f"{name}, {kind} weights over W8A8's", case.weight_bytes / int8.weight_bytes, 0.55, at_least=False))
    return goals


def find_ceilings(args, device) -> vitq.profiling.Ceilings:
    h200 = device.type == "cuda" and "H200" in torch.cuda.get_device_name(device)
    given = (args.bandwidth or h200 and H200_TBS) * 1e12, (args.peak or h200 and H200_TOPS) * 1e12
    try:
        measured = vitq.profiling.measure_ceilings(device)
    except Exception:
        if not all(given):
            raise
        traceback.print_exc()  # the floors do not need it
        return vitq.profiling.Ceilings(*given)
    ceilings = vitq.profiling.Ceilings(given[0] or measured.bytes_per_s, given[1] or measured.ops_per_s, measured.rates)
    print(f"measured: {', '.join(f'{name} {rate / 1e12:.4g} T/s' for name, rate in measured.rates.items())}; floors at "
          f"{ceilings.bytes_per_s / 1e12:.3g} TB/s and {ceilings.ops_per_s / 1e12:.4g} TOPS", flush=True)
    return ceilings


def ahead(sections, whole, small, batches, batch, device) -> None:
    fp16 = "fp16" + models.COMPILED
    large = timed_whole(sections, whole, small)
    found = [(name, batch, fp16) for name in large]
    found += [(name, batch, peer) for name in large for peer in models.PEERS if "peers" in sections and models.has_torchao()]
    found += [(name, b, fp16) for name in small for b in batches if "small-batches" in sections]
    if found:
        began = time.perf_counter()
        models.compile_ahead(found, device)
        print(f"compiled {len(found)} cases ahead in {time.perf_counter() - began:.0f} s", flush=True)


def gpu_and_driver(device) -> str:
    name = torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, subprocess.SubprocessError, IndexError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return f"{name}, driver {subprocess.check_output(query, text=True, timeout=20).split()[0]}"
    return name


def names(text: str) -> list[str]:
    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise ValueError("give at least one name, with commas in between")
    return found


if __name__ == "__main__":
    sys.exit(main())
