"""Save and load a converted model: a folder with `model.safetensors` and `vitq.json`. Strict, and never pickle.

The JSON header holds what is needed to build the empty model again (architecture and its arguments, recipe, float dtype)
and to trust the file (schema, sizes, a SHA-256 over header and tensors). The float weights are not needed.
"""

from __future__ import annotations

import hashlib
import inspect
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
from vitq.calib.data import data_config
from vitq.calib.runner import specs
from vitq.conversion import build, float_dtype, model_info
from vitq.models import prepare
from vitq.nn.model import QuantizedDecoder
from vitq.nn.packed import pack_all
from vitq.ops.dispatch import check_backend, pick_device
from vitq.recipe import Recipe

SCHEMA = 1
HEADER, TENSORS = "vitq.json", "model.safetensors"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_REQUIRED = ("schema", "vitq_version", "recipe", "architecture", "model_kwargs", "dtype", "device", "backend", "sha256",
             "pretrained_cfg", "source", "calibration", "notes")


class CheckpointError(ValueError):
    """A checkpoint that cannot be trusted, or a model that cannot be written as one."""


def save(model: nn.Module, folder: str | os.PathLike, *, source: dict[str, Any] | None = None) -> Path:
    """Write a converted model to `folder`, whole or not at all: everything goes to a temporary folder beside it first.

    source: what to record of where the model came from, as JSON: name, weights, data_config, class_names; and
        model_kwargs, the arguments of timm.create_model that the model itself does not tell (img_size, num_classes,
        in_chans, global_pool, dynamic_img_size are read off it).
    An existing checkpoint in `folder` is replaced; a folder that holds anything else is refused.
    Raises TypeError for an unconverted model, CheckpointError if the folder cannot be written or if timm would not
    build the same model again from what is recorded.
    """
    import timm

    info = model_info(model)
    if isinstance(model, QuantizedDecoder):
        raise CheckpointError(f"language models cannot be saved yet: {type(model).__name__} would have to be built again by transformers")
    folder = Path(folder).resolve()  # through a link, so that a rename does not replace the link
    _check_target(folder)
    cfg = dict(getattr(model, "pretrained_cfg", None) or {})
    source = {**_known_source(model, cfg), **info.source, **(source or {})}
    kwargs = {**_model_kwargs(model), **source.get("model_kwargs", {})}
    architecture = cfg.get("architecture") or source["name"].split(".")[0]
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    header = {
        "schema": SCHEMA, "vitq_version": vitq.__version__, "timm_version": timm.__version__,
        "architecture": architecture, "model_kwargs": kwargs, "pretrained_cfg": _jsonable(cfg), "source": source,
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
    or does not fit the model it names.
    """
    folder, device = Path(folder), pick_device(str(device or "cpu"))
    check_backend(backend, device)
    header = _read_header(folder)
    tensors = _read_tensors(folder)
    saved = _DTYPES.get(header["dtype"])
    if saved is None:
        raise CheckpointError(f"{folder / HEADER}: dtype must be one of {', '.join(_DTYPES)}, got {header['dtype']!r}")
    if dtype is None and header["device"] == device.type:
        dtype = saved
    model = _skeleton(header, float_dtype(dtype, device), backend)
    # First what is missing, by name; then the hash, which tells no more than that something changed.
    _check_same(folder, header, model.state_dict(), tensors)
    if _digest({k: v for k, v in header.items() if k != "sha256"}, tensors) != header["sha256"]:
        raise CheckpointError(f"{folder} is damaged: its content does not match its SHA-256; save or copy it again")
    model.load_state_dict(tensors, strict=True)
    model.vitq.source, model.vitq.calibration, model.vitq.notes = header["source"], header["calibration"], header["notes"]
    model = model.to(device)  # which links the modules too
    pack_all(model)
    return model


def _skeleton(header: dict[str, Any], dtype: torch.dtype, backend: str) -> nn.Module:
    """The converted model with empty buffers. Raises CheckpointError naming what does not fit."""
    import timm

    try:
        recipe = Recipe.from_dict(header["recipe"])
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"the checkpoint's recipe is damaged: {error}") from error
    if not timm.is_model(header["architecture"]):
        raise CheckpointError(f"timm {timm.__version__} has no model {header['architecture']!r}; the checkpoint was written "
                              f"with timm {header.get('timm_version')}")
    try:
        with torch.random.fork_rng(devices=[]):
            model = timm.create_model(header["architecture"], pretrained=False, **header["model_kwargs"])
    except (TypeError, RuntimeError, AssertionError) as error:
        raise CheckpointError(f"timm {timm.__version__} cannot build {header['architecture']!r} with "
                              f"{header['model_kwargs']}: {error}") from error
    if header["pretrained_cfg"]:
        model.pretrained_cfg = {**(model.pretrained_cfg or {}), **header["pretrained_cfg"]}
    prepared = prepare(model, check=False)
    return build(prepared, recipe, specs(prepared, recipe), dtype=dtype, backend=backend)


def _model_kwargs(model: nn.Module) -> dict[str, Any]:
    """Arguments of timm.create_model that can be read off a built model."""
    kwargs: dict[str, Any] = {"num_classes": model.num_classes}
    embed = model.patch_embed
    parameters = inspect.signature(type(model).__bases__[-1].__init__).parameters  # of the class that was converted
    if getattr(embed, "img_size", None) is not None:
        kwargs["img_size"] = list(embed.img_size)
    if getattr(model, "in_chans", 3) != 3:
        kwargs["in_chans"] = model.in_chans
    if getattr(model, "global_pool", None) is not None and "global_pool" in parameters:
        kwargs["global_pool"] = model.global_pool
    if getattr(model, "dynamic_img_size", False):
        kwargs["dynamic_img_size"] = True
    if not getattr(embed, "strict_img_size", True) and not getattr(model, "dynamic_img_size", False):
        kwargs["strict_img_size"] = False
    return kwargs


def _check_rebuilds(header: dict[str, Any], tensors: dict[str, Tensor], model: nn.Module) -> None:
    """A checkpoint that would load as another model must not be written: build it, and compare shapes and logits.

    Shapes alone do not tell: the number of heads, an epsilon or an activation changes none of them.
    """
    if not header["architecture"]:
        raise CheckpointError("the model does not name its timm architecture; give source={'name': 'deit_small_patch16_224'}")
    skeleton = _skeleton(header, _DTYPES[header["dtype"]], header["backend"])
    try:
        _check_same(Path("this model"), header, skeleton.state_dict(), tensors)
        skeleton.load_state_dict(tensors)
        device = _device(model)
        size = getattr(model.patch_embed, "img_size", None) or (224, 224)
        x = torch.randn(1, getattr(model, "in_chans", None) or 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
        with torch.inference_mode():
            if not torch.equal(skeleton.to(device)(x), model(x)):
                raise CheckpointError("the tensors fit, but its logits differ (number of heads, activation, epsilon …)")
    except CheckpointError as error:
        raise CheckpointError(f"timm.create_model({header['architecture']!r}, **{header['model_kwargs']}) builds another "
                              f"model than the one to be saved: {error}. Give the arguments it was built with: "
                              "vitq.save(…, source={'model_kwargs': {…}})") from error


def _check_same(where: Path, header: dict[str, Any], expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
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
    absent = [key for key in _REQUIRED if key not in header]
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


def _known_source(model: nn.Module, cfg: dict[str, Any]) -> dict[str, Any]:
    """What a timm model itself tells of where it came from."""
    tag = cfg.get("tag")
    name = f"{cfg.get('architecture') or ''}{'.' + tag if tag else ''}"
    return {"name": name, "weights": f"timm:{tag}" if tag else "unknown", "class_names": None,
            "data_config": data_config(model)}


def _jsonable(value: Any) -> Any:
    """pretrained_cfg holds tuples and an OrderedDict now and then; what JSON cannot say is left out."""
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items() if _is_plain(v)}
    return [_jsonable(v) for v in value] if isinstance(value, (list, tuple)) else value


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool, list, tuple, dict))


def _device(model: nn.Module) -> torch.device:
    return next(iter(model.state_dict().values())).device


def _some(names: list[str]) -> str:
    return "none" if not names else ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
