#!/usr/bin/env python3
"""Time `generate` of a language model with random weights and quantized keys and values, by cache: dynamic, static, and static with CUDA graphs.

    python tools/generate_benchmark.py --layers 4 --batch 1 --prompt 512          # of Llama-3-8B's shape
    python tools/generate_benchmark.py --recipe w8a8-dynamic --set kv.bits=8 --batch 16 --prompt 2048

A token's time is that of long answers less that of short ones, divided by the tokens between: prompt and capture are in both. The least of --repeats counts.
What a recipe would search or learn is replaced by what costs the same time (`vitq.profiling.quick_recipe`), what it measures it measures on random tokens.
"""
from __future__ import annotations

import argparse
import sys
import time
from typing import Any, Callable

import torch

import vitq
from _cli import check_least, exit_code
from _generation import cache_name, executed_recipe, random_tokens

HEADERS = ("cache", "ms a token", "ms of the prompt and the first tokens", "bytes of the cache, part of 16-bit floats")
SHORT = 8  # tokens


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--recipe", default="w8a8-dynamic", help="default: %(default)s")
    p.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE",
                   help="change the recipe; default: kv.bits=4 kv.symmetric=false")
    for name, value, text in (("layers", 4, "of the model"), ("hidden", 4096, "size"), ("intermediate", 14336, "size"), ("heads", 32, "of queries"),
                              ("kv-heads", 8, "of keys and values"), ("vocab", 128256, "tokens"), ("batch", 1, "sequences"), ("prompt", 512, "tokens"),
                              ("new", 64, f"tokens of an answer, more than {SHORT}"), ("repeats", 3, "timed runs of each")):
        p.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default {value})")
    p.add_argument("--device", help="default: cuda where there is one")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0: done; 2: a user's mistake, said in one line."""
    args = parse(argv)
    return exit_code("generate_benchmark", lambda: run(args), "out of memory on the device: give fewer --layers or a smaller --batch")


def run(args: argparse.Namespace) -> int:
    check(args)
    device, recipe = vitq.pick_device(args.device), executed_recipe(args.recipe, "--recipe", changes(args))
    model = converted(args, recipe, device)
    ids = torch.randint(2, args.vocab, (args.batch, args.prompt), device=device)
    cache = vitq.quantized_cache(model, max_length=args.prompt + args.new, batch_size=args.batch)
    part = cache.nbytes / (4 * args.layers * args.kv_heads * args.hidden // args.heads * (args.prompt + args.new) * args.batch)
    cases = {"dynamic": {}, "static, disable_compile=True": {cache_name(model): cache, "disable_compile": True}, "static": {cache_name(model): cache}}
    rows = []
    for name, options in cases.items():
        def answer(tokens: int) -> None:
            cache.reset()
            model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, **options)

        short, whole = (least(lambda: answer(tokens), args.repeats, device) for tokens in (SHORT, args.new))
        rows.append((name, f"{(whole - short) / (args.new - SHORT) * 1e3:.3f}", f"{short * 1e3:.1f}", f"{part:.4f}" if options else ""))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{args.layers} layers, {args.batch} x {args.prompt} tokens, recipe {args.recipe} with {', '.join(changes(args))}, {where}, torch {torch.__version__}")
    print(vitq.report.markdown_table(HEADERS, rows))
    return 0


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for sizes that no model has."""
    check_least(args, layers=1, hidden=1, intermediate=1, heads=1, kv_heads=1, vocab=3, batch=1, prompt=1, repeats=1)
    if args.new <= SHORT:
        raise ValueError(f"--new {args.new}: give more than {SHORT}, so that there is a difference to time")
    if args.heads % args.kv_heads:
        raise ValueError(f"--heads {args.heads} with --kv-heads {args.kv_heads}: give a divisor, since each head of keys and values serves as many of queries")
    if args.hidden % (2 * args.heads):
        raise ValueError(f"--hidden {args.hidden} with --heads {args.heads}: give a multiple of {2 * args.heads}, since each head has an even size")


def changes(args: argparse.Namespace) -> list[str]:
    return args.changes or ["kv.bits=4", "kv.symmetric=false"]


def converted(args: argparse.Namespace, recipe: vitq.Recipe, device: torch.device) -> Any:
    """The model, made on the device in its float type."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=args.hidden, intermediate_size=args.intermediate, num_hidden_layers=args.layers, num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads, vocab_size=args.vocab, max_position_embeddings=args.prompt + args.new, pad_token_id=0, bos_token_id=1,
        eos_token_id=None)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16 if device.type == "cuda" else torch.float32)
    try:
        with device:
            model = transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    return vitq.convert(model, recipe, random_tokens(args.vocab, device) if recipe.needs_data else None)


def least(call: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Seconds."""
    found = []
    for _ in range(repeats + 1):  # the first one makes what later ones find
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found[1:])


if __name__ == "__main__":
    sys.exit(main())
