"""Streaming histograms against the raw data, and the file they are kept in."""

import json
import re
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vitq.calib.histogram import PERCENTILES
from vitq.calib.statistics import Histogram, Statistics
from vitq.quantizers.uniform import fake_quantize, scale_and_zero


pytestmark = pytest.mark.usefixtures("one_thread")


def data(kind, shape=(64, 30, 12)):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    return {"normal": x, "gelu": torch.nn.functional.gelu(x * 2), "outliers": x * torch.where(torch.rand(shape, generator=torch.Generator().manual_seed(4)) < 1e-3, 60.0, 1.0),
            "positive": x.abs() + 3, "negative": -x.abs(), "zero": torch.zeros(shape), "constant": torch.full(shape, -0.3),
            "channels": x * torch.logspace(-3, 2, shape[-1]), "tiny": x * 1e-30, "large": x * 1e30}[kind]


KINDS = ["normal", "gelu", "outliers", "positive", "negative", "zero", "constant", "channels", "tiny", "large"]


def same(a, b):
    return all(torch.equal(a.state()[key], b.state()[key]) for key in a.state())


@pytest.mark.parametrize("channels", [None, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_streaming_equals_one_shot_in_any_order(kind, channels):
    x = data(kind) * torch.logspace(-2, 1, 64)[:, None, None]  # later batches need wider ranges
    whole, forward, backward = (Histogram(channels) for _ in range(3))
    whole.update(x)
    parts = x.split([1, 7, 20, 36])
    for part in parts:
        forward.update(part)
    for part in reversed(parts):
        backward.update(part)
    assert same(whole, forward) and same(whole, backward)
    assert whole.count == x.numel() // (channels or 1)
    flat = x.reshape(1, -1) if channels is None else x.reshape(-1, 12).t()
    assert torch.equal(whole.min, flat.amin(1)) and torch.equal(whole.max, flat.amax(1))


@pytest.mark.parametrize("channels", [None, 12])
def test_counts_are_those_of_exact_edges(channels):
    x = data("channels")
    histogram = Histogram(channels, bins=64)
    histogram.update(x)
    rows = x.reshape(1, -1) if channels is None else x.reshape(-1, 12).t()
    for c, row in enumerate(rows):
        radius = 2.0 ** int(histogram.exponent[c])
        assert row.abs().max() < radius <= 2 * row.abs().max()
        edges = torch.linspace(-radius, radius, 65, dtype=torch.float64)
        expected = torch.bincount(torch.bucketize(row.double(), edges, right=True) - 1, minlength=64)
        assert torch.equal(histogram.counts[c], expected)


def test_values_on_a_power_of_two_and_many_chunks():
    x = torch.tensor([1.0, -1.0, 2.0, -2.0, 0.0, -0.0, 4.0])
    one, two = Histogram(bins=8), Histogram(bins=8)
    one.update(x)
    for value in x:
        two.update(value)
    assert same(one, two) and int(one.exponent) == 3
    big = torch.randn(700_000)
    one, two = Histogram(), Histogram()
    one.update(big)
    for part in big.split(99_999):
        two.update(part)
    assert same(one, two) and one.count == 700_000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_and_strides(dtype):
    x = data("normal").to(dtype)
    a, b, c = Histogram(12), Histogram(12), Histogram(12, dim=1)
    a.update(x)
    b.update(x.float())
    c.update(x.transpose(1, 2))
    assert same(a, b) and same(a, c)
    a, b = Histogram(), Histogram()
    a.update(x[::2, :, 1::3])
    b.update(x[::2, :, 1::3].contiguous())
    assert same(a, b)


def test_made_in_inference_mode_and_used_outside():
    histogram = Histogram()
    with torch.inference_mode():
        histogram.update(torch.randn(100))
    histogram.update(torch.randn(100, requires_grad=True) * 9)
    lo, hi = histogram.range(8, False, "mse")
    assert histogram.count == 200 and not (lo.is_inference() or lo.requires_grad) and lo < hi


def test_memory_does_not_grow():
    histogram = Histogram(12)
    size = sum(t.numel() * t.element_size() for t in histogram.state().values())
    for i in range(20):
        histogram.update(data("normal") * 2.0**i)
    assert sum(t.numel() * t.element_size() for t in histogram.state().values()) == size


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("channels", [None, 12])
def test_refuses_nan_and_adds_nothing(bad, channels):
    histogram = Histogram(channels)
    histogram.update(data("normal"))
    before = {key: value.clone() for key, value in histogram.state().items()}
    x = data("normal")
    x[3, 4, 5] = bad
    with pytest.raises(ValueError, match="activations hold NaN or inf"):
        histogram.update(x)
    assert all(torch.equal(before[key], histogram.state()[key]) for key in before)


def test_refuses_shapes():
    with pytest.raises(ValueError, match=re.escape("activations have shape (3, 5); dimension -1 must have 12 channels")):
        Histogram(12).update(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="must have 12 channels"):
        Histogram(12, dim=2).update(torch.zeros(3, 12))
    with pytest.raises(TypeError, match="activations are torch.int64"):
        Histogram().update(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="bins = 7"):
        Histogram(bins=7)
    with pytest.raises(ValueError, match="channels = 0"):
        Histogram(0)
    with pytest.raises(ValueError, match="no activations have been observed"):
        Histogram().range(8, True, "mse")
    histogram = Histogram()
    histogram.update(torch.zeros(0, 5))
    assert histogram.count == 0
    histogram.update(torch.ones(1))
    with pytest.raises(ValueError, match="observer = 'median'"):
        histogram.range(8, True, "median")


def quantile(rows, p):
    return torch.quantile(rows.double(), p, dim=1)


def error(rows, lo, hi, bits, symmetric):
    scale, zero = scale_and_zero(lo, hi, bits, symmetric)
    return (fake_quantize(rows, scale.reshape(-1, 1), zero.reshape(-1, 1), bits).double() - rows.double()).square().sum(1)


@pytest.mark.parametrize("channels", [None, 12])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_ranges_against_brute_force(kind, bits, symmetric, channels):
    x = data(kind)
    histogram = Histogram(channels)
    for part in x.split(10):
        histogram.update(part)
    rows = x.reshape(1, -1) if channels is None else x.reshape(-1, 12).t()
    shape = () if channels is None else (12,)
    least = {}
    for observer in ("minmax", "percentile", "mse"):
        lo, hi = histogram.range(bits, symmetric, observer)
        assert lo.shape == hi.shape == shape and lo.dtype == torch.float32
        assert torch.isfinite(lo).all() and torch.isfinite(hi).all() and (lo <= hi).all()
        least[observer] = error(rows, lo, hi, bits, symmetric)
    lo, hi = histogram.range(bits, symmetric, "minmax")
    assert torch.equal(lo.reshape(-1), rows.amin(1)) and torch.equal(hi.reshape(-1), rows.amax(1))
    brute = torch.stack([error(rows, quantile(rows, 1 - p), quantile(rows, p), bits, symmetric) for p in PERCENTILES]).amin(0)
    # the 512 buckets of a channel are as wide as a step of 8 bits, and a sparse tail leaves the place of a quantile open
    floor = 1e-9 * rows.double().square().sum(1)
    assert (least["percentile"] <= brute * (1.05 if channels is None and kind != "outliers" else 1.3) + floor).all()
    ratios = torch.linspace(0.01, 1, 100)
    brute = torch.stack([error(rows, rows.amin(1) * r, rows.amax(1) * r, bits, symmetric) for r in ratios]).amin(0)
    assert (least["mse"] <= brute * (1.03 if channels is None else 1.15) + floor).all()
    assert (least["mse"] <= least["minmax"] * (1.02 if channels is None else 1.1) + floor).all()


def test_outliers_are_clipped_and_skewed_ranges_kept():
    x = torch.randn(200_000)
    x[0] = 100.0
    histogram = Histogram()
    histogram.update(x)
    lo, hi = histogram.range(4, False, "percentile")
    assert -6 < lo < 0 < hi < 6
    gelu = Histogram()
    gelu.update(torch.nn.functional.gelu(torch.randn(200_000) * 3))
    lo, hi = gelu.range(8, False, "mse")
    assert -0.18 < lo < -0.1 and hi > 8


def test_update_is_fast():
    # 128 images of DeiT-S are 1.2e9 elements: 20 s are 60 M elements/s; here the bound only catches a slow path
    histogram, x = Histogram(), torch.randn(8, 197, 1536)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        histogram.update(x)
        seconds.append(time.perf_counter() - start)
    assert x.numel() / min(seconds) > 3e6


# --- the file ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    statistics = Statistics("VisionTransformer:abc", samples=64)
    for key, channels in (("blocks.0.attn.qkv:input", 12), ("blocks.0.attn.qk:other", None), ("unused:input", None)):
        statistics[key] = Histogram(channels, bins=64)
    statistics["blocks.0.attn.qkv:input"].update(data("channels"))
    statistics["blocks.0.attn.qk:other"].update(data("normal"))
    path = tmp_path / "stats.safetensors"
    statistics.save(path)
    return statistics, path


def test_file_round_trip(saved, tmp_path):
    statistics, path = saved
    loaded = Statistics.load(path)
    assert (loaded.model, loaded.samples, len(loaded)) == (statistics.model, 64, 3)
    assert set(loaded) == set(statistics) and "x:input" not in loaded
    for key in statistics:
        assert same(statistics[key], loaded[key]) and loaded[key].channels == statistics[key].channels
    loaded["blocks.0.attn.qk:other"].update(torch.randn(5) * 100)
    assert [p.name for p in tmp_path.iterdir()] == ["stats.safetensors"]
    loaded.save(str(path))
    assert Statistics.load(str(path))["blocks.0.attn.qk:other"].count == data("normal").numel() + 5


def test_save_into_no_folder(tmp_path):
    with pytest.raises(OSError):
        Statistics().save(tmp_path / "missing" / "stats.safetensors")


def read(path):
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["vitq"])


def test_load_refuses(saved, tmp_path):
    _, path = saved
    content = path.read_bytes()
    tensors, header = read(path)
    other = tmp_path / "other.safetensors"

    def expect(message):
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            Statistics.load(other)
        assert str(other) in str(caught.value)

    with pytest.raises(FileNotFoundError, match="no such file; calibrate first"):
        Statistics.load(tmp_path / "none")
    for length in (0, 4, 100, len(content) // 2, len(content) - 1):
        other.write_bytes(content[:length])
        expect("not a readable safetensors file")
    flipped = bytearray(content)
    flipped[-20] ^= 4
    other.write_bytes(flipped)
    expect("content does not match its hash")
    save_file(tensors, other)
    expect("not a file of calibration statistics")
    save_file(tensors, other, metadata={"vitq": "{"})
    expect("calibrate again")
    save_file(tensors, other, metadata={"vitq": json.dumps({**header, "schema": 2})})
    expect("schema 2; this vitq knows up to 1")
    save_file(tensors, other, metadata={"vitq": json.dumps({**header, "format": "x"})})
    expect("holds 'x'")
    save_file(tensors, other, metadata={"vitq": json.dumps({**header, "samples": 65})})
    expect("content does not match its hash")
    without = {key: value for key, value in header.items() if key != "operands"}
    save_file(tensors, other, metadata={"vitq": json.dumps(without)})
    expect("key 'operands' is missing")
    save_file({key: value for key, value in tensors.items() if not key.endswith("qkv:input.min")}, other, metadata={"vitq": json.dumps(header)})
    expect("tensors missing: ['blocks.0.attn.qkv:input.min']")
    save_file({**tensors, "extra": torch.zeros(1)}, other, metadata={"vitq": json.dumps(header)})
    expect("unknown: ['extra']")


def test_from_state_refuses():
    histogram = Histogram(12)
    histogram.update(data("normal"))
    state = histogram.state()
    for change, message in (
        ({"counts": state["counts"].float()}, "histogram counts is torch.float32"),
        ({"counts": -state["counts"]}, "negative counts"),
        ({"min": state["min"][:3]}, "with 12 rows"),
        ({"max": state["max"] * float("nan")}, "NaN bounds"),
        ({"exponent": state["exponent"] + 1000}, "exponents are outside"),
        ({"more": state["max"]}, "it needs"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            Histogram.from_state({**state, **change}, 12)
