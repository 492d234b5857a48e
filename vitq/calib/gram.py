"""Gram matrices of layer inputs: all that error-reducing solvers need of the data, in memory that does not grow with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitq.calib.runner import exact_float32, limited, reported
from vitq.formats import ActivationFormat
from vitq.models.sites import Prepared
from vitq.quantizers.activation import fake_activation

# Rows multiplied at once, in float64: the solvers subtract these sums from one another.
CHUNK = 4096
# Bytes of Gram matrices at once, where nobody says: ViT-L then takes four passes, DeiT-S one.
GRAM_MEMORY = 2e9


class Gram:
    """Of the inputs of a linear layer with K features: quantized, Σ x̄ᵀx̄, and cross, Σ x̄ᵀx, with x̄ what the layer reads and x what the
    float model had. float64 [K + 1, K + 1] on the inputs' device; the last feature is a 1, which the bias multiplies. rows: of inputs."""

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.quantized = torch.zeros(features + 1, features + 1, dtype=torch.float64, device=device)
        self.cross = torch.zeros_like(self.quantized)
        self.rows = 0

    def ordered(self, features: Tensor) -> Gram:
        """The same with the input features in this order, integers [K]."""
        index = torch.cat((features.long().to(self.quantized.device), torch.tensor([len(self.quantized) - 1], device=self.quantized.device)))
        other = Gram(0)
        other.quantized, other.cross = (m[index][:, index] for m in (self.quantized, self.cross))
        other.rows = self.rows
        return other

    def update(self, x: Tensor, quantized: Tensor) -> None:
        """Add rows: x and quantized [..., K]."""
        for floats, codes in zip(x.flatten(0, -2).split(CHUNK), quantized.flatten(0, -2).split(CHUNK)):
            floats, codes = (F.pad(part.double(), (0, 1), value=1.0) for part in (floats, codes))
            self.quantized.addmm_(codes.T, codes)
            self.cross.addmm_(codes.T, floats)
            self.rows += len(codes)


def gram_of(sample: Tensor, fmt: ActivationFormat | None) -> Gram:
    """The Gram matrices of activations [..., K] that a layer reads in this format, None for floating point."""
    gram = Gram(sample.shape[-1], sample.device)
    with torch.no_grad(), exact_float32():
        _add(gram, sample, sample, fmt)
    return gram


def collect_grams(prepared: Prepared, formats: Mapping[str, ActivationFormat | None], data: Iterable, limit: int,
                  memory: float = GRAM_MEMORY, progress: Callable[[int], None] | None = None) -> Iterator[tuple[str, Gram]]:
    """The Gram matrices of the layers in `formats`, in the model's order, over at most `limit` images of `data`.

    The float model runs once for as many layers as have room in `memory` bytes; their matrices are the caller's to drop before the
    next ones are made. data must give the same images each time it is iterated. progress: called with the number of images of each batch of
    each run.
    """
    for layers in divided(prepared.model, formats, memory):
        with gathering(prepared.model, layers) as grams, torch.no_grad(), exact_float32():
            for batch in reported(limited(data, limit, prepared.tokens), progress):
                prepared.run(batch)
        while grams:
            name = next(iter(grams))
            yield name, grams.pop(name)


def divided(model: nn.Module, formats: Mapping[str, ActivationFormat | None], memory: float) -> list[dict[str, ActivationFormat | None]]:
    """The layers in order, as many together as have Gram matrices of `memory` bytes, one at least."""
    passes, room = [], 0.0
    for name, fmt in formats.items():
        needed = 16.0 * (_features(model.get_submodule(name)) + 1) ** 2
        if not passes or needed > room:
            passes.append({})
            room = memory
        passes[-1][name] = fmt
        room -= needed
    return passes


@contextmanager
def gathering(model: nn.Module, formats: Mapping[str, ActivationFormat | None], paired: bool = False) -> Iterator[dict[str, Gram]]:
    """Gram matrices of these layers, by name, to which their inputs are added inside. paired: each layer is given what it reads in the float
    model first, and then, of the same images, what it reads where the layers before it are quantized."""
    grams, handles = {}, []
    try:
        for name, fmt in formats.items():
            module = model.get_submodule(name)
            grams[name] = Gram(_features(module), module.weight.device)
            handles.append(module.register_forward_pre_hook(partial(_on_input, grams[name], fmt, [] if paired else None)))
        yield grams
    finally:
        for handle in handles:
            handle.remove()


def _on_input(gram: Gram, fmt: ActivationFormat | None, first: list[Tensor] | None, module: nn.Module, args: tuple) -> None:
    if first == []:
        first.append(args[0])
        return
    x, float_x = args[0], first.pop() if first else args[0]
    if isinstance(module, nn.Conv2d):  # a patch embedding: its kernel is its stride
        x, float_x = (F.unfold(t, module.kernel_size, stride=module.stride).transpose(1, 2) for t in (x, float_x))
    _add(gram, float_x, x, fmt)


def _add(gram: Gram, float_x: Tensor, x: Tensor, fmt: ActivationFormat | None) -> None:
    """Rows of the float model and what a layer that has this format reads in their place, both as the format transforms them."""
    if fmt is not None and fmt.transform is not None:
        float_x = fmt.transform.to(x.device).apply(float_x)
    gram.update(float_x, fake_activation(x, fmt))


def _features(module: nn.Module) -> int:
    return module.weight[0].numel()
