"""Save and load a converted model: a folder with `model.safetensors` and `vitq.json`. Strict, and never pickle.

The JSON header holds what is needed to build the empty model again (what `vitq.builders` records of a model of timm or transformers, recipe,
float dtype) and to trust the file (schema, a SHA-256 over header and tensors). The float weights are not needed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import vitq
from vitq.builders import BUILDERS
from vitq.calib.runner import specs
from vitq.conversion import build, float_dtype, model_info
from vitq.models import prepare
from vitq.models.adapter import replace
from vitq.models.heads import part_heads
from vitq.nn.model import QuantizedDecoder
from vitq.nn.packed import pack_all
from vitq.ops.dispatch import check_backend, pick_device
from vitq.recipe import Recipe

SCHEMA = 2  # 1 had models of timm only, and said nothing of a library
HEADER, TENSORS = "vitq.json", "model.safetensors"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_REQUIRED = ("schema", "vitq_version", "recipe", "dtype", "device", "backend", "sha256", "source", "calibration", "notes")


class CheckpointError(ValueError):
    """A checkpoint that cannot be trusted, or a model that cannot be written as one."""


def save(model: nn.Module, folder: str | os.PathLike, *, source: dict[str, Any] | None = None) -> Path:
    """Write a converted model to `folder`, whole or not at all: everything goes to a temporary folder beside it first.

    source: what to record of where the model came from, as JSON: name, weights, data_config, class_names; and for timm
        model_kwargs, the arguments of timm.create_model that the model itself does not tell (img_size, num_classes,
        in_chans, global_pool, dynamic_img_size are read off it). A language model records its config; its tokenizer is not saved.
    An existing checkpoint in `folder` is replaced; a folder that holds anything else is refused.
    Raises TypeError for an unconverted model, CheckpointError if the folder cannot be written or if timm or transformers would
    not build the same model again from what is recorded.
    """
    info = model_info(model)
    folder = Path(folder).resolve()  # through a link, so that a rename does not replace the link
    _check_target(folder)
    library = "transformers" if isinstance(model, QuantizedDecoder) else "timm"
    try:
        architecture, source = BUILDERS[library].record(model, {**info.source, **(source or {})})
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    ties = _ties(model)
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items() if name not in ties}
    header = {
        "schema": SCHEMA, "vitq_version": vitq.__version__, "library": library, **architecture, "source": source,
        "recipe": info.recipe.to_dict(), "dtype": str(info.dtype)[6:], "device": _device(model).type,
        "backend": info.backend, "calibration": info.calibration, "notes": info.notes,
    }
    _check_rebuilds(header, tensors, model)
    header["sha256"] = _digest(header, tensors)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder.parent}: {error.strerror}; choose another output folder") from error
    try:
        save_file(tensors, temporary / TENSORS)
        (temporary / HEADER).write_text(json.dumps(header, indent=1, sort_keys=True) + "\n")
        shutil.copymode(temporary / HEADER, temporary / TENSORS)  # safetensors and mkdtemp write for the owner alone
        temporary.chmod(0o755)
        _replace_folder(temporary, folder)
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error}; what was there before is untouched") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def load(folder: str | os.PathLike, device: str | torch.device | None = None, backend: str = "auto", *,
         dtype: torch.dtype | None = None) -> nn.Module:
    """The model that `save` wrote, in one call and without its float weights.

    device: cpu by default. dtype of what stays in float: as saved on the same kind of device, else that device's
    default. On the same kind of device the logits are bit-identical to those of the model that was saved.
    Raises FileNotFoundError if there is no checkpoint, CheckpointError if it is damaged, incomplete, of a newer schema,
    or does not fit the model it names, ImportError for a language model without the package transformers.
    """
    folder, device = Path(folder), pick_device(str(device or "cpu"))
    check_backend(backend, device)
    header = _read_header(folder)
    stored = _read_tensors(folder)
    tensors = _of_today(stored) if header["schema"] == 1 else stored
    saved = _DTYPES.get(header["dtype"])
    if saved is None:
        raise CheckpointError(f"{folder / HEADER}: dtype must be one of {', '.join(_DTYPES)}, got {header['dtype']!r}")
    if dtype is None and header["device"] == device.type:
        dtype = saved
    model = _skeleton(header, float_dtype(dtype, device), backend)
    # First what is missing, by name; then the hash, which tells no more than that something changed.
    _check_same(folder, header, model, tensors)
    if _digest({k: v for k, v in header.items() if k != "sha256"}, stored) != header["sha256"]:
        raise CheckpointError(f"{folder} is damaged: its content does not match its SHA-256; save or copy it again")
    _fill(model, tensors)
    model.vitq.source, model.vitq.calibration, model.vitq.notes = header["source"], header["calibration"], header["notes"]
    model = model.to(device)  # which links the modules too
    pack_all(model)
    return model


def _skeleton(header: dict[str, Any], dtype: torch.dtype, backend: str) -> nn.Module:
    """The converted model before its tensors are loaded. Raises CheckpointError naming what does not fit."""
    builder = BUILDERS[_library(header)]
    try:
        recipe = Recipe.from_dict(header["recipe"])
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"the checkpoint's recipe is damaged: {error}") from error
    try:
        with builder.context():
            prepared = prepare(builder.empty(header), check=False)
            if recipe.heads:
                part_heads(prepared, recipe.heads.get("chosen", {}))
            return build(prepared, recipe, specs(prepared, recipe), dtype=dtype, backend=backend)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


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


def _ties(model: nn.Module) -> dict[str, str]:
    """The names of a tensor that has several, all but the first of each, with that first one."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(t), name) for name, t in model.state_dict(keep_vars=True).items()}
    return {name: kept for name, kept in names.items() if name != kept}


def _fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put `tensors`, which fit, in the places of the model's own, without copying those of the right dtype."""
    ties = _ties(model)
    model.load_state_dict({name: tensors[ties.get(name, name)].to(t.dtype) for name, t in model.state_dict().items()}, assign=True)
    for name, kept in ties.items():
        replace(model, name, model.get_parameter(kept))
    if lost := [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]:
        raise CheckpointError(f"{_some(lost)} would have no values: a buffer that is not in the state dict is saved only in the modules that the "
                              "model's adapter keeps exact")


def _check_rebuilds(header: dict[str, Any], tensors: dict[str, Tensor], model: nn.Module) -> None:
    """A checkpoint that would load as another model must not be written: build it, and compare shapes and logits.

    Shapes alone do not tell: the number of heads, an epsilon or an activation changes none of them.
    """
    builder, device = BUILDERS[header["library"]], _device(model)
    skeleton = _skeleton(header, _DTYPES[header["dtype"]], header["backend"])
    try:
        _check_same(Path("this model"), header, skeleton, tensors)
        _fill(skeleton, tensors)
        x = builder.sample(model).to(device)
        with torch.inference_mode():
            if not torch.equal(builder.logits(skeleton.to(device), x), builder.logits(model, x)):
                raise CheckpointError("the tensors fit, but its logits differ (number of heads, activation, epsilon …)")
    except CheckpointError as error:
        raise CheckpointError(builder.differs(header, str(error))) from error


def _check_same(where: Path, header: dict[str, Any], model: nn.Module, found: dict[str, Tensor]) -> None:
    ties = _ties(model)
    expected = {name: t for name, t in model.state_dict().items() if name not in ties}
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unexpected:
        raise CheckpointError(f"{where} does not fit {header['architecture']!r}: missing tensors {_some(missing)}, unexpected "
                              f"{_some(unexpected)}")
    for name, tensor in expected.items():
        # Float parts may change dtype between devices; codes, scales and zero points may not.
        same_kind = tensor.dtype == found[name].dtype or (tensor.is_floating_point() and found[name].is_floating_point())
        if tensor.shape != found[name].shape or not same_kind:
            raise CheckpointError(f"{where}: tensor {name!r} is {list(found[name].shape)} {found[name].dtype}, "
                                  f"{header['architecture']!r} needs {list(tensor.shape)} {tensor.dtype}")


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / HEADER
    if not path.is_file():
        raise FileNotFoundError(f"no vitq checkpoint in {folder}: {HEADER} is missing")
    try:
        header = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(header, dict) or not isinstance(header.get("schema"), int):
        raise CheckpointError(f"{path} is not a vitq header: it has no schema number")
    if header["schema"] > SCHEMA:
        raise CheckpointError(f"{path} has schema {header['schema']}, this vitq {vitq.__version__} reads up to {SCHEMA}: "
                              f"it was written by vitq {header.get('vitq_version')}; upgrade vitq")
    if (library := _library(header)) not in BUILDERS:
        raise CheckpointError(f"{path} is damaged: it names the library {library!r}; models are of {' or '.join(BUILDERS)}")
    absent = [key for key in (*_REQUIRED, *BUILDERS[library].keys) if key not in header]
    if absent:
        raise CheckpointError(f"{path} is damaged: it lacks {', '.join(absent)}")
    return header


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / TENSORS
    if not path.is_file():
        raise CheckpointError(f"{folder} is incomplete: {TENSORS} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or cut short: {error}") from error


def _digest(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the header without its hash and over every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_target(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give a folder")
    others = sorted({p.name for p in folder.iterdir()} - {HEADER, TENSORS}) if folder.is_dir() else []
    if others:
        raise CheckpointError(f"{folder} holds other files ({_some(others)}), which a checkpoint would replace; give an empty "
                              "or new folder")


def _replace_folder(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`; an older checkpoint there steps aside first and comes back if the rename fails."""
    if not folder.exists():
        os.rename(new, folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    was = old / "was"
    try:
        os.rename(folder, was)
        os.rename(new, folder)
    except BaseException:  # an interrupt too: the old checkpoint goes back before anything is removed
        if was.exists() and not folder.exists():
            os.rename(was, folder)
        raise
    finally:
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)


def _device(model: nn.Module) -> torch.device:
    return next(iter(model.state_dict().values())).device


def _some(names: list[str]) -> str:
    return "none" if not names else ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
