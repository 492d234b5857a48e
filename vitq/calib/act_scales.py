"""SmoothQuant's statistics: the largest absolute value of each input channel of each linear layer, by the source model's own names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from vitq.calib.runner import check_tokens, inputs_of


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
