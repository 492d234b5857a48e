"""Save and load a converted model, strictly: what is loaded is what was saved, bit for bit, or an error says why not.

The header of the files (`vitq.checkpoint_files`) holds what is needed to build the empty model again (what `vitq.builders` records of a model of timm
or transformers, recipe, float dtype) and to trust them (schema, a SHA-256 over header and tensors). The float weights are not needed.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vitq
from vitq.builders import BUILDERS
from vitq.calib.runner import specs
from vitq.checkpoint_files import PATTERNS, SCHEMA, CheckpointError, check_target, digest, read_header, read_tensors, some, write
from vitq.conversion import build, float_dtype, model_info
from vitq.models import hub, prepare
from vitq.models.adapter import replace
from vitq.models.heads import part_heads
from vitq.nn.model import QuantizedDecoder
from vitq.nn.packed import pack_all
from vitq.ops.dispatch import check_backend, device_of, pick_device
from vitq.recipe import Recipe

__all__ = ["CheckpointError", "load", "save"]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_REQUIRED = ("schema", "vitq_version", "recipe", "dtype", "device", "backend", "sha256", "source", "calibration", "notes")
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*\Z")


def save(model: nn.Module, folder: str | os.PathLike, *, source: dict[str, Any] | None = None, max_shard_size: int | str = "50GB") -> Path:
    """Write a converted model to `folder`, whole or not at all.

    source: what to record of where the model came from, as JSON: name, weights, data_config, class_names; and for timm
        model_kwargs, the arguments of timm.create_model that the model itself does not tell (img_size, num_classes,
        in_chans, global_pool, dynamic_img_size are read off it). A language model records its config; its tokenizer is not saved.
    max_shard_size: of a file of tensors, in bytes or as "5GB"; more go to several, with an index.
    A checkpoint in `folder` is replaced, and what else is there stays; a folder with a model that vitq did not write is refused. A language model's
    folder is what its `save_pretrained` writes, which transformers opens after `import vitq.hf`.
    Raises TypeError for an unconverted model, ValueError for no such size, CheckpointError if the folder cannot be written or if timm or transformers would
    not build the same model again from what is recorded.
    """
    info = model_info(model)
    folder = Path(folder).resolve()
    check_target(folder)
    library = "transformers" if isinstance(model, QuantizedDecoder) else "timm"
    try:
        architecture, source = BUILDERS[library].record(model, {**info.source, **(source or {})})
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    ties = _ties(model)
    tensors = {name: t for name, t in model.state_dict(destination=_OnCpu()).items() if name not in ties}
    header = {
        "schema": SCHEMA, "vitq_version": vitq.__version__, "library": library, **architecture, "source": source,
        "recipe": info.recipe.to_dict(), "dtype": str(info.dtype)[6:], "device": device_of(model).type,
        "backend": info.backend, "calibration": info.calibration, "notes": info.notes,
    }
    _check_rebuilds(header, tensors, model)
    header["sha256"] = digest(header, tensors)
    write(folder, header, tensors, max_shard_size)
    return folder


def load(folder: str | os.PathLike, device: str | torch.device | None = None, backend: str = "auto", *,
         dtype: torch.dtype | None = None, revision: str | None = None, token: str | bool | None = None) -> nn.Module:
    """The model that `save`, `save_pretrained` or `push_to_hub` wrote, in one call and without its float weights.

    folder: a folder, or a string "user/repository" of the Hugging Face hub where there is no folder of that name. Of a repository only the files of
        the checkpoint are downloaded, once; where the hub does not answer, its cache is enough. revision (branch, tag or commit) and token are
        for the hub.
    device: cpu by default. dtype of what stays in float: as saved on the same kind of device, else that device's
    default. On the same kind of device the logits are bit-identical to those of the model that was saved.
    Raises FileNotFoundError if there is no checkpoint, ConnectionError within 10 seconds if neither the hub nor its cache gives it,
    CheckpointError if it is damaged, incomplete, of a newer schema, or does not fit the model it names, ImportError for a language model without the
    package transformers.
    """
    device = pick_device(str(device or "cpu"))
    check_backend(backend, device)
    folder = _folder(folder, revision, token)
    header = checked_header(folder)
    if dtype is None and header["device"] == device.type:
        dtype = _DTYPES[header["dtype"]]
    model = skeleton(header, float_dtype(dtype, device), backend)
    _fill(model, checked_tensors(folder, header, model))
    describe(model, header)
    model = model.to(device)  # which links the modules too
    pack_all(model)
    return model


def _folder(given: str | os.PathLike, revision: str | None, token: str | bool | None) -> Path:
    """Where the checkpoint is, downloaded if need be."""
    if isinstance(given, str) and not Path(given).exists() and _REPOSITORY.match(given):
        return hub.snapshot(given, PATTERNS, revision=revision, token=token)
    if revision is not None:
        raise ValueError(f"revision= is of a repository on the hub, USER/NAME; {given} is none: leave it out")
    return Path(given)


def checked_header(folder: Path) -> dict[str, Any]:
    """The header of a checkpoint, with all that a header must have. Raises as `load` does."""
    header = read_header(folder)
    if (library := _library(header)) not in BUILDERS:
        raise CheckpointError(f"{folder} is damaged: its header names the library {library!r}; models are of {' or '.join(BUILDERS)}")
    absent = [key for key in (*_REQUIRED, *BUILDERS[library].keys) if key not in header]
    if absent:
        raise CheckpointError(f"{folder} is damaged: its header lacks {', '.join(absent)}")
    if not isinstance(header["dtype"], str) or header["dtype"] not in _DTYPES:
        raise CheckpointError(f"{folder} is damaged: dtype must be one of {', '.join(_DTYPES)}, got {header['dtype']!r}; copy or save it again")
    return header


def checked_tensors(folder: Path, header: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a checkpoint, which are those that the skeleton `model` needs. Raises CheckpointError."""
    stored = read_tensors(folder)
    tensors = _of_today(stored) if header["schema"] == 1 else stored
    # First what is missing, by name; then the hash, which tells no more than that something changed.
    _check_same(folder, header, model, tensors)
    if digest(header, stored) != header["sha256"]:
        raise CheckpointError(f"{folder} is damaged: its content does not match its SHA-256, so that a tensor or a line of its header was changed; "
                              "save or copy it again")
    return tensors


def describe(model: nn.Module, header: dict[str, Any]) -> None:
    """Tell a loaded model what the header says beside its tensors."""
    model.vitq.source, model.vitq.calibration, model.vitq.notes = header["source"], header["calibration"], header["notes"]


def skeleton(header: dict[str, Any], dtype: torch.dtype, backend: str, empty: nn.Module | None = None) -> nn.Module:
    """The converted model before its tensors are loaded. empty: the float model, where it is there already, with any weights.

    Raises CheckpointError naming what does not fit.
    """
    builder, default = BUILDERS[_library(header)], torch.get_default_dtype()
    try:
        recipe = Recipe.from_dict(header["recipe"])
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"the checkpoint's recipe is damaged: {error}") from error
    try:
        torch.set_default_dtype(torch.float32)  # of scales; transformers has another one while it loads a 16-bit model
        with builder.context():
            prepared = prepare(builder.empty(header) if empty is None else empty, check=False)
            if recipe.heads:
                part_heads(prepared, recipe.heads.get("chosen", {}))
            return build(prepared, recipe, specs(prepared, recipe), dtype=dtype, backend=backend)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    finally:
        torch.set_default_dtype(default)


def _of_today(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of schema 1, which held -zero point · multiplier of an asymmetric weight's groups in place of the zero points."""
    today = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix("offset")
        if name.endswith(".weight_offset") and (multiplier := tensors.get(f"{stem}multiplier")) is not None:
            name, tensor = f"{stem}zero", -tensor.div(multiplier, rounding_mode="trunc")
        today[name] = tensor
    return today


def _library(header: dict[str, Any]) -> str:
    return header.get("library", "timm")


class _OnCpu(dict):
    """A state dict on the CPU, tensor by tensor: codes that a layer on a GPU makes again for it are there one layer at a time."""

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        super().__setitem__(name, tensor.detach().cpu().contiguous())


def _ties(model: nn.Module) -> dict[str, str]:
    """The names of a parameter that has several, all but the first of each, with that first one."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}
    return {name: kept for name, kept in names.items() if name != kept}


def _fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put `tensors`, which fit, in the places of the model's own, without copying those of the right dtype."""
    ties = _ties(model)
    model.load_state_dict({name: tensors[ties.get(name, name)].to(t.dtype) for name, t in model.state_dict().items()}, assign=True)
    for name, kept in ties.items():
        replace(model, name, model.get_parameter(kept))
    if lost := [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]:
        raise CheckpointError(f"{some(lost)} would have no values: a buffer that is not in the state dict is saved only in the modules that the "
                              "model's adapter keeps exact")


def _check_rebuilds(header: dict[str, Any], tensors: dict[str, Tensor], model: nn.Module) -> None:
    """A checkpoint that would load as another model must not be written: build it, and compare shapes and logits.

    Shapes alone do not tell: the number of heads, an epsilon or an activation changes none of them.
    """
    builder, device = BUILDERS[header["library"]], device_of(model)
    rebuilt = skeleton(header, _DTYPES[header["dtype"]], header["backend"])
    try:
        _check_same(Path("this model"), header, rebuilt, tensors)
        _fill(rebuilt, tensors)
        x = builder.sample(model).to(device)
        with torch.inference_mode():
            if not torch.equal(builder.logits(rebuilt.to(device), x), builder.logits(model, x)):
                raise CheckpointError("the tensors fit, but its logits differ (number of heads, activation, epsilon …)")
    except CheckpointError as error:
        raise CheckpointError(builder.differs(header, str(error))) from error


def _check_same(where: Path, header: dict[str, Any], model: nn.Module, found: dict[str, Tensor]) -> None:
    ties = _ties(model)
    expected = {name: t for name, t in model.state_dict().items() if name not in ties}
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unexpected:
        raise CheckpointError(f"{where} does not fit {header['architecture']!r}: missing tensors {some(missing)}, unexpected "
                              f"{some(unexpected)}")
    for name, tensor in expected.items():
        # Float parts may change dtype between devices; codes, scales and zero points may not.
        same_kind = tensor.dtype == found[name].dtype or (tensor.is_floating_point() and found[name].is_floating_point())
        if tensor.shape != found[name].shape or not same_kind:
            raise CheckpointError(f"{where}: tensor {name!r} is {list(found[name].shape)} {found[name].dtype}, "
                                  f"{header['architecture']!r} needs {list(tensor.shape)} {tensor.dtype}")
