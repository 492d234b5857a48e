#!/usr/bin/env python3
"""Time one linear layer: float32, 16-bit, W8A8 static and dynamic, W4A8, and the functional int8 pipeline, in turn.

    python tools/module_benchmark.py --layer_type v_proj                    # LLaMA 4096 -> 4096
    python tools/module_benchmark.py --layer_type down_proj --size 5120 --bsz 1 --seq_len 2048
    python tools/module_benchmark.py --layer_type fc1 --dim 384 --bsz 8 --seq_len 197          # DeiT-S

Inputs are random and already on the device, in the dtype that the layer takes in a model: that of the row, and for the
integer rows what vitq.convert leaves in float on this device. The integer rows include quantizing the input and scaling
the result. SQNR is against float32.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

import vitq

# LLaMA 7B, 13B and 70B, by width: the shapes that DUQ4bitCUDA's module_benchmark.py times (its down_proj widens).
DOWN_PROJ = {4096: 11008, 5120: 13824, 8192: 28672}
VIT = {"qkv": (1, 3), "proj": (1, 1), "fc1": (1, 4), "fc2": (4, 1)}
RECIPES = {"W8A8 static": "w8a8", "W8A8 dynamic": "w8a8-dynamic", "W4A8": "w4a8"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--layer_type", "--layer-type", default="v_proj", choices=("v_proj", "down_proj", *VIT))
    p.add_argument("--size", type=int, default=4096, choices=tuple(DOWN_PROJ), help="width of v_proj and down_proj (default 4096)")
    p.add_argument("--dim", type=int, default=384, help="width of the ViT's layers: 384 DeiT-S (default), 768 DeiT-B …")
    p.add_argument("--bsz", type=int, default=1)
    p.add_argument("--seq_len", "--seq-len", type=int, help="rows are bsz·seq_len (default 2048, on a CPU 128)")
    p.add_argument("--device", help="cpu, cuda, cuda:1 … (default: cuda where there is one)")
    p.add_argument("--backend", choices=("auto", "reference", "cpu", "cuda"), default="auto")
    p.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True, help="use CUDA graphs on cuda")
    p.add_argument("--repeats", type=int, metavar="N", help="timed calls of each (default 200, on a CPU 30)")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--json", type=Path, metavar="PATH", help="write every figure as JSON")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0: done; 2: a user's mistake, said in one line."""
    args = parse(argv)
    try:
        return run(args)
    except torch.OutOfMemoryError:
        message = "out of memory on the device: lower --bsz or --seq_len"
    except (ValueError, TypeError, OSError) as error:
        message = " ".join(str(error).split())
    print(f"module_benchmark: {message}", file=sys.stderr)
    return 2


def shape(layer: str, size: int, dim: int) -> tuple[int, int]:
    """(in_features, out_features)."""
    if layer in VIT:
        return tuple(dim * times for times in VIT[layer])
    return size, size if layer == "v_proj" else DOWN_PROJ[size]


def run(args: argparse.Namespace) -> int:
    device = vitq.pick_device(args.device)
    on_cpu = device.type == "cpu"
    seq_len = args.seq_len if args.seq_len is not None else 128 if on_cpu else 2048
    repeats = args.repeats if args.repeats is not None else 30 if on_cpu else 200
    for flag, value in (("--bsz", args.bsz), ("--seq_len", seq_len), ("--dim", args.dim), ("--repeats", repeats),
                        ("--threads", args.threads)):
        if value is not None and value < 1:
            raise ValueError(f"{flag} must be at least 1, got {value}")
    if args.json and not args.json.parent.is_dir():
        raise ValueError(f"cannot write {args.json}: there is no folder {args.json.parent}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    k, n = shape(args.layer_type, args.size, args.dim)
    generator = torch.Generator().manual_seed(args.seed)
    x = torch.randn(args.bsz, seq_len, k, generator=generator).to(device)
    linear = nn.Linear(k, n, bias=args.layer_type in VIT)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * k**-0.5)
    linear = linear.to(device).requires_grad_(False)

    cases, notes = build(args, linear, x)
    if device.type == "cuda" and args.graphs:
        for name, (fn, inputs) in cases.items():
            fn, reason = vitq.evaluate.cuda_graph(fn, inputs)
            cases[name] = fn, inputs
            notes[name] = "; ".join(filter(None, [notes[name], f"no CUDA graph: {reason}" if reason else "CUDA graph"]))
    with torch.inference_mode():
        reference = linear(x)
        errors = {name: vitq.evaluate.sqnr_db(reference, fn(inputs)) for name, (fn, inputs) in cases.items()}
    timings = vitq.timing.time_models(cases, repeats, warmup=5)

    half = next(name for name in cases if "float16" in name)
    rows = {name: {"timing": t, "speedup_float32": timings["float32"].median_ms / t.median_ms,
                   "speedup_16_bit": timings[half].median_ms / t.median_ms, "sqnr_db": errors[name],
                   "tops": 2 * args.bsz * seq_len * k * n / t.median_ms / 1e9, "note": notes[name]}
            for name, t in timings.items()}
    print(f"{args.layer_type} {k} -> {n}, {args.bsz} x {seq_len} rows, {device}, torch {torch.__version__}, {repeats} calls")
    headers = ("", "ms", "spread", "TOPS", "x float32", f"x {half}", "SQNR dB", "runs as")
    print(vitq.report.table(headers, [
        (name, f"{r['timing'].median_ms:.4f}", f"{100 * r['timing'].spread:.0f} %", f"{r['tops']:.2f}",
         f"{r['speedup_float32']:.2f}", f"{r['speedup_16_bit']:.2f}", f"{r['sqnr_db']:.1f}", r["note"])
        for name, r in rows.items()]))
    if args.json:
        vitq.report.write_json(args.json, {
            "vitq": vitq.__version__, "torch": torch.__version__, "device": device, "layer_type": args.layer_type,
            "in_features": k, "out_features": n, "bsz": args.bsz, "seq_len": seq_len, "repeats": repeats,
            "threads": torch.get_num_threads(), "rows": rows})
        print(f"wrote {args.json}")
    return 0


def build(args: argparse.Namespace, linear: nn.Linear, x: torch.Tensor) -> tuple[dict, dict]:
    """Case -> (callable, its input), and case -> what runs it."""
    dtype, half = vitq.timing.best_half(linear, x)
    cases = {"float32": (linear, x), str(dtype)[6:]: (half, x.to(dtype))}
    notes = {name: "torch" for name in cases}
    role = args.layer_type if args.layer_type in VIT else {"v_proj": "qkv", "down_proj": "fc2"}[args.layer_type]
    for name, recipe in RECIPES.items():
        module = vitq.linear_module(linear, recipe, x, role=role, backend=args.backend)
        dtype = module.dtype  # of what stays in float here: the one that vitq.convert takes on this device
        row = module.row(args.layer_type, role)
        cases[name], notes[name] = (module, x.to(dtype)), "; ".join(filter(None, [f"{row.backend} {row.kernel}", row.note]))
    weight = vitq.ops.quantize(linear.weight, bits=8)

    def functional(inputs: torch.Tensor) -> torch.Tensor:
        q = vitq.ops.quantize(inputs, bits=8)
        return vitq.ops.dequantize(vitq.ops.int_matmul(q, weight), q.scale, weight.scale, linear.bias, dtype=dtype)

    cases["vitq.ops W8A8"], notes["vitq.ops W8A8"] = (functional, x.to(dtype)), "quantize, int_matmul, dequantize; dynamic"
    return cases, notes


if __name__ == "__main__":
    sys.exit(main())
