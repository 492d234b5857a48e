"""The base of every executed module: portable buffers on one side, a kernel's packed form of them on the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vitq.ops import dispatch


@dataclass(frozen=True)
class Row:
    """One line of `vitq.explain`."""

    layer: str
    role: str
    format: str
    backend: str
    kernel: str
    bytes: int
    note: str = ""


class PackedModule(nn.Module):
    """state_dict holds device-neutral buffers; `_packed` what the chosen kernels made of them.

    The packed form is derived: it is made on first use, dropped when the buffers move or are loaded, and never copied
    or saved (oneDNN's packed weights cannot be).
    """

    def __init__(self, backend: str):
        super().__init__()
        self.backend = dispatch.check_backend(backend)
        self._packed: dict[str, tuple[dispatch.Choice, Any]] | None = None

    def cases(self) -> dict[str, Any]:
        """op -> spec, for every op this module runs itself. Subclasses override."""
        return {}

    def link(self) -> None:
        """Tell child modules what surrounds them (epilogue, output format). Subclasses with children override."""

    def device(self) -> torch.device:
        return next(self.buffers()).device

    def packed(self) -> dict[str, tuple[dispatch.Choice, Any]]:
        if self._packed is None:
            cases, packed = self.cases(), {}
            device = self.device() if cases else None
            for op, spec in cases.items():
                choice = dispatch.choose(op, self.backend, spec, device)
                packed[op] = choice, choice.kernel.pack(spec, device)
            self._packed = packed
        return self._packed

    def call(self, op: str, *args: Any, **kwargs: Any) -> Any:
        choice, packed = self.packed()[op]
        return choice.kernel.run(packed, *args, **kwargs)

    def invalidate(self) -> None:
        self._packed = None

    def own_bytes(self) -> int:
        return sum(b.numel() * b.element_size() for b in self.buffers(recurse=False))

    def _apply(self, fn, recurse: bool = True):
        check_keeps_dtype(fn)
        super()._apply(fn, recurse)
        self.invalidate()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.invalidate()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_packed": None}


def check_keeps_dtype(fn) -> None:
    """Raises RuntimeError for a `Module._apply` function that casts (.half(), .float(), .to(dtype), .type(dtype) …).

    Scales are float32 and what stays in float is 16-bit or not, so a cast to either would change one of them.
    """
    for kept in (torch.float32, torch.bfloat16):
        if (dtype := fn(torch.zeros(1, dtype=kept)).dtype) != kept:
            raise RuntimeError(f"casting to {dtype} would change the scales or the float parts of a quantized model; choose the "
                               "float dtype when converting: vitq.convert(model, …, dtype=torch.float16)")


def link_all(model: nn.Module) -> None:
    """Link every packed module; outer ones last, so that their word counts."""
    modules = [m for m in model.modules() if isinstance(m, PackedModule)]
    for module in reversed(modules):
        module.link()
        module.invalidate()


def pack_all(model: nn.Module) -> None:
    """Choose kernels and pack weights now rather than in the first forward."""
    for module in model.modules():
        if isinstance(module, PackedModule):
            module.packed()
