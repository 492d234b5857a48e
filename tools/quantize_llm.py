#!/usr/bin/env python3
"""Quantize a language model: its perplexity before and after, its size, what runs, and zero-shot tasks if asked for.

    python tools/quantize_llm.py --model HuggingFaceTB/SmolLM2-135M                          # WikiText-2, windows of 2048 tokens
    python tools/quantize_llm.py --model model.gguf --data book.txt --seqlen 512 --recipe w8a8-dynamic,w8a8,w4a8 --save out
    python tools/quantize_llm.py --load out/w8a8 --data book.txt --tasks lambada_openai,piqa
"""
from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import vitq
from _cli import add_common, check_least, device_of, executed_recipe, exit_code, writable
from _console import Console
from _language import (add_blocks, check_blocks, check_positions, check_same, checked_statistics, collected, convert, dtype_of, half_of,
                       kept_statistics, on_cpu, options_of, prefill_and_decode, quiet_transformers, tasks_of, zero_shot)


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help="a folder of transformers, a name on the hub, or a .gguf file (with --load: the one it was made of)")
    p.add_argument("--recipe", help="shipped recipes or YAML files, with commas between (default w8a8-dynamic)")
    p.add_argument("--data", default="wikitext2", help="wikitext2 (default), c4, a text file, or a folder of .txt files")
    p.add_argument("--nsamples", type=int, metavar="N", help="windows to calibrate on (default: the recipe's)")
    p.add_argument("--stats", type=Path, metavar="FILE", help="read the statistics of activations from there, or else write them there, for all recipes")
    p.add_argument("--act-scales", type=Path, metavar="FILE", help="the largest inputs of channels from SmoothQuant's act_scales.pt, in the place of measuring")
    p.add_argument("--seqlen", type=int, default=2048, metavar="T", help="tokens of a window (default 2048)")
    p.add_argument("--limit", type=int, metavar="N", help="evaluate on the first N windows")
    p.add_argument("--batch-size", type=int, default=1, metavar="N", help="windows a batch (default 1)")
    p.add_argument("--eval", choices=("ppl", "none"), default="ppl", help="perplexity (default), or none")
    p.add_argument("--tasks", metavar="A,B", help="zero-shot tasks: names that lm-eval has (lambada_openai, piqa …), or YAML files of its kind")
    p.add_argument("--simulate", action="store_true", help="evaluate vitq.simulate's model too, which the executed one must reproduce")
    p.add_argument("--benchmark", action="store_true", help="time prefill and decode of a window, in 16-bit floats and quantized")
    p.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of what stays in float (default: the device's)")
    p.add_argument("--memory", type=float, default=2.0, metavar="GB", help="what a solver's Gram matrices may take at once (default 2)")
    p.add_argument("--save", type=Path, metavar="DIR", help="write the checkpoint and the tokenizer there (DIR/RECIPE for each of several), and reload it")
    p.add_argument("--load", type=Path, metavar="DIR", help="measure this checkpoint instead of quantizing")
    p.add_argument("--output", type=Path, metavar="DIR", help="folder for report.json and table.md")
    add_blocks(p)
    add_common(p)
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0: done; 1: a reloaded checkpoint gave other logits; 2: a user's mistake, said in one line."""
    args = parse(argv)
    return exit_code("quantize_llm", lambda: run(args, Console(args.quiet, args.json)),
                     f"out of memory on {args.device or 'the device'}: lower --batch-size (now {args.batch_size}), --seqlen or --memory")


def run(args: argparse.Namespace, console: Console) -> int:
    began = time.perf_counter()
    if helps := int(os.environ.get("RANK", "0")) > 0 and args.resume is not None:  # one of several processes, of which the first reports
        args.eval, args.tasks, args.benchmark, args.simulate, args.save, args.output, args.json = "none", None, False, False, None, None, False
        console = Console(True, True)
    check_least(args, nsamples=1, seqlen=2, limit=1, batch_size=1, memory=1e-3)
    if args.load and (args.recipe or args.set or args.nsamples or args.simulate or args.save or args.stats or args.act_scales
                      or args.stream):
        raise ValueError("--load takes a checkpoint as it is: leave out --recipe, --set, --nsamples, --simulate, --save, --stats, --act-scales and "
                         "--stream")
    check_blocks(args)
    if args.simulate and args.eval == "none":
        raise ValueError("--simulate evaluates the simulated model's perplexity: leave out --eval none")
    if not (args.model or args.load):
        raise ValueError("give --model, or --load with a checkpoint")
    torch.manual_seed(args.seed)
    device, tasks = device_of(args), tasks_of(args.tasks) if args.tasks else []
    overrides = args.set + ([f"calib_size={args.nsamples}"] if args.nsamples else [])
    recipes = [] if args.load else [executed_recipe(name, overrides) for name in (args.recipe or "w8a8-dynamic").split(",")]
    with contextlib.ExitStack() as stack:
        targets = {r.name: args.save / r.name if len(recipes) > 1 else args.save for r in recipes} if args.save else {}
        if len(targets) < len(recipes) and args.save:
            raise ValueError("two of the recipes have one name: give each its own, for its checkpoint")
        for target in targets.values():
            stack.enter_context(writable(target.absolute().parent, target))
        if args.output:
            stack.enter_context(writable(args.output))
        if args.stats:
            stack.enter_context(writable(args.stats.absolute().parent))
        stats = kept_statistics(args, recipes)
        checkpoint = vitq.load(args.load, device, args.backend, dtype=dtype_of(args)) if args.load else None
        if args.load and not hasattr(checkpoint, "generate"):
            raise ValueError(f"{args.load} holds a {type(checkpoint).__name__}, which is no language model")
        loaded, text = load(args, recipes, checkpoint, device, console)
        stats = checked_statistics(args, recipes, stats, loaded.model, console)
        report = {"vitq": vitq.__version__, "torch": torch.__version__, "model": loaded.name, "data": args.data, "windows": len(text.eval),
                  "seqlen": args.seqlen, "device": device, "backend": args.backend, "seed": args.seed, "threads": torch.get_num_threads(),
                  "rows": [{"recipe": "float", "dtype": loaded.model.dtype, **scores(args, loaded.model, "float", loaded, text, tasks, console)}]}
        if args.stats and stats is None:
            stats = collected(args, [recipe for recipe in recipes if recipe.is_static], loaded, text, console)
        try:
            for source in recipes or [checkpoint]:
                with options_of(args, source) as blocks:
                    if helps:
                        convert(args, source, loaded, text, stats, blocks, console)
                        continue
                    report["rows"].append(row(args, source, loaded, text, stats, tasks, targets, report, blocks, console))
                if args.output:  # a run of hours that is cut off keeps what it found
                    vitq.report.write_json(args.output / "report.json", report)
        finally:
            headers, rows = table(report["rows"])
            console.result(f"\n{len(text.eval)} windows of {args.seqlen} tokens\n" + vitq.report.table(headers, rows))
    for name, of in (("tasks", task_rows), ("speed", speed_rows)):
        if any(name in r for r in report["rows"]):
            console.result("\n" + vitq.report.table(*of(report["rows"])))
    report.update(notes=console.notes, seconds=round(time.perf_counter() - began, 1))
    console.result(f"\n{report['seconds']:.0f} s in all")
    if args.output:
        vitq.report.write_json(args.output / "report.json", report)
        (args.output / "table.md").write_text(vitq.report.markdown_table(headers, rows) + "\n", encoding="utf-8")
        console.result(f"wrote {args.output / 'report.json'} and table.md")
    if args.json:
        print(vitq.report.to_json(report))
    return 0 if all(r.get("reload", True) for r in report["rows"]) else 1


def load(args, recipes: list, checkpoint, device: torch.device, console: Console):
    """The float model on the device, with its tokenizer, and the windows."""
    name = args.model or checkpoint.vitq.source.get("name", "")
    console.step(f"loading {name}")
    if args.quiet or args.json:
        quiet_transformers()
    loaded = vitq.load_language_model(name)
    if checkpoint is not None:
        check_same(checkpoint, loaded.model, name)
    check_positions(args.seqlen, loaded.model, name)
    needed = max((r.calib_size for r in recipes if r.needs_data), default=0)
    text = vitq.open_text(args.data, loaded.tokenizer, args.seqlen, nsamples=needed, seed=args.seed, limit=args.limit)
    loaded.model.to(device)
    console.result(f"model {loaded.name} in {str(loaded.model.dtype)[6:]} on {device}, text from {text.name}: {len(text.calib)} windows of "
                   f"{args.seqlen} tokens to calibrate on, {len(text.eval)} to evaluate")
    return loaded, text


def scores(args, model, name: str, loaded, text, tasks: list, console: Console) -> dict:
    """Perplexity and the scores of the tasks, each where it was asked for."""
    found = {}
    if args.eval == "ppl":
        with console.bar(f"{name}, evaluating", len(text.eval), "windows") as bar:
            found["perplexity"] = vitq.perplexity(model, text.eval, batch_size=args.batch_size, progress=bar.update)
    if tasks:
        console.step(f"{name}: zero-shot {args.tasks}")
        found["tasks"] = zero_shot(model, loaded.tokenizer, tasks, args.batch_size)
    return found


def row(args, source, loaded, text, stats, tasks: list, targets: dict, report: dict, blocks: dict, console: Console) -> dict:
    """Everything measured of one recipe, or of the checkpoint in its place. blocks: as `options_of` has them."""
    device = loaded.model.device
    if isinstance(source, vitq.Recipe):
        model, calib, kept, cost = convert(args, source, loaded, text, stats, blocks, console)
        found = {"recipe": source.name, "calibration": cost}
    else:
        model, calib, kept, found = source, None, None, {"recipe": source.vitq.recipe.name}
    found.update(settings=model.vitq.recipe.to_dict(), dtype=model.vitq.dtype, **scores(args, model, found["recipe"], loaded, text, tasks, console))
    if args.eval == "ppl":
        console.step(f"perplexity {found['perplexity']:.3f}")
    if args.simulate and args.eval == "ppl":
        with on_cpu(loaded.model, args.calib_device):
            simulated = vitq.simulate(loaded.model, source, calib, statistics=kept, memory=args.memory * 1e9, **blocks)
        found["simulated"] = vitq.perplexity(simulated.to(device), text.eval, batch_size=args.batch_size)
    if args.eval == "ppl":
        found["ratio"] = found["perplexity"] / report["rows"][0]["perplexity"]
    layers = vitq.explain(model)
    found.update(bits=vitq.report.bits_per_weight(model), kernels=vitq.report.kernel_summary(layers))
    for note in vitq.report.storage_notes(layers):
        console.note(note)
    console.result(f"\nWhat runs, {found['recipe']}\n" + vitq.report.kernel_table(found["kernels"]))
    with checkpoint_of(args, model, loaded.name, targets.get(found["recipe"])) as folder:
        found["bytes"] = sum(file.stat().st_size for file in folder.glob("model*"))  # without a tokenizer
        found["part_of_fp16"] = found["bytes"] / (2 * sum(p.numel() for p in loaded.model.parameters()))
        if args.save:
            loaded.tokenizer.save_pretrained(folder)
            found["checkpoint"], found["reload"] = folder, reloads(args, folder, model, text.eval[:1].to(model.device), console)
    if args.benchmark:
        name, half = half_of(loaded.model)
        found["speed"] = prefill_and_decode({name: half, "quantized": model}, text.eval[:1].to(model.device))
    return found


@contextlib.contextmanager
def checkpoint_of(args, model, name: str, target: Path | None) -> Iterator[Path]:
    """The folder that holds the model: the one it was loaded from, the one to save it to, or one for the moment, to see its size."""
    with tempfile.TemporaryDirectory() as folder:
        yield args.load or vitq.save(model, target or Path(folder) / "checkpoint", source={"name": name})


def reloads(args, folder: Path, model, window: torch.Tensor, console: Console) -> bool:
    """Whether the checkpoint's logits are the model's, bit for bit, on the first window."""
    again = vitq.load(folder, window.device, args.backend, dtype=dtype_of(args))
    with torch.inference_mode():
        same = torch.equal(model(window, use_cache=False).logits, again(window, use_cache=False).logits)
    console.result(f"wrote {folder}; reloaded, its logits are {'bit-identical' if same else 'DIFFERENT'}")
    return same


def table(found: list[dict]) -> tuple[list[str], list[list]]:
    """Headers and rows: one for the float model, one for each recipe."""
    simulated = any("simulated" in r for r in found)
    headers = ["recipe", "perplexity", "ratio", *simulated * ["simulated"], "bits, linears", "bits, model", "MB on disk", "part of fp16",
               "seconds", "MB to convert"]

    def number(of: dict, key: str, digits: int) -> str | None:
        return f"{of[key]:.{digits}f}" if key in of else None

    rows = []
    for r in found:
        bits, cost = r["bits"]._asdict() if "bits" in r else {}, r.get("calibration", {})
        rows.append([r["recipe"], number(r, "perplexity", 3), number(r, "ratio", 4), *simulated * [number(r, "simulated", 3)],
                     number(bits, "linears", 2), number(bits, "model", 2), f"{r['bytes'] / 1e6:.1f}" if "bytes" in r else None,
                     number(r, "part_of_fp16", 3), number(cost, "seconds", 1), number(cost, "memory_mb", 0)])
    return headers, rows


def task_rows(found: list[dict]) -> tuple[list[str], list[list]]:
    metrics = [(task, metric) for task, of in found[0]["tasks"].items() for metric in of]
    return ["zero-shot", "metric", *(r["recipe"] for r in found)], [[task, metric, *(f"{r['tasks'][task][metric]:.4f}" for r in found)]
                                                                     for task, metric in metrics]


def speed_rows(found: list[dict]) -> tuple[list[str], list[list]]:
    return ["recipe", "model", "prefill ms", "decode ms a token"], [
        [r["recipe"], name, f"{of['prefill'].median_ms:.1f}", f"{of['decode'].median_ms:.2f}"]
        for r in found if "speed" in r for name, of in r["speed"].items()]


if __name__ == "__main__":
    sys.exit(main())
