#!/usr/bin/env python3
"""Write SmoothQuant's act_scales.pt of a language model: {layer name: max |x| of each input channel}, for tools that read it.

    python tools/act_scales.py --model facebook/opt-125m --data wikitext2 --output act_scales.pt       # 512 windows of 512 tokens, as theirs

vitq's own recipes need no such file: they measure what they need, and `tools/quantize_llm.py --stats FILE` keeps that. With `--act-scales FILE` it
takes one.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import vitq
from _cli import check_least, exit_code
from _console import Console
from _language import check_positions


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="a folder of transformers, a name on the hub, or a .gguf file")
    p.add_argument("--data", default="wikitext2", help="wikitext2 (default), c4, a text file, or a folder of .txt files")
    p.add_argument("--nsamples", type=int, default=512, metavar="N", help="windows (default 512)")
    p.add_argument("--seqlen", type=int, default=512, metavar="T", help="tokens of a window (default 512)")
    p.add_argument("--batch-size", type=int, default=1, metavar="N", help="windows a batch (default 1)")
    p.add_argument("--device", help="cpu, cuda, cuda:1 … (default: cuda where there is one)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--output", type=Path, default=Path("act_scales.pt"), metavar="FILE", help="default: act_scales.pt")
    p.add_argument("--quiet", action="store_true", help="no progress")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0: done; 2: a user's mistake, said in one line."""
    args = parse(argv)
    return exit_code("act_scales", lambda: run(args), "out of memory: lower --batch-size or --seqlen")


def run(args: argparse.Namespace) -> int:
    check_least(args, nsamples=1, seqlen=2, batch_size=1)
    if args.output.is_dir():
        raise ValueError(f"cannot write {args.output}: it is a folder; give a file")
    if not args.output.absolute().parent.is_dir():
        raise ValueError(f"cannot write {args.output}: there is no folder {args.output.absolute().parent}")
    console = Console(args.quiet, False)
    device = torch.device(vitq.pick_device(args.device))
    loaded = vitq.load_language_model(args.model)
    check_positions(args.seqlen, loaded.model, args.model)
    text = vitq.open_text(args.data, loaded.tokenizer, args.seqlen, nsamples=args.nsamples, seed=args.seed, limit=1)
    loaded.model.to(device)
    with console.bar("measure", len(text.calib), "windows") as bar:
        scales = vitq.act_scales(loaded.model, text.calib.split(args.batch_size), progress=bar.update)
    temporary = args.output.with_name(f".{args.output.name}.part")
    torch.save(scales, temporary)
    temporary.replace(args.output)  # whole or not at all
    most = max(scales, key=lambda name: float(scales[name].max()))
    print(f"wrote {args.output}: {len(scales)} layers over {len(text.calib)} windows of {args.seqlen} tokens; the largest input, "
          f"{float(scales[most].max()):.4g}, is of {most}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
