"""vitq.timing: percentiles, turns, the better 16-bit copy, peak memory."""
import time

import pytest
import torch
from torch import nn

from vitq.timing import best_half, time_model, time_models, with_peak


def test_percentiles():
    t = time_model(lambda _: time.sleep(0.005), torch.zeros(1), repeats=5, warmup=0)
    assert 5 <= t.p10 <= t.median_ms <= t.p90 and t.spread == pytest.approx((t.p90 - t.p10) / t.median_ms)
    with pytest.raises(ValueError, match="repeats"):
        time_model(lambda _: None, torch.zeros(1), repeats=0)


def test_turns():
    x, order = torch.zeros(1), []
    time_models({"a": (lambda _: order.append("a"), x), "b": (lambda _: order.append("b"), x)}, repeats=2, warmup=1)
    assert "".join(order) == "ab" + "aaa" + "bbb"  # a warm-up of each, then turns that open with an untimed call
    order.clear()
    time_models({"a": (lambda _: order.append("a"), x), "b": (lambda _: order.append("b"), x)}, repeats=5, warmup=0)
    assert "".join(order) == "aaaaa" + "bbbbb" + "aa" + "bb"  # four timed calls, then the fifth


def test_best_half_is_a_copy_in_16_bit():
    linear = nn.Linear(8, 8)
    dtype, half = best_half(linear, torch.zeros(2, 8))
    assert dtype in (torch.bfloat16, torch.float16) and half.weight.dtype == dtype and linear.weight.dtype == torch.float32


def test_a_cpu_has_no_peak():
    built = nn.Linear(8, 8)
    assert with_peak(lambda: built, torch.zeros(2, 8)) == (built, None)


@pytest.mark.gpu
def test_peak_counts_weights_and_what_a_forward_allocates():
    x = torch.zeros(1 << 20, 4, device="cuda")
    nn.Linear(4, 4, device="cuda")(x)  # cuBLAS's workspace is there before
    fn, peak = with_peak(lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()).cuda(), x)
    assert 32 <= peak < 33  # the output of each, 16 MiB both
