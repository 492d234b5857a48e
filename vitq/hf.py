"""`import vitq.hf` lets transformers open what vitq quantized: `AutoModelForCausalLM.from_pretrained(folder or hub id)`.

It registers a quantization config and a quantizer under the method "vitq". transformers builds the model's class on the meta device and hands it
over; the quantizer checks folder and model as `vitq.load` does, puts the empty integer modules in, and transformers loads the tensors into them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from vitq.checkpoint import checked_header, checked_tensors, describe, skeleton
from vitq.checkpoint_files import METHOD, CheckpointError, check_schema, some, tensor_files
from vitq.conversion import convert, float_dtype
from vitq.models.adapter import replace
from vitq.nn.packed import link_all, pack_all
from vitq.ops.dispatch import check_backend, pick_device
from vitq.recipe import Recipe

__all__ = ["VitqConfig", "VitqQuantizer"]

_OWN = "quantization_config of config.json"
# Of a config, what may be other than it was saved: it says how a model is used, and not what it computes.
_FREE = {"dtype", "architectures", "quantization_config", "transformers_version", "_name_or_path", "use_cache", "return_dict", "output_attentions",
         "output_hidden_states", "pad_token_id", "bos_token_id", "eos_token_id"}


@register_quantization_config(METHOD)
class VitqConfig(QuantizationConfigMixin):
    """How vitq quantizes a language model: `from_pretrained(float_model, quantization_config=VitqConfig("w8a8-dynamic"))`.

    recipe: a name from `vitq.recipes()`, a YAML path or a `vitq.Recipe`, of those that need no data. Recipes that do go through `vitq.convert`.
    backend: as of `vitq.convert`.
    header: what a checkpoint says beside these, read from its config.json.
    Raises ValueError for a recipe or backend that there is not.
    """

    def __init__(self, recipe: str | Path | Recipe | dict[str, Any] = "w8a8-dynamic", backend: str = "auto", **header: Any):
        header.pop("quant_method", None)
        if "schema" not in header:  # not of a checkpoint, which is checked as a whole, and may be of a newer vitq
            if header:
                raise TypeError(f"VitqConfig takes recipe and backend; got {', '.join(header)}")
            if not isinstance(recipe, Recipe):
                recipe = Recipe.from_dict(recipe) if isinstance(recipe, dict) else Recipe.from_yaml(recipe)
            recipe = recipe.to_dict()
            check_backend(backend)
        self.quant_method, self.recipe, self.backend = METHOD, recipe, backend
        self.__dict__.update(header)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Of a config.json. Raises CheckpointError for that of a checkpoint whose schema number is lost or wrong, or of a newer vitq."""
        if config_dict.keys() - {"quant_method", "recipe", "backend"}:
            check_schema(_OWN, config_dict)
        return super().from_dict(config_dict, **kwargs)


@register_quantizer(METHOD)
class VitqQuantizer(HfQuantizer):
    """What transformers calls while it loads a model with a `VitqConfig`."""

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Before any weight is read. Raises CheckpointError for a newer checkpoint, ValueError for a recipe that needs data."""
        config = self.quantization_config
        if self.pre_quantized:
            check_schema(_OWN, config.to_dict())
            return
        recipe = Recipe.from_dict(config.recipe)
        if recipe.needs_data or recipe.execution == "simulated":
            why = "needs data to calibrate on" if recipe.needs_data else "is for simulation"
            raise ValueError(f"the recipe {recipe.name!r} {why}, which from_pretrained does not have: load the float model, then "
                             f"model = vitq.convert(model, {recipe.name!r}, calib=batches of token ids) and model.save_pretrained(folder); or give "
                             "a recipe without data, such as 'w8a8-dynamic'")

    def update_device_map(self, device_map: Any) -> dict[str, torch.device] | None:
        """One device for all of the model: "auto" is a GPU where there is one. Raises ValueError for several."""
        if device_map is None:
            return None
        if isinstance(device_map, str):  # auto, balanced …: transformers has made devices of all others
            return {"": pick_device()}
        devices = {f"cuda:{d}" if isinstance(d, int) else str(d) for d in device_map.values()}
        if len(devices) != 1:
            raise ValueError(f"a quantized model is on one device, device_map names {', '.join(sorted(devices))}: give device_map='cuda', 'cpu' or "
                             "'auto'")
        return {"": pick_device(devices.pop())}

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of what stays in float. Raises ValueError for what is not a 16- or 32-bit float."""
        try:
            return float_dtype(dtype, torch.device("cpu"))
        except ValueError as error:
            own = ", or where none was given, save or copy the checkpoint again: its config.json is damaged" if self.pre_quantized else ""
            raise ValueError(f"{error}: give one of them as dtype={own}") from error

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        """That of the model that was saved, unless another is asked for."""
        if self.pre_quantized and config._attn_implementation is None:
            config._attn_implementation = getattr(self.quantization_config, "attention", None)
        return config

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype that the empty integer model has there: codes, scales and rotary frequencies are no matter of `dtype=`."""
        return dtype

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise ValueError("a quantized model is on one device: leave out tp_plan and distributed_config")
        if not self.pre_quantized:
            return
        if not checkpoint_files:
            raise ValueError("a quantized model is loaded from its folder or repository: leave out state_dict")
        folder = Path(checkpoint_files[0]).parent
        if [Path(file).name for file in checkpoint_files] != list(tensor_files(folder)):
            raise CheckpointError(f"{folder} holds other files of tensors than those to load "
                                  f"({some([Path(file).name for file in checkpoint_files])}): leave out variant and gguf_file")
        self._header = header = checked_header(folder)
        if type(model).__name__ != header["architecture"]:
            raise CheckpointError(f"{folder} holds a {header['architecture']} and was opened as a {type(model).__name__}: use "
                                  "transformers.AutoModelForCausalLM, or the class itself, with the `architectures` that config.json had")
        _check_config(folder, header, model.config)
        for target, tied in model.all_tied_weights_keys.items():  # as transformers does after loading; what is tied stays in float
            replace(model, target, model.get_parameter(tied))
        empty = skeleton(header, model.config.dtype, "auto", empty=model)
        checked_tensors(folder, header, empty)
        _become(model, empty)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self.pre_quantized:
            describe(model, self._header)
            link_all(model)
            pack_all(model)
        else:
            _become(model, convert(model, Recipe.from_dict(self.quantization_config.recipe), backend=self.quantization_config.backend,
                                   dtype=model.config.dtype))

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _check_config(folder: Path, header: dict[str, Any], config: PretrainedConfig) -> None:
    """Raises CheckpointError for a config that is another than the checkpoint's, as arguments of from_pretrained make it."""
    saved, given = (_fields(one) for one in (AutoConfig.for_model(**header["config"]), config))
    changed = [f"{key}={given.get(key)!r} instead of {saved.get(key)!r}" for key in sorted(saved.keys() | given.keys())
               if key not in _FREE and saved.get(key) != given.get(key)]
    if changed:
        raise CheckpointError(f"{folder} was saved with another config: {some(changed)}. Its codes and scales are of that one: leave these "
                              "arguments out, or change the float model and convert it again")


def _fields(config: PretrainedConfig) -> dict[str, Any]:
    return json.loads(config.to_json_string(use_diff=False))


def _become(model: nn.Module, other: nn.Module) -> None:
    """Make `model`, which transformers goes on with, the same as `other`."""
    model.__class__ = type(other)
    model.__dict__.clear()
    model.__dict__.update(other.__dict__)
