#!/usr/bin/env python3
"""Prefill and decode of language models on a GPU: float16 (bfloat16 on a CPU), eager and compiled, against vitq's recipes, with the peak of memory.

    python tools/llm_benchmark.py --random llama-2-7b --batch 1,16 --output llama.json        # random weights in that model's shape
    python tools/llm_benchmark.py --model meta-llama/Llama-2-7b-hf --recipes w8a8-dynamic,flatquant-w4a4kv4

Every case has a static cache and runs as CUDA graphs where it can be captured: a prompt of --prompt tokens, then --decode tokens, each chosen on the GPU and fed
back, without a word from the host. The baseline of a row is the faster of float16 eager and torch.compile with SDPA. A recipe runs whole: norms, rotary
positions, cache and head are in its time. What a recipe would search or learn is replaced by what costs the same time (`vitq.profiling.quick_recipe`), what it
measures it measures on random tokens.
"""
from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vitq
from _cli import check_least, exit_code
from _console import Console
from _generation import SHAPES, Case, executed_recipe, measure, random_model, random_tokens
from _language import check_positions

PUBLISHED = "Published of FlatQuant's own kernels, Llama-2-7B on an RTX 3090, batch 1, times as fast as its float16 (a chip that multiplies int4 at twice the rate of int8):"
PUBLISHED_ROWS = [["FlatQuant W4A4KV4", "1.98 to 2.06", "0.47 to 0.48"], ["QuaRot", None, "0.59"], ["int4, no transforms", None, "0.67"]]


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--random", metavar="A,B", help=f"random weights in the shapes of {', '.join(SHAPES)}")
    p.add_argument("--model", help="or a folder of transformers, a name on the hub, or a .gguf file")
    p.add_argument("--layers", type=int, metavar="N", help="of a random model, in place of all")
    p.add_argument("--recipes", default="w8a8-dynamic,dgq-w4a8,w4a4,w4a4kv4,quarot-w4a4kv4,flatquant-w4a4kv4",
                   help="with commas; w4a4, w4a4kv4: 4 bits a token and an output, and of keys and values, nothing else (default %(default)s)")
    p.add_argument("--batch", default="1", metavar="N,M", help="sequences (default 1)")
    p.add_argument("--prompt", type=int, default=2048, metavar="T", help="tokens of each (default 2048)")
    p.add_argument("--decode", type=int, default=256, metavar="T", help="tokens after them (default 256)")
    p.add_argument("--kv-bits", type=int, metavar="N", help="bits of keys and values of recipes that leave them in float (default: float)")
    p.add_argument("--repeats", type=int, default=5, help="timed prefills, and decodes of all tokens (default 5)")
    p.add_argument("--no-compile", action="store_true", help="leave torch.compile of float16 out, which takes minutes")
    p.add_argument("--device-map", choices=("auto",), help="auto: the float model over all visible GPUs, by accelerate; recipes run on one")
    p.add_argument("--device", help="default: cuda where there is one, else cpu")
    p.add_argument("--output", type=Path, metavar="PATH", help="write every figure as JSON")
    p.add_argument("--quiet", action="store_true", help="no progress, only the results")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0: done; 2: a user's mistake, said in one line."""
    args = parse(argv)
    return exit_code("llm_benchmark", lambda: run(args), "out of memory: lower --batch, --prompt or --layers")


def run(args: argparse.Namespace) -> int:
    check_least(args, prompt=1, decode=1, repeats=1, layers=1, kv_bits=2)
    if bool(args.random) == bool(args.model):
        raise ValueError("give --random with the names of shapes, or --model")
    if args.layers and args.model:
        raise ValueError("--layers is of a random model: leave it out with --model")
    try:
        batches = [int(b) for b in args.batch.split(",")]
    except ValueError:
        batches = [0]
    if min(batches) < 1:
        raise ValueError(f"--batch {args.batch}: give numbers of sequences, such as 1,16")
    if args.device_map and importlib.util.find_spec("accelerate") is None:
        raise ValueError("--device-map needs accelerate: pip install 'vitq[llm]'")
    device, console = torch.device(vitq.pick_device(args.device)), Console(args.quiet, False)
    if device.index is not None:
        torch.cuda.set_device(device)  # whose streams and events are used
    recipes = [(name, recipe_of(name, args.kv_bits)) for name in map(str.strip, args.recipes.split(","))]
    names = [name.strip() for name in args.random.split(",")] if args.random else [args.model]
    for name in names:
        if args.random and name not in SHAPES:
            raise ValueError(f"--random {name}: known are {', '.join(SHAPES)}")
    if args.output:
        vitq.report.make_folder(args.output.parent)
        if args.output.is_dir():
            raise ValueError(f"--output {args.output} is a folder: give the path of a file")
    report: dict[str, Any] = {"vitq": vitq.__version__, "torch": torch.__version__, "device": device_name(device), "prompt": args.prompt, "decode": args.decode,
                              "rows": []}
    for name in names:
        def source(where: torch.device = device, name: str = name) -> nn.Module:
            model = random_model(name, where, args.layers) if args.random else vitq.load_language_model(name, dtype=torch.float16, tokenizer=False).model.to(where)
            check_positions(args.prompt + args.decode, model, name, "--prompt and --decode:")
            return model

        rows: list[dict] = []
        try:
            for found in itertools.chain(float_rows(args, name, source, batches, device, console), *(
                    recipe_rows(args, name, source, recipe_name, recipe, batches, device, console) for recipe_name, recipe in recipes)):
                rows.append(found)
                compare(rows)
                if args.output:
                    vitq.report.write_json(args.output, {**report, "rows": report["rows"] + rows})
        finally:  # what was measured is shown, whatever becomes of the next
            if rows:
                console.result("\n" + vitq.report.table(*table(rows)))
        report["rows"] += rows
    console.result(f"\n{PUBLISHED}\n" + vitq.report.table(["case", "prefill x", "a token x"], PUBLISHED_ROWS))
    return 0


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def recipe_of(name: str, kv_bits: int | None) -> vitq.Recipe:
    """A recipe that runs in the time of the named one. `w4a4` is of 4 bits for each token and output, with nothing around it, `w4a4kv4`
    FlatQuant's without transforms, scales and clips: what these cost is the difference."""
    if name == "w4a4kv4":
        recipe = vitq.profiling.quick_recipe("flatquant-w4a4kv4").with_overrides(
            [f"{role}.input.{field}" for role in ("qkv", "proj", "fc1", "fc2") for field in ("transform=none", "clip_ratio=1.0")]
            + [f"{role}.other.{field}" for role in ("qk", "pv") for field in ("transform=none", "clip_ratio=1.0")])
    elif name == "w4a4":
        recipe = vitq.Recipe.from_yaml("w8a8-dynamic").with_overrides([f"{role}.bits=4" for role in ("qkv", "proj", "fc1", "fc2")] + ["weight.observer=minmax"])
    else:
        recipe = executed_recipe(name, "--recipes")
    if kv_bits and not recipe.resolve("qk").cached:
        recipe = recipe.with_overrides([f"kv.bits={kv_bits}"])
    return recipe


def begin_memory(device: torch.device) -> None:
    """Whatever was there before is gone, and the peak of memory begins anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        for each in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(each)


def float_rows(args, name: str, source: Callable, batches: list[int], device: torch.device, console: Console) -> Iterator[dict]:
    from transformers import StaticCache

    model = source(torch.device("cpu")).half() if args.device_map and device.type == "cuda" else source()  # it may not fit one GPU
    kinds = [("eager", lambda: model)] + ([] if args.no_compile else [("compiled", lambda: torch.compile(model, dynamic=False))])
    if args.device_map:
        from accelerate import dispatch_model, infer_auto_device_map

        dispatch_model(model, infer_auto_device_map(model, no_split_module_classes=model._no_split_modules))
    for batch in batches:
        for kind, make in kinds:
            case = f"{str(model.dtype)[6:]} {kind}"
            console.step(f"{name}, {case}, batch {batch}")
            begin_memory(device)
            torch._dynamo.reset()
            cache = StaticCache(config=model.config, max_cache_len=args.prompt + args.decode + 16)
            yield {**row(name, case, batch, lambda cache=cache, make=make, batch=batch: Case(
                model, cache, make(), batch, args.prompt, args.decode, device), args, device, console), "float": True}


def recipe_rows(args, name: str, source: Callable, recipe_name: str, recipe: vitq.Recipe, batches: list[int], device: torch.device,
                console: Console) -> Iterator[dict]:
    from transformers import StaticCache

    console.step(f"{name}, {recipe_name}: converting")
    torch._dynamo.reset()  # what was compiled before holds its model
    try:
        begin_memory(device)
        model = source()
        calib = random_tokens(model.config.vocab_size, device) if recipe.needs_data else None
        model = vitq.convert(model, recipe, calib, dtype=torch.float16 if device.type == "cuda" else None)
    except torch.OutOfMemoryError:
        yield from ({"model": name, "case": recipe_name, "batch": batch, "notes": ["out of memory in conversion"]} for batch in batches)
        return
    for batch in batches:
        console.step(f"{name}, {recipe_name}, batch {batch}")
        begin_memory(device)
        length = args.prompt + args.decode + 16
        cached = recipe.resolve("qk").cached or recipe.resolve("pv").cached

        def case() -> Case:
            cache = vitq.quantized_cache(model, max_length=length, batch_size=batch) if cached else StaticCache(config=model.config, max_cache_len=length)
            return Case(model, cache, model, batch, args.prompt, args.decode, device)

        yield row(name, recipe_name, batch, case, args, device, console)


def row(name: str, kind: str, batch: int, case: Callable[[], Case], args, device: torch.device, console: Console) -> dict:
    found: dict[str, Any] = {"model": name, "case": kind, "batch": batch}
    try:
        found.update(measure(case(), args.repeats, device))
    except torch.OutOfMemoryError:
        found["notes"] = ["out of memory"]
        return found
    console.step(f"prefill {found['prefill_ms']:.2f} ms, a token {found['decode_ms']:.3f} ms")
    return found


def compare(rows: list[dict]) -> None:
    """Ratios to the best float row of the same batch: of time, and to the least memory that one takes."""
    for found in rows:
        floats = [r for r in rows if r["batch"] == found["batch"] and r.get("float")]
        for key in ("prefill_ms", "decode_ms"):
            best = min((r[key] for r in floats if key in r), default=None)
            if best is not None and key in found:
                found[f"{key[:-3]}_ratio"] = best / found[key]
        least = min((r["peak_gb"] for r in floats if "peak_gb" in r), default=None)
        if least is not None and "peak_gb" in found:
            found["memory_ratio"] = found["peak_gb"] / least


def table(rows: list[dict]) -> tuple[list[str], list[list]]:
    def number(of: dict, key: str, digits: int) -> str | None:
        return f"{of[key]:.{digits}f}" if key in of else None

    headers = ["model", "case", "batch", "prefill ms", "x", "ms a token", "x", "peak GB", "part", "notes"]
    return headers, [[r["model"], r["case"], r["batch"], number(r, "prefill_ms", 2), number(r, "prefill_ratio", 2), number(r, "decode_ms", 3),
                      number(r, "decode_ratio", 2), number(r, "peak_gb", 2), number(r, "memory_ratio", 2), "; ".join(r.get("notes", ()))] for r in rows]


if __name__ == "__main__":
    sys.exit(main())
