#!/usr/bin/env python3
"""Time whole models: float32, the best 16-bit with and without torch.compile, and each recipe, in one process and in turn.

    python tools/vit_benchmark.py                                       # deit_s: batch 200 on a GPU, 8 on a CPU
    python tools/vit_benchmark.py --model deit_s,swin_t --val-batchsize 64 --recipes w8a8,w4a8 --plot speed.png
    python tools/vit_benchmark.py --recipes w8a8 --no-compile --profile # where a block's time goes, kernel by kernel

Images are random and already on the device; weights are random by default, because neither changes the speed. On cuda
each case is captured as a CUDA graph where that works, and timed by events.
"""
from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import vitq

CALIBRATION_IMAGES = 8


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="deit_s", help=f"one or more, with commas: {', '.join(vitq.ALIASES)} or any timm name")
    p.add_argument("--val-batchsize", type=int, metavar="N", help="images a batch (default 200, on a CPU 8)")
    p.add_argument("--recipes", default="w8a8,w4a8", help="recipes to time, with commas (default w8a8,w4a8)")
    p.add_argument("--weights", default="random", help="random (default), pretrained, demo or a file; the speed is the same")
    p.add_argument("--device", help="cpu, cuda, cuda:1 … (default: cuda where there is one)")
    p.add_argument("--backend", choices=("auto", "reference", "cpu", "cuda"), default="auto")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="time torch.compile too")
    p.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True, help="use CUDA graphs on cuda")
    p.add_argument("--repeats", type=int, metavar="N", help="timed calls of each case (default 50, on a CPU 15)")
    p.add_argument("--tune", action="store_true", help="on cuda: first find the fastest GEMM tiles, and remember them")
    p.add_argument("--profile", action="store_true", help="break each recipe's time down by kernel, beside its floors")
    p.add_argument("--bandwidth", type=float, metavar="TB/S", help="for the floors (default: measured by a copy)")
    p.add_argument("--peak", type=float, metavar="TOPS", help="int8, for the floors (default: measured by GEMMs)")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--json", type=Path, metavar="PATH", help="write every figure as JSON")
    p.add_argument("--plot", type=Path, metavar="PATH", help="write a PNG")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0: done; 2: a user's mistake, said in one line."""
    args = parse(argv)
    try:
        return run(args)
    except (ValueError, TypeError, OSError) as error:
        print(f"vit_benchmark: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    torch.manual_seed(args.seed)
    device = vitq.pick_device(args.device)
    on_cpu = device.type == "cpu"
    batch = args.val_batchsize if args.val_batchsize is not None else 8 if on_cpu else 200
    repeats = args.repeats if args.repeats is not None else 15 if on_cpu else 50
    for flag, value in (("--val-batchsize", batch), ("--repeats", repeats), ("--threads", args.threads)):
        if value is not None and value < 1:
            raise ValueError(f"{flag} must be at least 1, got {value}")
    for flag, rate in (("--bandwidth", args.bandwidth), ("--peak", args.peak)):
        if rate is not None and not rate > 0:
            raise ValueError(f"{flag} must be above 0, got {rate}")
    for path in filter(None, (args.json, args.plot)):
        if not path.parent.is_dir():
            raise ValueError(f"cannot write {path}: there is no folder {path.parent}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    recipes = [vitq.Recipe.from_yaml(name).with_overrides([f"calib_size={CALIBRATION_IMAGES}"]) for name in names(args.recipes)]
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.processor() or platform.machine()}, " \
        f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    print(f"{device} ({machine}), torch {torch.__version__}, batch {batch}, {repeats} calls, {args.weights} weights")
    if args.weights == "random":
        print("note: weights are random, since the speed does not depend on them")
    ceilings = find_ceilings(args, device) if args.profile else None
    models = {name: bench(name, args, recipes, device, batch, repeats, ceilings) for name in names(args.model)}
    if args.json:
        vitq.report.write_json(args.json, {
            "vitq": vitq.__version__, "torch": torch.__version__, "device": device, "machine": machine, "batch": batch,
            "repeats": repeats, "threads": torch.get_num_threads(), "weights": args.weights, "models": models})
        print(f"wrote {args.json}")
    if args.plot:
        groups = {m: {case: of["timing"] for case, of in cases.items()} for m, cases in models.items()}
        vitq.report.plot_benchmark(args.plot, groups, unit=f"ms a batch of {batch}", title=f"Speed on {device} ({machine})")
        print(f"wrote {args.plot}")
    return 0


def names(text: str) -> list[str]:
    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise ValueError("give at least one model and one recipe, with commas in between")
    return found


def find_ceilings(args: argparse.Namespace, device: torch.device) -> vitq.profiling.Ceilings:
    """What floors are reckoned with: as given, measured where not."""
    given = args.bandwidth and args.bandwidth * 1e12, args.peak and args.peak * 1e12
    measured = None if all(given) else vitq.profiling.measure_ceilings(device)
    rates = {} if measured is None else measured.rates
    ceilings = vitq.profiling.Ceilings(given[0] or measured.bytes_per_s, given[1] or measured.ops_per_s, rates)
    print(f"floors at {ceilings.bytes_per_s / 1e12:.3g} TB/s and {ceilings.ops_per_s / 1e12:.4g} TOPS; measured: "
          + (", ".join(f"{name} {rate / 1e12:.4g} T" for name, rate in rates.items()) or "nothing"))
    return ceilings


def bench(name: str, args: argparse.Namespace, recipes: list, device: torch.device, batch: int, repeats: int,
          ceilings: vitq.profiling.Ceilings | None) -> dict:
    """Builds every case of one model, times them in turn, prints the tables and returns the rows by case."""
    try:
        loaded = vitq.load_model(name, args.weights, seed=args.seed)
    except RuntimeError as error:  # the hub cannot be reached
        raise ValueError(str(error)) from error
    model = loaded.model.to(device)
    images = torch.randn(batch, *vitq.data_config(model)["input_size"], generator=torch.Generator().manual_seed(args.seed))
    images = images.to(device)
    cases: dict[str, dict] = {}
    ready: dict[str, tuple] = {}
    converted: dict[str, torch.nn.Module] = {}

    def add(case: str, build, x: torch.Tensor) -> None:
        """Build, warm up and capture one case; a reason takes the place of figures where that fails."""
        bar.set_postfix_str(case)
        row = cases[case] = {"timing": None, "peak_mib": None, "graph": False, "note": ""}
        try:
            fn, row["peak_mib"] = vitq.timing.with_peak(build, x)
            if hasattr(fn, "vitq"):
                converted[case] = fn
            if device.type == "cuda" and args.graphs:
                fn, reason = vitq.evaluate.cuda_graph(fn, x)
                row.update(graph=reason is None, note=f"no CUDA graph: {reason}" if reason else "")
            ready[case] = fn, x
        except torch.OutOfMemoryError:
            row["note"] = "out of memory"
        except Exception as error:  # torch.compile fails in many ways: no C compiler, an unsupported op …
            if "compile" not in case:
                raise
            row["note"] = f"torch.compile failed: {first_line(error)}"
        bar.update()

    with tqdm(desc=name, total=2 + args.compile + len(recipes), leave=False, disable=None) as bar:
        add("float32", lambda: model, images)
        dtype, half = vitq.timing.best_half(model, images)
        short = str(dtype)[6:]
        add(short, lambda: half, images.to(dtype))
        if args.compile:
            torch.compiler.reset()
            add(f"{short} compiled", lambda: torch.compile(half), images.to(dtype))
        for recipe in recipes:
            add(recipe.name, lambda: convert(model, recipe, images, args.backend, args.tune), images)
        bar.set_postfix_str("timing")
        timings = vitq.timing.time_models(ready, repeats)
    rows = table(loaded.name, cases, timings, batch)
    for case, model in converted.items() if ceilings is not None else ():
        profile = vitq.profiling.profile(model, images)
        rows[case]["profile"] = profile
        print(f"\n{case}, kernel by kernel ({profile.clock}); floors are for each call's bytes and operations\n"
              + vitq.report.profile_table(profile, ceilings))
    return rows


def convert(model, recipe, images: torch.Tensor, backend: str, tune: bool):
    calib = images.repeat(-(-CALIBRATION_IMAGES // len(images)), 1, 1, 1) if recipe.needs_data else None
    quantized = vitq.convert(model, recipe, None if calib is None else [calib[:CALIBRATION_IMAGES]], backend)
    if tune:
        vitq.tune(quantized, images)
    return quantized


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:160] if lines else type(error).__name__


def table(name: str, cases: dict[str, dict], timings: dict, batch: int) -> dict[str, dict]:
    """Prints the rows of one model; returns them with their ratios."""
    halves = [t.median_ms for case, t in timings.items() if "float16" in case]
    base, best = timings.get("float32"), min(halves, default=None)
    for case, t in timings.items():
        cases[case].update(timing=t, ms_per_image=t.median_ms / batch,
                           speedup_float32=base.median_ms / t.median_ms if base else None,
                           speedup_best_16_bit=best / t.median_ms if best else None)
    rows = []
    for case, row in cases.items():
        t = row["timing"]
        figures = [None] * 5 if t is None else [
            f"{t.median_ms:.2f}", f"{row['ms_per_image']:.3f}", f"{100 * t.spread:.0f} %",
            *(f"{r:.2f}" if (r := row[f"speedup_{k}"]) else None for k in ("float32", "best_16_bit"))]
        peak = None if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        rows.append((case, *figures, peak, ("CUDA graph" if row["graph"] else "") or row["note"]))
    print(f"\n{name}")
    headers = ("", "ms a batch", "ms an image", "spread", "x float32", "x best 16-bit", "peak MiB", "note")
    print(vitq.report.table(headers, rows))
    return cases


if __name__ == "__main__":
    sys.exit(main())
