"""Fake-quantized execution in float: what the integer model must compute, written independently of it.

The prepared float model keeps its modules; weights are replaced by their dequantized codes, and hooks put every operand
that the plan quantizes through quantize -> dequantize.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from vitq.formats import ActivationFormat
from vitq.models.sites import Prepared
from vitq.plan import AttentionParams, LinearParams, Plan
from vitq.quantizers.uniform import dequantize, fake_quantize, fake_quantize_per_token


@torch.no_grad()
def simulate(prepared: Prepared, plan: Plan) -> nn.Module:
    """Turn `prepared.model` (as `choose` left it) into its own simulation and return it. float32 throughout."""
    for name, params in plan.layers.items():
        module = prepared.model.get_submodule(name)
        if isinstance(params, LinearParams):
            weight = dequantize(params.codes, params.weight_scale[:, None], 0)
            module.weight.copy_(weight.view_as(module.weight))
            module.register_forward_pre_hook(partial(_fake_input, params.input))
        elif isinstance(params, AttentionParams):
            for tap, fmt in ((module.tap_q, params.q), (module.tap_k, params.k), (module.tap_v, params.v)):
                tap.register_forward_hook(partial(_fake_output, fmt))
            module.tap_p.register_forward_hook(partial(_fake_probabilities, params.p_bits))
    return prepared.model


def _fake(fmt: ActivationFormat, x: Tensor) -> Tensor:
    if fmt.dynamic:
        return fake_quantize_per_token(x, fmt.bits)
    return fake_quantize(x, fmt.scale.to(x.device), fmt.zero_point.to(x.device), fmt.bits)


def _fake_input(fmt: ActivationFormat, module: nn.Module, args: tuple) -> tuple:
    return (_fake(fmt, args[0]), *args[1:])


def _fake_output(fmt: ActivationFormat, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return _fake(fmt, output)


def _fake_probabilities(bits: int, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """Unsigned, one scale a row: the row's maximum becomes 2^bits − 1."""
    scale = output.amax(dim=-1, keepdim=True) / (2**bits - 1)
    return torch.where(scale > 0, torch.round(output / scale) * scale, output)
