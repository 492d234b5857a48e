"""Cases of torch.ops.vitq.*: name -> (operator, a function that makes its arguments on the CPU, the share of codes that may differ
by one, the relative error that floats may have). tests/cuda/test_ops.py runs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitq.cuda.layout import bits_of, exchange_bytes, pack_transform, pack_weight, pad_columns, permute_rows, round_up, starts_of
from vitq.formats import int_range, pack_int4
from vitq.ops.cached_attention import RowCodes


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def codes(*shape: int, bits: int = 8, seed: int = 0) -> Tensor:
    lo, hi = int_range(bits)
    return torch.randint(lo, hi + 1, shape, dtype=torch.int8, generator=generator(seed))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def strided(x: Tensor, multiple: int = 16) -> Tensor:
    """The same values, rows at multiples of 16 elements and 16 more, as a view of a larger matrix."""
    wide = x.new_zeros(*x.shape[:-1], -(-x.shape[-1] // multiple) * multiple + multiple)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


CASES: dict[str, tuple[str, Callable[[], dict[str, Any]], float, float]] = {}


def case(name: str, op: str, make: Callable[[], dict[str, Any]], share: float = 0.0, error: float = 0.0) -> None:
    assert name not in CASES
    CASES[name] = op, make, share, error


def two_levels(n: int, k: int, group: int, zero: bool) -> dict[str, Any]:
    """Multipliers of groups of columns for codes of 4 bits, and zero points within the codes, so that all products are int8."""
    groups, n_pad = -(-k // group), -(-n // 32) * 32
    multiplier = torch.randint(1, 9 if zero else 16, (groups, n_pad), dtype=torch.int8, generator=generator(11))
    return {"multiplier": multiplier, "group_columns": group,
            "group_zero": torch.randint(-8, 8, (groups, n_pad), dtype=torch.int8, generator=generator(12)) if zero else None}


def linear(m: int, n: int, k: int, *, bits: int = 8, input_bits: int = 8, out: torch.dtype = torch.float32, activation: str = "",
           dynamic: bool = False, residual: torch.dtype | None = None, ends: tuple[int, ...] = (), shift: bool = False,
           fp: int = 0, out_bits: int = 8, bias: bool = True, extremes: bool = False, grouped: int = 0, inplace: bool = False,
           expanded: bool = False, group: int = 0, group_zero: bool = False) -> dict[str, Any]:
    segments = max(len(ends), 1)
    a = torch.full((m, k), -128, dtype=torch.int8) if extremes else codes(m, k, bits=input_bits, seed=1)
    w = torch.full((n, k), -128 if bits == 8 else -8, dtype=torch.int8) if extremes else codes(n, k, bits=bits, seed=2)
    sigma = k**0.5 * 2.0 ** (bits + input_bits - 2) / 3
    to_codes = out == torch.int8 and not activation
    scale = (torch.rand(segments, n, generator=generator(3)) + 0.5) / sigma * (40 if to_codes else 1)
    if input_bits == 4:
        even = F.pad(a, (0, k % 2))
        a = strided(pack_int4(even))
    else:
        a = strided(a)
    result: dict[str, Any] = dict(
        out=torch.zeros(m, n, dtype=out), codes=a, weight=pack_weight(w, bits, plain=input_bits == 4), scale=pad_columns(scale),
        bias=pad_columns(randn(n, seed=4) * (10 if to_codes else 1)) if bias else None, weight_bits=bits, input_bits=input_bits,
        activation=activation, segment_ends=list(ends), out_bits=out_bits)
    if out == torch.int8 and activation:
        result |= dict(out_scale=0.0173 if out_bits == 8 else 0.3, out_zero_point=-11 if out_bits == 8 else 2)
    if dynamic:
        result["row_scale"] = torch.rand(m, generator=generator(5)) + 0.3
    if shift:
        result |= dict(column_sums=pad_columns(randn(n, seed=6)), row_shift=randn(m, seed=7))
    if fp:
        weight_fp = permute_rows(randn(n, fp, seed=8).half() / 8)
        result |= dict(codes_fp=randn(m, fp, seed=9).half(), weight_fp=weight_fp)
    if group:
        result |= two_levels(n, k, group, group_zero)
    if residual is not None:
        result["residual"] = randn(m, n, seed=10).to(residual)
    if grouped:  # [G, R, N] within [G, R + 1, N], as tokens beside a class token
        shape = m // grouped, grouped, n
        result["out"] = torch.zeros(m // grouped, grouped + 1, n, dtype=out)[:, 1:]
        if residual is not None:
            wide = torch.zeros(m // grouped, grouped + 2, n, dtype=residual)[:, 2:]
            result["residual"] = randn(1, grouped, n,
                                       seed=10).to(residual).expand(shape) if expanded else wide.copy_(randn(*shape, seed=10))
    if inplace:
        result["out"] = result["residual"]
    return result


SIZES = [(197, 96, 64), (1, 1000, 384), (16, 10, 48), (17, 37, 70), (3, 1, 5), (0, 32, 64), (300, 257, 96), (130, 384, 1536),
         (5, 64, 4096)]
for m, n, k in SIZES:
    size = f"{m}x{n}x{k}"
    case(f"linear {size}", "linear", lambda m=m, n=n, k=k: linear(m, n, k))
    case(f"linear {size} w4", "linear", lambda m=m, n=n, k=k: linear(m, n, k, bits=4))
    case(f"linear {size} codes", "linear", lambda m=m, n=n, k=k: linear(m, n, k, out=torch.int8))
    case(f"linear {size} w4 codes4", "linear", lambda m=m, n=n, k=k: linear(m, n, k, bits=4, out=torch.int8, out_bits=4))
    case(f"linear {size} gelu codes", "linear", lambda m=m, n=n, k=k: linear(m, n, k, out=torch.int8, activation="gelu"), 1e-3)
    case(f"linear {size} half residual", "linear", lambda m=m, n=n,
         k=k: linear(m, n, k, out=torch.float16, residual=torch.float16))
    case(f"linear {size} a4w4", "linear", lambda m=m, n=n, k=k: linear(m, n, k, bits=4, input_bits=4))
for activation in ("relu", "gelu", "gelu_tanh"):
    for bits in (8, 4):
        case(f"linear {activation} w{bits} codes", "linear",
             lambda a=activation, b=bits: linear(100, 200, 96, bits=b, out=torch.int8, activation=a), 1e-3)
        case(f"linear {activation} w{bits} codes4 dynamic", "linear",
             lambda a=activation, b=bits: linear(100, 200, 96, bits=b, out=torch.int8, activation=a, out_bits=4, dynamic=True),
             1e-3)
    case(f"linear {activation} float", "linear", lambda a=activation: linear(100, 200, 96, activation=a), 0, 2e-5)
    case(f"linear {activation} half residual", "linear",
         lambda a=activation: linear(100, 200, 96, activation=a, out=torch.float16, residual=torch.float16), 0, 1e-3)
for out in (torch.float16, torch.bfloat16, torch.float32):
    for residual in (None, torch.float16, torch.bfloat16, torch.float32):
        case(f"linear {out} + {residual}", "linear", lambda o=out,
             r=residual: linear(70, 72, 64, out=o, residual=r, dynamic=True))
    case(f"linear {out} in place", "linear", lambda o=out: linear(70, 72, 64, out=o, residual=o, inplace=True))
    case(f"linear {out} groups in place", "linear", lambda o=out: linear(68, 72, 64, out=o, residual=o, grouped=17, inplace=True))
    case(f"linear {out} groups", "linear", lambda o=out: linear(68, 72, 64, out=o, residual=o, grouped=17))
    case(f"linear {out} groups, one residual for all", "linear",
         lambda o=out: linear(68, 37, 64, out=o, residual=o, grouped=17, expanded=True))
for bits in (8, 4):
    case(f"linear w{bits} no bias", "linear", lambda b=bits: linear(33, 40, 64, bits=b, bias=False))
    case(f"linear w{bits} extremes", "linear", lambda b=bits: linear(64, 64, 4096, bits=b, extremes=True))
    case(f"linear w{bits} dynamic codes", "linear", lambda b=bits: linear(90, 128, 96, bits=b, out=torch.int8, dynamic=True))
    for ends in ((), (64, 192), (32, 64, 96, 192)):
        name = f"linear w{bits} {len(ends) or 1} segments"
        case(name, "linear", lambda b=bits, e=ends: linear(150, 100, 192, bits=b, ends=e))
        case(f"{name} shift", "linear", lambda b=bits, e=ends: linear(150, 100, 192, bits=b, ends=e, shift=True))
        case(f"{name} shift dynamic", "linear", lambda b=bits,
             e=ends: linear(150, 100, 192, bits=b, ends=e, shift=True, dynamic=True))
        case(f"{name} shift codes", "linear", lambda b=bits,
             e=ends: linear(150, 100, 192, bits=b, ends=e, shift=True, dynamic=True, out=torch.int8))
        case(f"{name} gelu codes", "linear",
             lambda b=bits, e=ends: linear(150, 100, 192, bits=b, ends=e, out=torch.int8, activation="gelu"), 1e-3)
        case(f"{name} fp16 columns, shift, gelu codes", "linear", lambda b=bits, e=ends: linear(
            150, 100, 192, bits=b, ends=e, fp=16, shift=True, dynamic=True, out=torch.int8, activation="gelu"), 2e-3)
        case(f"{name} fp16 columns", "linear", lambda b=bits, e=ends: linear(150, 100, 192, bits=b, ends=e, fp=32), 0, 1e-5)
        case(f"{name} fp16 columns, shift, residual", "linear", lambda b=bits, e=ends: linear(
            150, 100, 192, bits=b, ends=e, fp=16, shift=True, dynamic=True, out=torch.float16, residual=torch.float16), 0, 1e-3)
# As a ViT has them: static, symmetric, in whole vectors. A segment ends inside of a piece of 128, at its end, or several do.
for ends in ((64, 384), (96, 384), (128, 384), (32, 160, 384), (352, 384), (160, 1024), (256, 300)):
    for out, activation in ((torch.int8, ""), (torch.int8, "gelu"), (torch.int8, "gelu_tanh"), (torch.float16, ""),
                            (torch.bfloat16, "")):
        case(f"linear segments {ends} {out} {activation}", "linear", lambda e=ends, o=out, a=activation: linear(
            330, 392, e[-1], ends=e, out=o, activation=a, residual=o if o.is_floating_point else None), 1e-3 if activation else 0)
# Fewer bits in whole vectors, both ends of the range reached: 8-bit weights, as 4-bit ones are after widening.
for out_bits in (2, 4, 7):
    for activation in ("", "gelu", "gelu_tanh", "relu"):
        for ends in ((), (64, 384)):
            case(f"linear {activation} w8 codes{out_bits} in vectors {ends}", "linear", lambda a=activation, b=out_bits, e=ends: linear(
                330, 392, 384, ends=e, out=torch.int8, activation=a, out_bits=b), 1e-3 if activation else 0)
# As QUIK has them: one integer segment, shifted rows and float16 columns, whole tiles and what is left over.
for m, n, k, fp in ((300, 392, 1000, 64), (130, 520, 3840, 256), (7, 96, 544, 32), (257, 256, 128, 0), (1, 33, 96, 16)):
    for bits in (8, 4):
        for out in (torch.float16, torch.bfloat16, torch.float32):
            case(f"linear mixed {m}x{n}x{k}+{fp} w{bits} {out}", "linear", lambda m=m, n=n, k=k, f=fp, b=bits, o=out: linear(
                m, n, k, bits=b, fp=f, shift=True, dynamic=True, out=o, residual=o), 0, 1e-2 if out == torch.bfloat16 else 1e-3)
# Packed weights on Hopper: whole pieces of K and tiles and what is left over, groups of one piece, of several and of all.
for m, n, k in ((17, 96, 64), (300, 392, 1000), (130, 520, 4096), (257, 33, 2112), (64, 4128, 640)):
    for group in (0, 128, 256, 5120):
        for zero in (False, True)[: 2 if group else 1]:
            case(f"linear packed {m}x{n}x{k} in groups of {group}, zero {zero}", "linear", lambda m=m, n=n, k=k, g=group, z=zero: linear(
                m, n, k, bits=4, out=torch.float16, dynamic=True, residual=torch.float16, group=g, group_zero=z))
        case(f"linear packed {m}x{n}x{k} in groups of {group}, codes", "linear", lambda m=m, n=n, k=k, g=group: linear(
            m, n, k, bits=4, out=torch.int8, group=g))
    case(f"linear packed {m}x{n}x{k} fp16 columns, groups", "linear", lambda m=m, n=n, k=k: linear(
        m, n, k, bits=4, out=torch.float16, dynamic=True, shift=True, fp=80, group=128, group_zero=True), 0, 1e-3)
    case(f"linear packed {m}x{n}x{k} gelu codes", "linear", lambda m=m, n=n, k=k: linear(m, n, k, bits=4, out=torch.int8, activation="gelu"), 1e-3)
# More tiles than any GPU has multiprocessors, so that blocks go from one to the next, in fewer pieces of K than there are warps that widen, and in many.
for m, n, k in ((256, 9000, 64), (256, 9000, 130), (256, 9000, 256), (1100, 2304, 1000)):
    for fp in (0, 80, 640):
        case(f"linear packed, many tiles {m}x{n}x{k} + {fp}", "linear", lambda m=m, n=n, k=k, f=fp: linear(
            m, n, k, bits=4, out=torch.float16, dynamic=True, shift=f > 0, fp=f), 0, 1e-3)
    case(f"linear packed, many tiles {m}x{n}x{k} in groups", "linear", lambda m=m, n=n, k=k: linear(
        m, n, k, bits=4, out=torch.float16, dynamic=True, group=128, group_zero=True))
case("linear a4w4 segments", "linear", lambda: linear(50, 40, 192, bits=4, input_bits=4, ends=(64, 192), shift=True, dynamic=True))
# Few rows, which have a kernel of their own: one and two tiles of rows, rows of the weight and pieces of k that are not whole.
for m, n, k in ((1, 96, 640), (2, 37, 70), (7, 200, 1000), (8, 64, 352), (9, 128, 2112), (16, 70, 5000), (16, 1, 33), (1, 4128, 96)):
    for bits, input_bits in ((8, 8), (4, 8), (4, 4)):
        for out in (torch.float16, torch.float32, torch.bfloat16):
            case(f"linear few {m}x{n}x{k} w{bits}a{input_bits} {out}", "linear", lambda m=m, n=n, k=k, b=bits, a=input_bits, o=out: linear(
                m, n, k, bits=b, input_bits=a, out=o, dynamic=True, residual=o))
        case(f"linear few {m}x{n}x{k} w{bits}a{input_bits} codes", "linear", lambda m=m, n=n, k=k, b=bits, a=input_bits: linear(
            m, n, k, bits=b, input_bits=a, out=torch.int8))
        case(f"linear few {m}x{n}x{k} w{bits}a{input_bits} fp16 columns", "linear", lambda m=m, n=n, k=k, b=bits, a=input_bits: linear(
            m, n, k, bits=b, input_bits=a, fp=m % 3 * 240 + 16, out=torch.float16, bias=m > 1), 0, 1e-3)
    for group in (32, 64, 128, 160, 5024):
        for zero in (False, True):
            case(f"linear few {m}x{n}x{k} in groups of {group}, zero {zero}", "linear", lambda m=m, n=n, k=k, g=group, z=zero: linear(
                m, n, k, bits=4, out=torch.float16, dynamic=True, residual=torch.float16, group=g, group_zero=z))
    for bits in (8, 4):
        case(f"linear few {m}x{n}x{k} w{bits} shift, fp16 columns", "linear", lambda m=m, n=n, k=k, b=bits: linear(
            m, n, k, bits=b, shift=True, dynamic=True, fp=48, out=torch.float16, residual=torch.float16), 0, 1e-3)
        case(f"linear few {m}x{n}x{k} w{bits} shift", "linear", lambda m=m, n=n, k=k, b=bits: linear(m, n, k, bits=b, shift=True, dynamic=True))
for m in (8, 16):  # an input that shared memory does not hold
    case(f"linear few {m} long rows in groups", "linear", lambda m=m: linear(
        m, 64, 9000, bits=4, out=torch.float16, dynamic=True, group=128, group_zero=True))
case("linear few, gelu codes", "linear", lambda: linear(5, 200, 300, bits=4, out=torch.int8, activation="gelu", group=128), 1e-3)
case("linear few, groups of rows", "linear", lambda: linear(12, 72, 192, bits=4, out=torch.float16, residual=torch.float16, grouped=4, group=64))
for bits, input_bits in ((8, 8), (4, 8), (4, 4)):
    case(f"linear few w{bits}a{input_bits} extremes", "linear", lambda b=bits, a=input_bits: linear(
        16, 64, 8192, bits=b, input_bits=a, extremes=a == 8))
case("linear many rows w4", "linear", lambda: linear(3000, 100, 100, bits=4, out=torch.int8))


def attention(b: int, n: int, h: int, d: int, *, m: int = 0, zero: tuple[int, int, int] = (0, 0, 0), p_bits: int = 8,
              bits: int = 8, out: torch.dtype = torch.float32, bias: int = 0, mask: int = 0, window: tuple[int, ...] = (),
              spread: float = 4.0, blind: bool = False, each: bool = False) -> dict[str, Any]:
    """Logits of a standard deviation near `spread`, as trained ViTs have. each: scales and zero points of its own for each head."""
    sigma = 2 ** (bits - 1) / 3.5
    qmin, qmax = int_range(bits)

    def operand(tokens: int, which: int) -> Tensor:
        return (randn(b, tokens, h, d, seed=which) * sigma + zero[which]).round().clamp(qmin, qmax).to(torch.int8)

    if m:
        q, k, v = operand(n, 0), operand(m, 1), operand(m, 2)
    else:  # as one GEMM writes them
        q, k, v = torch.stack([operand(n, i) for i in range(3)], 2).unbind(2)
    queries, keys = (window[2] * window[3],) * 2 if window else (n, m or n)
    own = [1 + i % 3 for i in range(h if each else 1)]
    result: dict[str, Any] = dict(
        out=torch.zeros(b, n, h * d, dtype=out), q=q, k=k, v=v, logit_scale=[spread / i / (sigma**2 * d**0.5) for i in own],
        v_scale=[i / sigma for i in own], q_zero=[zero[0] * (2 - i) for i in own], v_zero=[zero[2] - 9 * (i - 1) for i in own], p_bits=p_bits,
        window=list(window))
    if bias:
        result["bias"] = randn(bias, queries, keys, seed=5)
        if blind:
            result["bias"][:, 3 % queries] = float("-inf")
    if mask:
        result["mask"] = torch.where(torch.rand(mask, queries, keys, generator=generator(6)) < 0.4, -100.0, 0.0)
    if window:
        result["pad"] = codes(3, h, d, bits=bits, seed=7)
    if out == torch.int8:
        result |= dict(out_scale=0.011, out_zero_point=4)
    return result


# A probability at a rounding tie moves by one code; that is all that floats may differ by, beside float32 rounding.
for shape in ((2, 197, 3, 64), (3, 49, 2, 32), (1, 50, 2, 80), (2, 1, 1, 16), (1, 300, 1, 24), (1, 577, 1, 128), (2, 257, 2, 72),
              (0, 5, 1, 32), (5, 64, 3, 32), (1, 33, 1, 7), (2, 1025, 1, 64)):
    for zero in ((0, 0, 0), (-20, 9, 33)):
        case(f"attention {shape} zero {zero}", "attention", lambda s=shape, z=zero: attention(*s, zero=z), 0, 2e-3)
    case(f"attention {shape} codes", "attention", lambda s=shape: attention(*s, zero=(1, 2, 3), out=torch.int8), 1e-3)
    case(f"attention {shape} each head", "attention", lambda s=shape: attention(*s, zero=(-20, 9, 33), each=True), 0, 2e-3)
case("attention each head codes", "attention", lambda: attention(2, 197, 6, 64, each=True, out=torch.int8), 1e-3)
case("attention each head p4", "attention", lambda: attention(2, 197, 6, 64, each=True, p_bits=4, bits=4), 0, 4e-3)
for p_bits in (8, 7, 4):
    for bits in (8, 4):
        case(f"attention p{p_bits} a{bits}", "attention",
             lambda p=p_bits, b=bits: attention(2, 60, 2, 32, zero=(1, 2, 3), p_bits=p, bits=b), 0, 4e-3)
for out in (torch.float16, torch.bfloat16):
    case(f"attention {out}", "attention", lambda o=out: attention(2, 197, 2, 64, out=o), 0, 8e-3)
for n in (40, 64, 270):
    for heads in (1, 2):
        case(f"attention {n} bias {heads}", "attention", lambda n=n, h=heads: attention(6, n, 2, 32, zero=(7, 1, -3), bias=h), 0,
             2e-3)
    case(f"attention {n} mask", "attention", lambda n=n: attention(6, n, 2, 32, mask=3), 0, 2e-3)
    case(f"attention {n} both", "attention", lambda n=n: attention(6, n, 2, 32, bias=2, mask=2, out=torch.int8), 1e-3)
    case(f"attention {n} blind", "attention", lambda n=n: attention(2, n, 2, 32, bias=2, blind=True, zero=(3, 0, 5)), 0, 2e-3)
    case(f"attention {n} bias, each head", "attention", lambda n=n: attention(6, n, 2, 32, zero=(7, 1, -3), bias=2, each=True), 0, 2e-3)
case("attention cross", "attention", lambda: attention(2, 30, 2, 64, m=77, zero=(1, 0, 2)), 0, 2e-3)
for spread in (1e-3, 100.0):
    case(f"attention spread {spread}", "attention", lambda s=spread: attention(2, 197, 2, 64, spread=s), 0, 2e-3)
for window in ((56, 56, 7, 7, 0, 0), (56, 56, 7, 7, 3, 3), (14, 14, 7, 7, 3, 3), (10, 13, 7, 7, 3, 3), (9, 9, 7, 7, 0, 0),
               (16, 16, 8, 8, 4, 4), (7, 7, 7, 7, 0, 0), (12, 24, 12, 12, 6, 0), (5, 5, 7, 7, 3, 0)):
    for out in (torch.int8, torch.float16):
        case(f"attention window {window} {out}", "attention", lambda w=window, o=out: attention(
            2, w[0] * w[1], 3, 32, window=w, bias=3, zero=(3, -4, 5), out=o), 1e-3, 4e-3)
    case(f"attention window {window} each head", "attention", lambda w=window: attention(
        2, w[0] * w[1], 3, 32, window=w, bias=3, zero=(3, -4, 5), each=True), 1e-3, 4e-3)


def rows(x: Tensor, *, bits: int = 8, dynamic: bool = False, packed: bool = False, norm: str = "", affine: bool = True,
         out: torch.dtype = torch.int8, residual: bool = False, order: int = 0, shift: bool = False,
         fp: int = 0, merge: bool = False, scale: float = 0.0311, zero_point: int = -7) -> dict[str, Any]:
    lead, k = x.shape[:-1], x.shape[-1]
    if merge:
        lead, k = (*lead[:-2], (lead[-2] + 1) // 2, (lead[-1] + 1) // 2), 4 * k
    m, width = lead.numel() if isinstance(lead, torch.Size) else torch.Size(lead).numel(), order or k
    shape = (*lead, (width + 1) // 2 if packed else width)
    result: dict[str, Any] = dict(
        out=torch.zeros(shape, dtype=torch.uint8 if packed else out), x=x, norm=norm, eps=1e-6, bits=bits,
        scale=scale if bits == 8 else 0.4, zero_point=0 if dynamic else zero_point if bits == 8 else 2, merge=merge)
    if norm and affine:
        result["weight"] = randn(k, seed=3) + 1
        result |= dict(bias=randn(k, seed=4)) if norm == "layer_norm" else {}
    if residual:
        result |= dict(residual=randn(*x.shape, seed=5).to(x.dtype), sum=torch.zeros(x.shape, dtype=x.dtype))
    if order:
        index = torch.randperm(k, generator=generator(6))[: order].to(torch.int32)
        result["order"] = F.pad(index, (0, order - len(index)), value=-1)
        result["order"][1::7] = -1
    if dynamic:
        result["row_scale"] = torch.zeros(m)
    if shift:
        result |= dict(row_scale=torch.zeros(m), row_shift=torch.zeros(m))
    if order and "row_scale" in result:
        result["counted"] = bits_of(result["order"], k)
    if fp:
        result |= dict(fp_order=torch.tensor([*range(0, 3 * fp, 3)][: fp - 1] + [-1], dtype=torch.int32).clamp_max(k - 1),
                       fp_out=torch.zeros(m, fp, dtype=torch.float16))
    return result


def kept_rows(m: int, k: int, kept: int, dtype: torch.dtype, bits: int, shift: bool) -> dict[str, Any]:
    columns = torch.randperm(k, generator=generator(6))
    order, fp = columns[kept:].sort().values.to(torch.int32), columns[:kept].sort().values.to(torch.int32)
    width = round_up(k - kept, 16)  # as layers allocate them
    x = awkward(m, k).to(dtype)
    if kept and dtype != torch.float16:
        x[0, fp[0]], x[-1, fp[-1]] = 1e6, float("-inf")  # beyond float16, where they end at its largest number
    result: dict[str, Any] = dict(
        out=torch.zeros(m, width, dtype=torch.int8)[:, : k - kept], x=x, bits=bits, order=order, row_scale=torch.zeros(m),
        counted=bits_of(order, k), starts=starts_of(order, fp, k))
    if shift:
        result["row_shift"] = torch.zeros(m)
    if kept:
        result |= dict(fp_order=F.pad(fp, (0, 16), value=-1), fp_out=torch.zeros(m, kept + 16, dtype=torch.float16))
    assert result["starts"] is not None
    return result


def awkward(m: int, k: int) -> Tensor:
    """Signed, asymmetric, with outliers, ties, a row of zeros and a constant row."""
    x = randn(m, k) * 2 + 0.3
    if m > 3 and k > 1:
        x[0], x[1] = 0, -4.125
        x[2, : k // 2] = 0.0311 / 2
        x[3, 0] = 1e4
    return x


INPUTS: dict[str, Callable[[], Tensor]] = {
    "plain": lambda: awkward(37, 384),
    "odd": lambda: randn(5, 3, 77),
    "class token": lambda: randn(9, 17, 96)[:, 0],
    "patch tokens": lambda: randn(4, 17, 96)[:, 1:],
    "one column": lambda: randn(7, 1),
    "zeros": lambda: torch.zeros(5, 64),
    "outliers": lambda: randn(21, 200) * torch.where(torch.rand(200, generator=generator(1)) < 0.05, 300.0, 1.0),
    "no rows": lambda: randn(0, 64),
    "wide": lambda: randn(3, 5000),
    "768": lambda: awkward(50, 768),
    "1536": lambda: awkward(9, 1536),
    "192 in 4-d": lambda: randn(2, 5, 6, 192),
}
for kind, make in INPUTS.items():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        def x(make=make, dtype=dtype):
            source = make()  # casting keeps the strides only of dense tensors
            return source.to(dtype) if source.is_contiguous() else torch.empty_strided(
                source.shape, source.stride(), dtype=dtype).copy_(source)

        for name, options in {"static": {}, "static4": {"bits": 4}, "dynamic": {"dynamic": True},
                              "dynamic4": {"dynamic": True, "bits": 4}, "asymmetric": {"dynamic": True, "shift": True},
                              "asymmetric4": {"dynamic": True, "shift": True, "bits": 4}}.items():
            case(f"rows {kind} {dtype} {name}", "rows", lambda x=x, o=options: rows(x(), **o))
        case(f"rows {kind} {dtype} packed", "rows", lambda x=x: rows(x(), bits=4, packed=True))
        case(f"rows {kind} {dtype} norm", "rows", lambda x=x: rows(x(), norm="layer_norm"), 1e-3)
        case(f"rows {kind} {dtype} norm dynamic", "rows", lambda x=x: rows(x(), norm="layer_norm", dynamic=True), 1e-3, 1e-5)
        case(f"rows {kind} {dtype} rms packed", "rows", lambda x=x: rows(x(), norm="rms_norm", bits=4, packed=True, dynamic=True),
             1e-3, 1e-5)
        case(f"rows {kind} {dtype} norm to float", "rows", lambda x=x, d=dtype: rows(x(), norm="layer_norm", out=d), 0,
             1e-5 if dtype == torch.float32 else 1e-2)
        case(f"rows {kind} {dtype} residual norm", "rows", lambda x=x: rows(x(), norm="layer_norm", affine=False, residual=True),
             1e-3)
for k, order in ((96, 96), (200, 256), (77, 64), (768, 768), (40, 70), (4096, 3840), (5003, 4800)):
    for dynamic, shift in ((False, False), (True, False), (True, True)):
        for norm in ("", "layer_norm"):
            case(f"rows {k} -> {order} dynamic {dynamic} shift {shift} norm {norm}", "rows", lambda k=k, o=order, d=dynamic, s=shift,
                 n=norm: rows(awkward(23, k).half(), order=o, dynamic=d, shift=s, norm=n, bits=4 if s else 8, fp=16 if k > 60 else 0),
                 1e-3 if norm else 0, 1e-5)
# Many rows, so that each group of lanes reorders several at once.
for m, k in ((40000, 96), (20000, 384), (9000, 768), (9000, 1024)):
    case(f"rows {m} x {k} ordered", "rows", lambda m=m, k=k: rows(awkward(m, k).half(), order=k, norm="layer_norm"), 1e-3)
# Larger features kept in float16, both sides ascending (QUIK).
for m, k, kept in ((3, 96, 16), (37, 576, 32), (5, 1536, 96), (9, 4096, 256), (2, 11008, 256), (1, 28672, 256), (4, 104, 0)):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for bits, shift in ((4, True), (8, True), (8, False)):
            case(f"rows {m} x {k}, {kept} kept {dtype} {bits} bits shift {shift}", "rows", lambda m=m, k=k, f=kept, d=dtype, b=bits, s=shift: kept_rows(
                m, k, f, d, b, s))
for shape in ((2, 14, 14, 96), (1, 6, 4, 40), (3, 7, 5, 8), (2, 2, 2, 384)):
    for dynamic in (False, True):
        case(f"rows merge {shape} dynamic {dynamic}", "rows",
             lambda s=shape, d=dynamic: rows(randn(*s).half(), merge=True, norm="layer_norm", dynamic=d), 1e-3, 1e-5)


def transformed_rows(m: int, k: int, left: int = 0, right: int = 0, *, dtype: torch.dtype = torch.float16, bits: int = 8, shift: bool = False,
                     clip: tuple[float, float] | None = None, gate: str = "", norm: str = "", affine: bool = True, pad: bool = True,
                     fragments: bool = False) -> dict[str, Any]:
    """Matrices near Hadamard's size, which leave a row as large as it was; rows of codes at multiples of 16 bytes where `pad`."""
    x = awkward(m, 2 * k if gate else k).to(dtype)
    if m and dtype != torch.float16 and (left or right) and not gate and not norm:
        x[m - 1, k - 1] = 1e9  # beyond float16, where it ends at its largest number
    result: dict[str, Any] = dict(
        out=torch.zeros(m, round_up(k, 16), dtype=torch.int8)[:, :k] if pad else torch.zeros(m, k, dtype=torch.int8), x=x, row_scale=torch.zeros(m), bits=bits,
        gate=gate, norm=norm, eps=1e-6, fragments=fragments)
    for name, size, seed in (("left", left, 8), ("right", right, 9)):
        if size:
            result |= {name: pack_transform((randn(size, size, seed=seed) * size**-0.5).half(), name == "right"), f"{name}_size": size}
    if shift:
        result["row_shift"] = torch.zeros(m)
    if clip:
        result["clip"] = torch.tensor(clip)
    if norm and affine:
        result["weight"] = randn(k, seed=3) + 1
        result |= dict(bias=randn(k, seed=4)) if norm == "layer_norm" else {}
    return result


MATRICES = ((64, 64), (86, 128), (112, 128), (128, 224), (24, 24), (32, 48), (12, 24), (5, 7), (1, 200), (43, 43), (100, 20), (170, 180),
            (12, 0, 768), (16, 0, 4096), (32, 0, 4096), (7, 0, 91), (40, 0, 3200), (50, 0, 3600), (64, 0, 5120), (129, 0, 516),
            (0, 128, 5120), (0, 37, 111), (0, 8, 8000), (0, 256, 12800))
BEFORE: tuple[dict[str, Any], ...] = ({}, {"clip": (0.9, 0.8)}, {"shift": True}, {"shift": True, "clip": (0.7, 0.95), "bits": 4},
                                      {"bits": 4, "clip": (0.6, 1.0)}, {"norm": "rms_norm", "clip": (0.9, 0.8)}, {"norm": "layer_norm"}, {"gate": "silu"}, {"gate": "gelu", "shift": True},
                                      {"gate": "gelu_tanh", "clip": (0.9, 0.9), "bits": 4}, {"gate": "relu"})
for i, (left, right, *rest) in enumerate(MATRICES):
    for j, dtype in enumerate((torch.float16, torch.bfloat16, torch.float32)):
        for options in BEFORE if (left, right) in ((64, 64), (5, 7), (32, 0), (0, 128)) else (BEFORE[j], BEFORE[3 + (i + j) % 8], BEFORE[(i + j) % 11]):
            name = f"transformed_rows {left}x{right} of {rest or [left * right]} {dtype} {options}"
            if name not in CASES:
                case(name, "transformed_rows", lambda l=left, r=right, k=(rest or [left * right])[0], d=dtype, o=options, m=(1, 5, 37)[(i + j) % 3]:
                     transformed_rows(m, k, l, r, dtype=d, **o), 5e-3, 1e-3)
for m in (0, 300, 3001):  # blocks that have several tokens at once, and one after the other
    for left, right, k in ((64, 64, 4096), (86, 128, 11008), (24, 24, 576), (32, 0, 4096), (0, 64, 448)):
        case(f"transformed_rows {m} of {left}x{right}", "transformed_rows",
             lambda m=m, l=left, r=right, k=k: transformed_rows(m, k, l, r, clip=(0.9, 0.95)), 5e-3, 1e-3)
# Hopper has another kernel: all that may come before, one to four warpgroups a token, rows of X that eights do not divide, what pads each size.
for i, (left, right) in enumerate(((112, 128), (128, 148), (64, 64), (3, 200), (17, 256), (33, 44), (90, 100), (50, 12), (9, 9))):
    for j, options in enumerate(BEFORE):
        if i < 3 or (i + j) % 4 == 0:
            dtype = (torch.float16, torch.bfloat16)[(i + j) % 2]
            case(f"transformed_rows 300 of {left}x{right} {dtype} {options}", "transformed_rows",
                 lambda l=left, r=right, d=dtype, o=options: transformed_rows(300, l * r, l, r, dtype=d, **o), 5e-3, 1e-3)
# The kernel of all chips where it would not be chosen: rows to come and several tokens of a block, and few rows.
for i, (left, right) in enumerate(((64, 64), (86, 128), (112, 128), (24, 24))):
    for j, options in enumerate(BEFORE):
        for m in (3, 300):
            case(f"transformed_rows {m} of {left}x{right} by fragments {options}", "transformed_rows",
                 lambda l=left, r=right, d=(torch.float16, torch.bfloat16)[(i + j) % 2], o=options, m=m: transformed_rows(
                     m, l * r, l, r, dtype=d, fragments=True, **o), 5e-3, 1e-3)
for j, options in enumerate(BEFORE[:5]):
    case(f"transformed_rows 37 of 32x0 by fragments {options}", "transformed_rows",
         lambda d=(torch.float16, torch.bfloat16)[j % 2], o=options: transformed_rows(37, 4096, 32, dtype=d, fragments=True, **o), 5e-3, 1e-3)
for options in ({"gate": "silu"}, {"norm": "rms_norm"}, {"shift": True, "bits": 4}):  # a block holds one token and its next, or one of some width
    case(f"transformed_rows 300 of 128x128 {options}", "transformed_rows", lambda o=options: transformed_rows(300, 16384, 128, 128, **o), 5e-3, 1e-3)
for k in (384, 11008, 77, 32768, 5003, 1):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for options in ({}, {"shift": True}, {"clip": (0.5, 0.75)}, {"clip": (0.5, 0.75), "shift": True, "bits": 4}):
            case(f"transformed_rows without matrices {k} {dtype} {options}", "transformed_rows", lambda k=k, d=dtype, o=options: transformed_rows(
                5, k, dtype=d, pad=k != 384, **o))
        for options in BEFORE[5:]:
            case(f"transformed_rows without matrices {k} {dtype} {options}", "transformed_rows", lambda k=k, d=dtype, o=options: transformed_rows(
                5, k, dtype=d, **o), 5e-3, 1e-3)

for shape, patch in (((2, 3, 224, 224), (16, 16)), ((1, 3, 30, 33), (14, 14)), ((2, 3, 56, 56), (4, 4)),
                     ((0, 3, 32, 32), (16, 16)), ((1, 1, 9, 7), (3, 2)),
                     # lines of patches that several blocks share, the last one a smaller part
                     ((2, 3, 224, 224), (32, 32)), ((1, 3, 224, 224), (14, 14)), ((4, 3, 512, 512), (16, 16)), ((1, 3, 280, 280), (14, 14))):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        case(f"patches {shape} {patch} {dtype}", "patches", lambda s=shape, p=patch, d=dtype: dict(
            out=torch.zeros(s[0] * (s[2] // p[0]) * (s[3] // p[1]), s[1] * p[0] * p[1], dtype=torch.int8), images=randn(*s).to(d),
            patch_h=p[0], patch_w=p[1], scale=0.0187, zero_point=-3, bits=8))
for n, k in ((32, 64), (96, 128), (384, 1536), (0, 64)):
    case(f"widen_int4 {n}x{k}", "widen_int4", lambda n=n, k=k: dict(out=torch.zeros(n, k, dtype=torch.int8),
                                                                    packed=pack_weight(codes(n, k, bits=4), 4)))
    for bits, largest in ((4, 15), (3, 31), (2, 63)):
        case(f"widen_int4 {n}x{k} multiplied {bits}", "widen_int4", lambda n=n, k=k, b=bits, m=largest: dict(
            out=torch.zeros(n, k, dtype=torch.int8), packed=pack_weight(codes(n, k, bits=b), 4),
            multiplier=torch.randint(1, m + 1, (2, n), dtype=torch.int8, generator=generator(1)),
            group=torch.randint(0, 2, (k,), dtype=torch.uint8, generator=generator(2))))
    for bits, largest in ((4, 8), (3, 18), (2, 42)):
        zeros = torch.randint(-(1 << bits - 1), 1 << bits - 1, (2, n), dtype=torch.int8, generator=generator(3))
        multiplier = torch.randint(1, largest + 1, (2, n), dtype=torch.int8, generator=generator(1))
        case(f"widen_int4 {n}x{k} with zero points {bits}", "widen_int4", lambda n=n, k=k, b=bits, m=multiplier, z=zeros: dict(
            out=torch.zeros(n, k, dtype=torch.int8), packed=pack_weight(codes(n, k, bits=b), 4), multiplier=m.clone(), zero=z.clone(),
            group=torch.randint(0, 2, (k,), dtype=torch.uint8, generator=generator(2))))
    steps = max(k // 32, 3)
    group = (torch.arange(k) // 32 + 1 if k > 64 else torch.arange(k) // 32).to(torch.uint8)
    case(f"widen_int4 {n}x{k} in {steps + 1} groups", "widen_int4", lambda n=n, k=k, s=steps, g=group: dict(
        out=torch.zeros(n, k, dtype=torch.int8), packed=pack_weight(codes(n, k, bits=4), 4), group=g.clone(),
        multiplier=torch.randint(1, 128, (s + 1, n), dtype=torch.int8, generator=generator(1)),
        zero=torch.randint(-128, 128, (s + 1, n), dtype=torch.int8, generator=generator(3))))


def weight_only(m: int, n: int, k: int, *, bits: int = 4, group: int = 128, zero: bool = True, dtype: torch.dtype = torch.float16,
                out: torch.dtype | None = None, bias: bool = True) -> dict[str, Any]:
    lo, hi = int_range(bits)
    shape = -(-k // group), -(-n // 32) * 32
    return dict(
        out=torch.zeros(m, n, dtype=out or dtype), x=strided(randn(m, k, seed=1).to(dtype)),
        weight=exchange_bytes(pack_weight(codes(n, k, bits=bits, seed=2), 4)) if bits <= 4 else pack_weight(codes(n, k, bits=bits, seed=2), 8),
        scale=(torch.rand(shape, generator=generator(3)) + 0.5) / (hi * k**0.5),
        zero=torch.randint(lo, hi + 1, shape, dtype=torch.int8, generator=generator(4)) if zero else None,
        bias=pad_columns(randn(n, seed=5)) if bias else None,
        weight_bits=4 if bits <= 4 else 8, group_columns=group)


def dequantize(n: int, k: int, *, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Any]:
    arguments = weight_only(1, n, k, **options) | {"out": torch.zeros(n, k, dtype=dtype)}
    return {name: value for name, value in arguments.items() if name not in ("x", "bias")}


# A sum in float32 that is rounded to out's dtype; what it may be off is of its norm.
ROUNDED = {torch.float16: 4e-4, torch.bfloat16: 3e-3, torch.float32: 2e-6}
for m, n, k in ((1, 96, 640), (2, 37, 70), (7, 200, 1000), (8, 64, 352), (9, 128, 2112), (16, 70, 5000), (16, 1, 33), (1, 4128, 96), (0, 40, 64)):
    for bits in (4, 8):
        for dtype in (torch.float16, torch.bfloat16):
            for group in (32, 96, 128, 5024):
                case(f"weight_only {m}x{n}x{k} w{bits} {dtype} in groups of {group}", "weight_only",
                     lambda m=m, n=n, k=k, b=bits, d=dtype, g=group: weight_only(
                         m, n, k, bits=b, dtype=d, group=g, out=torch.float32), 0, ROUNDED[torch.float32])
            for out in (torch.float16, torch.bfloat16):
                case(f"weight_only {m}x{n}x{k} w{bits} {dtype} to {out}", "weight_only", lambda m=m, n=n, k=k, b=bits, d=dtype, o=out: weight_only(
                    m, n, k, bits=b, dtype=d, zero=False, out=o, bias=m % 2 == 0), 0, ROUNDED[out])
for bits in (4, 8):
    for dtype in (torch.float16, torch.bfloat16):
        case(f"weight_only long rows w{bits} {dtype}", "weight_only", lambda b=bits, d=dtype: weight_only(
            8, 64, 5000, bits=b, dtype=d, out=torch.float32), 0, ROUNDED[torch.float32])
for n, k in ((96, 640), (37, 70), (1, 33), (0, 64), (4128, 96)):
    for bits in (2, 4, 8):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            case(f"dequantize {n}x{k} w{bits} {dtype}", "dequantize",
                 lambda n=n, k=k, b=bits, d=dtype: dequantize(n, k, bits=b, group=64, zero=b != 2, dtype=d))


def cache_rows(batch: int, heads: int, room: int, dim: int, bits: int, symmetric: bool, dtype: torch.dtype, seed: int, apart: bool = False) -> Tensor:
    """Rows of a cache that is full, or floats. apart: as bytes, those of all heads side by side for each token."""
    x = (randn(batch, heads, room, dim, seed=seed) * (torch.rand(1, 1, room, 1, generator=generator(seed)) * 4 + 0.1) + 0.3).to(dtype)
    rows = x if bits == 16 else RowCodes(bits, symmetric).pack(x)
    if not apart:
        return rows
    rows = rows.view(torch.uint8)
    return rows.transpose(1, 2).contiguous().transpose(1, 2)


def append_rows(batch: int, heads: int, tokens: int, dim: int, *, group: int = 2, keys: tuple[int, bool] = (4, False), values: tuple[int, bool] = (4, False),
                dtype: torch.dtype = torch.float16, rotary: int = 0, right: bool = False, clip: bool = False, queries: bool = True, start: int = 5,
                apart: bool = False, advance: bool = True, outs: bool = False, before: bool = False, turned_back: bool = False,
                odd: int = 0) -> dict[str, Any]:
    def turned(count: int, seed: int) -> Tensor:  # as the product before leaves them
        return (randn(batch, tokens, count + 1, dim + odd, seed=seed) * 2 + 0.25).to(dtype)[:, :, :count, odd:].transpose(1, 2)

    room = 32 if tokens <= 20 else start + tokens
    k, q = turned(heads, 1), turned(heads * group, 3)
    k[0, 0, :1], k[0, 0, -1:, : dim // 2] = 0.0, 0.0311 / 2
    found: dict[str, Any] = dict(
        keys=cache_rows(batch, heads, room, dim, *keys, dtype, 5, apart), values=cache_rows(batch, heads, room, dim, *values, dtype, 6, apart),
        state=torch.tensor([start, 0]), k=k, v=turned(heads, 2), key_bits=keys[0], key_symmetric=keys[1], value_bits=values[0],
        value_symmetric=values[1], advance=advance)
    if queries:
        found |= dict(q=q, q_out=torch.zeros(batch, tokens, heads * group, dim, dtype=dtype))
    if rotary:
        angles = randn(rotary, tokens, dim // 2, seed=7).repeat(1, 1, 2)
        found |= dict(cos=angles.cos().to(dtype), sin=angles.sin().to(dtype))
    if right:
        matrix = torch.linalg.qr(randn(dim, dim, seed=8))[0].contiguous()
        found |= dict(right=matrix.half()) | (dict(inverse=matrix) if queries else {})
    if clip:
        found |= dict(key_clip=torch.tensor([0.9, 0.8]), value_clip=torch.tensor([0.7, 1.0]))
    if outs:
        found |= dict(k_out=torch.zeros(k.shape, dtype=dtype), v_out=torch.zeros(k.shape, dtype=dtype), out_before=before, out_turned=turned_back)
    return found


def cached_attention(batch: int, heads: int, tokens: int, dim: int, length: int, *, group: int = 4, keys: tuple[int, bool] = (4, False),
                     values: tuple[int, bool] = (4, False), dtype: torch.dtype = torch.float16, mask: int = 0, window: int = 0, splits: int = 1,
                     apart: bool = False, large: float = 1.0) -> dict[str, Any]:
    room = length + -length % 16 + 16
    q = (randn(batch, tokens, heads * group, dim, seed=1) * large).to(dtype).transpose(1, 2)
    found: dict[str, Any] = dict(
        out=torch.zeros(batch, tokens, heads * group, dim, dtype=dtype), q=q, keys=cache_rows(batch, heads, room, dim, *keys, dtype, 5, apart),
        values=cache_rows(batch, heads, room, dim, *values, dtype, 6, apart), state=torch.tensor([length, 0]), key_bits=keys[0], key_symmetric=keys[1],
        value_bits=values[0], value_symmetric=values[1], scale=dim**-0.5 / large, window=window)
    if mask:
        found["mask"] = torch.rand(mask, tokens, length, generator=generator(9)) < 0.6
    if splits > 1:
        found["workspace"] = torch.zeros(batch * heads * -(-group * tokens // 8), splits, 8, dim + 2)
    return found


FORMATS = {"4 asymmetric": (4, False), "4": (4, True), "8 asymmetric": (8, False), "8": (8, True), "float": (16, True)}
TURNED = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 2e-4}  # sums of another order, after which a code may be another
for dim in (64, 80, 96, 128):
    for dtype in TURNED:
        for name, codes_of in FORMATS.items():
            for rotary in (0, 1, 3):
                case(f"append_rows {dim} {dtype} {name}, rotary {rotary}", "append_rows", lambda d=dim, t=dtype, k=codes_of, r=rotary: append_rows(
                    3, 2, 1, d, keys=k, values=k, dtype=t, rotary=r))
        case(f"append_rows {dim} {dtype} turned", "append_rows", lambda d=dim, t=dtype: append_rows(2, 3, 2, d, dtype=t, rotary=1, right=True, clip=True),
             5e-3, 10 * TURNED[dtype])
        for tokens, options in {9: {}, 300: dict(outs=True), 17: dict(outs=True, before=True, apart=True), 33: dict(outs=True, turned_back=True)}.items():
            if "turned_back" in options and dtype == torch.float32:
                continue
            case(f"append_rows {dim} {dtype} turned, {tokens} tokens", "append_rows", lambda d=dim, t=dtype, n=tokens, o=options: append_rows(
                2, 2, n, d, dtype=t, rotary=2, right=True, clip=True, **o), 5e-3, 10 * TURNED[dtype])
        for i, (name, codes_of) in enumerate(FORMATS.items()):
            if dtype != torch.float32:
                case(f"append_rows {dim} {dtype} {name} turned, 37 tokens", "append_rows", lambda d=dim, t=dtype, k=codes_of, i=i: append_rows(
                    2, 2, 37, d, keys=k, values=k, dtype=t, rotary=i % 3, right=True, outs=True, turned_back=i % 2 == 0), 5e-3, 10 * TURNED[dtype])
                case(f"append_rows {dim} {dtype} {name}, 37 tokens", "append_rows", lambda d=dim, t=dtype, k=codes_of, i=i: append_rows(
                    2, 2, 37, d, group=3, keys=k, values=k, dtype=t, rotary=i % 3, outs=True, apart=i % 2 == 0))
for bits in range(2, 9):
    for symmetric in (True, False):
        for tokens in (5, 19):
            case(f"append_rows {bits} bits symmetric {symmetric} clipped, {tokens} tokens", "append_rows", lambda b=bits, s=symmetric, n=tokens: append_rows(
                2, 2, n, 64, keys=(b, s), values=(b, s), clip=True))
for name, options in {"many tokens": dict(tokens=20), "no room": dict(tokens=4, start=30), "no queries": dict(queries=False),
                      "no advance": dict(advance=False), "apart": dict(apart=True, keys=(8, True)), "small heads": dict(dim=16), "odd heads": dict(dim=40),
                      "largest heads": dict(dim=256), "8 and 4": dict(keys=(8, True), values=(4, True)), "floats apart": dict(keys=(16, True), apart=True),
                      "one head": dict(heads=1, group=1), "no tokens": dict(tokens=0), "numbers": dict(tokens=20, outs=True, rotary=1),
                      "numbers of 8 bits": dict(tokens=3, outs=True, keys=(8, True), values=(8, False)),
                      "numbers of floats": dict(outs=True, keys=(16, True), values=(16, True), rotary=1),
                      "numbers before": dict(outs=True, before=True, rotary=2), "numbers without room": dict(tokens=4, start=30, outs=True),
                      "a prompt without room": dict(tokens=20, start=20, outs=True, right=True), "a prompt behind others": dict(tokens=20, start=11, outs=True),
                      "a prompt without queries": dict(tokens=20, queries=False, right=True), "a prompt that is not counted": dict(tokens=20, advance=False),
                      # more than the warps of an H200, which then take another
                      "a prompt of many pieces": dict(tokens=700, heads=8, right=True, outs=True, turned_back=True), "a prompt before codes": dict(
                          tokens=20, queries=False, right=True, outs=True, before=True), "odd strides": dict(odd=1, tokens=9, rotary=1),
                      "a prompt of odd heads": dict(tokens=20, dim=112, right=True, rotary=1)}.items():
    case(f"append_rows {name}", "append_rows", lambda o=options: append_rows(**(dict(batch=2, heads=2, tokens=2, dim=64) | o)),
         *((5e-3, 10 * TURNED[torch.float16]) if "right" in options else ()))
# Results are rounded to out's type, probabilities to float16 or, of bfloat16 values, to bfloat16.
ATTENDED = {torch.float16: 2e-3, torch.bfloat16: 6e-3}
for dim in (64, 80, 96, 128):
    for dtype in ATTENDED:
        for k_name, k_format in FORMATS.items():
            for v_name, v_format in FORMATS.items():
                case(f"cached_attention {dim} {dtype} K{k_name} V{v_name}", "cached_attention", lambda d=dim, t=dtype, k=k_format, v=v_format: cached_attention(
                    2, 2, 1, d, 333, keys=k, values=v, dtype=t, splits=3), 0, ATTENDED[dtype])
for name, options in {
        "one token there": dict(length=1), "16": dict(length=16), "17": dict(length=17), "127": dict(length=127), "128": dict(length=128), "129": dict(length=129),
        "two tokens": dict(tokens=2), "three tokens": dict(tokens=3, length=700, splits=2),
        "three tokens, window": dict(tokens=3, window=100, length=700), "eight tokens": dict(tokens=8), "eight tokens in parts": dict(tokens=8, splits=5, group=3),
        "one query a head": dict(group=1, heads=3), "7 queries": dict(group=7), "8 queries": dict(group=8), "16 queries": dict(group=16),
        "mask": dict(mask=2), "one mask": dict(mask=1, tokens=3), "mask in parts": dict(mask=2, tokens=3, splits=4, length=1000),
        "window": dict(window=100, length=700), "short window": dict(window=3, tokens=8, splits=4, length=700), "long window": dict(window=4096),
        "more parts than tokens": dict(splits=9, length=200), "long": dict(length=5000, splits=7), "apart": dict(apart=True),
        "apart in parts": dict(apart=True, splits=3, keys=(8, True), values=(16, True)), "large queries": dict(large=30000.0),
        "small queries": dict(large=1e-4)}.items():
    for dtype in ATTENDED:
        if name != "large queries" or dtype == torch.bfloat16:
            case(f"cached_attention {name} {dtype}", "cached_attention", lambda o=options, t=dtype: cached_attention(
                **(dict(batch=2, heads=2, tokens=1, dim=128, length=300, dtype=t) | o)), 0, ATTENDED[dtype])
case("cached_attention very large queries", "cached_attention", lambda: cached_attention(1, 2, 1, 64, 300, dtype=torch.bfloat16, large=1e6), 0, 6e-3)
