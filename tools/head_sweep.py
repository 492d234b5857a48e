#!/usr/bin/env python3
"""Accuracy against the number of heads with few bits: those that matter least, by a score of theirs, and as many drawn at random.

    python tools/head_sweep.py --llm HuggingFaceTB/SmolLM2-135M --data wikitext2 --seqlen 128 --limit 1000
    python tools/head_sweep.py --vit deit_s=OUT/deit_small_patch16_224.glyphs.safetensors --data OUT/glyphs --recipe phq-w8 --heads 0,1,2,4,6

Each seed draws other calibration data, and other heads for `random`; a figure is the mean over the seeds with its standard deviation. Image models:
top-1 in percent. Language models: perplexity, and last-word accuracy: each evaluated window is cut at the end of its last sentence, and a model is
right where the argmax of every token of the last word is that token, given all that is before it. `s.e.` is the standard error of such an accuracy
over the windows (or images): smaller differences say nothing.
"""
from __future__ import annotations

import argparse
import datetime
import math
import platform
import re
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import vitq
from _cli import check_least, exit_code
from _console import Console

LAST_WORD = re.compile(r"(.*\S)\s+(\S*\w)\W*[.?!]", re.S)


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = p.add_mutually_exclusive_group(required=True)
    model.add_argument("--llm", metavar="NAME", help="a folder of transformers, a name on the hub, or a .gguf file")
    model.add_argument("--vit", metavar="NAME[=WEIGHTS]", help="a timm or short name, with what --weights of quantize_vit.py takes (default auto)")
    p.add_argument("--data", required=True, help="wikitext2, c4, a text file or a folder of them; of an image model what quantize_vit.py takes")
    p.add_argument("--recipe", default="phq-mixed", help="a recipe with heads (default %(default)s)")
    p.add_argument("--heads", default="0,0.25,0.5,0.75,1.0", help="for `heads.least`: query heads a layer, or parts of them (default %(default)s)")
    p.add_argument("--scores", default="contribution,random", help="of l1, contribution, sensitivity, random (default %(default)s)")
    p.add_argument("--seeds", type=int, default=3, help="draws (default %(default)s)")
    p.add_argument("--calib-size", type=int, default=32, help="images, or windows, to calibrate on (default %(default)s)")
    p.add_argument("--seqlen", type=int, default=128, metavar="T", help="tokens of a window (default %(default)s)")
    p.add_argument("--limit", type=int, help="evaluate on at most so many windows or images")
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override the recipe")
    p.add_argument("--device", help="default: cuda where there is one")
    p.add_argument("--output", type=Path, default=Path("vitq-out") / "heads", metavar="DIR", help="for heads.json and heads.md (default %(default)s)")
    p.add_argument("--quiet", action="store_true", help="no progress, only the results")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0: done; 2: a user's mistake, said in one line."""
    args = parse(argv)
    given = sys.argv[1:] if argv is None else argv
    return exit_code("head_sweep", lambda: run(args, shlex.join(given), Console(args.quiet, False)), "out of memory: lower --batch-size or --seqlen")


def run(args: argparse.Namespace, command: str, console: Console) -> int:
    check_least(args, seeds=1, calib_size=1, seqlen=2, limit=1, batch_size=1)
    device = torch.device(vitq.pick_device(args.device))
    cases = recipes_of(args)  # a mistake there is one before any work
    vitq.report.make_folder(args.output)
    name, _, weights = (args.llm or args.vit).partition("=") if args.vit else (args.llm, "", "")
    loaded = vitq.load_language_model(name) if args.llm else vitq.load_model(name, weights or "auto")
    loaded.model.to(device)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    report = {"command": f"python tools/head_sweep.py {command}", "machine": f"{machine}, vitq {vitq.__version__}, torch {torch.__version__}",
              "date": str(datetime.date.today()), "model": loaded.name, "rows": []}
    found: dict[tuple[str, str], list[dict[str, float]]] = {key: [] for key in [("float", ""), *cases]}
    for seed in range(args.seeds):
        calib, measure, report["samples"] = language(args, loaded, seed) if args.llm else vision(args, loaded, seed)
        if seed == 0:
            found["float", ""].append(measure(loaded.model))
        for (score, least), recipe in cases.items():
            recipe = recipe.with_overrides([f"heads.seed={seed}"])
            model = vitq.convert(loaded.model, recipe, calib)
            one = measure(model)
            heads = model.vitq.recipe.heads["chosen"]
            one |= {"units": statistics.mean(map(len, heads.values())), "bits": vitq.report.bits_per_weight(model).linears}
            found[score, least].append(one)
            console.step(f"seed {seed}, {least} heads by {score}: " + ", ".join(f"{key} {value:.4g}" for key, value in one.items()))
        report["rows"] = [{"score": score, "least": least, "runs": runs} for (score, least), runs in found.items() if runs]
        vitq.report.write_json(args.output / "heads.json", report)
    text = vitq.report.markdown_table(*table(report["rows"], report["samples"]))
    (args.output / "heads.md").write_text(f"{report['machine']}, {report['date']}: `{report['command']}`\n\n{text}\n", encoding="utf-8")
    console.result(f"\n{report['machine']}, {report['samples']} windows or images\n\n{text}\n\nwrote {args.output / 'heads.json'} and heads.md")
    return 0


def recipes_of(args: argparse.Namespace) -> dict[tuple[str, str], vitq.Recipe]:
    """(score, least) -> the recipe; none and all of the heads are the same by any score."""
    base = vitq.Recipe.from_yaml(args.recipe).with_overrides([f"calib_size={args.calib_size}", *args.set])
    if not base.heads:
        raise ValueError(f"--recipe {args.recipe} has no heads: take phq-mixed, phq-w8, or one with that key")
    cases: dict[tuple[str, str], vitq.Recipe] = {}
    for least in args.heads.split(","):
        for score in args.scores.split(","):
            recipe = base.with_overrides([f"heads.least={least}", f"heads.score={score}"])
            same = recipe.heads["least"] == 0 or recipe.heads["least"] == 1 and isinstance(recipe.heads["least"], float)
            cases.setdefault(("any" if same else score, least), recipe)
    return cases


def vision(args: argparse.Namespace, loaded, seed: int) -> tuple[list, Callable[[nn.Module], dict[str, float]], int]:
    """Calibration images, what measures a model, and on how many images."""
    data = vitq.open_images(args.data, vitq.data_config(loaded.model), seed=seed)
    if not vitq.labels_match(loaded.class_names, loaded.model.num_classes, data):
        raise ValueError(f"the classes of {args.data} are not those of {loaded.name}: top-1 would mean nothing")
    count = min(len(data.eval), args.limit or len(data.eval))

    def measure(model: nn.Module) -> dict[str, float]:
        return {"top-1 %": 100 * vitq.evaluate.evaluate(model, vitq.batches(data.eval, args.batch_size, limit=args.limit)).top1}

    return list(vitq.batches(data.calib, args.batch_size, limit=args.calib_size)), measure, count


def language(args: argparse.Namespace, loaded, seed: int) -> tuple[list, Callable[[nn.Module], dict[str, float]], int]:
    """Calibration windows, what measures a model, and on how many last words."""
    text = vitq.open_text(args.data, loaded.tokenizer, args.seqlen, nsamples=args.calib_size, seed=seed, limit=args.limit)
    words = sorted((found for window in text.eval if (found := last_word(loaded.tokenizer, window))), key=lambda found: len(found[0]))
    if not words:
        raise ValueError(f"no window of {args.seqlen} tokens of {args.data} holds the end of a sentence: give longer ones")

    def measure(model: nn.Module) -> dict[str, float]:
        right = [r for i in range(0, len(words), args.batch_size) for r in are_right(model, words[i: i + args.batch_size])]
        return {"perplexity": vitq.perplexity(model, text.eval, batch_size=args.batch_size), "last word %": 100 * statistics.mean(right)}

    return list(text.calib.split(args.batch_size)), measure, len(words)


def last_word(tokenizer, window: Tensor) -> tuple[Tensor, int] | None:
    """Token ids [T] of a window up to the last word before the end of its last sentence, and how many of them are that word's."""
    match = LAST_WORD.match(tokenizer.decode(window, skip_special_tokens=True))
    if match is None:
        return None
    before, whole = (tokenizer(text)["input_ids"] for text in (match[1], f"{match[1]} {match[2]}"))
    same = next((i for i, (a, b) in enumerate(zip(before, whole)) if a != b), min(len(before), len(whole)))
    return (torch.tensor(whole), len(whole) - same) if 0 < same < len(whole) else None


@torch.inference_mode()
def are_right(model: nn.Module, words: list[tuple[Tensor, int]]) -> list[bool]:
    """For each of these ids and counts whether each of the last `count` tokens is the one that the model holds most likely, given those before it.
    What fills up shorter ones comes after them, where a causal model does not look."""
    batch = torch.nn.utils.rnn.pad_sequence([ids for ids, _ in words], batch_first=True)
    best = model(batch[:, :-1].to(model.device), use_cache=False).logits.argmax(-1).cpu()
    return [torch.equal(of[len(ids) - 1 - count: len(ids) - 1], ids[-count:]) for of, (ids, count) in zip(best, words)]


def table(rows: list[dict], samples: int) -> tuple[list[str], list[list]]:
    """Headers and rows; of a figure the mean over the seeds ± their standard deviation."""
    figures = list(rows[0]["runs"][0])
    headers = ["heads", "by", "least units, a layer", "bits, linears", *figures, "s.e. of %"]

    def spread(values: list[float]) -> str:
        return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")

    cells = []
    for row in rows:
        runs = row["runs"]
        part = statistics.mean(run[figures[-1]] for run in runs) / 100
        measured = [f"{statistics.mean(run[key] for run in runs):.2f}" if key in runs[0] else None for key in ("units", "bits")]
        cells.append([row["least"] or None, row["score"], *measured, *(spread([run[key] for run in runs]) for key in figures),
                      f"{100 * math.sqrt(part * (1 - part) / samples):.2f}"])
    return headers, cells


if __name__ == "__main__":
    sys.exit(main())
