"""How the empty float model of a checkpoint is built again: what its header records of a model of timm or of transformers, and back."""

from __future__ import annotations

import inspect
import json
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from vitq.calib.data import data_config


class TimmBuilder:
    """Models of images: an architecture's name and arguments of timm.create_model."""

    keys = ("architecture", "model_kwargs", "pretrained_cfg")  # what a header must have beside the keys that every header has

    def record(self, model: nn.Module, source: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the header says of the architecture, and of where the model came from (`source`, with what the model itself tells).

        Raises ValueError for a model that does not name its architecture.
        """
        import timm

        cfg = dict(getattr(model, "pretrained_cfg", None) or {})
        source = {**_known_source(model, cfg), **source}
        architecture = cfg.get("architecture") or source["name"].split(".")[0]
        if not architecture:
            raise ValueError("the model does not name its timm architecture; give source={'name': 'deit_small_patch16_224'}")
        kwargs = {**_model_kwargs(model), **source.get("model_kwargs", {})}
        return {"timm_version": timm.__version__, "architecture": architecture, "model_kwargs": kwargs, "pretrained_cfg": _jsonable(cfg)}, source

    def context(self) -> AbstractContextManager:
        """What building takes place in. Some tensors that a checkpoint does not hold are made then, such as Swin's position indices."""
        return torch.random.fork_rng(devices=[])

    def empty(self, header: dict[str, Any]) -> nn.Module:
        """The float model with any weights. Raises ValueError where timm cannot build it."""
        import timm

        name, kwargs = header["architecture"], header["model_kwargs"]
        if not timm.is_model(name):
            raise ValueError(f"timm {timm.__version__} has no model {name!r}; the checkpoint was written with timm {header.get('timm_version')}")
        try:
            model = timm.create_model(name, pretrained=False, **kwargs)
        except (TypeError, RuntimeError, AssertionError) as error:
            raise ValueError(f"timm {timm.__version__} cannot build {name!r} with {kwargs}: {error}") from error
        if header["pretrained_cfg"]:
            model.pretrained_cfg = {**(model.pretrained_cfg or {}), **header["pretrained_cfg"]}
        return model

    def sample(self, model: nn.Module) -> Tensor:
        """One fixed image [1, C, H, W]."""
        size = getattr(model.patch_embed, "img_size", None) or (224, 224)
        return torch.randn(1, getattr(model, "in_chans", None) or 3, *size, generator=torch.Generator().manual_seed(0))

    def logits(self, model: nn.Module, x: Tensor) -> Tensor:
        return model(x)

    def differs(self, header: dict[str, Any], why: str) -> str:
        """What to say of a model that the header would not give back."""
        return (f"timm.create_model({header['architecture']!r}, **{header['model_kwargs']}) builds another model than the one to be saved: {why}. "
                "Give the arguments it was built with: vitq.save(…, source={'model_kwargs': {…}})")


class TransformersBuilder:
    """Language models: a class and its config. They are built on the meta device, so that no weight is made in vain."""

    keys = ("architecture", "config", "attention", "generation_config")

    def record(self, model: nn.Module, source: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        import transformers

        architecture, config = type(model).__bases__[-1].__name__, model.config  # of the class that was converted
        fields = {**json.loads(config.to_json_string(use_diff=False)), "architectures": [architecture], "dtype": str(model.vitq.dtype)[6:]}
        for key in ("quantization_config", "_name_or_path"):  # of the file that the float weights came from
            fields.pop(key, None)
        return ({"transformers_version": transformers.__version__, "architecture": architecture, "config": fields,
                 "attention": config._attn_implementation, "generation_config": json.loads(model.generation_config.to_json_string())},
                {"name": config.name_or_path or architecture, **source})

    def context(self) -> AbstractContextManager:
        return torch.device("meta")

    def empty(self, header: dict[str, Any]) -> nn.Module:
        """The float model without weights. Raises ImportError without transformers, ValueError where it cannot build the model."""
        try:
            import transformers
        except ImportError as error:
            raise ImportError(f"the checkpoint holds a {header['architecture']} of the package transformers, which is not installed: "
                              "pip install 'vitq[llm]'") from error
        try:
            config = transformers.AutoConfig.for_model(**header["config"])
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=header["attention"], dtype=torch.float32,
                                                                  trust_remote_code=False)
            model.generation_config = transformers.GenerationConfig(**header["generation_config"])
        except Exception as error:  # a config that is wrong fails in as many ways as there are classes
            version = header.get("transformers_version")  # FlatQuant's code does not say it
            raise ValueError(f"transformers {transformers.__version__} cannot build the {header['architecture']} of this checkpoint"
                             f"{f', which was written with transformers {version}' if version else ''}: {error}") from error
        if type(model).__name__ != header["architecture"]:
            raise ValueError(f"transformers {transformers.__version__} builds a {type(model).__name__} of the config, not a {header['architecture']}")
        return model

    def sample(self, model: nn.Module) -> Tensor:
        """Fixed token ids [1, T]."""
        tokens = min(16, getattr(model.config, "max_position_embeddings", 16))
        vocabulary = model.get_input_embeddings().num_embeddings
        return torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))

    def logits(self, model: nn.Module, x: Tensor) -> Tensor:
        return model(x, use_cache=False).logits

    def differs(self, header: dict[str, Any], why: str) -> str:
        return (f"transformers builds another model of this {header['architecture']}'s config than the one to be saved: {why}. Its modules were "
                "changed by hand after it was built, or its config was: put the change into the other as well")


BUILDERS = {"timm": TimmBuilder(), "transformers": TransformersBuilder()}


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
