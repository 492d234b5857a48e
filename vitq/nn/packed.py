"""The base of every executed module: portable buffers on one side, a kernel's packed form of them on the other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitq.ops import dispatch

PACKING = threading.RLock()  # of any module: outer ones pack what is inside


@dataclass(frozen=True)
class Row:
    """One line of `vitq.explain`. bytes: what the layer stores, in a checkpoint too; memory: the bytes that it takes here, with what kernels made
    of that."""

    layer: str
    role: str
    format: str
    backend: str
    kernel: str
    bytes: int
    memory: int
    note: str = ""


class PackedModule(nn.Module):
    """state_dict holds device-neutral buffers; `_packed` what the chosen kernels made of them, `_derived` what this module did.

    The packed form is made by `pack_all` or else on first use, dropped before the buffers move or are loaded, and never
    copied or saved (oneDNN's packed weights cannot be). A forward changes nothing and reads no value on the host, so
    that it can be traced and captured.
    """

    def __init__(self, backend: str):
        super().__init__()
        self.backend = dispatch.check_backend(backend)
        self._packed: dict[str, tuple[dispatch.Choice, Any]] | None = None
        self._derived: dict[str, Tensor] = {}

    def cases(self) -> dict[str, Any]:
        """op -> spec, for every op this module runs itself; "op:label" where it runs one in several ways. Subclasses override."""
        return {}

    def derive(self) -> dict[str, Tensor]:
        """Constants that come of the buffers and of children once these are packed. Subclasses override."""
        return {}

    def link(self) -> None:
        """Tell child modules what surrounds them (epilogue, output format). Subclasses with children override."""

    def device(self) -> torch.device:
        return next(self.buffers()).device

    def packed(self) -> dict[str, tuple[dispatch.Choice, Any]]:
        if self._packed is None:
            if torch.compiler.is_compiling():
                raise RuntimeError(f"this {type(self).__name__} was moved or loaded by itself and has not run since: call it once, "
                                   "or move and load the whole model, before it is traced")
            with PACKING:  # a kernel may take the place of a buffer
                if self._packed is None:
                    self._pack()
        return self._packed

    @torch.no_grad()
    def _pack(self) -> None:
        cases, packed = self.cases(), {}
        device = self.device() if cases else None
        for case, spec in cases.items():
            op = case.partition(":")[0]
            choice = dispatch.choose(op, self.backend, spec, device)
            packed[case] = choice, choice.kernel.pack(spec, device)
        self._packed = packed
        self._derived = self.derive()

    def derived(self, name: str) -> Tensor | None:
        """One of the constants of `derive`, None where there is none of this name."""
        self.packed()
        return self._derived.get(name)

    def call(self, case: str, *args: Any, **kwargs: Any) -> Any:
        choice, packed = self.packed()[case]
        return choice.kernel.run(packed, *args, **kwargs)

    def invalidate(self) -> None:
        self._packed, self._derived = None, {}

    def own_bytes(self) -> int:
        """Of the buffers, as a checkpoint has them."""
        return sum(b.numel() * b.element_size() for b in self.buffers(recurse=False))

    def held_bytes(self) -> int:
        """Of the buffers, the packed form and what is derived: each piece of memory once."""
        return sum(dict(map(_memory, _tensors([self.packed(), self._derived, *self.buffers(recurse=False)]))).values())

    def _apply(self, fn, recurse: bool = True):
        check_keeps_dtype(fn)
        self.invalidate()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.invalidate()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_packed": None, "_derived": {}}


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those in `value`, however deep in dataclasses, sequences and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        yield from _tensors([getattr(value, field.name) for field in fields(value)])
    elif isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _memory(tensor: Tensor) -> tuple[int, int]:
    """What tells a tensor's memory from others', and its bytes."""
    if tensor.layout != torch.strided:  # oneDNN's own, which shows no storage
        return id(tensor), tensor.numel() * tensor.element_size()
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


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
    """Choose kernels and pack weights now rather than in the first forward: no trace or capture may do it."""
    for module in model.modules():
        if isinstance(module, PackedModule):
            module.packed()


def is_packed(model: nn.Module) -> bool:
    return any(module._packed is not None for module in model.modules() if isinstance(module, PackedModule))
