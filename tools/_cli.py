"""What the tools that quantize share: options, checks before any work, exit codes."""
from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import vitq


def add_common(p: argparse.ArgumentParser) -> None:
    p.add_argument("--device", help="cpu, cuda, cuda:1 … (default: cuda where there is one)")
    p.add_argument("--backend", choices=("auto", "reference", "cpu", "cuda"), default="auto")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override the recipe: head.bits=16 …")
    p.add_argument("--quiet", action="store_true", help="no progress, only the results")
    p.add_argument("--json", action="store_true", help="print the report as one JSON object and nothing else")


def exit_code(tool: str, job: Callable[[], int], out_of_memory: str) -> int:
    """What `job` returns; 2 for a user's mistake, said in one line; 130 where it was interrupted."""
    code = 2
    try:
        return job()
    except torch.OutOfMemoryError as error:  # one of vitq's own has another as its cause, and says what is kept
        message = f"{out_of_memory}; {error}" if isinstance(error.__cause__, torch.OutOfMemoryError) else out_of_memory
    except (ValueError, TypeError, OSError, ImportError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    print(f"{tool}: {message}", file=sys.stderr)
    return code


def check_least(args: argparse.Namespace, **least: float) -> None:
    """Raises ValueError for an option below its least value; one that was not given is None."""
    for name, n in least.items():
        value = getattr(args, name)
        if value is not None and not value >= n:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {n:g}, got {value:g}")


def device_of(args: argparse.Namespace) -> torch.device:
    device = torch.device(vitq.pick_device(args.device))
    if args.device is None and device.type == "cuda" and "LOCAL_RANK" in os.environ:  # of several processes each has its own
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if args.backend not in ("auto", "reference", device.type):
        raise ValueError(f"--backend {args.backend} cannot run on {device}: give --device {args.backend}, or --backend auto or reference")
    return device


def executed_recipe(name: str, overrides: list[str]) -> vitq.Recipe:
    """Raises ValueError for a recipe that is for simulation alone."""
    recipe = vitq.Recipe.from_yaml(name).with_overrides(overrides)
    if recipe.execution == "simulated":
        raise ValueError(f"{name} is for simulation: nothing executes all that it holds; tools/compare_methods.py measures it")
    return recipe


def names_vitq(header: Path) -> bool:
    """Whether the file is one of a checkpoint that vitq wrote."""
    return header.is_file() and '"vitq_version"' in header.read_text(encoding="utf-8", errors="replace")


@contextlib.contextmanager
def writable(folder: Path, checkpoint: Path | None = None) -> Iterator[None]:
    """Fails before any work where `folder`, or a checkpoint in it, cannot be written; leaves no empty folder behind if the work fails."""
    made = [f for f in (folder, *folder.parents) if not f.exists()]
    vitq.report.make_folder(folder)
    if checkpoint is not None and checkpoint.exists() and not any(names_vitq(checkpoint / name) for name in ("vitq.json", "config.json")):
        raise ValueError(f"{checkpoint} exists and is no vitq checkpoint; choose another folder")
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # what is not empty stays
            for f in made:
                f.rmdir()
        raise
