"""Perplexity of a language model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitq.calib.runner import check_tokens, inputs_of

ROWS = 256  # positions whose log-probabilities exist at once, in float32


def perplexity(model: nn.Module, windows: Tensor | Iterable, *, batch_size: int = 1, progress: Callable[[int], None] | None = None) -> float:
    """exp of the mean negative log-likelihood, in nats, of every token but the first of its window, given those before it in the window.

    model: a causal language model of transformers, float, simulated or quantized, on whatever device.
    windows: token ids [N, T], of which `batch_size` run at once; or batches of them [B, T].
    progress: called with the number of windows of each batch.

    Log-probabilities are float32, of at most 256 positions at once; their sum is float64.
    Raises ValueError for no windows, windows of one token, ids that the model does not have, or logits that are NaN.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    device = next(t for t in (*model.parameters(), *model.buffers())).device
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    for batch in windows.split(batch_size) if isinstance(windows, Tensor) else windows:
        ids = inputs_of(batch, tokens=True)
        if not len(ids):
            continue
        check_tokens(ids, model)
        if ids.shape[1] < 2:
            raise ValueError("a window needs two tokens or more: its first is not predicted")
        ids = ids.to(device, torch.int64)
        with torch.inference_mode():
            logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            for rows, targets in zip(logits.split(ROWS), ids[:, 1:].flatten().split(ROWS)):
                total += F.cross_entropy(rows.float(), targets, reduction="none").double().sum()
        count += ids[:, 1:].numel()
        if progress is not None:
            progress(len(ids))
    if not count:
        raise ValueError("there are no windows to evaluate on")
    mean = float(total) / count
    if math.isnan(mean):
        raise ValueError(f"the logits of {type(model).__name__} hold NaN")
    return math.exp(mean) if mean < 700 else math.inf
