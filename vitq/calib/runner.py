"""Calibration: run images through the float model once and observe every operand that the recipe quantizes statically."""

from __future__ import annotations

import fnmatch
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitq.calib.histogram import LEAST_BINS, Histogram
from vitq.calib.online import divisible
from vitq.calib.statistics import Statistics
from vitq.models.heads import PARTS
from vitq.models.sites import LinearSite, Prepared
from vitq.recipe import FLOAT_BITS, LayerSpec, QuantSpec, Recipe

log = logging.getLogger("vitq")


def specs(prepared: Prepared, recipe: Recipe) -> dict[str, LayerSpec]:
    """What the recipe asks of each linear and each attention matmul, by layer name; of a matmul in float only where it quantizes a cache. Of a layer
    that is to be put into parts it is what it asks of these."""
    parts = parts_to_come(prepared, recipe)
    found = {name: recipe.resolve(site.role, name) for site in prepared.linears for name in parts.get(site.name, (site.name,))}
    layers = [*found, *(name for site in (*prepared.attentions, *prepared.caches) for name in (site.qk, site.pv))]
    if recipe.heads:  # in parts, of which a layer may lack one
        layers += [f"{name}.{part}" for site in prepared.heads for name in (site.qkv, site.proj) for part in PARTS]
        layers += [f"{site.name}.{matmul}.{part}" for site in prepared.caches for matmul in ("qk", "pv") for part in PARTS]
    for pattern in (pattern for rule in recipe.rules for pattern in rule.names):
        if not fnmatch.filter(layers, pattern):
            raise ValueError(f"recipe {recipe.name!r}: the name pattern {pattern!r} matches no layer; the model's are "
                             f"{', '.join(layers[:3])}, …")
    for site in prepared.attentions:
        qk, pv = recipe.resolve("qk", site.qk), recipe.resolve("pv", site.pv)
        if qk.is_float != pv.is_float:
            raise ValueError(f"recipe {recipe.name!r} leaves {'q·k' if qk.is_float else 'p·v'} of {site.name!r} in float "
                             "and quantizes the other: one kernel runs both, so give qk and pv both <= 8 bits or both 16")
        if qk.cached or pv.cached:
            raise ValueError(f"recipe {recipe.name!r} quantizes keys or values of {site.name!r} as they enter a cache, and a model of images has none: "
                             "give qk and pv static operands of <= 8 bits, or 16 bits")
        found[site.qk], found[site.pv] = qk, pv
    return found | cache_specs(prepared, recipe)


def parts_to_come(prepared: Prepared, recipe: Recipe) -> dict[str, list[str]]:
    """The names of the parts of each linear layer that the recipe's heads will divide, by its own; none where it is done."""
    there = {site.name for site in prepared.linears}
    return {name: [f"{name}.{part}" for part in PARTS] for site in prepared.heads if recipe.heads for name in (site.qkv, site.proj) if name in there}


def cache_specs(prepared: Prepared, recipe: Recipe) -> dict[str, LayerSpec]:
    """The attention matmuls of a language model whose keys or values are quantized as they enter the cache, by name."""
    found: dict[str, LayerSpec] = {}
    layers = [(role, name) for site in prepared.caches for role, name in (("qk", site.qk), ("pv", site.pv))]
    for role, name in layers or ([("qk", None), ("pv", None)] if prepared.tokens else []):
        spec, what = recipe.resolve(role, name), "keys" if role == "qk" else "values"
        if spec.input.bits != FLOAT_BITS or spec.other.bits == FLOAT_BITS:
            continue
        if name is None:
            raise ValueError(f"recipe {recipe.name!r} quantizes {what} as they enter the cache, but a {type(prepared.model).__name__} keeps the "
                             f"attention of transformers, which hands them to no module of vitq: leave out kv.bits, or give {role}.other 16 bits")
        if not spec.cached:
            raise ValueError(f"recipe {recipe.name!r} asks for static {what} of {name!r}, whose attention runs in float: in a cache their scales are "
                             f"found for each token; give {role}.other dynamic: true (or --set kv.bits={spec.other.bits}), or 16 bits")
        found[name] = spec
    return found


def transform_of(sites: list[LinearSite], found: Mapping[str, LayerSpec], recipe: Recipe, model: nn.Module) -> str | None:
    """The recipe's transform if sites that share an input take it, else None. `layernorm_fold` needs static inputs of one format."""
    inputs = [found[site.name].input for site in sites if not found[site.name].is_float and not found[site.name].weight_only]
    if not recipe.transforms or not inputs or not divisible(model, sites):
        return None
    transform = recipe.transforms[0]
    if transform == "layernorm_fold" and (sites[0].norm is None or inputs[0].dynamic or any(spec != inputs[0] for spec in inputs)):
        return None
    return transform


def heads_of(attention: nn.Module, spec: QuantSpec) -> int | None:
    """How many scales an operand of this attention has, None for one of all heads together."""
    return attention.num_heads if spec.granularity == "per_head" else None


# What a batch may be, and under which keys of a mapping its tensor lies.
IMAGES = ("calibration data must yield image batches: a tensor [B, C, H, W], an (images, labels) pair, or a dict with 'image' or 'pixel_values'",
          ("image", "images", "pixel_values"))
TOKENS = ("calibration data must yield batches of token ids: a tensor [B, T], an (ids, labels) pair, or a mapping with 'input_ids'", ("input_ids",))


def inputs_of(batch: object, tokens: bool = False) -> Tensor:
    """The images, or token ids, of a batch that is a tensor, an (inputs, labels …) sequence, or a mapping. Raises TypeError for another."""
    allowed, keys = TOKENS if tokens else IMAGES
    if isinstance(batch, Mapping):
        batch = next((batch[key] for key in keys if key in batch), None)
    elif isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if not isinstance(batch, Tensor):
        raise TypeError(f"{allowed}; got {type(batch).__name__}")
    return batch


def check_tokens(ids: Tensor, model: nn.Module) -> None:
    """Raises ValueError or TypeError unless `ids` are token ids [B, T] that `model` has."""
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"token ids must be integers, got {ids.dtype}")
    if ids.ndim != 2 or not ids.shape[1]:
        raise ValueError(f"token ids must have shape [batch, tokens], got {list(ids.shape)}")
    size = model.get_input_embeddings().num_embeddings
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise ValueError(f"token ids must be 0 to {size - 1} for this model, got {int(ids.min())} to {int(ids.max())}")


def checked(data: Iterable, limit: int, prepared: Prepared) -> Iterator[Tensor]:
    """Batches of what the model reads, each fit for it, cut off after `limit` images or sequences."""
    check = check_tokens if prepared.tokens else check_images
    for batch in limited(data, limit, prepared.tokens):
        check(batch, prepared.model)
        yield batch


def check_images(images: Tensor, model: nn.Module) -> None:
    """Raises ValueError or TypeError unless `images` is a finite float batch of the size that `model` takes."""
    embed = model.patch_embed
    channels = getattr(model, "in_chans", None) or 3
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point and preprocessed as the model expects, got {images.dtype}: apply "
                        "timm.data.create_transform(**timm.data.resolve_model_data_config(model))")
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(f"images must have shape [batch, {channels}, height, width], got {list(images.shape)}: give batches, "
                         "for a dataset of single images vitq.batches(dataset, 32)")
    size, strict = getattr(embed, "img_size", None), getattr(embed, "strict_img_size", True)
    if size is not None and strict and tuple(images.shape[2:]) != tuple(size):
        raise ValueError(f"images must be {size[0]}x{size[1]} for this model, got {images.shape[2]}x{images.shape[3]}: resize "
                         "them, or build the model with img_size=… or dynamic_img_size=True")
    # timm's PatchEmbed asserts this itself; a convolutional stem (backbone) has its own strides.
    patch = None if strict or size is None or hasattr(embed, "backbone") else embed.patch_size
    if patch and not embed.dynamic_img_pad and any(s % p for s, p in zip(images.shape[2:], patch)):
        raise ValueError(f"images must be a multiple of the patch size {patch[0]}x{patch[1]}, got {images.shape[2]}x"
                         f"{images.shape[3]}: resize them")
    bad = ~torch.isfinite(images).flatten(1).all(dim=1)
    if bad.any():
        raise ValueError(f"image {int(bad.nonzero()[0])} of a batch holds NaN or infinite values")


def limited(data: Iterable, limit: int, tokens: bool = False) -> Iterator[Tensor]:
    """Batches of images (or token ids) of `data`, of which one tensor is one batch, cut off after `limit` of them."""
    seen = 0
    data = [data] if isinstance(data, Tensor) else data
    for batch in data:
        images = inputs_of(batch, tokens)[: limit - seen]
        seen += len(images)
        if len(images):
            yield images
        if seen >= limit:
            return


def reported(batches: Iterable[Tensor], progress: Callable[[int], None] | None) -> Iterator[Tensor]:
    """The batches; after each was used, progress is called with the number of its images or sequences."""
    for batch in batches:
        yield batch
        if progress is not None:
            progress(len(batch))


@contextmanager
def exact_float32() -> Iterator[None]:
    """TF32 off inside: statistics must not depend on the GPU's reduced-precision modes."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


class Operand(NamedTuple):
    """What is observed under one key: a module's input, or its output; channels and bins as of `Histogram`, dim the channels'."""

    module: nn.Module
    at_input: bool
    channels: int | None = None
    bins: int | None = None
    dim: int = -1


def operands(prepared: Prepared, recipe: Recipe) -> dict[str, Operand]:
    """Every operand whose statistics the recipe needs, by its key. Layers that are to be put into parts are observed whole, and proj, of which each
    part reads some features, by channel."""
    model, found, layer_specs = prepared.model, {}, specs(prepared, recipe)
    parts, divided = parts_to_come(prepared, recipe), {site.proj for site in prepared.heads if recipe.heads}
    for whole in prepared.input_groups():
        named = [(name, site) for site in whole for name in parts.get(site.name, (site.name,))]
        sites = [replace(site, name=name) for name, site in named]
        inputs = [layer_specs[site.name].input for site in sites]
        by_channel = transform_of(sites, layer_specs, recipe, model) is not None or any(s.outliers for s in inputs if s.bits != FLOAT_BITS)
        for i, ((_, site), spec) in enumerate(zip(named, inputs)):
            key, module = f"{site.name}:input", model.get_submodule(site.name)
            channels = module.in_features if by_channel or site.name in divided else None
            if spec.bits != FLOAT_BITS and not spec.dynamic:
                found[key] = Operand(module, True, channels)
            elif by_channel and i == 0:
                found[key] = Operand(module, True, channels, LEAST_BINS)  # for the largest values alone
    for site in prepared.attentions:
        attn, qk, pv = model.get_submodule(site.name), layer_specs[site.qk], layer_specs[site.pv]
        for key, tap, spec in ((f"{site.qk}:input", attn.tap_q, qk.input), (f"{site.qk}:other", attn.tap_k, qk.other),
                               (f"{site.pv}:other", attn.tap_v, pv.other), (f"{site.pv}:input", attn.tap_p, pv.input)):
            if spec.bits != FLOAT_BITS and not spec.dynamic:
                found[key] = Operand(tap, False, heads_of(attn, spec), dim=-2)  # q, k and v are [B, N, H, D]
    return found


def collect(prepared: Prepared, recipes: Sequence[Recipe], data: Iterable, *,
            progress: Callable[[int], None] | None = None) -> Statistics:
    """One streaming pass over at most the largest `calib_size` images of the recipes; each of them finds what it needs in the result.

    data: any iterable of image batches (see `inputs_of`), already preprocessed. progress is called with the number of
    images of each batch. Memory does not grow with the number of images.
    Raises ValueError for an empty or too small set, a wrong size, NaN or infinity in images or activations.
    """
    stats = Statistics(model=fingerprint(prepared.model))
    most = max(recipes, key=lambda recipe: recipe.calib_size)
    with observing(operands_of(prepared, recipes), stats), torch.inference_mode(), exact_float32():
        for images in reported(checked(data, most.calib_size, prepared), progress):
            prepared.run(images)
            stats.samples += len(images)
    check_sample_count(stats.samples, most, prepared)
    return stats


def operands_of(prepared: Prepared, recipes: Sequence[Recipe]) -> dict[str, Operand]:
    """Every operand whose statistics one of the recipes needs, by its key, as fine as any of them needs it."""
    wanted: dict[str, Operand] = {}
    for recipe in recipes:
        for key, operand in operands(prepared, recipe).items():
            if key in wanted:  # by channel serves one that needs it for all together, fine bins serve one that needs few
                other = wanted[key]
                bins = operand.bins if operand.bins == other.bins else None
                operand = operand._replace(channels=operand.channels or other.channels, bins=bins)
            wanted[key] = operand
    return wanted


@contextmanager
def observing(wanted: Mapping[str, Operand], stats: Statistics) -> Iterator[None]:
    """Inside, what passes through each operand is added to a new histogram of `stats`."""
    handles = []
    try:
        for key, operand in wanted.items():
            stats[key] = Histogram(operand.channels, operand.bins, operand.dim)
            if operand.at_input:
                handles.append(operand.module.register_forward_pre_hook(partial(_on_input, key, stats[key])))
            else:
                handles.append(operand.module.register_forward_hook(partial(_on_output, key, stats[key])))
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_calibration(data: Iterable, recipe: Recipe, prepared: Prepared) -> None:
    """Raises as `collect` does for images that it would not take."""
    check_sample_count(sum(map(len, checked(data, recipe.calib_size, prepared))), recipe, prepared)


def check_sample_count(samples: int, recipe: Recipe, prepared: Prepared) -> None:
    """An empty or far too small set is an error; a small one a warning, since ranges from it are rough."""
    least, what = max(1, recipe.calib_size // 16), prepared.samples
    if samples < least:
        raise ValueError(f"calibration data holds {samples} {what}: recipe {recipe.name!r} reads {recipe.calib_size} and "
                         f"needs at least {least}; give more {what}, or lower calib_size")
    if samples < recipe.calib_size:
        log.warning("calibration data held %d %s, recipe %r reads up to %d", samples, what, recipe.name, recipe.calib_size)


def fingerprint(model: nn.Module) -> str:
    """Class, parameter shapes and sums of a prepared model: statistics fit only the weights they were collected with."""
    parts = (f"{name}{tuple(p.shape)}{float(p.double().sum()):.9e},{float(p.double().abs().sum()):.9e}"
             for name, p in model.named_parameters())
    return f"{type(model).__name__}:{hashlib.sha256(';'.join(parts).encode()).hexdigest()[:16]}"


def _on_input(key: str, histogram: Histogram, module: nn.Module, args: tuple) -> None:
    _update(key, histogram, args[0])


def _on_output(key: str, histogram: Histogram, module: nn.Module, args: tuple, output: Tensor) -> None:
    _update(key, histogram, output)


def _update(key: str, histogram: Histogram, x: Tensor) -> None:
    try:
        histogram.update(x)
    except ValueError as error:
        raise ValueError(f"activation {key!r}: {error}") from error
