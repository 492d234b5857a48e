"""The C kernels against float64 (and, where the arithmetic allows, bit-exact) references."""

import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vitq.cpu import kernels, loader
from vitq.quantizers import uniform

pytestmark = pytest.mark.skipif(loader.why_unavailable() is not None, reason=str(loader.why_unavailable()))


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def reference_codes(x, scale, zero_point, qmin, qmax):
    """The formula of vitq.quantizers.uniform, for any code range, shifted to uint8."""
    scale = torch.as_tensor(scale, dtype=torch.float32)
    codes = torch.clamp(torch.round(x.float() / scale) + zero_point, qmin, qmax)
    return (codes + 128).to(torch.uint8)


def float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


# ---------------------------------------------------------------- quantize_rows

GRIDS = [(0, -128, 127), (17, -128, 127), (-128, -128, 127), (0, -8, 7), (3, -8, 7), (0, -127, 127)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero_point, qmin, qmax", GRIDS)
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 384])
def test_quantize_rows_is_exact(dtype, zero_point, qmin, qmax, columns):
    x = (torch.randn(37, columns, generator=random(columns)) * 3).to(dtype)
    scale = float32(0.0237)
    codes, scales = kernels.quantize_rows(x, scale, zero_point, qmin, qmax)
    assert scales is None
    assert codes.dtype == torch.uint8
    assert torch.equal(codes, reference_codes(x, scale, zero_point, qmin, qmax))
    if (qmin, qmax) == (-128, 127):
        assert torch.equal(codes.int(), uniform.quantize(x, scale, zero_point, 8).int() + 128)


@pytest.mark.parametrize("scale", [1.0, 0.1, 1 / 3, 7e-4, 1e-30, 1e30])
def test_quantize_rows_rounds_ties_and_extremes_like_torch(scale):
    scale = float32(scale)
    steps = torch.cat([torch.arange(-300, 300, 0.5), torch.tensor([0.0, -0.0, 1e10, -1e10, 3e38, -3e38])])
    near = steps * scale
    up = torch.nextafter(near, torch.tensor(math.inf))
    down = torch.nextafter(near, torch.tensor(-math.inf))
    x = torch.stack([near, up, down, steps])
    for zero_point, qmin, qmax in GRIDS:
        codes, _ = kernels.quantize_rows(x, scale, zero_point, qmin, qmax)
        assert torch.equal(codes, reference_codes(x, scale, zero_point, qmin, qmax))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("qmin, qmax", [(-128, 127), (-8, 7)])
def test_quantize_rows_dynamic_is_exact(dtype, qmin, qmax):
    x = torch.randn(5, 13, 100, generator=random(0)).to(dtype)
    x[1, 2] = 0
    x[2, 3, 7] = 1e6
    x[3, 4] = 3e38
    codes, scales = kernels.quantize_rows(x, None, 0, qmin, qmax)
    expected_codes, expected_scales = uniform.quantize_per_token(x, bits=8 if qmax == 127 else 4)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(codes.int(), expected_codes.int() + 128)
    assert scales[1, 2, 0] > 0
    assert (codes[1, 2] == 128).all()


def test_quantize_rows_takes_strided_rows():
    wide = torch.randn(20, 3, 50, generator=random(1))
    x = wide[:, 1, 4:39]
    codes, _ = kernels.quantize_rows(x, 0.05, 2, -128, 127)
    assert torch.equal(codes, reference_codes(x, 0.05, 2, -128, 127))
    nested = wide.transpose(0, 1)  # its leading dimensions have no common stride
    codes, _ = kernels.quantize_rows(nested, 0.05, 2, -128, 127)
    assert torch.equal(codes, reference_codes(nested, 0.05, 2, -128, 127))


def test_not_finite_inputs_have_defined_codes():
    x = torch.tensor([[math.nan, math.inf, -math.inf, 1.0]])
    codes, _ = kernels.quantize_rows(x, 1.0, 0, -100, 100)
    assert codes.tolist() == [[28, 228, 28, 129]]
    codes, scales = kernels.quantize_rows(x, None, 0, -100, 100)
    assert scales.isnan().all()
    assert codes.tolist() == [[28, 28, 28, 28]]
    codes, scales = kernels.quantize_rows(x[:, 1:], None, 0, -100, 100)
    assert scales.isinf().all()
    assert codes.tolist() == [[28, 28, 128]]


# ---------------------------------------------------------- layer_norm_quantize


def layer_norm64(x, weight, bias, eps):
    cast = [None if t is None else t.double() for t in (weight, bias)]
    return F.layer_norm(x.double(), x.shape[-1:], *cast, eps)


def assert_nearly_all_equal(codes, expected):
    difference = (codes.int() - expected.int()).abs()
    assert difference.max() <= 1
    assert difference.count_nonzero() <= max(1, codes.numel() // 1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("columns", [1, 17, 32, 40, 384, 768])
def test_layer_norm_static(dtype, affine, columns):
    g = random(columns)
    x = (torch.randn(60, columns, generator=g) * 2 + 5).to(dtype)
    weight = torch.randn(columns, generator=g) if affine else None
    bias = torch.randn(columns, generator=g) if affine else None
    y = layer_norm64(x, weight, bias, 1e-6)
    for scale, zero_point, qmin, qmax in ((0.03, -11, -128, 127), (0.4, 1, -8, 7)):
        codes, scales = kernels.layer_norm_quantize(x, weight, bias, 1e-6, scale, zero_point, qmin, qmax)
        assert scales is None
        expected = torch.clamp(torch.round(y / float32(scale)) + zero_point, qmin, qmax) + 128
        assert_nearly_all_equal(codes, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [17, 384])
def test_layer_norm_dynamic(dtype, columns):
    g = random(columns)
    x = (torch.randn(4, 15, columns, generator=g) * 2 - 3).to(dtype)
    weight, bias = torch.randn(columns, generator=g), torch.randn(columns, generator=g)
    y = layer_norm64(x, weight, bias, 1e-5)
    codes, scales = kernels.layer_norm_quantize(x, weight, bias, 1e-5, None, 0, -128, 127)
    expected = y.abs().amax(-1, keepdim=True) / 127
    assert scales.shape == (4, 15, 1)
    torch.testing.assert_close(scales.double(), expected, rtol=1e-5, atol=0)
    assert_nearly_all_equal(codes, torch.clamp(torch.round(y / expected), -128, 127) + 128)


def test_layer_norm_of_large_mean_keeps_its_precision():
    x = torch.randn(50, 384, generator=random(3)) + 1000  # E[x^2] - E[x]^2 would lose all digits
    codes, _ = kernels.layer_norm_quantize(x, None, None, 1e-6, 0.03, 0, -128, 127)
    expected = torch.clamp(torch.round(layer_norm64(x, None, None, 1e-6) / float32(0.03)), -128, 127) + 128
    difference = (codes.int() - expected.int()).abs()
    assert difference.max() <= 1
    assert difference.count_nonzero() <= codes.numel() // 100


def test_layer_norm_of_a_constant_row_is_its_bias():
    x = torch.full((3, 40), 7.0)
    bias = torch.arange(40.0) - 20
    codes, _ = kernels.layer_norm_quantize(x, torch.ones(40), bias, 1e-6, 1.0, 0, -128, 127)
    assert torch.equal(codes.int(), (bias.int() + 128).expand(3, 40))


# --------------------------------------------------------------- attention_int8


def make_qkv(batch, tokens, heads, dim, seed=0):
    qkv = torch.randint(-128, 128, (batch, tokens, 3, heads, dim), dtype=torch.int8, generator=random(seed))
    return qkv.unbind(2)


def each_head(value):
    """A number, or one a head, as float64 [1 or H, 1, 1] of its float32."""
    return torch.as_tensor(value, dtype=torch.float32).double().reshape(-1, 1, 1)


def listed(value):
    return list(value) if isinstance(value, (list, tuple)) else [value]


def reference(q, k, v, *, qk_scale, v_scale, zq=0, zk=0, zv=0, p_bits=8, bias=None, mask=None):
    """The kernel's formula in float64: output [B, N, H * D], codes and exp sums [B, H, N, ...]. Scales and zero points: one, or one a head."""
    q, k, v = (t.double().transpose(1, 2) - each_head(z) for t, z in ((q, zq), (k, zk), (v, zv)))
    logits = q @ k.mT * each_head(qk_scale)
    if bias is not None:
        logits = logits + bias.double()
    if mask is not None:
        logits = logits + mask.double().repeat(len(q) // len(mask), 1, 1)[:, None]
    top = logits.amax(-1, keepdim=True)
    e = torch.where(top.isneginf(), 0.0, torch.exp(logits - top))
    levels = 2**p_bits - 1
    codes, total = torch.round(e * levels), e.sum(-1, keepdim=True)
    out = torch.where(total > 0, codes @ v * each_head(v_scale) / (levels * total), 0.0)
    return out.transpose(1, 2).flatten(2), codes, total


def read_codes(q, k, total, p_bits=8, **options):
    """The kernel's probability codes, read through one-hot values: `dim` keys a call."""
    batch, tokens, heads, dim = q.shape
    parts = []
    for first in range(0, tokens, dim):
        count = min(dim, tokens - first)
        v = torch.zeros(batch, tokens, heads, dim, dtype=torch.int8)
        v[:, first : first + count, :, :count] = torch.eye(count, dtype=torch.int8)[None, :, None]
        out = kernels.attention_int8(q, k, v, v_scale=[1.0], p_bits=p_bits, **options)
        parts.append(out.unflatten(2, (heads, dim)).transpose(1, 2)[..., :count])
    exact = torch.cat(parts, -1).double() * (2**p_bits - 1) * total
    codes = exact.round()
    assert (codes - exact).abs().max() < 1e-3
    return codes


def kernel_options(qk_scale, zq=0, zk=0, **others):
    return dict(logit_scale=listed(qk_scale), q_zero=listed(zq), k_zero=listed(zk), **others)


def check_attention(q, k, v, *, qk_scale, v_scale=0.02, zq=0, zk=0, zv=0, p_bits=8, bias=None, mask=None):
    """Codes as float64's but for rare neighbours; the output exact to fp32 given the codes."""
    options = kernel_options(qk_scale, zq, zk, p_bits=p_bits, bias=bias, mask=mask)
    _, codes, total = reference(
        q, k, v, qk_scale=qk_scale, v_scale=v_scale, zq=zq, zk=zk, zv=zv, p_bits=p_bits, bias=bias, mask=mask
    )
    actual = read_codes(q, k, total, **options)
    assert_nearly_all_equal(actual, codes)
    out = kernels.attention_int8(q, k, v, v_scale=listed(v_scale), v_zero=listed(zv), **options)
    numerator = actual @ (v.double().transpose(1, 2) - each_head(zv)) * each_head(v_scale)
    expected = torch.where(total > 0, numerator / ((2**p_bits - 1) * total), 0.0).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out.double(), expected, rtol=3e-6, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 49, 64, 65, 197, 257, 577])
@pytest.mark.parametrize("dim", [16, 32, 48, 64, 80, 96, 128])
def test_attention_sizes(tokens, dim):
    q, k, v = make_qkv(1, tokens, 2, dim, seed=tokens + dim)
    check_attention(q, k, v, qk_scale=3e-4 / math.sqrt(dim / 64))


@pytest.mark.parametrize("dim", [1, 2, 7, 30, 65, 250, 256])
def test_attention_head_sizes_off_the_vector_width(dim):
    q, k, v = make_qkv(2, 37, 2, dim)
    check_attention(q, k, v, qk_scale=2e-3 / math.sqrt(dim), zq=-7, zk=100, zv=30)


@pytest.mark.parametrize("zq, zk, zv", [(5, 0, 0), (0, -9, 0), (0, 0, 31), (-128, 127, -128), (127, -128, 127)])
def test_attention_zero_points(zq, zk, zv):
    q, k, v = make_qkv(2, 50, 3, 32)
    check_attention(q, k, v, qk_scale=2e-4, zq=zq, zk=zk, zv=zv)


def test_attention_scales_and_zero_points_of_each_head():
    q, k, v = make_qkv(2, 50, 3, 32)
    check_attention(q, k, v, qk_scale=[2e-4, 1e-3, 5e-5], v_scale=[0.02, 0.5, 0.001], zq=[5, 0, -128], zk=[0, 127, -3], zv=[-7, 31, 0])


@pytest.mark.parametrize("p_bits", range(2, 9))
def test_attention_probability_bits(p_bits):
    q, k, v = make_qkv(1, 65, 2, 64)
    check_attention(q, k, v, qk_scale=3e-4, p_bits=p_bits, zv=3)


@pytest.mark.parametrize("low", [-100.0, -math.inf])
@pytest.mark.parametrize("with_bias", [True, False])
def test_attention_bias_and_mask(low, with_bias):
    g = random(5)
    q, k, v = make_qkv(8, 49, 3, 32)
    bias = torch.randn(3, 49, 49, generator=g) if with_bias else None
    mask = torch.where(torch.rand(4, 49, 49, generator=g) < 0.4, low, 0.0)
    check_attention(q, k, v, qk_scale=3e-4, bias=bias, mask=mask, zv=-4)


def test_attention_rows_without_a_key_give_zeros():
    q, k, v = make_qkv(2, 20, 2, 16)
    mask = torch.zeros(1, 20, 20)
    mask[0, 3] = -math.inf
    mask[0, 4, 1:] = -math.inf
    out = kernels.attention_int8(q, k, v, logit_scale=[1e-3], v_scale=[0.5], v_zero=[9], mask=mask)
    assert out.isfinite().all()
    assert (out[:, 3] == 0).all()
    torch.testing.assert_close(out[:, 4], (v[:, 0].float() - 9).flatten(1) * 0.5)
    check_attention(q, k, v, qk_scale=1e-3, mask=mask)


def test_attention_bias_may_be_expanded_over_heads():
    q, k, v = make_qkv(2, 20, 3, 16)
    bias = torch.randn(1, 20, 20, generator=random(6)).expand(3, -1, -1)
    out = kernels.attention_int8(q, k, v, logit_scale=[1e-3], v_scale=[0.02], bias=bias)
    assert torch.equal(out, kernels.attention_int8(q, k, v, logit_scale=[1e-3], v_scale=[0.02], bias=bias.contiguous()))


def test_attention_with_equal_logits_averages_the_values_exactly():
    q, k, v = make_qkv(2, 577, 2, 64)
    out = kernels.attention_int8(q, k, v, logit_scale=[0.0], v_scale=[1.0], v_zero=[-128])
    mean = (v.double() + 128).mean(1, keepdim=True).flatten(2).expand(-1, 577, -1)
    torch.testing.assert_close(out.double(), mean, rtol=1e-6, atol=0)


def test_attention_of_extreme_codes_does_not_overflow():
    q = torch.full((1, 2000, 1, 256), -128, dtype=torch.int8)
    zero_points = dict(q_zero=[127], k_zero=[127], v_zero=[127])
    out = kernels.attention_int8(q, q, q, logit_scale=[1e-3], v_scale=[1.0], **zero_points)
    torch.testing.assert_close(out, torch.full((1, 2000, 256), -255.0))


@pytest.mark.parametrize("scale", [3e-4, 0.5])
def test_attention_near_float_attention(scale):
    q, k, v = make_qkv(2, 197, 3, 64)
    out = kernels.attention_int8(q, k, v, logit_scale=[scale], v_scale=[0.02])
    qd, kd, vd = (t.double().transpose(1, 2) for t in (q, k, v))
    expected = F.scaled_dot_product_attention(qd, kd, vd * 0.02, scale=scale).transpose(1, 2).flatten(2)
    assert (out - expected).norm() < 0.01 * expected.norm()


def test_attention_output_kinds_agree():
    q, k, v = make_qkv(2, 50, 3, 48)
    options = dict(logit_scale=[3e-4], v_scale=[0.02], v_zero=[4])
    out = kernels.attention_int8(q, k, v, **options)
    halves = kernels.attention_int8(q, k, v, out_dtype=torch.bfloat16, **options)
    assert torch.equal(halves, out.bfloat16())
    for scale, zero_point, qmin, qmax in ((0.004, 0, -128, 127), (0.003, -30, -128, 127), (0.1, 2, -8, 7)):
        codes = kernels.attention_int8(
            q, k, v, out_scale=scale, out_zero_point=zero_point, out_qmin=qmin, out_qmax=qmax, **options
        )
        assert torch.equal(codes, reference_codes(out, scale, zero_point, qmin, qmax))


def test_attention_takes_any_batch_token_and_head_strides():
    q, k, v = make_qkv(2, 33, 3, 32)
    expected = kernels.attention_int8(q, k, v, logit_scale=[3e-4], v_scale=[0.02])
    contiguous = [t.contiguous() for t in (q, k, v)]
    assert torch.equal(expected, kernels.attention_int8(*contiguous, logit_scale=[3e-4], v_scale=[0.02]))
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert torch.equal(expected, kernels.attention_int8(*heads_first, logit_scale=[3e-4], v_scale=[0.02]))


def test_exponential():
    x = -torch.cat([torch.linspace(0, 20, 200_001), torch.linspace(20, 87, 50_001), torch.tensor([0.0, 1e-8])])
    y = torch.empty_like(x)
    loader.library().vitq_cpu_exp(x.data_ptr(), y.data_ptr(), x.numel())
    exact = torch.exp(x.double())
    assert ((y.double() - exact).abs() / exact).max() <= 2e-7
    assert y[x == 0].eq(1).all()
    low = torch.tensor([-87.5, -1000.0, -math.inf, math.nan])
    loader.library().vitq_cpu_exp(low.data_ptr(), y.data_ptr(), 4)
    assert y[:4].eq(0).all()


# ------------------------------------------------------ threads, empties, errors


def run_all(batch):
    q, k, v = make_qkv(batch, 197, 3, 64)
    x = torch.randn(400, 384, generator=random(7))
    return [
        kernels.attention_int8(q, k, v, logit_scale=[3e-4], v_scale=[0.02]),
        kernels.attention_int8(q, k, v, logit_scale=[3e-4], v_scale=[0.02], out_scale=0.01),
        *kernels.layer_norm_quantize(x, None, None, 1e-6, None, 0, -128, 127),
        *kernels.quantize_rows(x, None, 0, -128, 127),
    ]


@pytest.mark.parametrize("batch", [1, 3])
def test_bits_do_not_depend_on_threads_or_run(batch):
    torch.set_num_threads(1)
    expected = run_all(batch)
    for threads in [2, 3] + [2] * 20:
        torch.set_num_threads(threads)
        for actual, first in zip(run_all(batch), expected, strict=True):
            assert torch.equal(actual, first)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
@pytest.mark.parametrize("threads", [1, 3])
def test_uses_the_threads_of_torch(threads):
    """In a fresh process: torch's own parallel work starts the pool, the kernels add nothing to it."""
    script = f"""
        import os, re, torch
        from vitq.cpu import kernels
        torch.set_num_threads({threads})
        def tasks():
            return len(os.listdir("/proc/self/task"))
        before = tasks()
        torch.nn.functional.gelu(torch.randn(2000, 2000))
        pool = tasks()
        assert pool - before == {threads} - 1, (before, pool)
        q = torch.zeros(4, 197, 4, 64, dtype=torch.int8)
        for _ in range(3):
            kernels.attention_int8(q, q, q, logit_scale=[1.0], v_scale=[1.0])
            kernels.quantize_rows(torch.randn(1000, 1000), 0.1, 0, -128, 127)
            kernels.layer_norm_quantize(torch.randn(1000, 1000), None, None, 1e-6, 0.1, 0, -128, 127)
        assert tasks() == pool, (pool, tasks())
        with open("/proc/self/maps") as maps:
            runtimes = set(re.findall(r"\\S*/lib(?:gomp|iomp5|omp)[^/]*\\.so\\S*", maps.read()))
        assert len(runtimes) == 1, runtimes
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_importing_vitq_loads_nothing():
    script = "import sys, vitq, vitq.cpu; assert 'vitq.cpu.loader' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_empty_inputs():
    codes, scales = kernels.quantize_rows(torch.empty(0, 8), None, 0, -128, 127)
    assert codes.shape == (0, 8)
    assert scales.shape == (0, 1)
    codes, _ = kernels.layer_norm_quantize(torch.empty(2, 0, 8), None, None, 1e-6, 0.1, 0, -128, 127)
    assert codes.shape == (2, 0, 8)
    q = torch.empty(0, 5, 2, 16, dtype=torch.int8)
    assert kernels.attention_int8(q, q, q, logit_scale=[1.0], v_scale=[1.0]).shape == (0, 5, 32)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((torch.zeros(2, 3, dtype=torch.float64), 0.1, 0, -128, 127), TypeError, "x must be"),
        (([1.0], 0.1, 0, -128, 127), TypeError, "x must be a tensor"),
        ((torch.zeros(2, 3, device="meta"), 0.1, 0, -128, 127), ValueError, "x must be a dense CPU"),
        ((torch.zeros(3, 2).t(), 0.1, 0, -128, 127), ValueError, "x's last dimension"),
        ((torch.tensor(1.0), 0.1, 0, -128, 127), ValueError, "x must have a last dimension"),
        ((torch.zeros(2, 3), 0.0, 0, -128, 127), ValueError, "scale must be positive"),
        ((torch.zeros(2, 3), 1e-60, 0, -128, 127), ValueError, "scale must be positive"),
        ((torch.zeros(2, 3), math.nan, 0, -128, 127), ValueError, "scale must be positive"),
        ((torch.zeros(2, 3), 0.1, 128, -128, 127), ValueError, "zero_point must be"),
        ((torch.zeros(2, 3), 0.1, 0, 0, 255), ValueError, "qmin and qmax"),
        ((torch.zeros(2, 3), None, 3, -128, 127), ValueError, "per-row scales need"),
    ],
)
def test_quantize_rows_names_the_bad_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        kernels.quantize_rows(*arguments)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"weight": torch.ones(9)}, ValueError, "weight must be contiguous"),
        ({"bias": torch.ones(8, dtype=torch.bfloat16)}, TypeError, "bias must be"),
        ({"bias": torch.ones(16)[::2]}, ValueError, "bias must be contiguous"),
        ({"eps": -1.0}, ValueError, "eps must be"),
    ],
)
def test_layer_norm_names_the_bad_argument(changes, error, message):
    arguments = dict(weight=None, bias=None, eps=1e-6, scale=0.1, zero_point=0, qmin=-128, qmax=127)
    with pytest.raises(error, match=message):
        kernels.layer_norm_quantize(torch.zeros(2, 8), **(arguments | changes))


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"q": torch.zeros(4, 5, 2, 16, dtype=torch.uint8)}, TypeError, "q must be"),
        ({"k": torch.zeros(4, 6, 2, 16, dtype=torch.int8)}, ValueError, "k must be"),
        ({"v": torch.zeros(4, 5, 16, 2, dtype=torch.int8).transpose(2, 3)}, ValueError, "v's last dimension"),
        ({"p_bits": 9}, ValueError, "p_bits"),
        ({"k_zero": [200]}, ValueError, "k_zero"),
        ({"logit_scale": [math.inf]}, ValueError, "logit_scale"),
        ({"v_scale": [1.0, 2.0, 3.0]}, ValueError, "v_scale must be one number, or one for each"),
        ({"bias": torch.zeros(5, 5)}, ValueError, "bias must have shape"),
        ({"bias": torch.zeros(3, 5, 5)}, ValueError, "bias must have shape"),
        ({"bias": torch.zeros(2, 5, 5).mT}, ValueError, "bias must be contiguous"),
        ({"bias": torch.zeros(2, 5, 5).double()}, TypeError, "bias must be"),
        ({"mask": torch.zeros(3, 5, 5)}, ValueError, "mask has 3 windows"),
        ({"mask": torch.zeros(2, 5, 4)}, ValueError, "mask must have shape"),
        ({"out_dtype": torch.float16}, TypeError, "out_dtype"),
        ({"out_scale": -1.0}, ValueError, "out_scale"),
    ],
)
def test_attention_names_the_bad_argument(changes, error, message):
    zeros = torch.zeros(4, 5, 2, 16, dtype=torch.int8)
    arguments = dict(q=zeros, k=zeros, v=zeros, logit_scale=[1.0], v_scale=[1.0]) | changes
    with pytest.raises(error, match=message):
        kernels.attention_int8(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


def test_attention_refuses_too_large_heads():
    q = torch.zeros(1, 2, 1, 257, dtype=torch.int8)
    with pytest.raises(ValueError, match="head size"):
        kernels.attention_int8(q, q, q, logit_scale=[1.0], v_scale=[1.0])


def test_a_missing_library_says_what_to_do(monkeypatch):
    monkeypatch.setattr(loader, "_find", lambda: None)
    loaded, reason = loader._load.__wrapped__()
    assert loaded is None
    assert "pip install" in reason


def test_a_broken_library_says_what_to_do(monkeypatch, tmp_path):
    broken = tmp_path / "_kernels.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(loader, "_find", lambda: broken)
    loaded, reason = loader._load.__wrapped__()
    assert loaded is None
    assert "does not load" in reason
