"""convert, simulate, calibrate, explain: from a float model to one that executes in integers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from vitq.calib.block_gradient import check_learned
from vitq.calib.blocks import STREAMS, collect_blocks, quantize_blocks
from vitq.calib.choose import check_statistics, choose, find_histogram, linear_params, observed_format
from vitq.calib.gram import GRAM_MEMORY, gram_of
from vitq.calib.heads import check_choice_of_heads, choose_heads, statistics_of_parts
from vitq.calib.histogram import LEAST_BINS, Histogram
from vitq.calib.online import Sizes, hadamard_input, input_sizes, mixed_values
from vitq.calib.resume import kept_heads
from vitq.calib.runner import check_calibration, collect, limited, operands_of, specs
from vitq.calib.simulate import simulate as _simulate
from vitq.calib.statistics import Statistics
from vitq.models import Prepared, prepare
from vitq.models.attention import RelativePositionBias
from vitq.models.adapter import is_plain_layer_norm, replace
from vitq.models.heads import part_heads
from vitq.nn.attention import QuantAttention
from vitq.nn.decoder_block import QuantGatedMlp, decoder_block
from vitq.nn.block import QuantBlock, QuantMlp, QuantPatchMerging
from vitq.nn.key_values import QuantKeyValues
from vitq.nn.linear import CodedLinear, QuantLinear, QuantPatchConv
from vitq.nn.model import ModelInfo, QuantizedDecoder, QuantizedModel, QuantizedSwin, QuantizedVit, casting_class, quantized_class
from vitq.nn.norm import FloatLayerNorm, QuantLayerNorm
from vitq.nn.packed import PackedModule, Row, pack_all
from vitq.nn.weight_only import WeightOnlyLinear
from vitq.ops import dispatch
from vitq.ops.dispatch import check_backend, default_dtype, device_of
from vitq.plan import CacheParams, InputParams, LinearParams, Plan
from vitq.recipe import LayerSpec, Recipe

_FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def convert(model: nn.Module, recipe: str | Recipe | None = None, calib: Iterable | Statistics | None = None,
            backend: str = "auto", *, dtype: torch.dtype | None = None, statistics: Statistics | None = None, memory: float = GRAM_MEMORY,
            progress: Callable[[int], None] | None = None, stream: str | None = None, device: str | torch.device | None = None,
            resume: str | Path | None = None, learned: Mapping[str, InputParams] | None = None) -> nn.Module:
    """A new model that executes in integers; the given one is not touched.

    model: a timm VisionTransformer, VisionTransformerDistilled or SwinTransformer; or a Llama, Mistral, Qwen2, Qwen3, OPT or Falcon
        ForCausalLM of transformers, for which images below are batches of token ids [B, T].
    recipe: a name from `vitq.recipes()`, a YAML path, or a Recipe. Default: `w8a8-dynamic` without calib, `w8a8` with.
    calib: what a static recipe measures its activation ranges on: any iterable of image batches (tensors [B, C, H, W],
        (images, labels) pairs, a DataLoader) preprocessed as the model expects, of which at most `recipe.calib_size`
        images are read, or the `Statistics` that `vitq.calibrate` returned.
        A solver that looks at the inputs (`recipe.needs_inputs`) needs the images; they are then kept and read twice. So does a recipe that
        chooses heads by them (`recipe.scores_heads`), which the whole float model does on its own device, with stream= too.
    backend: auto (the device's own), reference, cpu or cuda.
    statistics: ranges that `vitq.calibrate` measured before; images in calib are then for the solver and the scores of heads alone.
    memory: bytes that the Gram matrices of such a solver may take at once; with less, the images are read more often.
    dtype: of what stays in float; default float16 on cuda, bfloat16 on a CPU with AMX or AVX512-BF16, else float32.
        Logits of images are float32 always; those of text where the head is quantized.
    progress: called with the number of images of each calibration batch, each time that it is read; what stream= does is counted once a block.
    stream: None: the whole model is calibrated on its own device. Else one block at a time is on `device` while the rest of the float32
        copy stays where the model is, and hidden states wait on the CPU, in float32. `float`: each block reads what the float model gives it,
        and the result is that of None, bit for bit where the device is the same; `quantized`: what the quantized blocks before it give, and in a
        block each group of layers that share an input what the quantized groups before it give.
    device: with stream=, where blocks are calibrated, cpu or cuda (default: the model's device). The result is on the model's device all the same.
    resume: with stream=, a folder in which each finished block is kept; the same call goes on after them. Processes that `torchrun` started share the
        blocks of stream='float' by way of it, and each returns the whole model, the same but for last digits. With stream='float' it holds
        `statistics.safetensors` at the end, for `Statistics.load`; not of a recipe with heads, whose layers are in parts by then.
    learned: of a recipe with block_gradient, what was learned elsewhere, as `vitq.import_flatquant` reads it. Nothing is learned then, the recipe's
        transforms are left out, which would be where learning starts, and only a solver that looks at the inputs needs calib.

    Raises ValueError (a static recipe without calib, unusable data, NaN weights, an unknown block, a bad recipe) or
    TypeError, naming what was given and what to do; with stream=, torch.OutOfMemoryError that says what is kept.
    """
    recipe = _recipe(recipe, calib)
    if recipe.execution == "simulated":
        raise ValueError(f"recipe {recipe.name!r} is for simulation: integer kernels do not compute all that it holds; vitq.simulate runs it")
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    check_backend(backend, None if parameter is None else parameter.device)
    prepared, plan = quantize(model, recipe, calib, statistics=statistics, memory=memory, progress=progress, stream=stream, device=device,
                              resume=resume, learned=learned)
    return executed(prepared, plan, float_dtype(dtype, parameter.device), backend, parameter.device)


def executed(prepared: Prepared, plan: Plan, dtype: torch.dtype, backend: str, device: torch.device,
             linears: Iterable[tuple[str, LinearParams]] = ()) -> nn.Module:
    """What the plan makes of `prepared`, whose model it takes, on the device and ready to run. linears: of linear layers that the plan has none of, by
    name, each asked for when the one before is in its module."""
    converted = build(prepared, plan.recipe, plan.specs, dtype=dtype, backend=backend, notes=plan.notes)
    parts: dict[str, list[CacheParams]] = {}
    for site in prepared.caches:
        if site.kv in plan.layers:
            parts.setdefault(f"{site.name}.kv", []).append(plan.layers[site.kv])
    for name, params in chain(plan.layers.items(), linears):
        if not isinstance(params, CacheParams):
            converted.get_submodule(name).set_params(params)
    for name, params in parts.items():
        converted.get_submodule(name).set_params(params)
    converted.vitq.calibration = {"images": plan.samples}
    converted = converted.to(device)  # which links the modules too
    pack_all(converted)
    return converted


def simulate(model: nn.Module, recipe: str | Recipe | None = None, calib: Iterable | Statistics | None = None, *,
             statistics: Statistics | None = None, memory: float = GRAM_MEMORY, stream: str | None = None,
             device: str | torch.device | None = None, resume: str | Path | None = None, learned: Mapping[str, InputParams] | None = None) -> nn.Module:
    """The float32 model that `convert` with the same arguments must reproduce in integers, by fake quantization."""
    prepared, plan = quantize(model, _recipe(recipe, calib), calib, statistics=statistics, memory=memory, stream=stream, device=device, resume=resume,
                              learned=learned)
    return _simulate(prepared, plan)


def calibrate(model: nn.Module, recipe: str | Recipe | Sequence[str | Recipe] = "w8a8", calib: Iterable = (), *,
              progress: Callable[[int], None] | None = None, stream: str | None = None,
              device: str | torch.device | None = None) -> Statistics:
    """Collect the statistics that `recipe` needs, or each of several, once; `convert` and `simulate` take them in place of images.

    Of several recipes what one needs by channel serves the others too, whose ranges may then differ in the last digits.
    stream: 'float': with one block on `device` at a time, as `convert` does it; statistics are of the float model always.
    """
    several = [recipe] if isinstance(recipe, (str, Recipe)) else list(recipe)
    if not several:
        raise ValueError("no recipe to calibrate for: give one, or several")
    recipes, device = [_recipe(one, calib) for one in several], _calibration_device(stream, device)
    if stream == "quantized":
        raise ValueError("statistics are of the float model: give stream='float', or None")
    prepared = prepare(model)
    for one in recipes:
        if one.heads:
            check_choice_of_heads(prepared, one)
    if stream is None:
        return collect(prepared, recipes, calib, progress=progress)
    return collect_blocks(prepared, recipes, calib, device=device, progress=progress)


def quantize(model: nn.Module, recipe: Recipe, calib: Iterable | Statistics | None, *, statistics: Statistics | None = None,
             memory: float = GRAM_MEMORY, progress: Callable[[int], None] | None = None, stream: str | None = None,
             device: str | torch.device | None = None, resume: str | Path | None = None,
             learned: Mapping[str, InputParams] | None = None) -> tuple[Prepared, Plan]:
    """Choose scales and codes: the prepared float model (transforms applied) and the plan for each of its layers."""
    device = _calibration_device(stream, device, resume)
    if learned is not None:
        if not recipe.learns or recipe.heads:
            why = "has heads, which were learned as parts of whole attentions" if recipe.learns else "learns nothing"
            raise ValueError(f"recipe {recipe.name!r} {why}: learned= is for one with block_gradient, such as 'flatquant-w4a4kv4'")
        recipe = dataclasses.replace(recipe, transforms=(), transform_options={})
    learns = recipe.learns and learned is None
    if (recipe.is_static and statistics is None or recipe.needs_inputs or learns or recipe.scores_heads) and calib is None:
        what = "learns by block_gradient" if learns else "is static" if recipe.is_static and statistics is None else \
            f"solves by {recipe.solver!r}" if recipe.needs_inputs else "chooses heads by what they write"
        statistics_too = "" if learns or recipe.needs_inputs or recipe.scores_heads else ", or the statistics of vitq.calibrate"
        raise ValueError(f"recipe {recipe.name!r} {what}: give calib= (an iterable of batches of preprocessed images or of token ids{statistics_too}), or use the recipe 'w8a8-dynamic', which needs no data")
    if not memory > 0:
        raise ValueError(f"memory must be a number of bytes above 0; got {memory}")
    prepared = prepare(model)
    stats, data = (calib, None) if isinstance(calib, Statistics) else (statistics, calib)
    scored = recipe.scores_heads  # by data that a folder's run is then of, whether a layer reads them or not
    if recipe.heads:
        if stats is not None:
            check_statistics(stats, prepared)
        if resume is not None and (chosen := kept_heads(resume, recipe, prepared.heads)) is not None:
            recipe = dataclasses.replace(recipe, heads={**recipe.heads, "chosen": chosen})
        if recipe.scores_heads:
            if data is None:
                raise ValueError(f"recipe {recipe.name!r} chooses heads by what they write, which statistics do not tell: give the calibration "
                                 f"{prepared.samples} as calib= and these as statistics=, or the choice as heads.chosen")
            data = _kept(data, recipe, prepared)
            check_calibration(data, recipe, prepared)
        recipe = choose_heads(prepared, recipe, data, progress)
        part_heads(prepared, recipe.heads["chosen"])
        stats = None if stats is None else statistics_of_parts(stats, prepared, recipe.heads["chosen"])
    for site in prepared.linears:
        spec = recipe.resolve(site.role, site.name)
        if site.role == "patch_embed" and not spec.is_float and spec.input.dynamic:
            raise ValueError(f"recipe {recipe.name!r} asks for a dynamic input of {site.name!r}: a patch embedding reads "
                             "pixels, which have no token yet; use a static input or bits: 16")
    if recipe.learns and stream is None:  # which goes block by block
        stream = "float"
    if stream is None and data is not None and recipe.needs_inputs:  # read more than once, and a loader may shuffle
        data = _kept(data, recipe, prepared)
        if stats is not None or not recipe.is_static:  # nothing else looks at them first
            check_calibration(data, recipe, prepared)
    if stream is not None:
        if (recipe.needs_inputs or learns) and data is None:
            who = f"the solver {recipe.solver!r} looks at the inputs of each layer" if recipe.needs_inputs else "block_gradient learns from the inputs"
            raise ValueError(f"recipe {recipe.name!r}: {who}, so it needs the calibration {prepared.samples} themselves, not statistics of them")
        if not (recipe.needs_inputs or learns or recipe.is_static and stats is None or scored):
            data = None  # nobody looks at it
        plan, _ = quantize_blocks(prepared, recipe, data, stream=stream, device=device, statistics=stats if recipe.is_static else None, memory=memory,
                                  resume=resume, share=_share(stream, resume), progress=progress, learned=learned)
        return prepared, plan
    if stats is None and recipe.is_static:
        stats = collect(prepared, [recipe], data, progress=progress)
    return prepared, choose(prepared, recipe, stats, data, memory, progress)


def _share(stream: str, resume: str | Path | None) -> tuple[int, int]:
    """(rank, processes) of those that `torchrun` started, where they have a folder to share the blocks of a float stream by."""
    rank, processes = (os.environ.get(name) for name in ("RANK", "WORLD_SIZE"))
    shared = "LOCAL_RANK" in os.environ and rank is not None and processes is not None and resume is not None and stream == "float"
    return (int(rank), int(processes)) if shared else (0, 1)


def _kept(calib: Iterable, recipe: Recipe, prepared: Prepared) -> Iterable:
    """What is read of `calib`, to be read again."""
    return calib if isinstance(calib, (list, tuple, Tensor)) else list(limited(calib, recipe.calib_size, prepared.tokens))


def build(prepared: Prepared, recipe: Recipe, layer_specs: dict[str, LayerSpec], *, dtype: torch.dtype, backend: str,
          notes: dict[str, str] | None = None) -> nn.Module:
    """Swap the modules of `prepared.model` for integer ones, their buffers still empty (zeros and ones)."""
    model = prepared.model
    roles = {site.name: site.role for site in prepared.linears}
    floats = {site.name: site.reason for site in prepared.floats}
    heads = mixed_values(prepared, layer_specs)
    for site in prepared.linears:
        source, spec = model.get_submodule(site.name), layer_specs[site.name]
        if spec.is_float:
            floats[site.name] = "the recipe leaves it in float"
        elif isinstance(source, nn.Conv2d):
            replace(model, site.name, QuantPatchConv(source, spec, dtype=dtype, backend=backend))
        else:
            out = torch.float32 if site.role == "head" else dtype
            replace(model, site.name, _coded(source, spec, out, backend, input_sizes(site.name, spec, source.in_features, heads)))
    for site in prepared.attentions:
        replace(model, site.name, QuantAttention(model.get_submodule(site.name), layer_specs[site.qk], layer_specs[site.pv],
                                                 dtype=dtype, backend=backend))
    caches: dict[str, list] = {}
    for site in prepared.caches:
        caches.setdefault(site.name, []).append((site.heads, *(layer_specs[name].cached if name in layer_specs else None for name in (site.qk, site.pv))))
    for name, parts in caches.items():
        if all(spec is None for _, *specs in parts for spec in specs):
            parts = [(None, None, None)]
        replace(model, f"{name}.kv", QuantKeyValues(model.get_submodule(name).head_dim, parts, backend=backend))
    for site in prepared.mlps:
        replace(model, site.name, QuantMlp(model.get_submodule(site.name), site.activation, backend=backend))
    for site in prepared.blocks:
        block = model.get_submodule(site.name)
        if site.kind == "decoder":
            parts = (block.self_attn.qkv_proj, block.self_attn.o_proj, block.mlp.gate_up_proj, block.mlp.down_proj)
            if all(isinstance(part, QuantLinear) for part in parts):
                replace(model, site.name, decoder_block(block, backend))
            continue
        linears = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
        if all(isinstance(linear, QuantLinear) for linear in linears):
            window = dict(window=tuple(block.window_size), shift=tuple(block.shift_size)) if site.kind == "window" else {}
            replace(model, site.name, QuantBlock(block, **window, backend=backend))
        elif site.kind == "window" and any(isinstance(linear, QuantLinear) for linear in linears):
            raise ValueError(f"recipe {recipe.name!r} leaves a linear layer of {site.name!r} or its input in float: a Swin block runs "
                             "quantized as a whole or not at all; give its qkv, proj, fc1 and fc2 bits <= 8, or the inputs of all 16")
    for site in prepared.merges:
        merging = model.get_submodule(site.name)
        if isinstance(merging.reduction, QuantLinear):
            replace(model, site.name, QuantPatchMerging(merging, backend=backend))
    for name, module in list(model.named_modules()):
        if is_plain_layer_norm(module) and module.weight is not None:
            replace(model, name, FloatLayerNorm(module, dtype=dtype, backend=backend))
    _cast_rest(model, prepared, layer_specs, dtype)
    base = QuantizedDecoder if prepared.tokens else QuantizedModel
    if prepared.stem is not None and isinstance(model.patch_embed.proj, QuantPatchConv):
        base = {"tokens": QuantizedVit, "image": QuantizedSwin}[prepared.stem.kind]
    model.__class__ = quantized_class(type(model), base)
    model.vitq = ModelInfo(recipe, roles, dict(notes or {}), floats, dtype, backend, stem=prepared.stem)
    return model


def _coded(linear: nn.Linear, spec: LayerSpec, dtype: torch.dtype, backend: str, matrices: Sizes = (None, None)) -> CodedLinear:
    """The module that takes the linear's place, its buffers still empty. matrices: sizes of those that its input is multiplied by."""
    if spec.weight_only:
        return WeightOnlyLinear(linear.in_features, linear.out_features, spec, dtype=dtype, backend=backend)
    return QuantLinear(linear.in_features, linear.out_features, spec, dtype=dtype, backend=backend, matrices=matrices)


def _cast_rest(model: nn.Module, prepared: Prepared, layer_specs: dict[str, LayerSpec], dtype: torch.dtype) -> None:
    """What stays in float takes `dtype`; a float head of a few classes stays float32, since it makes the logits."""
    heads = [] if prepared.tokens else [model.get_submodule(s.name) for s in prepared.linears if s.role == "head" and layer_specs[s.name].is_float]
    exact = [model.get_submodule(name) for name in prepared.exact]
    for module in exact:  # a checkpoint holds them: another device computes them anew to other last bits
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, buffer)
    kept = [*heads, *exact]
    for module in model.modules():
        if isinstance(module, (PackedModule, RelativePositionBias)) or any(module is other for other in kept):
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(module, name, buffer.to(dtype))
    for head in heads:
        head.__class__ = casting_class(type(head))
    if not prepared.tokens and (not isinstance(getattr(model.patch_embed, "proj", None), QuantPatchConv) or hasattr(model.patch_embed, "backbone")):
        model.patch_embed.__class__ = casting_class(type(model.patch_embed))


def linear_module(linear: nn.Linear, recipe: str | Recipe = "w8a8-dynamic", sample: Tensor | Histogram | None = None, *,
                  role: str = "fc1", backend: str = "auto", dtype: torch.dtype | None = None) -> nn.Module:
    """One `nn.Linear` as an integer module by the rules that `recipe` has for `role`: [..., K] float -> [..., N] float.

    sample: activations [..., K] to measure ranges on and to solve by, or where the recipe's solver looks at none a `Histogram` of them, by
    channel for a recipe with outliers (`vitq.Statistics` holds those of a model). Raises ValueError if a recipe that needs them gets none.
    Also as `vitq.QuantLinear.from_float`.
    """
    recipe = _recipe(recipe, sample)
    if recipe.heads:
        raise ValueError(f"recipe {recipe.name!r} has heads, and one linear layer has none: give a recipe without, or convert the model")
    if recipe.learns:
        raise ValueError(f"recipe {recipe.name!r} learns by block_gradient, from whole blocks: convert the model, or give transform: hadamard")
    if not isinstance(sample, (Tensor, Histogram, type(None))):
        raise TypeError(f"sample must be activations [..., {linear.in_features}], or a Histogram of them (statistics['NAME:input']); got a "
                        f"{type(sample).__name__}")
    features = sample.shape[-1] if isinstance(sample, Tensor) else linear.in_features if sample is None else sample.channels or linear.in_features
    if features != linear.in_features:
        raise ValueError(f"sample has {features} features, the layer {linear.in_features}")
    spec = recipe.resolve(role, role)
    if spec.is_float:
        raise ValueError(f"recipe {recipe.name!r} leaves role {role!r} in float")
    fmt = None
    if not spec.weight_only:
        if sample is None and (not spec.input.dynamic or spec.input.outliers):
            what = "has float16 columns" if spec.input.dynamic else "is static"
            raise ValueError(f"recipe {recipe.name!r} {what}: give sample=, activations to measure ranges on")
        fmt = observed_format(sample, spec.input)
        if (mixing := hadamard_input(role, spec, linear.in_features, {})) is not None:
            fmt = dataclasses.replace(fmt, transform=mixing.transform)
        if spec.input.outliers and fmt.columns is None:  # all below the threshold
            spec = dataclasses.replace(spec, input=dataclasses.replace(spec.input, outliers=0))
    gram = None
    if recipe.needs_inputs:
        if not isinstance(sample, Tensor):
            raise ValueError(f"recipe {recipe.name!r} solves by {recipe.solver!r}: give sample=, activations to look at")
        gram = gram_of(sample.to(linear.weight.device), fmt)
    module = _coded(linear, spec, float_dtype(dtype, linear.weight.device), backend, input_sizes(role, spec, linear.in_features, {}))
    module.set_params(linear_params(linear, spec, recipe, fmt, gram))
    module = module.to(linear.weight.device)
    pack_all(module)
    return module


def check(model: nn.Module, recipe: str | Recipe | Sequence[str | Recipe], statistics: Statistics | None = None) -> None:
    """Raises as `convert` with these arguments would, for what can be known without data: an unknown block, rules that match no layer or do not go
    together, heads of which the model has too few, statistics of another model or of operands that the recipe does not need.

    The model is copied without its weights; with statistics, which its float32 weights are compared with, as `convert` copies it.
    """
    prepared = prepare(model, weights=statistics is not None)
    if statistics is not None:
        check_statistics(statistics, prepared)
    for one in [recipe] if isinstance(recipe, (str, Recipe)) else recipe:
        one = _recipe(one, ())
        if one.heads:
            check_choice_of_heads(prepared, one)
        wanted = operands_of(prepared, [one])
        if one.learns:
            check_learned(prepared, specs(prepared, one), one)
        if statistics is not None:
            for key, operand in wanted.items():
                find_histogram(statistics, key, operand.channels, LEAST_BINS if operand.bins == LEAST_BINS else LEAST_BINS + 1)


# By the name that others give it; here, since a module knows nothing of calibration.
QuantLinear.from_float = staticmethod(linear_module)


def tune(model: nn.Module, images: Tensor) -> dict[str, dict[str, float]]:
    """Find the fastest tile for every GEMM of model(images) on this GPU, and remember it for later runs of any model.

    images: a batch as it will be used, [B, C, H, W]; the choice depends on its size. It is kept in a file by GPU, driver and build
    (folder VITQ_CACHE, or vitq in the user's cache folder). Graphs and compiled models made before keep their tiles.
    Returns microseconds by GEMM and tile, fastest first. Raises TypeError for a model that vitq did not convert, ValueError without a
    GPU or without the CUDA library.
    """
    model_info(model)
    device = next(model.buffers()).device

    def run() -> None:
        with torch.inference_mode():
            model(images.to(device))

    return dispatch.tune(run, device)


def explain(model: nn.Module) -> list[Row]:
    """One row a layer: role, format, the backend and kernel that run it, bytes stored and in memory, and why where it fell back.

    Raises TypeError for a model that vitq did not convert.
    """
    info = model_info(model)
    rows, counted = [], set()  # a tied weight counts where it comes first
    device = device_of(model)
    for name, module in model.named_modules():
        if isinstance(module, CodedLinear):
            rows.append(module.row(name, info.roles[name], info.notes.get(name, "")))
        elif isinstance(module, QuantAttention):
            rows += module.rows(name)
        elif isinstance(module, QuantKeyValues):
            rows += filter(None, [module.row(name, device)])
        elif isinstance(module, QuantGatedMlp):
            rows += filter(None, [module.row(name)])
        elif isinstance(module, (QuantLayerNorm, FloatLayerNorm)):
            rows.append(module.row(name))
        elif name in info.floats:
            own = module.parameters(recurse=bool(name))  # the root row is for its own tokens and embeddings
            own = [p for p in own if id(p) not in counted]
            counted.update(map(id, own))
            size = sum(p.numel() * p.element_size() for p in own)
            rows.append(Row(name or type(module).__name__, info.roles.get(name, "float"), str(info.dtype)[6:], "torch",
                            "torch", size, size, info.floats[name]))
    return rows


def model_info(model: nn.Module) -> ModelInfo:
    info = getattr(model, "vitq", None)
    if not isinstance(info, ModelInfo):
        raise TypeError(f"expected a model that vitq.convert or vitq.load returned, got {type(model).__name__}")
    return info


def _recipe(recipe: str | Recipe | None, calib: object) -> Recipe:
    if recipe is None:
        recipe = "w8a8-dynamic" if calib is None else "w8a8"
    if isinstance(recipe, Recipe):
        return recipe
    return Recipe.from_yaml(recipe)


def _calibration_device(stream: str | None, device: str | torch.device | None, resume: str | Path | None = None) -> torch.device | None:
    """Where blocks are calibrated, None for the model's own device. Raises ValueError for a stream or a device that there is not."""
    if stream is None and (device is not None or resume is not None):
        raise ValueError(f"{'device' if device is not None else 'resume'}= is for calibration block by block: give stream='float' or "
                         "stream='quantized' too")
    if stream is not None and stream not in STREAMS:
        raise ValueError(f"stream must be None, {' or '.join(map(repr, STREAMS))}, got {stream!r}")
    return None if device is None else dispatch.pick_device(str(device))


def float_dtype(dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    """What stays in float on `device`, by default or as asked for. Raises ValueError for what is not a 16- or 32-bit float."""
    if dtype is None:
        return default_dtype(device.type)
    if dtype not in _FLOAT_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(str(d) for d in _FLOAT_DTYPES)}, got {dtype}")
    return dtype
