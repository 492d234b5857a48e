#!/usr/bin/env python3
"""Quantize a vision transformer, measure what it costs and gains, save it, and check that it reloads bit for bit.

    python tools/quantize_vit.py --model deit_s                                # demo photographs calibrate and evaluate
    python tools/quantize_vit.py --model swin_t --data /data/imagenet --recipe w4a8 --set head.bits=16
"""
from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

import vitq
from _cli import add_common, check_least, device_of, executed_recipe, exit_code, writable
from _console import Console
from _memory import measured

TIMED_BATCH_CPU, LAYER_IMAGES, SHOWN_LAYERS = 8, 16, 10  # LAYER_IMAGES: those whose layer outputs are compared


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="deit_s", help=f"{', '.join(vitq.ALIASES)}, or any timm name (default deit_s)")
    p.add_argument("--recipe", default="erq-w8a8", help="a shipped recipe or a YAML file (default erq-w8a8; w8a8 is as accurate at 8 bits and calibrates in seconds)")
    p.add_argument("--weights", default="auto", help="auto (default), pretrained, demo, random, or a file")
    p.add_argument("--data", default="demo", help="demo (default), a folder of images, hf:NAME[:SPLIT], or synthetic: made from the model, second best")
    p.add_argument("--calib-size", type=int, metavar="N", help="images to calibrate on (default: the recipe's)")
    p.add_argument("--memory", type=float, default=2.0, metavar="GB", help="what a solver's Gram matrices may take at once (default 2)")
    p.add_argument("--batch-size", type=int, default=32, metavar="N", help="images a batch (default 32)")
    p.add_argument("--limit", type=int, metavar="N", help="evaluate on at most N images")
    p.add_argument("--unreadable", choices=("skip", "error"), default="skip", help="what to do with broken image files")
    p.add_argument("--output", type=Path, help="folder for everything written (default vitq-out/MODEL-RECIPE)")
    add_common(p)
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0: done; 1: the reloaded checkpoint gave other logits; 2: a user's mistake, said in one line."""
    args = parse(argv)
    return exit_code("quantize_vit", lambda: run(args, Console(args.quiet, args.json)),
                     f"out of memory on {args.device or 'the device'}: lower --batch-size (now {args.batch_size})")


def run(args: argparse.Namespace, console: Console) -> int:
    began = time.perf_counter()
    check_least(args, batch_size=1, limit=1, memory=1e-3)
    torch.manual_seed(args.seed)
    overrides = args.set + ([f"calib_size={args.calib_size}"] if args.calib_size is not None else [])
    recipe, device = executed_recipe(args.recipe, overrides), device_of(args)
    output = args.output or Path("vitq-out") / f"{args.model.replace('/', '_')}-{recipe.name}"
    with writable(output, output / "checkpoint"):
        loaded, data = load(args, recipe, device, console)
        own_labels = vitq.labels_match(loaded.class_names, loaded.model.num_classes, data)
        if not own_labels and data.name == "demo":
            console.note("the demo photographs are not of this model's classes: images like the model's own calibrate "
                         "better. Give them with --data PATH or --data hf:NAME")
        cost: list[tuple[float, float]] = []
        with measured(device, cost):
            statistics, model = quantize(args, recipe, loaded, data, console)
        (seconds, memory), = cost
        console.result(f"calibrated and converted in {seconds:.1f} s, with {memory:.0f} MB at most beyond the model's")
        report = {"vitq": vitq.__version__, "torch": torch.__version__, "model": loaded.name, "weights": loaded.weights,
                  "recipe": recipe.to_dict(), "data": data.name, "calibration_images": model.vitq.calibration["images"],
                  "calibration": {"seconds": round(seconds, 2), "memory_mb": round(memory, 1)},
                  "device": device, "backend": args.backend, "dtype": model.vitq.dtype, "seed": args.seed,
                  "threads": torch.get_num_threads()}
        images = measure(args, report, loaded, model, data, own_labels, console)
        write(output, report, loaded, model, statistics, console)
        same = check_reload(args, model, images, report, console)
        # A list that decoding fills: it is complete only now.
        report.update(skipped_images=list(data.skipped), notes=console.notes, seconds=round(time.perf_counter() - began, 1))
        vitq.report.write_json(output / "report.json", report)
    for name, path in report["files"].items():
        console.result(f"wrote {name:<12} {path}")
    if args.json:
        print(vitq.report.to_json(report))
    return 0 if same else 1


def load(args, recipe, device: torch.device, console: Console):
    console.step(f"loading {args.model}, weights {args.weights}")
    try:
        loaded = vitq.load_model(args.model, args.weights, seed=args.seed)
    except RuntimeError as error:  # the hub cannot be reached
        raise ValueError(str(error)) from error
    for note in loaded.notes:
        console.note(note)
    loaded.model.to(device)
    made = {"model": loaded.model, "limit": recipe.calib_size} if args.data == "synthetic" else {}
    if made:
        console.step(f"optimising {recipe.calib_size} images and some to compare on, unless they are in the cache: minutes on a CPU")
    data = vitq.open_images(args.data, vitq.data_config(loaded.model), seed=args.seed, unreadable=args.unreadable, **made)
    console.result(f"model {loaded.name} ({loaded.weights}) on {device}, images from {data.name}")
    return loaded, data


def quantize(args, recipe, loaded, data, console: Console):
    """Calibrates once. Returns the statistics (None for a dynamic recipe) and the converted model."""
    statistics = images = None
    if recipe.needs_inputs or recipe.scores_heads:  # which reads them more than once
        images = list(vitq.batches(data.calib, args.batch_size, limit=recipe.calib_size))
    if recipe.is_static:
        console.step(f"calibrating on up to {recipe.calib_size} images")
        with console.bar("calibrate", recipe.calib_size) as bar:
            batches = images or vitq.batches(data.calib, args.batch_size, limit=recipe.calib_size)
            statistics = vitq.calibrate(loaded.model, recipe, batches, progress=bar.update)
    console.step(f"converting with the recipe {recipe.name}" + recipe.needs_inputs * f", whose solver {recipe.solver} takes seconds a layer")
    with console.bar("convert", sum(map(len, images)) if images else None) as bar:
        model = vitq.convert(loaded.model, recipe, images, args.backend, statistics=statistics, memory=args.memory * 1e9, progress=bar.update)
    return statistics, model


def measure(args, report: dict, loaded, model, data, own_labels: bool, console: Console) -> torch.Tensor:
    """Accuracy or agreement, kernels, layer errors and speed, each printed and put into `report`; returns timed images."""
    console.step("evaluating the float and the quantized model on the same images")
    known = len(data.eval) if hasattr(data.eval, "__len__") else None
    with console.bar("evaluate", min(filter(None, (args.limit, known)), default=None)) as bar:
        both = vitq.evaluate.evaluate_models({"float": loaded.model, "quantized": model},
                                             vitq.batches(data.eval, args.batch_size, limit=args.limit),
                                             progress=bar.update, labels=own_labels)
    agreement = vitq.evaluate.compare(both["float"].logits, both["quantized"].logits)
    report.update(images=both["float"].n, agreement=agreement, accuracy=None)
    console.result(f"\n{both['float'].n} images")
    if own_labels:
        report["accuracy"] = {name: vitq.report.accuracy(e, data.class_names) for name, e in both.items()}
    console.result(vitq.report.accuracy_table(report["accuracy"]) if own_labels else
                   "The labels are not the model's own classes: no top-1, only how the two models agree")
    console.result(f"equal predictions {100 * agreement.equal:.2f} %, logits SQNR {agreement.sqnr_db:.1f} dB")

    report["layers"] = vitq.explain(model)
    report["kernels"] = vitq.report.kernel_summary(report["layers"])
    console.result("\nWhat runs (every layer in layers.txt)\n" + vitq.report.kernel_table(report["kernels"]))

    device = next(loaded.model.parameters()).device
    batch = TIMED_BATCH_CPU if device.type == "cpu" else args.batch_size
    count = max(batch, LAYER_IMAGES)
    sample = next(vitq.batches(data.eval, count, limit=count))[0]
    with console.bar("layers", min(LAYER_IMAGES, len(sample))) as bar:
        report["layer_sqnr"] = vitq.evaluate.layer_sqnr(loaded.model, model, sample[:LAYER_IMAGES], progress=bar.update)
    console.result("\nLargest errors, accumulated end to end\n" + vitq.report.table(
        ("layer", "role", "SQNR dB"), [(r.layer, r.role, f"{r.sqnr_db:.1f}") for r in report["layer_sqnr"][:SHOWN_LAYERS]]))

    console.step("\ntiming")
    images = sample.repeat(-(-batch // len(sample)), 1, 1, 1)[:batch].to(device)
    report["speed"] = speed(loaded.model, model, images)
    rows = [(name, f"{t['ms_per_image']:.2f}", f"{100 * t['timing'].spread:.0f} %", f"{t['times_float32']:.2f}")
            for name, t in report["speed"]["models"].items()]
    console.result(f"\nSpeed at batch {batch}\n" + vitq.report.table(("", "ms an image", "spread", "time / float32"), rows))
    return images


def speed(float_model, model, images) -> dict:
    """Times float32, the faster of bfloat16 and float16, and the quantized model, in turn; on cuda as CUDA graphs."""
    dtype, half = vitq.timing.best_half(float_model, images)
    cases = {"float32": (float_model, images), str(dtype)[6:]: (half, images.to(dtype)), "quantized": (model, images)}
    if images.is_cuda:
        cases = {name: (vitq.evaluate.cuda_graph(fn, x)[0], x) for name, (fn, x) in cases.items()}
    once = vitq.timing.time_model(float_model, images, repeats=1, warmup=1).median_ms
    timings = vitq.timing.time_models(cases, repeats=int(max(3, min(20, 8000 / once))))
    return {"batch": len(images), "best_16_bit": dtype, "models": {
        name: {"ms_per_image": t.median_ms / len(images), "times_float32": t.median_ms / timings["float32"].median_ms, "timing": t}
        for name, t in timings.items()}}


def write(output: Path, report: dict, loaded, model, statistics, console: Console) -> None:
    console.step("\nsaving")
    source = {"name": loaded.name, "weights": loaded.weights, "data_config": vitq.data_config(loaded.model),
              "class_names": None if loaded.class_names is None else list(loaded.class_names), "model_kwargs": {}}
    files = {"checkpoint": output / "checkpoint", "report": output / "report.json", "layers": output / "layers.txt",
             "tensorboard": output / "tensorboard", "plot": output / "layer_error.png"}
    report["files"] = files
    vitq.save(model, files["checkpoint"], source=source)
    report["size"] = size = vitq.report.sizes(loaded.model, files["checkpoint"])
    console.result(f"\nsize {size.checkpoint_bytes / 1e6:.1f} MB on disk, {size.ratio:.3f} of the float32 file ({size.fp32_bytes / 1e6:.1f} MB)")
    for note in vitq.report.storage_notes(report["layers"]):
        console.note(note)
    files["layers"].write_text(vitq.report.layer_table(report["layers"]) + "\n", encoding="utf-8")
    vitq.report.plot_layer_error(files["plot"], report["layer_sqnr"], f"{loaded.name}, {report['recipe']['name']}")
    vitq.report.write_tensorboard(files["tensorboard"], vitq.report.scalars(report), model=model, statistics=statistics,
                                  layer_errors=report["layer_sqnr"])


def check_reload(args, model, images, report: dict, console: Console) -> bool:
    """Loads the checkpoint and compares its logits bit for bit on the images that were timed."""
    again = vitq.load(report["files"]["checkpoint"], device=images.device, backend=args.backend)
    with torch.no_grad():
        same = torch.equal(model(images), again(images))
    report["reload"] = {"bit_identical": same, "images": len(images)}
    console.result(f"reload check on {len(images)} images: logits are {'bit-identical' if same else 'DIFFERENT'}\n")
    return same


if __name__ == "__main__":
    sys.exit(main())
