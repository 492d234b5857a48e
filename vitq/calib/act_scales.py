"""SmoothQuant's statistics: the largest absolute value of each input channel of each linear layer, by the source model's own names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from vitq.calib.histogram import LEAST_BINS, Histogram
from vitq.calib.pickled import read_pickled
from vitq.calib.runner import check_tokens, fingerprint, inputs_of
from vitq.calib.statistics import Statistics
from vitq.models import prepare
from vitq.models.language import source_names

FARTHEST = 0.5  # how far apart what is said of one input may be, as a part of the larger


@torch.inference_mode()
def act_scales(model: nn.Module, calib: Iterable, *, progress: Callable[[int], None] | None = None) -> dict[str, Tensor]:
    """{name of each `nn.Linear` that ran: float32 [K], max |x| of its input channels over all of `calib`}, as `act_scales.pt` of SmoothQuant
    and QUIK has it (`torch.save` the result).

    model: any module, on its own device; it is not changed. calib: batches of token ids [B, T] for a language model of transformers, else of
    images [B, C, H, W], as `vitq.convert` takes them. progress: called with the number of sequences or images of each batch.
    Raises ValueError for no data, ids that the model does not have, or an input that is not finite, naming the layer.
    """
    if getattr(model, "vitq", None) is not None:
        raise ValueError("the model is quantized already: give the float model that it was made of")
    tokens = hasattr(model, "generate")
    found: dict[str, Tensor] = {}
    device = next(model.parameters()).device

    def seen(name: str, module: nn.Module, args: tuple) -> None:
        largest = args[0].detach().flatten(0, -2).abs().amax(0).float()
        found[name] = largest if name not in found else torch.maximum(found[name], largest)

    handles = [module.register_forward_pre_hook(partial(seen, name)) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    samples = 0
    try:
        for batch in [calib] if isinstance(calib, Tensor) else calib:
            inputs = inputs_of(batch, tokens)
            if not len(inputs):
                continue
            if tokens:
                check_tokens(inputs, model)
            model(inputs.to(device, torch.int64), use_cache=False) if tokens else model(inputs.to(device))
            samples += len(inputs)
            if progress is not None:
                progress(len(inputs))
    finally:
        for handle in handles:
            handle.remove()
    if not samples:
        raise ValueError("no calibration data: give at least one batch")
    if not found:
        raise ValueError("no nn.Linear of the model ran: there is nothing to measure")
    for name, largest in found.items():
        if not bool(torch.isfinite(largest).all()):
            raise ValueError(f"input of {name!r}: not finite; check the data and the model's dtype")
    return {name: largest.cpu() for name, largest in found.items()}


def import_act_scales(scales: str | os.PathLike | Mapping[str, Tensor], model: nn.Module) -> Statistics:
    """Statistics for `convert`, `simulate` and `check` of what SmoothQuant's `generate_act_scales.py`, QUIK or `vitq.act_scales` measured of `model`.

    scales: a file that torch.save wrote, which is read without running any code in it (weights_only), or the mapping itself: {name of each linear
        layer: max |x| of its input channels, [K]}. Layers that read the same input (q, k and v, gate and up) are one here, with the largest of
        what is said of them. What belongs to layers that stay in float anyway is left out; an output head may be missing.
    Largest values are all that it holds, so it serves recipes whose inputs are dynamic: SmoothQuant's, `clip_outliers`, outliers in float16
    (QUIK). One with static ranges is refused by those who look for them.

    Raises FileNotFoundError; ValueError for a file that is none, layers that are missing or not of this model, a wrong length, what is no largest
    value, and what is said of one input in ways that differ by more than half.
    """
    where = "the given scales" if isinstance(scales, Mapping) else f"act_scales {scales}"
    found = scales if isinstance(scales, Mapping) else read_pickled(scales, "act_scales")
    if not isinstance(found, Mapping) or not all(isinstance(name, str) and isinstance(t, Tensor) for name, t in found.items()):
        raise ValueError(f"{where}: not a mapping of layer names to tensors, as SmoothQuant's generate_act_scales.py writes it")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if unknown := sorted(found.keys() - linears.keys()):
        raise ValueError(f"{where}: {_some(unknown)} of it are no linear layers of this {type(model).__name__}: it was measured on another model")
    prepared = prepare(model)
    groups, missing = [], []
    for sites in prepared.input_groups():
        names = [name for site in sites for name in source_names(site.name) if name in linears]
        missing += [name for name in names if name not in found and not any(site.role == "head" for site in sites)]
        groups.append((sites, [name for name in names if name in found]))
    if missing:
        raise ValueError(f"{where}: {_some(missing)} of this {type(model).__name__} are missing: measure all of its linear layers")
    stats = Statistics(fingerprint(prepared.model))
    for sites, names in groups:
        if not names:
            continue
        largest = torch.stack([_largest(where, name, found[name], linears[name].in_features) for name in names])
        high, low = largest.amax(0), largest.amin(0)
        if bool((high - low > FARTHEST * high).any()):
            channel = int(((high - low) / high.clamp_min(1e-30)).argmax())
            said = ", ".join(f"{name}: {float(value):.4g}" for name, value in zip(names, largest[:, channel]))
            raise ValueError(f"{where}: layers that share an input differ in channel {channel} of it ({said}): they were not measured together")
        for site in sites:
            stats[f"{site.name}:input"] = histogram = Histogram(len(high), LEAST_BINS)
            histogram.update(torch.stack((-high, high)))
    return stats


def _largest(where: str, name: str, values: Tensor, features: int) -> Tensor:
    if not values.is_floating_point() or values.shape != (features,):
        raise ValueError(f"{where}: {name!r} has {values.dtype} {list(values.shape)}; the layer has {features} input features, so floats [{features}]")
    values = values.detach().float().cpu()
    if not bool((values.isfinite() & (values >= 0)).all()):
        raise ValueError(f"{where}: {name!r} holds numbers that are negative or not finite, which no largest absolute value is")
    return values


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
