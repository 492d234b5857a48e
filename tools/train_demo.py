#!/usr/bin/env python3
"""Trains the demo model that ships with vitq, from scratch, in under two minutes on one GPU.

    python tools/train_demo.py --output DIR                  # train on the 1600 photographs, score on the 400 held out
    python tools/train_demo.py --output DIR --val            # choose settings: train on 1400, score on 200 of the 1600
    python tools/train_demo.py --output DIR --epochs 1 --limit 8 --device cpu        # a smoke test

Writes `ARCH.TASK.safetensors` (fp16, with classes and preprocessing in its metadata) and a card, README.md.
"""
from __future__ import annotations

import argparse
import copy
import datetime
import json
import math
import random
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from _demo_tasks import TASKS, Batches, Task, read_all


def train(model: nn.Module, task: Task, x: torch.Tensor, y: torch.Tensor, a: argparse.Namespace) -> nn.Module:
    """Trains `model` in place on photographs uint8 [N, 3, H, W]; returns its moving average (EMA), the better one."""
    device, patch = x.device, model.patch_embed.patch_size[0]
    batches = Batches(x, y, task, model.pretrained_cfg["input_size"][-1], a.batch_size, a.seed)
    steps = max(1, a.epochs * len(x) // a.batch_size)
    # Every patch token also learns what it shows (cloth of this class, or the spot): otherwise the class token has to
    # find one patch in 196 from the photograph's label alone. This head is dropped afterwards.
    local_head = nn.Linear(model.num_features, len(task.classes)).to(device)
    ema = copy.deepcopy(model).eval()
    params = [*model.parameters(), *local_head.parameters()]
    opt = torch.optim.AdamW([{"params": [p for p in params if p.ndim > 1], "weight_decay": a.weight_decay},
                             {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0}],
                            lr=a.lr, betas=(0.9, 0.98), fused=device.type == "cuda")
    sizes, side = random.Random(a.seed), min(x.shape[-2:])
    model.train()
    for step in range(steps):
        warm, done = max(1, steps // 10), step / steps
        for g in opt.param_groups:
            g["lr"] = a.lr * min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * done)) + 1e-3)
        img, label, mask = batches(side if sizes.random() < 0.5 else sizes.randint(int(0.9 * side), side))
        img = (img - task.mean) / task.std
        tokens_on_spot = F.avg_pool2d(mask[:, None], patch).flatten(1)  # share of each patch [B, tokens]
        with torch.autocast(device.type, torch.bfloat16):
            f = model.forward_features(img)
            logits, token_logits = model.forward_head(f), local_head(f[:, model.num_prefix_tokens:])
        loss = F.cross_entropy(logits.float(), label, label_smoothing=a.smoothing)
        on, off = tokens_on_spot > 0.12, tokens_on_spot == 0  # what a spot only grazes teaches nothing
        cloth = torch.where(label == batches.spot, batches.plain, label)[:, None].expand_as(on)
        weight = torch.where(on, 10.0, off.float())
        per_token = F.cross_entropy(token_logits.float().transpose(1, 2), torch.where(on, batches.spot, cloth),
                                    reduction="none")
        loss = loss + a.token_loss * (per_token * weight).sum() / weight.sum()
        opt.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), max(0.002, 9 / (step + 10)))
        if step % warm == 0 or step == steps - 1:
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}", flush=True)
    return ema


@torch.no_grad()
def score(model: nn.Module, samples: list[tuple[str, int]], task: Task) -> dict[str, float]:
    """Top-1 and recalls (fractions) in float32, through timm's own evaluation transform, as vitq measures them."""
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    images = (torch.stack([transform(Image.open(p).convert("RGB")) for p, _ in samples[i:i + 50]])
              for i in range(0, len(samples), 50))
    y = torch.tensor([label for _, label in samples])
    right = torch.cat([model(x).argmax(1) for x in images]) == y
    recall = {f"recall {c}": right[y == i].float().mean().item() for i, c in enumerate(task.classes)}
    return {"top-1": right.float().mean().item(), **recall}


def build(task: Task, drop_path: float = 0.0) -> nn.Module:
    model = timm.create_model(task.arch, num_classes=len(task.classes), drop_path_rate=drop_path)
    # crop_pct 1: the whole photograph is seen; cropping would cut spots off.
    model.pretrained_cfg = dict(model.pretrained_cfg, mean=[task.mean] * 3, std=[task.std] * 3, crop_pct=1.0,
                                interpolation="bicubic", crop_mode="center", num_classes=len(task.classes))
    return model


def write(model: nn.Module, held: list, what: str, seconds: float, task: Task, a: argparse.Namespace) -> None:
    """The weights, their scores as read back from the file, and the card."""
    a.output.mkdir(parents=True, exist_ok=True)
    path = a.output / f"{task.arch}.{a.task}.safetensors"
    cfg = {k: model.pretrained_cfg[k] for k in
           ("input_size", "mean", "std", "crop_pct", "interpolation", "crop_mode", "num_classes")}
    meta = {"format": "pt", "vitq_weights": "1", "task": a.task, "timm": task.arch,
            "class_names": json.dumps(task.classes), "pretrained_cfg": json.dumps(cfg)}
    save_file({k: v.half().cpu().contiguous() for k, v in model.state_dict().items()}, path, metadata=meta)
    saved = build(task).eval()
    saved.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    machine = f"one {torch.cuda.get_device_name()}" if a.device.startswith("cuda") else "a CPU"
    rows = "\n".join(f"| {k} | {v:.4f} |" for k, v in score(saved, held, task).items())
    options = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in vars(a).items()
                       if k not in ("output", "images", "device", "val", "limit"))
    (a.output / "README.md").write_text(f"""# {path.name}

timm `{task.arch}` with {len(task.classes)} classes ({', '.join(task.classes)}), fp16: for trying vitq where no
pretrained weights can be fetched. It knows nothing but this task.

- Command: `python tools/train_demo.py {options}`
- Made on {datetime.date.today()} in {seconds:.0f} seconds of training on {machine}
  (torch {torch.__version__.split('+')[0]}, timm {timm.__version__}).
- Data: {task.data}. The held-out images took no part in training nor in the choice of settings.
- Preprocessing: {cfg['interpolation']} to {cfg['input_size'][-1]} pixels without cropping, mean {task.mean},
  std {task.std}; the file's metadata holds it, with the class names.

Scores of this file, in float32 on a CPU, on the {len(held)} {what}:

| | |
|---|---|
{rows}
""")
    print(f"{seconds:.1f} s of training; {path} ({path.stat().st_size / 1e6:.1f} MB)\n{what}, fp32 on CPU:\n{rows}")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--output", type=Path, required=True)
    p.add_argument("--task", choices=sorted(TASKS), default="textiles")
    p.add_argument("--images", help="folder with the class folders (default: the installed package's)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--val", action="store_true", help="hold 200 of the training photographs out and score on them")
    p.add_argument("--limit", type=int, help="use about so many photographs of each part (smoke test)")
    for name, value in (("epochs", 200), ("batch-size", 192), ("lr", 5e-4), ("weight-decay", 0.05), ("drop-path", 0.1),
                        ("smoothing", 0.05), ("token-loss", 1.0), ("seed", 0)):
        p.add_argument(f"--{name}", type=type(value), default=value)
    a = p.parse_args()
    task = TASKS[a.task]
    torch.manual_seed(a.seed)
    fit, held, what = *(task.split(a.images)[k] for k in ("train", "test")), "held-out test photographs"
    if a.val:
        fit, held, what = fit[200:], fit[:200], "validation photographs"
    if a.limit:  # some of every class
        fit, held = (sorted(part, key=lambda s: s[1])[:: max(1, len(part) // a.limit)] for part in (fit, held))
    started = time.perf_counter()
    x, y = read_all(fit, a.device)
    model = train(build(task, a.drop_path).to(a.device), task, x, y, a)
    write(model, held, what, time.perf_counter() - started, task, a)


if __name__ == "__main__":
    main()
