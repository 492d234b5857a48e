"""Calibration images without data, after PSAQ-ViT (Li et al., ECCV 2022; arXiv 2209.05687).

A vision transformer tells foreground from background: what its attention writes into the patches of a photograph is diverse, and into those of noise
alike. So images are optimised, from noise, until the similarities of their patches are as spread as they can be, and the model is sure of a class.
Second best to images like those the model will see.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from vitq.cache import cache_folder, replacing
from vitq.calib.runner import exact_float32, fingerprint
from vitq.models import prepare

log = logging.getLogger("vitq")

PATCHES = 64  # of each image and block, drawn anew at each step: their pairs are enough of a sample
GRID, WIDTH = 64, 0.05  # of the density of similarities: points in [-1, 1], standard deviation of the kernel
SMOOTH = 0.05  # weight of the total variation
LEARNING_RATE = 0.1
STEPS = 300
VERSION = 1  # of all this: a change of what images come out raises it


def synthesize(model: nn.Module, count: int, data_config: dict, *, steps: int = STEPS, seed: int = 0, batch_size: int = 32,
               cache: str | os.PathLike[str] | None = "", progress: Callable[[int], None] | None = None) -> Tensor:
    """float32 [count, 3, H, W] on the CPU, normalized as `data_config` (`vitq.data_config(model)`) has it.

    cache: a folder where images are kept by the model's weights and these arguments; "" is vitq's own (VITQ_CACHE), None keeps none.
    progress is called with the number of images of each batch. Raises ValueError for a model without logits, or a count or number of steps
    under 1.
    """
    for name, value in (("count", count), ("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    if getattr(model, "num_classes", 0) < 2:
        raise ValueError("synthetic images are drawn towards the model's classes, of which this model has none; give images")
    prepared = prepare(model)
    file = None if cache is None else _file(
        Path(cache) if cache else cache_folder(), prepared.model, (count, steps, seed, batch_size), data_config)
    if file is not None and file.is_file() and (kept := _read(file, (count, *data_config["input_size"]))) is not None:
        return kept
    device = next(model.parameters()).device
    taps = [prepared.model.get_submodule(site.name) for site in prepared.attentions]
    for parameter in prepared.model.parameters():
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    done = []
    with exact_float32(), torch.enable_grad():
        for start in range(0, count, batch_size):
            n = min(batch_size, count - start)
            done.append(_optimise(prepared.model, taps, n, data_config, steps, generator, device))
            if progress is not None:
                progress(n)
    images = torch.cat(done)
    if file is not None:
        _write(file, images)
    return images


def _optimise(model: nn.Module, taps: list[nn.Module], count: int, config: dict, steps: int, generator: torch.Generator,
              device: torch.device) -> Tensor:
    """Images are sigmoids of what is optimised, so that every pixel is one that an image could have."""
    mean, std = (torch.tensor(config[key], device=device)[:, None, None] for key in ("mean", "std"))
    logits = torch.randn(count, *config["input_size"], generator=generator).to(device).requires_grad_()
    wanted = torch.randint(model.num_classes, (count,), generator=generator).to(device)
    optimizer = torch.optim.Adam([logits], lr=LEARNING_RATE, betas=(0.5, 0.9))
    seen: list[Tensor] = []
    handles = [tap.register_forward_hook(partial(_keep, seen)) for tap in taps]
    try:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
            seen.clear()
            pixels = torch.sigmoid(logits)
            loss = F.cross_entropy(model((pixels - mean) / std), wanted) + SMOOTH * _variation(pixels)
            for output in seen:
                tokens = output.flatten(1, -2)
                some = torch.randperm(tokens.shape[1], generator=generator)[:PATCHES].to(device)
                loss = loss - similarity_entropy(tokens[:, some]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    return ((torch.sigmoid(logits.detach()) - mean) / std).cpu()


def similarity_entropy(tokens: Tensor) -> Tensor:
    """Differential entropy, in nats, of the cosine similarities of each image's patches: tokens [B, N, C] -> [B], by a kernel density."""
    unit = F.normalize(tokens.float(), dim=-1)
    first, second = torch.triu_indices(tokens.shape[1], tokens.shape[1], offset=1, device=tokens.device)
    similarity = (unit @ unit.transpose(1, 2))[:, first, second]
    grid = torch.linspace(-1, 1, GRID, device=tokens.device)
    density = torch.exp(-0.5 * ((similarity[:, :, None] - grid) / WIDTH) ** 2).mean(1) / (WIDTH * math.sqrt(2 * math.pi))
    return -(density * torch.log(density + 1e-12)).sum(1) * (2 / (GRID - 1))


def _keep(seen: list[Tensor], module: nn.Module, args: tuple, output: Tensor) -> None:
    seen.append(output)


def _variation(pixels: Tensor) -> Tensor:
    """Mean absolute step between neighbouring pixels, in parts of the range."""
    return pixels.diff(dim=-1).abs().mean() + pixels.diff(dim=-2).abs().mean()


def _file(folder: Path, model: nn.Module, arguments: tuple[int, ...], config: dict) -> Path:
    key = repr((VERSION, fingerprint(model), sorted((k, config[k]) for k in ("input_size", "mean", "std")), arguments))
    return folder / f"synthetic-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"


def _read(file: Path, shape: tuple[int, ...]) -> Tensor | None:
    """None, and a warning, for a file that is damaged: its images are made again."""
    from safetensors.torch import load_file

    try:
        images = load_file(file)["images"]
        if images.shape != shape or not bool(torch.isfinite(images).all()):
            raise ValueError(f"it holds {list(images.shape)}, or numbers that are not finite")
        return images
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        log.warning("the synthetic images in %s cannot be read (%s): they are made again", file, error)
        return None


def _write(file: Path, images: Tensor) -> None:
    from safetensors.torch import save_file

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            save_file({"images": images.contiguous()}, temporary)
    except (SafetensorError, OSError) as error:
        log.warning("the synthetic images are not kept: %s cannot be written (%s)", file, error)
