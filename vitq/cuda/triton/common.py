"""What the Triton kernels share: the package's rounding rule, activations, and how rows are addressed."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rint(x):
    """Round half to even. Beyond ±2^22 the result is off by a few, which the clamp that always follows hides."""
    # Adding 1.5·2^23 leaves no bits for a fraction. One kind of instruction on every Triton version, and cheaper than
    # a conversion to int and back.
    return (x + 12582912.0) - 12582912.0


@triton.jit
def to_codes(x, scale, zero_point, qmin, qmax):
    """clamp(round(x / scale) + zero_point) as int8, with a true division: x · (1 / scale) gives other codes at ties.

    scale broadcasts to x and is far smaller than it (one value, a row's or a column's), so its correctly rounded
    reciprocal is cheap. Two corrections of x · (1 / scale) by its exact remainder then give the correctly rounded
    quotient (Markstein 1990), in 5 operations where `div.rn` also branches for special cases: on an H200, LayerNorm and
    quantize of 39400 x 384 takes 27 µs so and 38 µs with div.rn, fc1 with GELU and codes 278 and 338.
    """
    inverse = tl.div_rn(1.0, scale)
    # Far outside of any code range already, and nothing below can overflow.
    bound = scale * 1024.0
    x = tl.minimum(tl.maximum(x, -bound), bound)
    quotient = x * inverse
    quotient = tl.fma(tl.fma(-quotient, scale, x), inverse, quotient)
    quotient = tl.fma(tl.fma(-quotient, scale, x), inverse, quotient)
    return tl.minimum(tl.maximum(rint(quotient) + zero_point, qmin), qmax).to(tl.int8)


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.maximum(y, 0.0)
    elif ACTIVATION == "gelu":
        return 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh u) / 2 = 1 / (1 + exp(-2u)); Triton has no tanh of its own
        u = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        return y / (1.0 + tl.exp(-2.0 * u))
    else:
        return y


def rows(x: Tensor) -> Tensor:
    """x [..., K] as [M, K] with unit column stride: a view wherever its strides allow one, else a copy."""
    x = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty((x.shape[:-1].numel(), 0))
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def power_of_2(n: int, at_least: int = 1) -> int:
    return max(triton.next_power_of_2(max(n, 1)), at_least)
