"""How good a model is: top-1, agreement with float, SQNR by layer."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitq.formats import QTensor
from vitq.graphs import Graph, first_line
from vitq.models import prepare
from vitq.models.heads import part_heads
from vitq.nn.attention import QuantAttention
from vitq.nn.block import QuantBlock
from vitq.nn.linear import CodedLinear, QuantLinear
from vitq.ops.common import activate
from vitq.ops.windows import Windows, from_windows

log = logging.getLogger("vitq")

_BLOCK = re.compile(r"(.*\.)?blocks\.\d+\Z")


# --- accuracy -----------------------------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a model said of `n` images. Figures are fractions over the images with a label (label >= 0).

    top1: None where no image has a label; top5: None too for models of at most 5 classes. per_class: recall of each
    class that occurs; support: its images. logits: float32 [n, classes], labels: int64 [n], both on the CPU.
    """

    n: int
    top1: float | None
    top5: float | None
    per_class: dict[int, float]
    support: dict[int, int]
    logits: Tensor
    labels: Tensor


def evaluate(model: nn.Module, dataset_or_batches: Iterable, *, batch_size: int = 32,
             device: torch.device | str | None = None, progress: Callable[[int], None] | None = None,
             labels: bool = True) -> Evaluation:
    """Run `model` over images and score it; see `evaluate_models`."""
    return evaluate_models({"model": model}, dataset_or_batches, batch_size=batch_size, device=device, progress=progress,
                           labels=labels)["model"]


def evaluate_models(models: Mapping[str, nn.Module], dataset_or_batches: Iterable, *, batch_size: int = 32,
                    device: torch.device | str | None = None, progress: Callable[[int], None] | None = None,
                    labels: bool = True) -> dict[str, Evaluation]:
    """Score several models over the same images, each decoded once.

    dataset_or_batches: a dataset of (image [C, H, W], label), batched here by `batch_size`; or an iterable of batches:
        images [B, C, H, W] with or without labels [B]. An image without a label has label -1.
    device: where the images go; by default each model's own.
    progress: called with the number of images of each batch.
    labels: False says that the labels are not the model's own classes: they are then read as unknown.

    Raises ValueError for no images, NaN or infinite logits, or a label that the model has no class for.
    """
    if not models:
        raise ValueError("no model to evaluate")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    said: dict[str, list[Tensor]] = {name: [] for name in models}
    truth: list[Tensor] = []
    seen = 0
    for images, target in _as_batches(dataset_or_batches, batch_size):
        for name, model in models.items():
            with torch.no_grad():
                y = model(images.to(_device(model) if device is None else device))
            if not isinstance(y, Tensor) or y.ndim != 2:
                raise TypeError(f"{name} must return logits [batch, classes], got {type(y).__name__}")
            y = y.float().cpu()
            bad = ~torch.isfinite(y).all(dim=1)
            if bad.any():
                first = seen + int(bad.nonzero()[0])
                raise ValueError(f"the logits of {name} hold NaN or infinite values, first for image {first}")
            said[name].append(y)
        truth.append(target if labels else torch.full_like(target, -1))
        seen += len(images)
        if progress is not None:
            progress(len(images))
    if not seen:
        raise ValueError("there are no images to evaluate on")
    target = torch.cat(truth)
    return {name: score(torch.cat(parts), target) for name, parts in said.items()}


def score(logits: Tensor, labels: Tensor) -> Evaluation:
    """Top-1, top-5 and recalls of logits [n, classes] against labels int64 [n], -1 where unknown."""
    n, classes = logits.shape
    known = labels >= 0
    if known.any() and int(labels.max()) >= classes:
        raise ValueError(f"label {int(labels.max())} has no class: the model has {classes} (0..{classes - 1})")
    if not known.any():
        return Evaluation(n, None, None, {}, {}, logits, labels)
    y, t = logits[known], labels[known]
    right = y.argmax(1) == t
    top5 = None
    if classes > 5:
        top5 = float((y.topk(5, dim=1).indices == t[:, None]).any(1).double().mean())
    found = {int(c): right[t == c] for c in t.unique()}
    return Evaluation(n, float(right.double().mean()), top5, {c: float(r.double().mean()) for c, r in found.items()},
                      {c: len(r) for c, r in found.items()}, logits, labels)


@dataclass(frozen=True)
class Agreement:
    """equal: fraction of images whose predicted class is the same; sqnr_db: of all logits together."""

    equal: float
    sqnr_db: float


def compare(reference_logits: Tensor, logits: Tensor) -> Agreement:
    """How far `logits` [n, classes] are from those of the float model on the same images."""
    if reference_logits.shape != logits.shape or logits.ndim != 2 or not len(logits):
        raise ValueError(f"logits of the same images are needed, [n, classes] both; got {list(reference_logits.shape)} and "
                         f"{list(logits.shape)}")
    equal = (reference_logits.argmax(1) == logits.argmax(1)).double().mean()
    return Agreement(float(equal), sqnr_db(reference_logits, logits))


def sqnr_db(reference: Tensor, x: Tensor) -> float:
    """10·log10(Σ reference² / Σ (reference − x)²), in float64; infinite where they are equal."""
    if reference.shape != x.shape:
        raise ValueError(f"tensors of one shape are needed, got {list(reference.shape)} and {list(x.shape)}")
    reference, x = reference.detach().double(), x.detach().to(reference.device).double()
    return _db(float(reference.square().sum()), float((reference - x).square().sum()))


def _db(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return -math.inf if signal == 0 else 10 * math.log10(signal / noise)


def _as_batches(data: Iterable, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images [B, C, H, W] and labels int64 [B] of whatever yields images or batches of them."""
    items = data if hasattr(data, "__iter__") else (data[i] for i in range(len(data)))
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for item in items:
        x, y = _split(item)
        if x.ndim == 4:
            yield x, y
            continue
        images.append(x)
        labels.append(y)
        if len(images) == batch_size:
            yield torch.stack(images), torch.cat(labels)
            images, labels = [], []
    if images:
        yield torch.stack(images), torch.cat(labels)


def _split(item: Any) -> tuple[Tensor, Tensor]:
    label = None
    if isinstance(item, (tuple, list)) and item:
        item, label = item[0], item[1] if len(item) > 1 else None
    if not isinstance(item, Tensor) or item.ndim not in (3, 4):
        what = list(item.shape) if isinstance(item, Tensor) else type(item).__name__
        raise TypeError(f"data must yield images [C, H, W] or batches [B, C, H, W], with or without labels; got {what}")
    count = len(item) if item.ndim == 4 else 1
    y = torch.full((count,), -1) if label is None else torch.as_tensor(label, dtype=torch.int64).reshape(-1).cpu()
    if len(y) != count:
        raise ValueError(f"a batch holds {count} images and {len(y)} labels")
    return item, y


def _device(model: nn.Module) -> torch.device:
    tensor = next(model.parameters(), None)
    tensor = next(model.buffers(), None) if tensor is None else tensor
    return torch.device("cpu") if tensor is None else tensor.device


# --- SQNR by layer ------------------------------------------------------------------------------------------------

class LayerError(NamedTuple):
    """SQNR of one layer's output against the float model's."""

    layer: str
    role: str
    sqnr_db: float


def layer_sqnr(float_model: nn.Module, quantized_model: nn.Module, images: Tensor, *, batch_size: int = 4,
               progress: Callable[[int], None] | None = None) -> list[LayerError]:
    """SQNR of every layer's output, worst first, with both models run end to end on `images` [B, C, H, W].

    The error is the accumulated one: each layer reads what the quantized layers before it made. Names and roles are
    those of `vitq.explain`; `NAME.pv` is what the attention hands to proj, and role `block` a whole block's output,
    the residual stream. Layers that run in fused kernels are compared where their result becomes visible: fc1 after
    its activation; qkv, attention and fc1 as the dequantized codes that the next layer reads; proj and fc2 without
    the residual that their kernel adds. `batch_size` bounds memory: the float outputs of one batch are kept.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
        raise ValueError("images must be a tensor [batch, channels, height, width] with at least one image")
    prepared = prepare(float_model)  # canonical form: LayerScale folded as in the quantized model
    if heads := quantized_model.vitq.recipe.heads:
        part_heads(prepared, heads["chosen"])
    reference = prepared.model
    sums: dict[str, list[float]] = {}
    roles: dict[str, str] = {}
    expected: dict[str, Tensor] = {}

    def add(name: str, role: str, y: Tensor | QTensor, activation: str | None = None) -> None:
        want = expected.pop(name, None)
        if want is None:
            return
        got = y.dequantize() if isinstance(y, QTensor) else y.float()
        want = activate(want, activation).reshape(got.shape)  # Swin's [B, H·W, C] is [B, H, W, C] here
        roles[name] = role
        total = sums.setdefault(name, [0.0, 0.0])
        total[0] += float(want.square().sum(dtype=torch.float64))
        total[1] += float((want - got).square().sum(dtype=torch.float64))

    with ExitStack() as stack:
        _watch_reference(reference, quantized_model, expected, stack)
        _watch_quantized(quantized_model, add, stack)
        for part in images.split(batch_size):
            with torch.no_grad():
                reference(part.to(_device(reference), torch.float32))
                quantized_model(part.to(_device(quantized_model)))
            if expected:
                log.warning("no output of %s was seen in the quantized model", ", ".join(sorted(expected)[:5]))
                expected.clear()
            if progress is not None:
                progress(len(part))
    rows = [LayerError(name, roles[name], _db(*total)) for name, total in sums.items()]
    return sorted(rows, key=lambda row: row.sqnr_db)


def _watch_reference(model: nn.Module, quantized: nn.Module, expected: dict[str, Tensor], stack: ExitStack) -> None:
    """Hooks that put the float outputs into `expected` under the names that `_watch_quantized` reports."""
    windows: dict[str, Windows] = {}  # of layers that see windows in the float model, and the image in the integer one

    def keep(name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        expected[name] = from_windows(output.float(), windows[name]) if name in windows else output.float()

    def keep_input(name: str, module: nn.Module, args: tuple) -> None:
        keep(name, module, (), args[0])

    for name, twin in quantized.named_modules():
        module = model.get_submodule(name)
        if isinstance(twin, QuantAttention):
            stack.enter_context(module.proj.register_forward_pre_hook(partial(keep_input, f"{name}.pv")))
        if isinstance(twin, CodedLinear) or _BLOCK.match(name):
            stack.enter_context(module.register_forward_hook(partial(keep, name)))
        if isinstance(twin, QuantBlock) and twin.window is not None:
            _watch_window_block(name, module, twin, windows, expected, stack)


def _watch_window_block(name: str, block: nn.Module, twin: QuantBlock, windows: dict[str, Windows],
                        expected: dict[str, Tensor], stack: ExitStack) -> None:
    block_input: list[Tensor] = []

    def start(module: nn.Module, args: tuple) -> None:
        block_input[:] = [args[0].float()]
        found = Windows(*args[0].shape[1:3], twin.window, twin.shift)
        windows.update({f"{name}.attn.{layer}": found for layer in ("qkv", "pv")})

    def middle(module: nn.Module, args: tuple) -> None:
        # The float proj's own output holds windows with their padding: take it as what the block adds to its input.
        expected[f"{name}.attn.proj"] = args[0].float() - block_input.pop().reshape(args[0].shape)

    stack.enter_context(block.register_forward_pre_hook(start))
    stack.enter_context(block.norm2.register_forward_pre_hook(middle))


def _watch_quantized(model: nn.Module, add: Callable[..., None], stack: ExitStack) -> None:
    def linear(name: str, role: str, activation: str | None, module: CodedLinear, args: tuple, kwargs: dict,
               output: Tensor | QTensor) -> None:
        # Taking the residual off again would leave the 16-bit rounding of the sum: run the kernel once more without.
        y = output if kwargs.get("residual") is None else module.forward(args[0])
        add(name, role, y, activation)

    def block(name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        add(name, "block", output)

    for name, module in model.named_modules():
        if isinstance(module, CodedLinear):
            activation = module.cases()["linear"].activation if isinstance(module, QuantLinear) else None
            stack.enter_context(module.register_forward_hook(
                partial(linear, name, model.vitq.roles[name], activation), with_kwargs=True))
        elif isinstance(module, QuantAttention):
            _watch_attend(f"{name}.pv", module, add, stack)
        elif _BLOCK.match(name):
            stack.enter_context(module.register_forward_hook(partial(block, name)))


def _watch_attend(name: str, module: QuantAttention, add: Callable[..., None], stack: ExitStack) -> None:
    # A fused block calls attend(), not the module, so no hook would fire.
    attend = module.attend

    def watched(*args: Any, **kwargs: Any) -> Tensor | QTensor:
        y = attend(*args, **kwargs)
        add(name, "pv", y)
        return y

    module.attend = watched
    stack.callback(module.__dict__.pop, "attend")


def cuda_graph(fn: Callable[[Tensor], Any], images: Tensor, warmup: int = 3) -> tuple[Callable[[Tensor], Any], str | None]:
    """fn(images) as one CUDA graph (the argument of the result is ignored: it replays on these images), and None; or
    `fn` itself and the reason why it cannot be captured. `vitq.compile` is for models that are used, not timed."""
    if not images.is_cuda:
        return fn, "no CUDA device"
    try:
        graph = Graph(fn, images, warmup=warmup)
    except RuntimeError as error:  # what a capture forbids is reported so: a synchronization, a copy to the host …
        return fn, first_line(error)

    def replay(_: Tensor) -> Any:
        graph.replay()
        return graph.output

    return replay, None
