"""What tools/quantize_llm.py does beside perplexity: zero-shot tasks by lm-eval, the times of prefill and decode, calibration block by block."""
from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

import vitq
from _console import Console
from _generation import cache_name
from _memory import measured


def kept_statistics(args: argparse.Namespace, recipes: list) -> Any:
    """What the file of --stats holds, None where there is none yet. Raises ValueError for recipes that none serve, and a file that holds none."""
    if args.stats and args.act_scales:
        raise ValueError("--stats and --act-scales are both of what was measured before: give one of the two")
    given = "--stats" if args.stats else "--act-scales" if args.act_scales else ""
    if given and not any(recipe.is_static for recipe in recipes):
        raise ValueError(f"{given}: {', '.join(recipe.name for recipe in recipes)}: nothing is measured before that runs: leave out {given}")
    if not args.stats:
        return None
    return vitq.Statistics.load(args.stats) if args.stats.exists() else None


def checked_statistics(args: argparse.Namespace, recipes: list, stats: Any, model: nn.Module, console: Console) -> Any:
    """The statistics, of the file of --act-scales where it is given. Raises ValueError, before any work, where model, recipes and these do not go
    together."""
    vitq.check(model, recipes)
    if args.act_scales:
        stats = vitq.import_act_scales(args.act_scales, model)
    if stats is None:
        return None
    given = f"--act-scales {args.act_scales}" if args.act_scales else f"--stats {args.stats}"
    try:
        vitq.check(model, [recipe for recipe in recipes if recipe.is_static], stats)
    except ValueError as error:
        raise ValueError(f"{given}: {error}" + ("" if args.act_scales else " (give another file, or delete this one)")) from error
    said = f"the largest inputs of {len(stats)} layers" if args.act_scales else f"what was measured of {stats.samples} windows"
    console.result(f"read {given.partition(' ')[2]}: {said}")
    return stats


def collected(args: argparse.Namespace, recipes: list, loaded: Any, text: Any, console: Console) -> Any:
    """Statistics for all of these recipes, written to the file of --stats; None for no recipe."""
    if not recipes:
        return None
    console.step(f"calibrating for {', '.join(recipe.name for recipe in recipes)}")
    blocks = {"stream": "float", "device": args.calib_device} if args.stream else {}
    with console.bar("calibrate", None if blocks else len(text.calib), "windows") as bar, on_cpu(loaded.model, args.calib_device):
        stats = vitq.calibrate(loaded.model, recipes, text.calib.split(args.batch_size), progress=bar.update, **blocks)
    stats.save(args.stats)
    console.result(f"wrote {args.stats}")
    return stats


def check_positions(tokens: int, model: nn.Module, name: str, option: str = "--seqlen") -> None:
    """Raises ValueError, which names the option, for more tokens than the model has positions."""
    most = getattr(model.config, "max_position_embeddings", None)
    if most and tokens > most:
        raise ValueError(f"{option} {tokens} is more than the {most} positions of {name}")


def check_same(checkpoint: nn.Module, model: nn.Module, name: str) -> None:
    """Raises ValueError where a checkpoint was plainly not made of this float model."""
    for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        of = [getattr(m.config, key, None) for m in (checkpoint, model)]
        if of[0] != of[1]:
            raise ValueError(f"--load: the checkpoint was not made of {name}: its {key} is {of[0]}, that of the model {of[1]}; give the model that it "
                             "was made of, or leave out --model")


def quiet_transformers() -> None:
    """No progress bars of its own."""
    with contextlib.suppress(ImportError):
        from transformers.utils import logging as bars

        bars.disable_progress_bar()


def tasks_of(names: str) -> list[str | dict]:
    """What lm-eval takes for names of its tasks and YAML files of others, with commas between.

    Raises ImportError without lm-eval, ValueError for a task that it does not know, OSError for a file that is not there.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError("--tasks needs the package lm-eval: pip install 'vitq[lm-eval]'") from error
    tasks = [yaml.safe_load(Path(name).read_text(encoding="utf-8")) if name.endswith((".yaml", ".yml")) else name for name in names.split(",")]
    manager = TaskManager()
    if unknown := [task for task in tasks if isinstance(task, str) and not manager.match_tasks([task])]:
        raise ValueError(f"lm-eval knows no task {', '.join(unknown)}; its own are those of `lm_eval ls tasks`")
    return tasks


def zero_shot(model: nn.Module, tokenizer: Any, tasks: list[str | dict], batch_size: int) -> dict[str, dict[str, float]]:
    """task -> metric -> value. Raises ValueError where lm-eval cannot run the tasks."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found = lm_eval.simple_evaluate(harness, tasks=tasks, num_fewshot=0, log_samples=False, bootstrap_iters=0)
    except Exception as error:  # of the data's library, the hub's, the task's own code
        raise ValueError(f"lm-eval cannot run the tasks: {error}") from error
    return {task: {metric.partition(",")[0]: value for metric, value in of.items() if isinstance(value, float) and "_stderr" not in metric}
            for task, of in found["results"].items()}


def prefill_and_decode(models: Mapping[str, nn.Module], tokens: torch.Tensor, repeats: int = 10) -> dict[str, dict[str, Any]]:
    """Timings of each model on token ids [1, T]: `prefill` of all of them, `decode` of one more when their keys and values are cached."""
    from transformers import DynamicCache

    prefill: dict[str, Any] = {}
    decode: dict[str, Any] = {}
    for name, model in models.items():
        cache = DynamicCache()  # of all positions, in models with a sliding window too: those can be cut back
        kept = {cache_name(model): cache}
        with torch.inference_mode():
            model(tokens, **kept, use_cache=True, logits_to_keep=1)

        def one_more(token: torch.Tensor, model: nn.Module = model, cache: Any = cache, kept: dict = kept) -> None:
            model(token, **kept, use_cache=True)
            cache.crop(-1)

        prefill[name] = (lambda x, model=model: model(x, use_cache=False, logits_to_keep=1)), tokens
        decode[name] = one_more, tokens[:, -1:].clone()
    times = {what: vitq.timing.time_models(cases, repeats=repeats) for what, cases in (("prefill", prefill), ("decode", decode))}
    return {name: {what: of[name] for what, of in times.items()} for name in models}


def add_blocks(p: argparse.ArgumentParser) -> None:
    p.add_argument("--stream", choices=("float", "quantized"), help="calibrate block by block, on what float blocks give, or quantized ones")
    p.add_argument("--calib-device", metavar="DEVICE", help="with --stream: where each block is calibrated; the float model is on the CPU")
    p.add_argument("--resume", type=Path, metavar="DIR", help="with --stream: keep finished blocks there (DIR/RECIPE of several), go on after them")


def check_blocks(args: argparse.Namespace) -> None:
    """Raises ValueError for options that do not go together, and a device that cannot be used."""
    if args.stream is None and (args.calib_device or args.resume):
        raise ValueError("--calib-device and --resume are for calibration block by block: give --stream float or --stream quantized")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not (args.stream == "float" and args.resume):
        raise ValueError("processes that torchrun started share the blocks of --stream float by the folder of --resume: give both, or start one process")
    if args.stream == "quantized" and (args.stats or args.act_scales):
        raise ValueError(f"--stream quantized measures what its quantized blocks give: leave out {'--stats' if args.stats else '--act-scales'}")
    if args.calib_device:
        vitq.pick_device(args.calib_device)


@contextlib.contextmanager
def options_of(args: argparse.Namespace, source: Any) -> Iterator[dict[str, Any]]:
    """Keyword arguments of vitq.convert and vitq.simulate for calibration block by block; where what a recipe learns is to be simulated too, with a folder
    that keeps it meanwhile."""
    blocks: dict[str, Any] = {}
    if args.stream and isinstance(source, vitq.Recipe):
        several = "," in (args.recipe or "")
        blocks = {"stream": args.stream, "device": args.calib_device, "resume": args.resume / source.name if args.resume and several else args.resume}
    if not (isinstance(source, vitq.Recipe) and source.learns and args.simulate) or blocks.get("resume"):
        yield blocks
        return
    with tempfile.TemporaryDirectory() as folder:
        yield {"stream": "float", **blocks, "resume": Path(folder) / "run"}


def dtype_of(args: argparse.Namespace) -> torch.dtype | None:
    return getattr(torch, args.dtype) if args.dtype else None


def convert(args: argparse.Namespace, recipe: vitq.Recipe, loaded: Any, text: Any, stats: Any, blocks: dict,
            console: Console) -> tuple[nn.Module, list | None, Any, dict[str, Any]]:
    """The converted model on the float one's device; the batches and the statistics that it was calibrated with, None for what the recipe needs not; what
    that cost."""
    device, kept = loaded.model.device, stats if recipe.is_static else None
    reads = recipe.needs_data if kept is None else recipe.needs_inputs or recipe.learns or recipe.scores_heads
    calib = list(text.calib[:recipe.calib_size].split(args.batch_size)) if reads else None
    console.step(f"quantizing with the recipe {recipe.name}")
    cost: list[tuple[float, float]] = []
    total, away = sum(map(len, calib)) if calib and not blocks and not recipe.learns else None, args.calib_device
    backend, dtype = args.backend, dtype_of(args)
    if away:  # what is made on the CPU is to run on the device
        backend, dtype = "auto" if backend == device.type else backend, dtype or (torch.float16 if device.type == "cuda" else None)
    with on_cpu(loaded.model, away), measured(torch.device(away or device), cost), console.bar(recipe.name, total, "windows") as bar:
        model = vitq.convert(loaded.model, recipe, calib, backend, dtype=dtype, statistics=kept, memory=args.memory * 1e9, progress=bar.update,
                             **blocks).to(device)
    (seconds, memory), = cost
    console.step(f"calibrated and converted in {seconds:.1f} s, with {memory:.0f} MB at most beyond the model's")
    return model, calib, kept, {"windows": min(recipe.calib_size, len(text.calib)) if calib else 0, "seconds": seconds, "memory_mb": memory}


@contextlib.contextmanager
def on_cpu(model: nn.Module, wanted: bool) -> Iterator[None]:
    """The model is on the CPU inside, if wanted."""
    home = model.device
    model.to("cpu" if wanted else home)
    try:
        yield
    finally:
        model.to(home)


def half_of(model: nn.Module) -> tuple[str, nn.Module]:
    """A 16-bit copy of a float model: float16 on a GPU, bfloat16 on a CPU."""
    dtype = torch.float16 if next(model.parameters()).is_cuda else torch.bfloat16
    return str(dtype)[6:], copy.deepcopy(model).to(dtype)
