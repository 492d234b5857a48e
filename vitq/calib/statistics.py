"""What calibration saw: one :class:`Histogram` an activation operand, kept as one file that can be reused for another recipe."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vitq.cache import replacing
from vitq.calib.histogram import Histogram

__all__ = ["Histogram", "Statistics"]

SCHEMA = 1
FORMAT = "vitq-statistics"


class Statistics:
    """Mapping "site:operand" -> Histogram. ``samples``: images seen; ``model``: fingerprint of the float model they went through."""

    def __init__(self, model: str = "", samples: int = 0) -> None:
        self.model, self.samples = model, samples
        self._histograms: dict[str, Histogram] = {}

    def __getitem__(self, key: str) -> Histogram:
        return self._histograms[key]

    def __setitem__(self, key: str, histogram: Histogram) -> None:
        self._histograms[key] = histogram

    def __contains__(self, key: object) -> bool:
        return key in self._histograms

    def __iter__(self) -> Iterator[str]:
        return iter(self._histograms)

    def __len__(self) -> int:
        return len(self._histograms)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; a reader never sees half of it. OSError where the folder cannot be written."""
        tensors: dict[str, Tensor] = {}
        operands: dict[str, dict[str, int | None]] = {}
        for key, histogram in self._histograms.items():
            operands[key] = {"channels": histogram.channels, "dim": histogram.dim}
            tensors.update({f"{key}.{name}": tensor.contiguous() for name, tensor in histogram.state().items()})
        header = {"format": FORMAT, "schema": SCHEMA, "model": self.model, "samples": self.samples, "operands": operands}
        header["sha256"] = digest(header, tensors)
        try:
            with replacing(path) as temporary:
                save_file(tensors, temporary, metadata={"vitq": json.dumps(header)})
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written: {error}") from error

    def fingerprint(self) -> str:
        """SHA-256 of all of it."""
        tensors = {f"{key}.{name}": tensor for key, histogram in self._histograms.items() for name, tensor in histogram.state().items()}
        return digest({"model": self.model, "samples": self.samples}, tensors)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read what :meth:`save` wrote. FileNotFoundError; ValueError for a truncated, changed or foreign file or a newer schema."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"statistics {path}: no such file; calibrate first, or give the path that Statistics.save wrote")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"statistics {path}: not a readable safetensors file ({error}); calibrate again") from error
        try:
            return cls._from_file(metadata, tensors)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"key {error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"statistics {path}: {reason}; calibrate again") from error

    @classmethod
    def _from_file(cls, metadata: dict[str, str], tensors: dict[str, Tensor]) -> Statistics:
        if "vitq" not in metadata:
            raise ValueError("not a file of calibration statistics")
        header = json.loads(metadata["vitq"])
        if header["format"] != FORMAT:
            raise ValueError(f"holds {header['format']!r}, not {FORMAT!r}")
        if header["schema"] > SCHEMA:
            raise ValueError(f"schema {header['schema']}; this vitq knows up to {SCHEMA}: a newer file needs a newer vitq")
        said = header.pop("sha256")
        expected = {f"{key}.{name}" for key in header["operands"] for name in Histogram().state()}
        if set(tensors) != expected:
            raise ValueError(f"tensors missing: {sorted(expected - set(tensors))[:3]}, unknown: {sorted(set(tensors) - expected)[:3]}")
        if digest(header, tensors) != said:
            raise ValueError("content does not match its hash: the file was changed or damaged")
        statistics = cls(header["model"], header["samples"])
        for key, operand in header["operands"].items():
            state = {name: tensors[f"{key}.{name}"] for name in Histogram().state()}
            statistics[key] = Histogram.from_state(state, operand["channels"], operand["dim"])
        return statistics


def digest(header: dict[str, object], tensors: dict[str, Tensor]) -> str:
    """SHA-256 of what a file holds."""
    found = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
