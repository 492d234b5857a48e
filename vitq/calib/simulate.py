"""Fake-quantized execution in float: what the integer model must compute, written independently of it.

The prepared float model keeps its modules; weights are replaced by their dequantized codes, and hooks put every operand
that the plan quantizes through quantize -> dequantize.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vitq.formats import ActivationFormat
from vitq.models.sites import Prepared
from vitq.plan import AttentionParams, CacheParams, LinearParams, Plan
from vitq.quantizers.activation import fake_activation
from vitq.quantizers.log_sqrt2 import fake_log_sqrt2
from vitq.quantizers.uniform import dequantize


@torch.no_grad()
def simulate(prepared: Prepared, plan: Plan) -> nn.Module:
    """Turn `prepared.model` (as `choose` left it) into its own simulation and return it. float32 throughout."""
    for name, params in plan.layers.items():
        module = prepared.model.get_submodule(name)
        fake_weight(module, params)
        fake_operands(module, params)
    return prepared.model


@torch.no_grad()
def fake_weight(module: nn.Module, params: LinearParams | AttentionParams | CacheParams) -> None:
    """Give a linear layer the weight and bias that its codes stand for, in place; others have none."""
    if isinstance(params, LinearParams):
        module.weight.copy_(_weight(params).view_as(module.weight))
        if params.bias is not None:
            module.bias.copy_(params.bias)  # which a solver may have moved


def fake_operands(module: nn.Module, params: LinearParams | AttentionParams | CacheParams) -> list[RemovableHandle]:
    """Hooks that put what a layer reads, an attention's operands, and keys and values before a cache, through quantize -> dequantize."""
    if isinstance(params, CacheParams):
        return [tap.register_forward_hook(partial(_fake_row, fmt)) for tap, fmt in ((module.tap_k, params.k), (module.tap_v, params.v))
                if fmt is not None]
    if isinstance(params, LinearParams):
        return [] if params.input is None else [module.register_forward_pre_hook(partial(_fake_input, params.input))]
    handles = [tap.register_forward_hook(partial(_fake_output, fmt))
               for tap, fmt in ((module.tap_q, params.q), (module.tap_k, params.k), (module.tap_v, params.v))]
    probabilities = partial(_fake_probabilities, params.p_bits) if params.p_log_scale is None else \
        partial(_fake_log_probabilities, params.p_log_scale, params.p_bits)
    return [*handles, module.tap_p.register_forward_hook(probabilities)]


def _weight(params: LinearParams) -> Tensor:
    """The numbers that codes and float16 columns stand for, each feature in its place."""
    if params.weight_fp is None:
        return _integers(params)
    columns, integers = params.input.columns, _integers(replace(params, weight_fp=None))
    weight = integers.new_empty(len(integers), integers.shape[1] + params.weight_fp.shape[1])
    weight[:, columns.order.sort().values.long()], weight[:, columns.fp.long()] = integers, params.weight_fp.float()
    return weight


def _integers(params: LinearParams) -> Tensor:
    """The numbers that the codes stand for, the features that have codes in their order."""
    if params.column_group is not None:
        group, scale, zero_point = params.column_group.long(), params.weight_scale, params.weight_zero
        if params.weight_multiplier is not None:
            scale = scale * params.weight_multiplier
        return dequantize(params.codes, scale[group].T, 0 if zero_point is None else zero_point[group].T)
    if params.input is None:
        return dequantize(params.codes, params.weight_scale[:, None], 0 if params.weight_zero is None else params.weight_zero[:, None])
    ends = params.segment_ends
    scales = params.weight_scale.view(len(ends), -1)
    zeros = (torch.zeros_like(scales) if params.weight_zero is None else params.weight_zero).view_as(scales)
    parts = [dequantize(params.codes[:, start:end], scale[:, None], zero[:, None])
             for start, end, scale, zero in zip((0, *ends), ends, scales, zeros)]
    weight, columns = torch.cat(parts, dim=1), params.input.columns
    return weight if columns is None else weight[:, columns.order.argsort()]


def _fake_input(fmt: ActivationFormat, module: nn.Module, args: tuple) -> tuple:
    return (fake_activation(args[0], fmt), *args[1:])


def _fake_output(fmt: ActivationFormat, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return fake_activation(output, fmt)


def _fake_row(fmt: ActivationFormat, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """Keys or values as they leave a cache. (Executed, keys stay as they were transformed and it is the queries that are transformed back.)"""
    fake = fake_activation(output, fmt)
    return fake if fmt.transform is None else fmt.transform.to(fake.device).inverse(fake)


def _fake_probabilities(bits: int, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """Unsigned, one scale a row: the row's maximum becomes 2^bits − 1."""
    scale = output.amax(dim=-1, keepdim=True) / (2**bits - 1)
    return torch.where(scale > 0, torch.round(output / scale) * scale, output)


def _fake_log_probabilities(scale: Tensor, bits: int, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return fake_log_sqrt2(output, scale.to(output.device), bits)
