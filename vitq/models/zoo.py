"""Model names and weights: short names, timm's pretrained weights, the packaged demo weights, files, random ones."""
from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import os
import sys
import warnings
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Iterator

import torch
from torch import Tensor, nn

from vitq.models import hub
from vitq.models.hub import Unavailable

ALIASES: dict[str, str] = {
    "deit_t": "deit_tiny_patch16_224.fb_in1k",
    "deit_s": "deit_small_patch16_224.fb_in1k",
    "deit_b": "deit_base_patch16_224.fb_in1k",
    "vit_s": "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "vit_b": "vit_base_patch16_224.augreg_in21k_ft_in1k",
    "vit_l": "vit_large_patch16_224.augreg_in21k_ft_in1k",
    "swin_t": "swin_tiny_patch4_window7_224.ms_in1k",
    "swin_s": "swin_small_patch4_window7_224.ms_in1k",
    "swin_b": "swin_base_patch4_window7_224.ms_in22k_ft_in1k",
}
DEMO_ARCH = "deit_small_patch16_224"
DEMO_FILE = f"{DEMO_ARCH}.textiles.safetensors"
WEIGHT_KINDS = ("auto", "pretrained", "demo", "random")
# What a model with other weights must not say of itself.
_NOT_FROM_TIMM = {"tag": "", "url": "", "hf_hub_id": None, "label_names": None, "label_descriptions": None}
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class LoadedModel:
    """A float32 model in eval mode and where it comes from."""

    model: nn.Module
    name: str  # timm's full name, with the tag of the weights where it has one
    weights: str  # "pretrained:TAG", "demo", "random:SEED" or "file:NAME:sha256"
    class_names: tuple[str, ...] | None  # None: not known
    notes: tuple[str, ...]  # lines the user should see


def resolve_name(name: str) -> str:
    """timm's full name (``arch.tag``) of a short name or of any name timm knows; ValueError with close matches."""
    import timm
    from timm.models import get_arch_pretrained_cfgs

    if not isinstance(name, str):
        raise TypeError(f"a model name is a string; got {type(name).__name__}")
    full = ALIASES.get(name, name)
    arch, _, tag = full.partition(".")
    if not timm.is_model(arch):
        close = difflib.get_close_matches(arch, [*ALIASES, *timm.list_models()], n=5, cutoff=0.6)
        raise ValueError(f"unknown model {name!r}. " + (f"Close: {', '.join(close)}. " if close else "")
                         + f"Give one of {', '.join(ALIASES)} or a timm name (timm.list_models())")
    tags = [str(t).partition(".")[2] for t in get_arch_pretrained_cfgs(arch)]
    tags = [t for t in tags if t]
    if tag and tag not in tags:
        close = difflib.get_close_matches(tag, tags, n=5, cutoff=0.3) or tags[:5]
        raise ValueError(f"{arch} has no weights tagged {tag!r}; timm {timm.__version__} has "
                         f"{', '.join(close) or 'none for it'}")
    return full if tag or not tags else f"{arch}.{tags[0]}"


def load_model(name: str, weights: str = "auto", *, seed: int = 0, **timm_kwargs: Any) -> LoadedModel:
    """Builds a timm model with weights; float32, eval mode.

    weights: ``"auto"`` (pretrained where the hub or its cache gives them; else, for deit_s alone, the demo weights,
        with a note), ``"pretrained"``, ``"demo"``, ``"random"`` (timm's initialization under `seed`), or the path of
        a .safetensors, .pth or .bin file. Files load strictly, and never through pickled objects.
    timm_kwargs: passed on to ``timm.create_model`` (``img_size=...``).

    Raises ValueError (unknown name, wrong file), FileNotFoundError (no such file), RuntimeError (the weights cannot
    be had; an unreachable hub is noticed within 10 seconds). It never falls back to random weights.
    """
    full = resolve_name(name)
    weights = os.fspath(weights)
    for key in ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"):
        if key in timm_kwargs:
            raise ValueError(f"{key} is not passed on to timm: weights= says which weights to load "
                             f"({', '.join(WEIGHT_KINDS)} or a path)")
    if weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _create(full, **timm_kwargs)
        _set_cfg(model, **_NOT_FROM_TIMM)
        return LoadedModel(model, full, f"random:{seed}", None,
                           (f"{full}: random weights (seed {seed}); its predictions mean nothing",))
    if weights == "demo":
        return _load_demo(full, (), timm_kwargs)
    if weights in ("auto", "pretrained"):
        try:
            return _load_pretrained(full, timm_kwargs)
        except Unavailable as e:
            if weights == "auto" and full.partition(".")[0] == DEMO_ARCH:
                note = f"no pretrained weights for {full} ({e}): using the demo weights that come with vitq"
                return _load_demo(full, (note,), timm_kwargs)
            raise RuntimeError(f"no pretrained weights for {full}: {e}. Give a file of weights (--weights PATH) or, "
                               "to try the speed only, --weights random") from e
    return _load_file(full, Path(weights).expanduser(), timm_kwargs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # timm warns of registry renames and mirrored names; what matters here is said in `notes` or raised.
    logger = logging.getLogger("timm")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _create(name: str, **kwargs: Any) -> nn.Module:
    import timm

    with _quiet():
        return timm.create_model(name, **kwargs).float().eval()


def _set_cfg(model: nn.Module, **changes: Any) -> None:
    model.pretrained_cfg = model.default_cfg = dict(model.pretrained_cfg, **changes)


# --- pretrained ---------------------------------------------------------------------------------------------------

def _load_pretrained(full: str, kwargs: dict[str, Any]) -> LoadedModel:
    import timm
    from timm.data import ImageNetInfo, infer_imagenet_subset

    cfg = timm.get_pretrained_cfg(full)
    if cfg is None or not (cfg.hf_hub_id or cfg.url or cfg.file):
        raise Unavailable("timm knows of none")
    if kwargs.get("num_classes", cfg.num_classes) not in (0, cfg.num_classes):
        raise ValueError(f"{full} has {cfg.num_classes} classes; num_classes={kwargs['num_classes']} would leave its "
                         "head random. Leave num_classes out, or give your own weights as a file")
    path, is_native = _fetch(cfg)
    overlay: dict[str, Any] = {"file": str(path)}
    if is_native:
        overlay["custom_load"] = False  # describes the original .npz, not the hub's copy
    model = _create(full, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    _set_cfg(model, file=cfg.file, custom_load=cfg.custom_load)
    names: tuple[str, ...] | None = tuple(cfg.label_names) if cfg.label_names else None
    if names is None and (subset := infer_imagenet_subset({"num_classes": getattr(model, "num_classes", 0)})):
        names = tuple(ImageNetInfo(subset).label_names())
    return LoadedModel(model, full, f"pretrained:{full.partition('.')[2]}", names, ())


def _fetch(cfg: Any) -> tuple[Path, bool]:
    """The local file of pretrained weights, downloaded if need be, and whether timm's own format is sure."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if cfg.file:
        return Path(cfg.file), False
    names = (cfg.hf_hub_filename,) if cfg.hf_hub_filename else _HUB_FILES
    if cfg.hf_hub_id:
        for f in names:
            found = huggingface_hub.try_to_load_from_cache(cfg.hf_hub_id, f)
            if isinstance(found, str):
                return Path(found), True
    if cfg.url:
        cached = Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(cfg.url)
        if cached.is_file():
            return cached, False
    if not cfg.hf_hub_id:
        hub.probe(cfg.url)
        cached.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(cfg.url, str(cached), progress=False)
        except OSError as e:
            raise Unavailable(f"downloading {cfg.url} failed: {e}") from e
        return cached, False
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise Unavailable("not in the cache, and HF_HUB_OFFLINE is set")
    hub.probe(huggingface_hub.hf_hub_url(cfg.hf_hub_id, "config.json"))
    for f in names:
        try:
            return Path(huggingface_hub.hf_hub_download(cfg.hf_hub_id, f, etag_timeout=hub.TIMEOUT_S)), True
        except (EntryNotFoundError, LocalEntryNotFoundError) as e:
            missing: Exception = e
        except Exception as e:  # the hub's client lets its HTTP library's errors through, and that library changes
            raise Unavailable(f"downloading {cfg.hf_hub_id} failed: {e}") from e
    raise Unavailable(f"{cfg.hf_hub_id} has none of {', '.join(names)}") from missing


# --- files --------------------------------------------------------------------------------------------------------

def _load_demo(full: str, notes: tuple[str, ...], kwargs: dict[str, Any]) -> LoadedModel:
    arch = full.partition(".")[0]
    if arch != DEMO_ARCH:
        raise ValueError(f"demo weights exist for deit_s ({DEMO_ARCH}) only, not for {arch}; use --model deit_s, or "
                         "--weights auto, random or a path")
    with as_file(files("vitq") / "demo" / DEMO_FILE) as path:
        if not path.is_file():
            raise FileNotFoundError(f"{DEMO_FILE} is missing from the installed package; install vitq again")
        loaded = _load_file(DEMO_ARCH, path, kwargs)
    return LoadedModel(loaded.model, DEMO_ARCH, "demo", loaded.class_names, notes)


def _load_file(full: str, path: Path, kwargs: dict[str, Any]) -> LoadedModel:
    if not path.is_file():
        hint = "" if path.suffix else f" (weights are {', '.join(WEIGHT_KINDS)} or the path of a file)"
        raise FileNotFoundError(f"no such file of weights: {path}{hint}")
    state, meta = _read_state(path)
    arch = full.partition(".")[0]
    cfg: dict[str, Any] = {}
    names: tuple[str, ...] | None = None
    if "vitq_weights" in meta:
        if meta["vitq_weights"] != "1":
            raise ValueError(f"{path.name} has format {meta['vitq_weights']!r}; this vitq reads '1': update vitq")
        if meta.get("timm", arch) != arch:
            raise ValueError(f"{path.name} holds weights of {meta['timm']}, not of {arch}")
        cfg, names = json.loads(meta.get("pretrained_cfg", "{}")), tuple(json.loads(meta.get("class_names", "[]")))
    num_classes = _num_classes(full, state)
    if kwargs.get("num_classes", num_classes) != num_classes:
        raise ValueError(f"{path.name} has {num_classes} classes; num_classes={kwargs['num_classes']} was asked for")
    model = _create(full, **{**kwargs, "num_classes": num_classes})
    _load_strictly(model, state, path.name, full)
    _set_cfg(model, **_NOT_FROM_TIMM, **{**cfg, "num_classes": num_classes})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return LoadedModel(model, full, f"file:{path.name}:{digest}", names or None, ())


def _read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors file, or of a state dict saved by torch (read without pickled code)."""
    from safetensors import safe_open

    meta: dict[str, str] = {}
    try:
        if path.suffix == ".safetensors":
            with safe_open(str(path), framework="pt") as f:
                meta = dict(f.metadata() or {})
                state: Any = {k: f.get_tensor(k) for k in f.keys()}
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # each kind of garbage fails in its own way: struct.error, KeyError, UnpicklingError ...
        # torch's own text advises to unpickle the file after all, which is not for a file of unknown origin.
        raise ValueError(f"cannot read weights from {path} ({type(e).__name__}). Expected a .safetensors file, or a state dict "
                         "that torch.load(weights_only=True) accepts") from e
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no state dict (names with tensors)")
    return {k.removeprefix("module."): v for k, v in state.items()}, meta


def _num_classes(full: str, state: dict[str, Tensor]) -> int:
    import timm

    cfg = timm.get_pretrained_cfg(full)
    classifier = (cfg.classifier if cfg else None) or "head"
    first = classifier if isinstance(classifier, str) else classifier[0]
    for key in (first, "head", "head.fc"):
        if f"{key}.weight" in state:
            return state[f"{key}.weight"].shape[0]
    return 0


def _load_strictly(model: nn.Module, state: dict[str, Tensor], file: str, full: str) -> None:
    own = model.state_dict()
    problems = _differences(own, state)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if problems and convert is not None:  # older files: other names, buffers that are no longer saved, another size
        try:
            with _quiet():
                converted = convert(dict(state), model)
            if not _differences(own, converted):
                state, problems = converted, []
        except (KeyError, IndexError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError):
            pass  # not such a file: the differences say more than the converter's failure
    if problems:
        raise ValueError(f"{file} does not fit {full}: {'; '.join(problems)}. Give the model that the weights "
                         "were trained for")
    bad = [k for k, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if bad:
        raise ValueError(f"{file} has NaN or infinite values in {_some(bad)}")
    model.load_state_dict({k: v.to(own[k].dtype) for k, v in state.items()})


def _differences(own: dict[str, Tensor], state: dict[str, Tensor]) -> list[str]:
    missing, unexpected = [k for k in own if k not in state], [k for k in state if k not in own]
    shapes = [f"{k} {list(state[k].shape)} instead of {list(own[k].shape)}"
              for k in own if k in state and own[k].shape != state[k].shape]
    return [f"{what} {_some(keys)}" for what, keys in
            (("missing", missing), ("unexpected", unexpected), ("wrong shape:", shapes)) if keys]


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
