#!/usr/bin/env python3
"""Tell methods of quantization apart: recipe by recipe, on the same images, over several calibration draws.

    python tools/compare_methods.py --models deit_s=OUT/deit_small_patch16_224.glyphs.safetensors --data OUT/glyphs
    python tools/compare_methods.py --models deit_s=A.safetensors,swin_t=B.safetensors --data OUT/glyphs \\
        --recipes erq-w4a4,erq-w3a4 --methods rtn,fold,fold+gptq,recipe --draws 5 --output tables
    python tools/compare_methods.py --models deit_s=A.safetensors --data OUT/glyphs --recipes erq-w4a4 --methods ablation

A row is a recipe with a method in place of the recipe's own. Each draw calibrates on other images. `drop` is the float model's top-1
less the quantized one's, the mean over the draws; `spread` its standard deviation over the draws; the interval is a bootstrap over the
evaluation images (95 %, scipy). Seconds and memory are those of calibrating and converting. Models run as vitq.convert makes them, in
integers, but for recipes with execution: simulated, which have no size; --simulate also evaluates vitq.simulate's model, which the integer ones
must reproduce. Train models for it by tools/train_demo.py --task glyphs.
"""
from __future__ import annotations

import argparse
import datetime
import platform
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from scipy.stats import bootstrap
from tqdm import tqdm

import vitq
from _memory import measured
from _methods import METHODS, SETS

def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", required=True, metavar="NAME[=WEIGHTS],…", help="timm or short names, each with what --weights of quantize_vit.py takes (default auto)")
    p.add_argument("--data", required=True, help="a folder with train and val, hf:NAME[:SPLIT], or demo")
    p.add_argument("--recipes", default="erq-w4a4,erq-w3a4", help="shipped recipes or YAML files (default %(default)s)")
    p.add_argument("--methods", default="baselines", help=f"of {', '.join(METHODS)}; or a set of them: {', '.join(SETS)} (default baselines)")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override every recipe, after its method")
    p.add_argument("--draws", type=int, default=5, help="calibration draws (default 5), each its own images")
    p.add_argument("--calib-size", type=int, default=32, help="images of each draw (default 32)")
    p.add_argument("--calib", choices=("data", "synthetic"), default="data", help="calibrate on the data's train, or on images made from the model")
    p.add_argument("--crop-pct", type=float, help="part of the resized image that is cut out (default: the model's own)")
    p.add_argument("--limit", type=int, help="evaluate on at most so many images")
    p.add_argument("--batch-size", type=int, default=100)
    p.add_argument("--simulate", action="store_true", help="evaluate the simulated models of the first draw too")
    p.add_argument("--device", help="default: cuda where there is one")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--output", type=Path, help="folder for methods.json, methods.md and methods.png (default vitq-out/methods)")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0: done; 2: a user's mistake, said in one line."""
    args = parse(argv)
    try:
        run(args)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        print(f"compare_methods: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    for flag in ("draws", "calib_size", "batch_size", "limit"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} must be at least 1, got {getattr(args, flag)}")
    if args.limit == 1:
        raise ValueError("--limit must be at least 2: the bootstrap needs images to draw from")
    if args.crop_pct is not None and not 0 < args.crop_pct <= 1:
        raise ValueError(f"--crop-pct must be above 0 and at most 1, got {args.crop_pct}")
    recipes = rows_of(args)
    device = vitq.pick_device(args.device)
    output = args.output or Path("vitq-out") / "methods"
    vitq.report.make_folder(output)
    report = {"command": "python tools/compare_methods.py " + shlex.join(argv_of(args)), "machine": machine(device),
              "date": str(datetime.date.today()), "calib_size": args.calib_size, "draws": args.draws, "models": []}
    print(f"{report['machine']}, {report['date']}: {report['command']}\n")
    models = []
    for name in args.models.split(","):  # all of them first: a wrong path must not wait for the model before it
        name, _, weights = name.partition("=")
        models.append(vitq.load_model(name, weights or "auto", seed=args.seed))
        for note in models[-1].notes:
            print(f"note: {note}")
    for loaded in models:
        report["models"].append(compare(args, loaded, recipes, device))
        write(output, report)
        print("\n".join([vitq.report.table(*table(report["models"][-1])), *report["models"][-1]["notes"], ""]), flush=True)
    for file in ("methods.json", "methods.md", "methods.png"):
        print(f"wrote {output / file}")


def argv_of(args: argparse.Namespace) -> Iterator[str]:
    """The options that make the figures."""
    for key in ("models", "data", "recipes", "methods", "draws", "calib_size", "crop_pct", "limit", "seed"):
        if (value := getattr(args, key)) is not None:
            yield from (f"--{key.replace('_', '-')}", str(value))
    for value in args.set:
        yield from ("--set", value)
    if args.calib != "data":
        yield from ("--calib", args.calib)
    if args.simulate:
        yield "--simulate"


def machine(device: torch.device) -> str:
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return f"{what}, vitq {vitq.__version__}, torch {torch.__version__}"


def rows_of(args: argparse.Namespace) -> dict[tuple[str, str], vitq.Recipe]:
    """(recipe, method) -> the recipe to run."""
    names = [m for part in args.methods.split(",") for m in SETS.get(part, part).split(",")]
    if unknown := [name for name in names if name not in METHODS]:
        raise ValueError(f"unknown method {', '.join(unknown)}; there are {', '.join(METHODS)} and the sets {', '.join(SETS)}")
    return {(recipe, method): vitq.Recipe.from_yaml(recipe).with_overrides(
        [f"calib_size={args.calib_size}", *METHODS[method], *args.set]) for recipe in args.recipes.split(",") for method in names}


def compare(args: argparse.Namespace, loaded, recipes: dict, device: torch.device) -> dict:
    """Everything measured of one model."""
    model, config = loaded.model.to(device), vitq.data_config(loaded.model)
    if args.crop_pct is not None:
        config = {**config, "crop_pct": args.crop_pct}
    data = vitq.open_images(args.data, config, seed=args.seed)
    if not vitq.labels_match(loaded.class_names, model.num_classes, data):
        raise ValueError(f"the classes of {args.data} are not those of {loaded.name}: top-1 would mean nothing")
    count = args.draws * args.calib_size
    too_few = f"{args.data} has {{}} images to calibrate on; {args.draws} draws of {args.calib_size} need {count}: lower --draws or --calib-size"
    if args.calib == "data" and hasattr(data.calib, "__len__") and len(data.calib) < count:
        raise ValueError(too_few.format(len(data.calib)))
    calib = vitq.synthesize(model, count, config, seed=args.seed) if args.calib == "synthetic" else \
        torch.cat([x for x, _ in vitq.batches(data.calib, args.batch_size, limit=count)])
    if len(calib) < count:
        raise ValueError(too_few.format(len(calib)))
    cost: dict[str, list[tuple[float, float]]] = {}
    bytes_of: dict[str, int] = {}
    models: dict[str, torch.nn.Module] = {"float": model}
    with tqdm(desc=f"{loaded.name}, calibrating", total=args.draws * len(recipes), unit=" models", leave=False, disable=None) as bar:
        for draw, images in enumerate(calib.split(args.calib_size)):
            for key, recipe in recipes.items():
                batches, executed = list(images.split(args.batch_size)), recipe.execution == "integer"
                name, of_draw = " ".join(key), f"{' '.join(key)}, draw {draw}"
                with measured(device, cost.setdefault(name, [])):
                    models[of_draw] = (vitq.convert if executed else vitq.simulate)(model, recipe, batches)
                if args.simulate and executed and draw == 0:
                    models[f"simulated {of_draw}"] = vitq.simulate(model, recipe, batches)
                if executed and draw == 0:
                    bytes_of[name] = saved_bytes(models[of_draw])
                bar.update()
    # All at once, so that each image is decoded once.
    with tqdm(desc=f"{loaded.name}, evaluating", unit=" images", leave=False, disable=None) as bar:
        found = vitq.evaluate.evaluate_models(models, vitq.batches(data.eval, args.batch_size, limit=args.limit), progress=bar.update)
    right: dict[str, list[np.ndarray]] = {}
    for key, e in found.items():
        right.setdefault(key.rpartition(", draw ")[0] or key, []).append(((e.logits.argmax(1) == e.labels) * 100.0).double().numpy())
    base = right["float"][0]
    whole = vitq.report.safetensors_bytes(model.state_dict())
    rows = [row(key, base, right, cost, bytes_of, whole, args.seed) for key in recipes]
    notes = sorted({note for (name, _), recipe in recipes.items() if (note := attention_note(name, recipe))})
    return {"model": loaded.name, "weights": loaded.weights, "data": data.name, "images": len(base), "float": base.mean(), "rows": rows, "notes": notes}


def attention_note(name: str, recipe: vitq.Recipe) -> str | None:
    """What the matmuls of attention run in, where that is not what the recipe's name says of activations."""
    qk, pv = recipe.resolve("qk"), recipe.resolve("pv")
    if recipe.execution != "integer" or qk.is_float or qk.input.bits == pv.input.bits:
        return None
    return f"{name}: q, k and v have {qk.input.bits} bits in int8 storage; probabilities are unsigned, {pv.input.bits} bits, uniform, a scale for each row"


def row(key: tuple[str, str], base: np.ndarray, right: dict, cost: dict, bytes_of: dict, whole: int, seed: int) -> dict:
    """One row's figures: accuracies in percent, seconds, MB, and the checkpoint as a part of the float32 file (None if nothing executes)."""
    name = " ".join(key)
    drops = [float((base - r).mean()) for r in right[name]]
    each = base - np.mean(right[name], axis=0)  # of every image, over the draws
    interval = bootstrap((each,), np.mean, n_resamples=2000, batch=200, method="percentile", random_state=seed).confidence_interval
    simulated = right.get(f"simulated {name}")
    return {"recipe": key[0], "method": key[1], "top1": float(base.mean() - np.mean(drops)), "drop": float(np.mean(drops)), "drops": drops,
            "spread": statistics.stdev(drops) if len(drops) > 1 else None, "low": float(interval.low), "high": float(interval.high),
            "seconds": statistics.median(s for s, _ in cost[name]), "memory_mb": max(m for _, m in cost[name]),
            "size": bytes_of[name] / whole if name in bytes_of else None,
            "executed_less_simulated": float((right[name][0] - simulated[0]).mean()) if simulated else None}


def saved_bytes(model: torch.nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return sum(f.stat().st_size for f in vitq.save(model, Path(folder) / "checkpoint").iterdir())


def table(found: dict) -> tuple[list[str], list[list]]:
    """Headers and rows. `x rtn`: the drop as a part of that of the same recipe's rtn, where there is one."""
    rtn = {r["recipe"]: r["drop"] for r in found["rows"] if r["method"] == "rtn"}
    simulated = any(r["executed_less_simulated"] is not None for r in found["rows"])
    headers = ["recipe", "method", "top-1 %", "drop", "95 %", "spread", "x rtn", "seconds", "MB", "size"] + simulated * ["exec − sim"]
    rows = [["float", None, f"{found['float']:.2f}"] + [None] * (len(headers) - 3)]
    for r in found["rows"]:
        part = rtn.get(r["recipe"])
        rows.append([r["recipe"], r["method"], f"{r['top1']:.2f}", f"{r['drop']:.2f}", f"{r['low']:.2f} to {r['high']:.2f}",
                     None if r["spread"] is None else f"{r['spread']:.2f}", f"{r['drop'] / part:.2f}" if part and part > 0 else None,
                     f"{r['seconds']:.1f}", f"{r['memory_mb']:.0f}", None if r["size"] is None else f"{r['size']:.3f}"]
                    + simulated * [None if r["executed_less_simulated"] is None else f"{r['executed_less_simulated']:+.2f}"])
    return headers, rows


def write(output: Path, report: dict) -> None:
    vitq.report.write_json(output / "methods.json", report)
    parts = [f"{report['machine']}, {report['date']}: `{report['command']}`"]
    for found in report["models"]:
        parts.append(f"### {found['model']}, {found['images']} images\n\n" + vitq.report.markdown_table(*table(found)) + "".join(
            f"\n\n{note}." for note in found["notes"]))
    (output / "methods.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    vitq.report.plot_drops(output / "methods.png", report["models"])


if __name__ == "__main__":
    sys.exit(main())
