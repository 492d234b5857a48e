"""The converted model: the source's own class with integer modules inside, and a guard on what would break them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from vitq.nn.packed import check_keeps_dtype, link_all
from vitq.recipe import Recipe


@dataclass
class ModelInfo:
    """What `vitq.save` and `vitq.explain` know of a converted model beside its tensors."""

    recipe: Recipe
    roles: dict[str, str]
    notes: dict[str, str]
    floats: dict[str, str]
    dtype: torch.dtype
    backend: str
    calibration: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)


class QuantizedModel:
    """Mixed into the class of the source model. Keeps timm's surface; refuses what integers cannot follow."""

    vitq: ModelInfo

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Images float [B, C, H, W] -> logits float32. An image with NaN or infinity gives NaN, as in the float model.

        Raises TypeError for images that are not floating point.
        """
        if not x.is_floating_point():
            raise TypeError(f"images must be floating point and preprocessed as the model expects, got {x.dtype}")
        x = x.float() if x.dtype == torch.float64 else x
        y = super().forward(x, *args, **kwargs)
        # Codes have no NaN, so a broken image would come out as a plausible class; 0 · sum is 0 unless it holds one.
        broken = x.flatten(1).sum(dim=1, dtype=torch.float32) * 0
        return y.float() + broken.view(-1, *(1,) * (y.ndim - 1))

    def train(self, mode: bool = True):
        if mode:
            raise RuntimeError("a quantized model cannot be trained: its weights are integer codes. Fine-tune the float "
                               "model, then convert it again")
        return super().train(mode)

    def load_state_dict(self, *args: Any, **kwargs: Any):
        result = super().load_state_dict(*args, **kwargs)
        link_all(self)
        return result

    def _apply(self, fn, recurse: bool = True):
        check_keeps_dtype(fn)
        super()._apply(fn, recurse)
        link_all(self)  # output formats are copies of the consumers' buffers, which have just moved
        return self

    def __reduce_ex__(self, protocol):
        raise TypeError("a quantized model is not pickled: use vitq.save(model, folder) and vitq.load(folder)")

    def __deepcopy__(self, memo: dict) -> nn.Module:
        import copy

        clone = self.__class__.__new__(self.__class__)
        memo[id(self)] = clone
        clone.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        return clone


@lru_cache(maxsize=None)
def quantized_class(source: type) -> type:
    """The class of a converted `source`: an instance of both `QuantizedModel` and `source`."""
    return type(f"Quantized{source.__name__}", (QuantizedModel, source), {"__module__": __name__})


def cast_input(module: nn.Module, args: tuple) -> tuple:
    """Forward pre-hook: the images come in float32, a float stem computes in its own dtype."""
    parameter = next(module.parameters(), None)
    return args if parameter is None else (args[0].to(parameter.dtype), *args[1:])
