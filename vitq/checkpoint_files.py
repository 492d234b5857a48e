"""The files of a checkpoint: a header in JSON and tensors in safetensors, in one file or in shards. Never pickle, whole or not at all.

A model of timm has its header in `vitq.json`. One of transformers has it where transformers looks for it: `config.json` is the config of the float
model with a `quantization_config` in it, which holds the rest of the header, and `generation_config.json` lies beside it. In memory a header is one
dict, whatever the files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import vitq

SCHEMA = 3  # 1 had models of timm only, and said nothing of a library; 2 had all in vitq.json, and one file of tensors
HEADER, CONFIG, GENERATION = "vitq.json", "config.json", "generation_config.json"
TENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
PATTERNS = (HEADER, CONFIG, GENERATION, TENSORS, INDEX, "model-*-of-*.safetensors")  # of the files above, for the hub
METHOD = "vitq"  # how transformers tells whose quantization_config it is
FLATQUANT = "quantization_config.json"  # which FlatQuant's code writes beside its tensors
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors\Z")
_UNSIGNED = ("sha256", "generation_config")  # how to sample is advice, which may be edited
_READ_FLATQUANT = "vitq.import_flatquant_checkpoint(folder) reads it"
_IN_CONFIG = ("config", "generation_config", "architecture", "dtype")  # of a header, what is said outside of quantization_config


class CheckpointError(ValueError):
    """A checkpoint that cannot be trusted, or a model that cannot be written as one."""


# Writing --------------------------------------------------------------------------------------------------------------


def write(folder: Path, header: dict[str, Any], tensors: dict[str, Tensor], max_shard_size: int | str) -> None:
    """Write a checkpoint to `folder`, an existing one in it replaced. Everything goes to a temporary folder first; what else is in `folder` stays.

    max_shard_size: of a file of tensors, in bytes or as "5GB". Raises CheckpointError where `folder` cannot be written; what was there before is then
    as it was. `check_target` is asked before.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder if folder.exists() else folder.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {error.strerror}; choose another output folder") from error
    try:
        shards = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
        for file, names in shards.filename_to_tensors.items():
            save_file({name: tensors[name] for name in names}, new / file, metadata={"format": "pt"})
        if shards.is_sharded:
            _write_json(new / INDEX, {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename})
        for file, content in _header_files(header).items():
            _write_json(new / file, content)
        for path in new.glob("*.safetensors"):  # safetensors and mkdtemp write for the owner alone
            shutil.copymode(new / (HEADER if (new / HEADER).exists() else CONFIG), path)
        new.chmod(0o755)
        _replace(new, folder)
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error}; what was there before is untouched") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def check_target(folder: Path) -> None:
    """Raises CheckpointError for a file, and for a folder with a model that vitq did not write."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give a folder")
    if not is_checkpoint(folder):
        check_free(str(folder), [p.name for p in _files(folder)], "folder")


def check_free(place: str, files: list[str], kind: str) -> None:
    """Raises CheckpointError where there are files of a model, which is not vitq's."""
    if files:
        raise CheckpointError(f"{place} holds a model that vitq did not write ({some(files)}), which a checkpoint would replace; give another {kind}")


def _header_files(header: dict[str, Any]) -> dict[str, Any]:
    """File name -> content."""
    if header["library"] != "transformers":
        return {HEADER: header}
    own = {key: value for key, value in header.items() if key not in _IN_CONFIG}
    return {GENERATION: header["generation_config"], CONFIG: {**header["config"], "quantization_config": {"quant_method": METHOD, **own}}}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def _files(folder: Path) -> list[Path]:
    """Those in `folder` that have names of a checkpoint's, the header last."""
    found = [p for p in (folder.iterdir() if folder.is_dir() else ()) if p.name in PATTERNS or _SHARD.match(p.name)]
    return sorted(found, key=lambda p: (p.name in (HEADER, CONFIG), p.name))


def _replace(new: Path, folder: Path) -> None:
    """Make `new` the checkpoint of `folder`; the files of an older one there step aside first and come back if anything fails."""
    if not folder.exists():
        os.rename(new, folder)
        return
    old, placed = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder)), []
    try:
        for path in reversed(_files(folder)):
            os.rename(path, old / path.name)
        for path in _files(new):
            placed.append(folder / path.name)
            os.rename(path, placed[-1])
    except BaseException:  # an interrupt too
        for path in placed:
            path.unlink(missing_ok=True)
        for path in _files(old):
            os.rename(path, folder / path.name)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


# Reading --------------------------------------------------------------------------------------------------------------


def is_checkpoint(folder: Path) -> bool:
    """Whether vitq wrote what `folder` holds, to all appearances."""
    if (folder / HEADER).is_file():
        return True
    try:
        return json.loads((folder / CONFIG).read_text())["quantization_config"]["quant_method"] == METHOD
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _of_flatquant(folder: Path, said: Any = None) -> bool:
    """Whether FlatQuant's code wrote what `folder` holds, to all appearances. said: the quantization_config in its config."""
    if isinstance(said, dict) and said.get("quant_method") == "flatquant":
        return True
    try:
        return json.loads((folder / FLATQUANT).read_text())["format"] == "packed_int4"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_header(folder: Path) -> dict[str, Any]:
    """What `write` was given. Raises FileNotFoundError where there is none, CheckpointError for one that is damaged or of a newer schema."""
    if (path := folder / HEADER).is_file():
        header, where = read_json(path), str(path)
    elif (path := folder / CONFIG).is_file():
        config, where = read_json(path), f"quantization_config of {path}"
        own = config.pop("quantization_config", None)
        if not isinstance(own, dict) or own.get("quant_method") != METHOD:
            other = f"FlatQuant quantized: {_READ_FLATQUANT}" if _of_flatquant(folder, own) else "vitq did not quantize: give a folder that vitq.save wrote"
            raise CheckpointError(f"{path} is the config of a model that {other}")
        generation = read_json(folder / GENERATION) if (folder / GENERATION).is_file() else {}
        header = {**own, "config": config, "generation_config": generation}
        del header["quant_method"]
        if isinstance(config.get("architectures"), list) and len(config["architectures"]) == 1:
            header["architecture"] = config["architectures"][0]
        if "dtype" in config:
            header["dtype"] = config["dtype"]
    else:
        other = f"; {folder / FLATQUANT} is there, of a model that FlatQuant quantized: {_READ_FLATQUANT}" if _of_flatquant(folder) else ""
        missing = f"{HEADER} is missing, and {CONFIG} of a language model{other}" if folder.is_dir() else "there is no such folder"
        raise FileNotFoundError(f"no vitq checkpoint in {folder}: {missing}")
    check_schema(where, header)
    return header


def check_schema(where: str, header: dict[str, Any]) -> None:
    """Raises CheckpointError unless this vitq reads checkpoints of such a header."""
    schema = header.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        what = f"its schema is {schema!r}" if "schema" in header else "it has no schema number"
        raise CheckpointError(f"{where} is damaged: {what}, and every checkpoint has one from 1 to {SCHEMA}; copy or save it again")
    if header["schema"] > SCHEMA:
        raise CheckpointError(f"{where} has schema {header['schema']}, this vitq {vitq.__version__} reads up to {SCHEMA}: "
                              f"it was written by vitq {header.get('vitq_version')}; upgrade vitq")


def tensor_files(folder: Path) -> dict[str, list[str] | None]:
    """File -> the tensors that the index says are in it; None without an index, of the one file that there is then."""
    if (folder / TENSORS).is_file() or not (folder / INDEX).is_file():
        return {TENSORS: None}
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(file, str) and _SHARD.match(file) for file in names.values()):
        raise CheckpointError(f"{folder / INDEX} is damaged: it does not say which tensor is in which of the files model-N-of-M.safetensors")
    files: dict[str, list[str] | None] = {file: [] for file in sorted(set(names.values()))}
    for name, file in names.items():
        files[file].append(name)
    return files


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All of them. Raises CheckpointError where one of the files is missing, cut short, or holds others than the index says."""
    tensors: dict[str, Tensor] = {}
    for file, expected in tensor_files(folder).items():
        if not (path := folder / file).is_file():
            raise CheckpointError(f"{folder} is incomplete: {file} is missing; copy or save it again")
        try:
            with safe_open(path, framework="pt") as opened:
                found = {name: opened.get_tensor(name) for name in opened.keys()}
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged or cut short: {error}; copy or save it again") from error
        if expected is not None and found.keys() != set(expected):
            raise CheckpointError(f"{path} does not fit {INDEX}: missing tensors {some(sorted(set(expected) - found.keys()))}, unexpected "
                                  f"{some(sorted(found.keys() - set(expected)))}; copy or save it again")
        tensors.update(found)
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A file's names with values. Raises CheckpointError for one that holds anything else."""
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it holds a {type(content).__name__}, not names with values")
    return content


def digest(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the header without its hash and over every tensor's name, dtype, shape and bytes."""
    unsigned = _UNSIGNED if header["schema"] >= 3 else _UNSIGNED[:1]
    found = hashlib.sha256(json.dumps({k: v for k, v in header.items() if k not in unsigned}, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def some(names: list[str]) -> str:
    """The first of them, to be read in a message."""
    return "none" if not names else ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
