"""Models that FlatQuant's code has quantized and saved for real (`--quantized_save`; published as NAME-W4A4KV4-FlatQuant), as executed models of vitq.

The format, as the code of `ruikangliu/FlatQuant` (flatquant/flat_utils.py) writes it: safetensors in `model.safetensors`, or shards with an index, and
`quantization_config.json` {w_bits, model_name, symmetric, format: packed_int4, sharded}, which is in the metadata of the first file of tensors too.
Forks write a_bits, k_bits and v_bits as well. Published folders have in its place a `quantization_config` in `config.json` {quant_method: flatquant,
w_bits, a_bits, kv_bits, w_is_symmetric, a_is_symmetric, kv_is_symmetric}.

Tensors have the names that the parameters have there: `LAYER.linear.weight` uint8 [N, K/2], two's complement, the low nibble the even column, of weights
that are transformed, clamped and, for values, mixed; `quantizer.LAYER.linear.{scale, zero, maxq}`; norms and the rows of up_proj with `diag_scale` in
them; beside them the matrices and clips of `vitq.calib.flatquant`; all else in float16.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vitq.builders import BUILDERS
from vitq.calib.block_gradient import fitted
from vitq.calib.choose import cache_params
from vitq.calib.flatquant import INPUTS, FlatBlock, warn_of_spread
from vitq.calib.online import learned_cache
from vitq.calib.runner import specs
from vitq.checkpoint_files import CONFIG, FLATQUANT, GENERATION, INDEX, CheckpointError, read_json, read_tensors, some, tensor_files
from vitq.conversion import executed, float_dtype
from vitq.formats import ActivationFormat, unpack_int4
from vitq.models import Prepared, prepare
from vitq.models.adapter import replace
from vitq.models.language import source_names
from vitq.ops.dispatch import check_backend, pick_device
from vitq.plan import LinearParams, Plan
from vitq.recipe import FLOAT_BITS, Recipe

_REQUIRED: dict[str, tuple] = {"format": ("packed_int4",), "symmetric": (True,), "w_bits": (2, 3, 4)}
_BITS = tuple(range(2, 9))
_OPTIONAL: dict[str, tuple] = {"a_bits": _BITS, "k_bits": (*_BITS, FLOAT_BITS), "v_bits": (*_BITS, FLOAT_BITS), "q_bits": (FLOAT_BITS,),
                               "a_is_symmetric": (True,), "kv_is_symmetric": (True, False), "trans": ("matmul",), "fuseLN": (False,),
                               "sharded": (True, False)}
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_FLAT = re.compile(r"_trans\.|\.clip_factor_")  # names in a block of what `FlatBlock` takes
_RAW = re.compile(r"self_attn\.(o|kcache|vcache)_trans\.linear\.")  # what --direct_inv leaves beside the matrix that is made of it


def import_flatquant_checkpoint(folder: str | os.PathLike, device: str | torch.device | None = None, backend: str = "auto", *,
                                config: Any = None, dtype: torch.dtype | None = None) -> nn.Module:
    """The executed model of a folder that FlatQuant's code quantized and saved, in one call, without data and without its float weights.

    device: cpu by default. config: of the float model, one of transformers or a folder that holds `config.json`; default: the one in `folder`. Bits of
        inputs, keys and values that the folder does not tell are 4, keys and values in float where no transform of keys is there.
    dtype: of what stays in float, default as `vitq.convert` has it.
    The result is one of the recipe flatquant-w4a4kv4 (flatquant-w4a4 with keys and values in float), which `vitq.save` writes. q, k and v, and gate and up,
    read one input, whose clip is the mean of theirs, as `vitq.import_flatquant` has it; keys and values are clipped as was learned, in the cache and before,
    where FlatQuant's kernels do neither.

    Raises FileNotFoundError for a folder that does not say that it is FlatQuant's, or without a config; CheckpointError for another format, files that are
    missing, cut short or damaged, tensors that are missing, unknown or do not fit the config, each by its name; ImportError without transformers.
    """
    folder, device = Path(folder), pick_device(str(device or "cpu"))
    check_backend(backend, device)
    said = _said(folder)
    builder, header = BUILDERS["transformers"], _header(folder, config)
    tensors = read_tensors(folder)
    try:
        with builder.context():
            empty = builder.empty(header)
            rotary = getattr(getattr(empty, "model", None), "rotary_emb", None)
        if rotary is not None:
            empty.model.rotary_emb = type(rotary)(empty.config)  # whose frequencies are in no file
        with builder.context():
            prepared = prepare(empty, check=False)
        plan, stored = _plan(prepared, empty, tensors, said)
        _fill_floats(prepared, stored, tensors)
        if tensors:
            raise CheckpointError(f"{some(sorted(tensors))} are not known: nothing of this {header['architecture']} would use them")
        model = executed(prepared, plan, float_dtype(dtype, device), backend, device, ((layer, stored.pop(layer).params()) for layer in list(stored)))
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    model.vitq.source = {"name": said.get("model_name") or header["architecture"]}
    return model


def _said(folder: Path) -> dict[str, Any]:
    """What the folder says of its format, by the names of `quantization_config.json`, and kv_is_symmetric. Raises CheckpointError for another one."""
    published = read_json(folder / CONFIG).get("quantization_config") if (folder / CONFIG).is_file() else None
    published = published if isinstance(published, dict) else {}
    said = {"k_bits": published.get("kv_bits"), "v_bits": published.get("kv_bits"), **{key: published[key] for key in _OPTIONAL if key in published}}
    if (folder / FLATQUANT).is_file():
        said |= read_json(folder / FLATQUANT)
    elif (stored := _metadata(folder)) is not None:
        said |= stored
    elif published.get("quant_method") == "flatquant":
        said |= {"format": "packed_int4", "symmetric": published.get("w_is_symmetric"), "w_bits": published.get("w_bits")}
    else:
        raise FileNotFoundError(f"no model of FlatQuant in {folder}: {FLATQUANT} is missing, and neither {CONFIG} nor the tensors say that it is one")
    said = {key: value for key, value in said.items() if value is not None}
    for key, values in (*_REQUIRED.items(), *((key, values) for key, values in _OPTIONAL.items() if key in said)):
        if said.get(key) not in values:
            raise CheckpointError(f"{folder}: {key} is {said.get(key)!r}; vitq reads {' or '.join(map(repr, values))}")
    if "sharded" in said and said["sharded"] != (folder / INDEX).is_file():
        there = "is missing" if said["sharded"] else "is there"
        raise CheckpointError(f"{folder} is incomplete: {FLATQUANT} has sharded: {json.dumps(said['sharded'])}, and {INDEX} {there}; copy it again")
    return said


def _metadata(folder: Path) -> dict[str, Any] | None:
    """What the metadata of a file of tensors says of the format. A file that cannot be read is left to `read_tensors`."""
    for file in tensor_files(folder):
        with contextlib.suppress(SafetensorError, OSError, ValueError):
            with safe_open(folder / file, framework="pt") as opened:
                stored = json.loads((opened.metadata() or {}).get("quantization_config", "null"))
            if isinstance(stored, dict):
                return stored
    return None


def _header(folder: Path, config: Any) -> dict[str, Any]:
    """What `TransformersBuilder.empty` takes, of the float model's config."""
    if config is None or isinstance(config, (str, os.PathLike)):
        path = Path(folder if config is None else config) / CONFIG
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; give the float model's config, or a folder that holds it, as config=")
        fields = read_json(path)
    else:
        fields = json.loads(config.to_json_string(use_diff=False))
    fields.pop("quantization_config", None)
    names = fields.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(fields.get("model_type"), str):
        raise CheckpointError(f"the config of {folder} does not say which model it is of: it needs model_type, and one name in architectures")
    architecture, generation = names[0].removeprefix("FlatQuant"), folder / GENERATION
    fields.update(model_type=fields["model_type"].removesuffix("_FlatQuant"), architectures=[architecture])
    fields.pop("auto_map", None)  # code of its own, which does not run
    return {"architecture": architecture, "config": fields, "attention": "sdpa", "generation_config": read_json(generation) if generation.is_file() else {}}


@dataclass
class _Stored:
    """A linear layer as the folder has it: packed codes, scale, zero points, the largest code and bias of each layer that it stands for, by their names."""

    parts: dict[str, tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]]
    features: int
    bits: int
    input: ActivationFormat | None = None

    def params(self) -> LinearParams:
        """Raises CheckpointError for codes, scales or zero points that are not those of so many bits."""
        codes, scale = zip(*((self._codes(name), scale.float()[:, 0]) for name, (_, scale, *_) in self.parts.items()))
        biases = [bias for *_, bias in self.parts.values()]
        bias = None if all(one is None for one in biases) else torch.cat([torch.zeros(len(q)) if one is None else one for q, one in zip(codes, biases)])
        return LinearParams(torch.cat(codes), self.bits, torch.cat(scale), bias, self.input)

    def _codes(self, name: str) -> Tensor:
        """int8 [N, K]."""
        packed, scale, zero, top, _ = self.parts[name]
        if not bool((scale > 0).all()):
            raise CheckpointError(f"'quantizer.{name}.linear.scale' holds scales that are not above 0")
        if bool((zero != 0).any()) or int(top) != 2 ** (self.bits - 1) - 1:
            raise CheckpointError(f"'quantizer.{name}.linear' has zero points up to {float(zero.abs().max()):g} and the largest code {int(top)}; symmetric "
                                  f"weights of {self.bits} bits have 0 and {2 ** (self.bits - 1) - 1}")
        codes = unpack_int4(packed, self.features)
        if int(codes.max()) > int(top) or int(codes.min()) < -int(top) - 1:
            raise CheckpointError(f"'{name}.linear.weight' has codes {int(codes.min())} to {int(codes.max())}, {self.bits} bits hold {-int(top) - 1} to "
                                  f"{int(top)}")
        return codes


def _plan(prepared: Prepared, source: nn.Module, tensors: dict[str, Tensor], said: dict[str, Any]) -> tuple[Plan, dict[str, _Stored]]:
    """The plan of what the tensors say, which are taken out of the mapping, but for the linear layers, whose codes stay packed: these, by name.

    source: the empty model with its layers as they were.
    """
    names = [stage for stage in prepared.stages if all(f"{stage}.{layer}" in {site.name for site in prepared.linears} for layer in INPUTS)]
    if not names:
        raise CheckpointError(f"FlatQuant's models are Llama, Mistral, Qwen2 or Qwen3; a {type(source).__name__} is none")
    keys = any(name.endswith("self_attn.kcache_trans.matrix") for name in tensors)
    bits = {key: said.get(key, 4 if keys or key == "a_bits" else FLOAT_BITS) for key in ("a_bits", "k_bits", "v_bits")}
    cache = {role: n for role, n in (("qk", bits["k_bits"]), ("pv", bits["v_bits"]))}
    symmetric = json.dumps(said.get("kv_is_symmetric", False))
    recipe = Recipe.from_yaml("flatquant-w4a4" if set(cache.values()) == {FLOAT_BITS} else "flatquant-w4a4kv4").with_overrides([
        "transforms=[]", *(f"{role}.other.bits={n}" for role, n in cache.items()),
        *(f"{role}.other.symmetric={symmetric}" for role, n in cache.items() if n != FLOAT_BITS),
        *(f"{role}.{operand}.bits={n}" for role in ("qkv", "proj", "fc1", "fc2")
          for operand, n in (("weight", said["w_bits"]), ("input", bits["a_bits"])))])
    plan, learned, stored, blocks = Plan(recipe, specs(prepared, recipe)), {}, {}, []
    for name in names:
        inside = [key.removeprefix(f"{name}.") for key in tensors if key.startswith(f"{name}.")]
        block = FlatBlock(name, {key: tensors.pop(f"{name}.{key}") for key in inside if _FLAT.search(key) and not _RAW.match(key)})
        for layer, trans in INPUTS.items():
            sources = source_names(f"{name}.{layer}")
            linears = {one: source.get_submodule(one) for one in sources}
            features = linears[sources[0]].in_features
            learned[f"{name}.{layer}"] = block.input(layer, trans, features, [linear.out_features for linear in linears.values()])
            stored[f"{name}.{layer}"] = _Stored({one: _weight(tensors, one, linear) for one, linear in linears.items()}, features, said["w_bits"])
        learned.update({f"{name}.self_attn.{key}": params for key, params in block.cache().items()})
        block.done()
        blocks.append(block)
    warn_of_spread("FlatQuant's model", blocks)
    for key in [key for key in tensors if any(_RAW.match(key.removeprefix("quantizer.").removeprefix(f"{name}.")) for name in names)]:
        tensors.pop(key)
    given = fitted(prepared, plan, learned)
    for layer, linear in stored.items():
        linear.input = ActivationFormat(bits["a_bits"], dynamic=True, transform=given[layer].transform, clip=given[layer].clip)
    for site in prepared.caches:
        if base := cache_params(prepared, [site], plan):
            plan.layers[site.kv] = learned_cache(site, base[site.kv], given)
    return plan, stored


def _weight(tensors: dict[str, Tensor], name: str, linear: nn.Linear) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Of the layer `name`: codes uint8 [N, K/2], scale and zero [N, 1], the largest code [], and bias float32 [N], or None."""
    rows = linear.out_features
    packed = _take(tensors, f"{name}.linear.weight", (torch.uint8,), rows, (linear.in_features + 1) // 2)
    scale, zero, top = (_take(tensors, f"quantizer.{name}.linear.{key}", None, *shape) for key, shape in
                        (("scale", (rows, 1)), ("zero", (rows, 1)), ("maxq", ())))
    return packed, scale, zero, top, None if linear.bias is None else _take(tensors, f"{name}.linear.bias", FLOATS, rows).float()


def _fill_floats(prepared: Prepared, layers: Iterable[str], tensors: dict[str, Tensor]) -> None:
    """Give what stays in float, all but these layers, its values, which are taken out of the mapping. A tied tensor is there once."""
    model, filled = prepared.model, {}
    coded = {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if name not in coded:
            if parameter not in filled:
                filled[parameter] = nn.Parameter(_take(tensors, name, FLOATS, *parameter.shape).float(), requires_grad=False)
            replace(model, name, filled[parameter])
    if lost := [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta and name not in coded]:
        raise CheckpointError(f"{some(lost)} would have no values")


def _take(tensors: dict[str, Tensor], name: str, dtypes: tuple[torch.dtype, ...] | None, *shape: int) -> Tensor:
    """One tensor out of the mapping. dtypes: those it may have, None for any. Raises CheckpointError that names it."""
    if name not in tensors:
        raise CheckpointError(f"{name!r} is missing")
    tensor = tensors.pop(name)
    if tensor.shape != shape or dtypes is not None and tensor.dtype not in dtypes:
        wanted = "" if dtypes is None else f" {' or '.join(str(dtype)[6:] for dtype in dtypes)}"
        raise CheckpointError(f"{name!r} is {list(tensor.shape)} {str(tensor.dtype)[6:]}; the model needs {list(shape)}{wanted}")
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise CheckpointError(f"{name!r} holds NaN or infinite values")
    return tensor
