"""What a calibration block by block has finished, kept in a folder so that one that was cut off goes on: a file for each block."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vitq.cache import replacing
from vitq.calib.histogram import Histogram
from vitq.calib.statistics import Statistics, digest
from vitq.formats import ActivationFormat, Columns, Kronecker
from vitq.models.sites import HeadSite
from vitq.plan import AttentionParams, CacheParams, InputParams, LinearParams
from vitq.recipe import Recipe

log = logging.getLogger("vitq")

SCHEMA = 1
FORMAT = "vitq-blocks"
HEADER = "run.json"
POLL = 0.2  # seconds between looks for a file of another process
# What a fingerprint is made of, and how a message calls it.
PARTS = {"model": "another model or other weights", "recipe": "another recipe", "data": "other calibration data", "stream": "the other stream",
         "statistics": "other statistics", "blocks": "other blocks", "learned": "other matrices"}
_STORED = {cls.__name__: cls for cls in (LinearParams, AttentionParams, CacheParams, InputParams, ActivationFormat, Columns, Kronecker)}


class Done(NamedTuple):
    """Of one block: what was seen of its operands, and what was chosen for its layers, by name, on the CPU; what was learned of the inputs, by the name
    of the first layer that reads one."""

    statistics: Statistics
    layers: dict[str, LinearParams | AttentionParams | CacheParams]
    inputs: dict[str, InputParams]


def fingerprint_of(batches: Iterable[Tensor]) -> str:
    """Of calibration data: of each image or sequence, whatever the batches they come in."""
    found = hashlib.sha256()
    for batch in batches:
        for sample in batch:
            found.update(f"{sample.dtype}{tuple(sample.shape)}".encode())
            found.update(sample.detach().cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def fingerprint_of_learned(learned: Mapping[str, InputParams]) -> str:
    """Of what was learned elsewhere of inputs, by name."""
    tensors: dict[str, Tensor] = {}
    return digest({name: _pack(learned[name], name, tensors) for name in sorted(learned)}, tensors)


def kept_heads(path: str | Path, recipe: Recipe, sites: Iterable[HeadSite]) -> dict[str, list[int]] | None:
    """What a run of this recipe in that folder chose of these attentions, its `heads.chosen`; None without such a run. Whether it is this one
    `Folder` says."""
    units = {site.name: range(site.units) for site in sites}
    try:
        there = json.loads((Path(path) / HEADER).read_text(encoding="utf-8"))["run"]["recipe"]
        chosen = there["heads"].pop("chosen")
        fits = chosen.keys() == units.keys() and all(unit in units[name] for name in chosen for unit in chosen[name])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return chosen if fits and there == json.loads(json.dumps(recipe.to_dict())) else None


class Folder:
    """The folder of one run. `run` says which: a mapping with the keys of PARTS, of JSON values.

    Raises ValueError for a folder of another run or of other files, which is left alone, and for a damaged one; OSError where it cannot be
    read or written.
    """

    def __init__(self, path: str | Path, run: Mapping[str, Any]) -> None:
        self.path, run = Path(path), json.loads(json.dumps(run))
        self.run = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"resume: {self.path} is no folder; give another, or one that does not exist yet")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            there = [file.name for file in self.path.iterdir() if not file.name.startswith(f".{HEADER}.")]  # which another process may be writing
            if (self.path / HEADER).exists():  # looked for last: another process may have written it meanwhile
                self._check(run)
            elif there:
                raise ValueError(f"resume: {self.path} holds other files and no {HEADER}: it is no folder of a calibration; give another")
            else:
                with replacing(self.path / HEADER) as temporary:
                    temporary.write_text(json.dumps({"format": FORMAT, "schema": SCHEMA, "run": run}, indent=1), encoding="utf-8")
        except OSError as error:
            raise OSError(f"resume: {self.path} cannot be read and written ({error.strerror or error}); give a folder that can") from error

    def _check(self, run: Mapping[str, Any]) -> None:
        try:
            header = json.loads((self.path / HEADER).read_text(encoding="utf-8"))
            known, there = (header["format"], header["schema"]) == (FORMAT, SCHEMA), dict(header["run"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"resume: {self.path / HEADER} is damaged ({error}); delete the folder to start again, or give another") from error
        if not known:
            raise ValueError(f"resume: {self.path} was written by another version of vitq; delete it to start again, or give another folder")
        other = [said for part, said in PARTS.items() if there.get(part) != run.get(part)]
        if other:
            raise ValueError(f"resume: {self.path} holds a run of {' and '.join(other)}; give another folder, or delete it to start again")

    def file(self, index: int) -> Path:
        return self.path / f"{index:04d}.safetensors"

    def save(self, index: int, name: str, done: Done) -> None:
        """Write one block, whole or not at all."""
        tensors: dict[str, Tensor] = {}
        for key, histogram in ((key, done.statistics[key]) for key in done.statistics):
            tensors.update({f"statistics/{key}.{part}": tensor for part, tensor in histogram.state().items()})
        layers = {layer: _pack(params, f"layers/{layer}", tensors) for layer, params in done.layers.items()}
        inputs = {layer: _pack(params, f"inputs/{layer}", tensors) for layer, params in done.inputs.items()}
        operands = {key: {"channels": done.statistics[key].channels, "dim": done.statistics[key].dim} for key in done.statistics}
        header = {"format": FORMAT, "schema": SCHEMA, "run": self.run, "index": index, "name": name, "operands": operands, "layers": layers,
                  "inputs": inputs}
        # safetensors takes no two tensors that share memory
        tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        header["sha256"] = digest(header, tensors)
        try:
            with replacing(self.file(index)) as temporary:
                save_file(tensors, temporary, metadata={"vitq": json.dumps(header)})
        except (SafetensorError, OSError) as error:
            raise OSError(f"resume: {self.file(index)} cannot be written ({error}); the blocks before it are kept") from error

    def wait(self, index: int, name: str) -> Done:
        """What another process saves of a block, when it is there."""
        if (done := self.load(index, name)) is None:
            log.info("waiting for %s, which another process makes", self.file(index))
        while done is None:
            time.sleep(POLL)
            done = self.load(index, name)
        return done

    def load(self, index: int, name: str) -> Done | None:
        """What :meth:`save` wrote of a block, None where there is nothing. Raises ValueError for a damaged file."""
        path = self.file(index)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["vitq"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            said = header.pop("sha256")
            if digest(header, tensors) != said:
                raise ValueError("its content does not match its hash")
            if (header["run"], header["index"], header["name"]) != (self.run, index, name):
                raise ValueError(f"it holds {header['name']!r} of another run")
            statistics = Statistics()
            for key, operand in header["operands"].items():
                state = {part: tensors[f"statistics/{key}.{part}"] for part in Histogram().state()}
                statistics[key] = Histogram.from_state(state, operand["channels"], operand["dim"])
            layers, inputs = ({layer: _unpack(stored, f"{kind}/{layer}", tensors) for layer, stored in header.get(kind, {}).items()}
                              for kind in ("layers", "inputs"))
            return Done(statistics, layers, inputs)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"resume: {path} is damaged or not of this run ({error}); delete this file to calibrate its block again") from error


def _pack(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """JSON of a dataclass whose fields are tensors, which go into `tensors`, other dataclasses, or JSON values."""
    if isinstance(value, Tensor):
        tensors[key] = value
        return {"tensor": True}
    if dataclasses.is_dataclass(value):
        return {"class": type(value).__name__, "fields": {f.name: _pack(getattr(value, f.name), f"{key}.{f.name}", tensors)
                                                          for f in dataclasses.fields(value)}}
    return {"value": value}


def _unpack(stored: dict[str, Any], key: str, tensors: Mapping[str, Tensor]) -> Any:
    if "tensor" in stored:
        return tensors[key]
    if "class" in stored:
        return _STORED[stored["class"]](**{name: _unpack(of, f"{key}.{name}", tensors) for name, of in stored["fields"].items()})
    value = stored["value"]
    return tuple(value) if isinstance(value, list) else value


def on_cpu(value: Any) -> Any:
    """The same parameters with their tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.cpu()
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, **{f.name: on_cpu(getattr(value, f.name)) for f in dataclasses.fields(value)})
    return value
