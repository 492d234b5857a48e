"""Weight-only layers on CUDA: packing, few rows and many, in parts. On CPU tensors the operators are the torch references."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import vitq
from vitq.cuda import loader, weight_only
from vitq.ops.common import even_groups
from vitq.ops.weight_only import ReferenceWeightOnly
from vitq.plan import LinearParams

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ROUNDING = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5}


def params(n: int, k: int, bits: int, group: int, symmetric: bool, bias: bool = True) -> LinearParams:
    lo, hi = -(1 << bits - 1), 1 << bits - 1
    shape = (-(-k // group), n) if group else (n,)
    return LinearParams(torch.randint(lo, hi, (n, k), dtype=torch.int8), bits, (torch.rand(shape) + 0.5) / (hi * k**0.5),
                        torch.randn(n) if bias else None, None,
                        weight_zero=None if symmetric else torch.randint(lo, hi, shape, dtype=torch.int32),
                        column_group=(torch.arange(k) // group).to(torch.uint8) if group else None)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("n, k, bits, group, symmetric", [(37, 70, 4, 32, False), (96, 640, 4, 128, True), (33, 300, 3, 0, False),
                                                          (64, 200, 8, 64, False), (40, 129, 2, 96, True), (128, 256, 6, 0, True)])
def test_the_product(n: int, k: int, bits: int, group: int, symmetric: bool, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    kernel, spec = weight_only.CudaWeightOnly(), params(n, k, bits, group, symmetric, bias=n != 40)
    assert weight_only.why_not(spec) is None
    packed = kernel.pack(spec, torch.device(device))
    wide, high = -(-k // 64) * 64, -(-n // 32) * 32
    assert packed.weight.numel() == (high * wide // 2 if bits <= 4 else high * (-(-k // 32) * 32)), "the weight stays packed"
    reference = ReferenceWeightOnly()
    for rows in ((), (1,), (2, 3), (16,), (17,), (4, 10), (0,)):
        x = torch.randn(*rows, k).to(dtype)
        want = reference.run(reference.pack(spec, torch.device("cpu")), x, dtype=dtype).double()
        got = kernel.run(packed, x.to(device), dtype=dtype)
        assert got.dtype == dtype and got.shape == (*rows, n)
        assert (got.cpu().double() - want).norm() <= ROUNDING[dtype] * want.norm()


@pytest.mark.parametrize("device", DEVICES)
def test_many_rows_in_parts_of_the_weight(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    kernel, spec, x = weight_only.CudaWeightOnly(), params(100, 160, 4, 64, False), torch.randn(20, 160, device=device)
    packed = kernel.pack(spec, torch.device(device))
    whole, sizes = kernel.run(packed, x, dtype=torch.float32), []
    dequantize = torch.ops.vitq.dequantize
    monkeypatch.setattr(weight_only, "SCRATCH", 64 * 160 * 4)
    monkeypatch.setattr(torch.ops.vitq, "dequantize", lambda out, *args, **kwargs: (sizes.append(len(out)), dequantize(out, *args, **kwargs)))
    torch.testing.assert_close(kernel.run(packed, x, dtype=torch.float32), whole, rtol=1e-5, atol=1e-6)
    assert sizes == [64, 36]


def test_the_order_of_weights_for_floats_is_its_own_inverse() -> None:
    packed = torch.arange(64, dtype=torch.uint8).view(2, 32)
    other = weight_only.exchange_bytes(packed)
    assert other[0, :8].tolist() == [0, 2, 1, 3, 4, 6, 5, 7] and torch.equal(weight_only.exchange_bytes(other), packed)


def test_groups_of_neighbours() -> None:
    assert even_groups(None, 70) == 96 and even_groups(torch.zeros(64, dtype=torch.uint8), 64) == 64
    assert even_groups(torch.arange(100) // 32, 100) == 32 and even_groups((torch.arange(600) // 2 // 160).to(torch.int16), 600) == 320
    for group in (torch.arange(100) // 48, torch.arange(100) % 2, (torch.arange(100) >= 32).long(), 1 - torch.arange(100) // 64):
        assert even_groups(group, 100) is None


def test_what_is_refused_says_why() -> None:
    spec = params(32, 64, 4, 32, False)
    for change, reason in (({"codes": torch.zeros(0, 64, dtype=torch.int8)}, "empty"), ({"column_group": torch.arange(64) % 2}, "not neighbours"),
                           ({"weight_zero": torch.full((2, 32), 9)}, "beyond the codes")):
        assert reason in weight_only.why_not(replace(spec, **change))


@pytest.mark.gpu
def test_a_module_runs_it_and_is_captured() -> None:
    linear, x = nn.Linear(256, 96, device="cuda"), torch.randn(3, 256, device="cuda")
    module = vitq.linear_module(linear, "gptq-w4a16", x, dtype=torch.float16)
    assert module.row("", "fc1").kernel == "cuda-weight-only" and loader.why_unavailable() is None
    replay, reason = vitq.evaluate.cuda_graph(module, x.half())
    assert reason is None and torch.equal(replay(x), module(x.half())) and vitq.evaluate.sqnr_db(linear(x), module(x.half()).float()) > 15
