#!/usr/bin/env python3
"""Trains a model for trying vitq and telling its methods apart, from scratch, in minutes on one GPU.

    python tools/train_demo.py --output DIR                        # the demo model that ships with vitq: photographs of textiles
    python tools/train_demo.py --output DIR --val                  # choose its settings: score on 200 of the 1600 to train on
    python tools/train_demo.py --output DIR --task glyphs          # hundreds of characters in fonts held out; also --arch swin_tiny_patch4_window7_224
    python tools/train_demo.py --output DIR --epochs 1 --limit 8 --device cpu        # a smoke test

Writes `ARCH.TASK.safetensors` (fp16, with classes and preprocessing in its metadata) and a card, `ARCH.TASK.md`; for glyphs, also the
folder `glyphs` with images to calibrate (train) and to evaluate on (val), for `--data` of the other tools.
"""
from __future__ import annotations

import argparse
import copy
import datetime
import json
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import _glyphs  # noqa: E402
import _textiles  # noqa: E402
import vitq  # noqa: E402

# A task: ARCH, MEAN, STD, DEFAULTS and prepare(), which gives classes and batches.
TASKS = {"textiles": _textiles, "glyphs": _glyphs}


def train(model: nn.Module, task, batches, a: argparse.Namespace) -> nn.Module:
    """Trains `model` in place; returns its moving average (EMA), the better one."""
    device = torch.device(a.device)
    steps = max(1, a.epochs * batches.images // a.batch_size)
    tokens = Tokens(model, task).to(device) if task is _textiles else None
    ema = copy.deepcopy(model).eval()
    params = [*model.parameters(), *(tokens.parameters() if tokens else ())]
    opt = torch.optim.AdamW([{"params": [p for p in params if p.ndim > 1], "weight_decay": a.weight_decay},
                             {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0}],
                            lr=a.lr, betas=(0.9, 0.98), fused=device.type == "cuda")
    features = torch.compile(model.forward_features) if device.type == "cuda" else model.forward_features
    recent, accuracy = torch.zeros((), device=device), 0.0  # right, of the last ten or so batches
    model.train()
    for step in range(steps):
        warm, done = max(1, steps // 10), step / steps
        for g in opt.param_groups:
            g["lr"] = a.lr * min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * done)) + 1e-3)
        img, label, mask = batches(accuracy)
        img = (img - task.MEAN) / task.STD
        with torch.autocast(device.type, torch.bfloat16):
            f = features(img)
            logits = model.forward_head(f)
        loss = F.cross_entropy(logits.float(), label, label_smoothing=a.smoothing)
        if tokens is not None:
            loss = loss + a.token_loss * tokens(f, label, mask)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        with torch.no_grad():
            recent.lerp_((logits.argmax(1) == label).float().mean(), 0.1)
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), max(0.002, 9 / (step + 10)))
        if step % 10 == 0:
            accuracy = recent.item()
        if step % warm == 0 or step == steps - 1:
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}  accuracy {accuracy:.3f}", flush=True)
    return ema


class Tokens(nn.Module):
    """For textiles: every patch token also learns what it shows (cloth of this class, or the spot). Otherwise the class token has to
    find one patch in 196 from the photograph's label alone. This head is dropped afterwards."""

    def __init__(self, model: nn.Module, task):
        super().__init__()
        self.head = nn.Linear(model.num_features, model.num_classes)
        self.prefix, self.patch = model.num_prefix_tokens, model.patch_embed.patch_size[0]
        self.spot, self.plain = task.SPOT, task.PLAIN

    def forward(self, features: torch.Tensor, label: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with torch.autocast(features.device.type, torch.bfloat16):
            logits = self.head(features[:, self.prefix:])
        tokens_on_spot = F.avg_pool2d(mask[:, None], self.patch).flatten(1)  # share of each patch [B, tokens]
        on, off = tokens_on_spot > 0.12, tokens_on_spot == 0  # what a spot only grazes teaches nothing
        cloth = torch.where(label == self.spot, self.plain, label)[:, None].expand_as(on)
        weight = torch.where(on, 10.0, off.float())
        per_token = F.cross_entropy(logits.float().transpose(1, 2), torch.where(on, self.spot, cloth), reduction="none")
        return (per_token * weight).sum() / weight.sum()


@torch.no_grad()
def score(model: nn.Module, samples: list[tuple[str, int]], classes: tuple[str, ...], device: str) -> dict[str, float]:
    """Top-1 and, of few classes, recalls (fractions) in float32, through timm's own evaluation transform, as vitq measures them."""
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    said = []
    with ThreadPoolExecutor() as pool:
        for i in range(0, len(samples), 100):
            images = pool.map(lambda s: transform(Image.open(s[0]).convert("RGB")), samples[i:i + 100])
            said.append(model(torch.stack(list(images)).to(device)).argmax(1).cpu())
    y = torch.tensor([label for _, label in samples])
    right = torch.cat(said) == y
    recall = {f"recall {c}": right[y == i].float().mean().item() for i, c in enumerate(classes)} if len(classes) < 10 else {}
    return {"top-1": right.float().mean().item(), **recall}


def build(arch: str, task, classes: int, drop_path: float = 0.0) -> nn.Module:
    model = timm.create_model(arch, num_classes=classes, drop_path_rate=drop_path)
    # crop_pct 1: the whole image is seen; cropping would cut what matters off.
    model.pretrained_cfg = dict(model.pretrained_cfg, mean=[task.MEAN] * 3, std=[task.STD] * 3, crop_pct=1.0,
                                interpolation="bicubic", crop_mode="center", num_classes=classes)
    return model


def write(model: nn.Module, classes: tuple[str, ...], held: list, what: str, data: str, seconds: float, a: argparse.Namespace) -> None:
    """The weights, their scores as read back from the file, and the card."""
    path = a.output / f"{a.arch}.{a.task}.safetensors"
    cfg = {k: model.pretrained_cfg[k] for k in
           ("input_size", "mean", "std", "crop_pct", "interpolation", "crop_mode", "num_classes")}
    meta = {"format": "pt", "vitq_weights": "1", "task": a.task, "timm": a.arch,
            "class_names": json.dumps(classes), "pretrained_cfg": json.dumps(cfg)}
    save_file({k: v.half().cpu().contiguous() for k, v in model.state_dict().items()}, path, metadata=meta)
    saved = build(a.arch, TASKS[a.task], len(classes)).eval()
    saved.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    torch.backends.cudnn.allow_tf32 = False
    machine = f"one {torch.cuda.get_device_name()}" if a.device.startswith("cuda") else "a CPU"
    scores = score(saved.to(a.device), held, classes, a.device)
    rows = "\n".join(f"| {k} | {v:.4f} |" for k, v in scores.items())
    options = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in vars(a).items()
                       if k not in ("output", "images", "images_only", "device", "val", "limit"))
    named = f" ({', '.join(classes)})" if len(classes) < 10 else ""
    path.with_suffix(".md").write_text(f"""# {path.name}

timm `{a.arch}` with {len(classes)} classes{named}, fp16: for trying vitq where no
pretrained weights can be fetched. It knows nothing but this task.

- Command: `python tools/train_demo.py --output DIR {options}`
- Made on {datetime.date.today()} in {seconds:.0f} seconds of training on {machine}
  (torch {torch.__version__.split('+')[0]}, timm {timm.__version__}).
- Data: {data}. The held-out images took no part in training nor in the choice of settings.
- Preprocessing: {cfg['interpolation']} to {cfg['input_size'][-1]} pixels without cropping, mean {cfg['mean'][0]},
  std {cfg['std'][0]}; the file's metadata holds it, with the class names.

Scores of this file, in float32, on the {len(held)} {what}:

| | |
|---|---|
{rows}
""", encoding="utf-8")
    print(f"{seconds:.1f} s of training; {path} ({path.stat().st_size / 1e6:.1f} MB)\n{what}, float32:\n{rows}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--output", type=Path, required=True)
    p.add_argument("--task", choices=sorted(TASKS), default="textiles")
    p.add_argument("--arch", help="timm name or vitq's short one (default: deit_s)")
    p.add_argument("--images", help="textiles: folder with the class folders (default: the installed package's)")
    p.add_argument("--test-images", type=int, default=16, help="glyphs: images of each class that are held out (default 16)")
    p.add_argument("--images-only", action="store_true", help="glyphs: write the images to calibrate and evaluate on, and train nothing")
    p.add_argument("--device", help="default: cuda where there is one")
    p.add_argument("--val", action="store_true", help="textiles: hold 200 of the training photographs out and score on them")
    p.add_argument("--limit", type=int, help="use about so many images of each part (smoke test)")
    for name in _textiles.DEFAULTS:
        kind = type(_textiles.DEFAULTS[name])
        p.add_argument(f"--{name}", type=kind, help=", ".join(f"{task}: {module.DEFAULTS[name]}" for task, module in TASKS.items()))
    for name, value in (("weight-decay", 0.05), ("token-loss", 1.0), ("seed", 0)):
        p.add_argument(f"--{name}", type=type(value), default=value)
    a = p.parse_args(argv)
    for name, value in TASKS[a.task].DEFAULTS.items():
        if getattr(a, key := name.replace("-", "_")) is None:
            setattr(a, key, value)
    a.arch = vitq.resolve_name(a.arch or TASKS[a.task].ARCH).partition(".")[0]
    if a.task == "textiles" and not a.arch.startswith(("deit", "vit")):
        raise ValueError(f"textiles are taught by patch tokens, which {a.arch} does not have: take a deit or vit, or --task glyphs")
    a.device = str(vitq.pick_device(a.device))
    if a.task != "textiles" and (a.val or a.images):
        raise ValueError(f"--{'val' if a.val else 'images'} is for --task textiles")
    if a.images_only and a.task != "glyphs":
        raise ValueError("--images-only is for --task glyphs; the textiles are a package of photographs")
    for name in ("epochs", "batch_size", "test_images", "limit"):
        if getattr(a, name) is not None and getattr(a, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(a, name)}")
    return a


def main(argv: list[str] | None = None) -> int:
    """0: done; 2: a user's mistake, said in one line."""
    try:
        a = parse(argv)
        task = TASKS[a.task]
        a.output.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(a.seed)
        size = timm.get_pretrained_cfg(a.arch).input_size[-1]
        classes, batches, held, what, data = task.prepare(a, size)
        if a.images_only:
            print(f"{len(held)} {what} of {len(classes)} classes and images to calibrate on are in {a.output / a.task}")
            return 0
        started = time.perf_counter()
        model = train(build(a.arch, task, len(classes), a.drop_path).to(a.device), task, batches, a)
        write(model, classes, held, what, data, time.perf_counter() - started, a)
    except (ValueError, OSError, ImportError) as error:
        print(f"train_demo: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
