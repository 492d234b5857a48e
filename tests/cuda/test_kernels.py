"""The kernels that dispatch sees on CUDA, the compiled ones and the fallback, against the reference kernels.

Those that need a GPU are marked so. The compiled kernels' packing and calls also run without one, on the operators' CPU
implementations. With TRITON_INTERPRET=1, no GPU and `--noconftest` the fallback runs on the CPU through Triton's interpreter,
slowly: enough to debug the arithmetic, and what `test_under_the_interpreter` does for a few of them.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vitq.cuda import fallback, kernels, loader, row_kernels
from vitq.formats import ActivationFormat, Columns, Kronecker, QTensor, int_range, pack_int4
from vitq.ops.attention import AttentionSpec
from vitq.ops.common import OutputFormat, signed
from vitq.ops.dispatch import registered
from vitq.ops.float_norm import FloatNormSpec
from vitq.ops.gated import GatedSpec
from vitq.ops.layer_norm import LayerNormSpec
from vitq.ops.linear import LinearSpec, int_matmul
from vitq.ops.patches import PatchesSpec
from vitq.ops.windows import Windows
from vitq.plan import AttentionParams, LinearParams
from vitq.quantizers.dual_uniform import largest_multiplier

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and not torch.cuda.is_available()
GPU = torch.device("cpu" if INTERPRETED else "cuda")
HAS_TRITON = importlib.util.find_spec("triton") is not None
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
# Triton's interpreter truncates where a GPU rounds to bfloat16.
FLOATS = [torch.float16, torch.float32] + [torch.bfloat16] * (not INTERPRETED)

if INTERPRETED:  # which rounds a multiply-add twice; float64 holds the product of two float32 numbers
    from triton.runtime import interpreter

    def fused(self, x, y, z):
        return interpreter.TensorHandle((x.data.astype("float64") * y.data + z.data).astype(z.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = fused

needs_triton = [pytest.mark.gpu, pytest.mark.skipif(not (HAS_TRITON and (torch.cuda.is_available() or INTERPRETED)),
                                                    reason="needs a CUDA device and triton")]
needs_library = [pytest.mark.gpu, pytest.mark.skipif(loader.why_unavailable() is not None, reason=str(loader.why_unavailable()))]
FALLBACK = pytest.param("fallback", marks=needs_triton)
WHICH = [FALLBACK] if INTERPRETED else ["operators on the CPU", pytest.param("library", marks=needs_library), FALLBACK]
STATE = {"which": "fallback"}


@pytest.fixture(params=WHICH)
def which(request):
    """The kernels that `cuda` runs."""
    STATE["which"] = request.param
    return request.param


@pytest.fixture(params=[FALLBACK])
def fallback_only(request):
    STATE["which"] = request.param


on_gpu = pytest.mark.usefixtures("which")
on_fallback = pytest.mark.usefixtures("fallback_only")


def device() -> torch.device:
    return CPU if STATE["which"] == "operators on the CPU" else GPU


def chosen(op: str):
    of_op = [kernel for backend, kernel in registered(op) if backend == "cuda"]
    return of_op[-1] if STATE["which"] == "fallback" else of_op[0]


def reference(op: str, spec, *args, **kwargs):
    kernel = dict(registered(op))["reference"]
    return kernel.run(kernel.pack(spec, CPU), *args, **kwargs)


def cuda(op: str, spec, *args, **kwargs):
    kernel = chosen(op)
    why = kernel.supports(spec) if device().type == GPU.type else None
    assert why is None
    return kernel.run(kernel.pack(spec, device()), *args, **kwargs)


def to_device(x):
    if x is None or isinstance(x, int):
        return x
    if isinstance(x, QTensor):
        return QTensor(*(to_device(t) for t in (x.codes, x.scale, x.zero_point, x.shift, x.fp)))
    if not isinstance(x, Tensor) or device() == CPU:
        return x
    # strides are part of several tests, and Tensor.to keeps them only for dense tensors
    storage = torch.empty(0, dtype=x.dtype, device=GPU)
    storage.set_(x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).to(GPU).untyped_storage(),
                 x.storage_offset(), x.shape, x.stride())
    return storage


def codes(*shape: int, bits: int = 8) -> Tensor:
    qmin, qmax = int_range(bits)
    return torch.randint(qmin, qmax + 1, shape, dtype=torch.int8)


def assert_same_codes(got: QTensor, want: QTensor, share: float = 0.0) -> None:
    """Equal, or a difference of 1 in at most `share` of the codes (one is always allowed then)."""
    assert got.codes.dtype == torch.int8 and got.codes.shape == want.codes.shape
    assert got.codes.device.type == device().type
    difference = (got.codes.cpu().int() - want.codes.int()).abs()
    if not difference.numel():
        return
    assert difference.max() <= (1 if share else 0)
    assert int((difference > 0).sum()) <= max(share * difference.numel(), 1 if share else 0)


# quantize ------------------------------------------------------------------------------------------------------------

FORMATS = {
    "static": ActivationFormat(8, scale=0.0237, zero_point=0),
    "asymmetric": ActivationFormat(8, scale=0.0311, zero_point=-37),
    "static4": ActivationFormat(4, scale=0.41, zero_point=3),
    "dynamic": ActivationFormat(8, dynamic=True),
    "dynamic4": ActivationFormat(4, dynamic=True),
}

INPUTS = {
    "plain": lambda: torch.randn(37, 384),
    "odd": lambda: torch.randn(5, 3, 77),
    "class token": lambda: torch.randn(9, 17, 96)[:, 0],
    "patch tokens": lambda: torch.randn(4, 17, 96)[:, 1:],
    "transposed": lambda: torch.randn(96, 33).t(),
    "one column": lambda: torch.randn(7, 1),
    "zeros": lambda: torch.zeros(5, 64),
    "outliers": lambda: torch.randn(21, 200) * torch.where(torch.rand(200) < 0.05, 300.0, 1.0),
    "no rows": lambda: torch.randn(0, 64),
    "wide": lambda: torch.randn(3, 5000),
}


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_quantize_is_exact(fmt, kind, dtype):
    torch.manual_seed(0)
    x = INPUTS[kind]().to(dtype)
    want, got = reference("quantize", FORMATS[fmt], x), cuda("quantize", FORMATS[fmt], to_device(x))
    assert_same_codes(got, want)
    assert torch.equal(got.scale.cpu(), want.scale)
    assert int(got.zero_point) == int(want.zero_point)


@on_gpu
def test_quantize_ties_and_saturation():
    scale = 0.25
    x = torch.cat([torch.arange(-130, 131) * scale + scale / 2, torch.tensor([1e30, -1e30, 65504.0, float("inf")])])
    for zero_point in (0, 5, -128):
        fmt = ActivationFormat(8, scale=scale, zero_point=zero_point)
        assert_same_codes(cuda("quantize", fmt, to_device(x[None])), reference("quantize", fmt, x[None]))


@on_gpu
def test_quantize_rows_longer_than_a_program():
    torch.manual_seed(0)
    x = torch.randn(3, 40_001)
    assert_same_codes(cuda("quantize", FORMATS["dynamic"], to_device(x)), reference("quantize", FORMATS["dynamic"], x))


@on_fallback
@pytest.mark.parametrize("shape", [(1, 2), (48, 80), (33, 4098)])
def test_unpack_int4_undoes_the_packing(shape):
    from vitq.cuda.triton.quantize import unpack_int4

    x = codes(*shape, bits=4)
    assert torch.equal(unpack_int4(to_device(pack_int4(x))).cpu(), x)


# layer_norm_quantize -------------------------------------------------------------------------------------------------

@on_gpu
@pytest.mark.parametrize("affine, dtype", [("both", torch.float16), ("both", torch.bfloat16), ("weight", torch.float32),
                                           ("none", torch.float16)], ids=str)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("fmt", ["asymmetric", "static4", "dynamic"])
def test_layer_norm_quantize(fmt, kind, affine, dtype):
    torch.manual_seed(0)
    x = (INPUTS[kind]() + 3.0).to(dtype)
    c = x.shape[-1]
    weight = None if affine == "none" else torch.randn(c)
    bias = torch.randn(c) if affine == "both" else None
    spec = LayerNormSpec(weight, bias, 1e-6, FORMATS[fmt])
    want, got = reference("layer_norm_quantize", spec, x), cuda("layer_norm_quantize", spec, to_device(x))
    assert_same_codes(got, want, share=1e-3)
    torch.testing.assert_close(got.scale.cpu(), want.scale, rtol=1e-5, atol=1e-12)


# rows that are made before they are quantized --------------------------------------------------------------------------

COMPILED = [where for where in WHICH if where is not FALLBACK]
CLIP = torch.tensor([0.9, 0.8])


@pytest.fixture(params=COMPILED)
def compiled(request):
    STATE["which"] = request.param


def kronecker(left: int, right: int) -> Kronecker | None:
    matrices = [(torch.randn(n, n) * n**-0.5).half() if n else None for n in (left, right)]
    return Kronecker(*matrices) if left or right else None


def compare(kernel, op: str, spec, x: Tensor, share: float) -> None:
    assert device() == CPU or kernel.supports(spec) is None
    want, got = reference(op, spec, x), kernel.run(kernel.pack(spec, device()), to_device(x))
    # Sums in another order: a code whose number lies near the middle of two may be the other one.
    assert_same_codes(got, want, share)
    assert got.codes.dim() < 2 or got.codes.stride(-2) % 16 == 0
    for a, b in ((got.scale, want.scale), (got.shift, want.shift)):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-3 * float(want.scale.max()) if b.numel() else 0.0)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits, symmetric, clip", [(8, True, None), (4, True, CLIP), (8, False, CLIP), (4, False, None)])
@pytest.mark.parametrize("left, right, shape", [(64, 64, (3, 7, 4096)), (86, 128, (2, 11008)), (5, 7, (9, 35)), (12, 0, (2, 5, 768)), (32, 0, (300, 1024)),
                                                (0, 32, (33, 96)), (0, 0, (5, 77)), (0, 0, (6, 5120)), (24, 24, (0, 576)), (24, 24, (576,))], ids=str)
def test_transformed_quantize(left, right, shape, bits, symmetric, clip, dtype):
    torch.manual_seed(0)
    fmt = ActivationFormat(bits, dynamic=True, symmetric=symmetric, transform=kronecker(left, right), clip=clip)
    compare(row_kernels.CudaTransform(), "quantize", fmt, torch.randn(shape).to(dtype), 5e-3 if left or right else 0.0)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("left, right, k", [(64, 64, 4096), (0, 8, 72), (0, 0, 768), (0, 0, 5003)], ids=str)
def test_transformed_norms(left, right, k, rms):
    torch.manual_seed(0)
    fmt = ActivationFormat(8, dynamic=True, transform=kronecker(left, right), clip=CLIP)
    spec = LayerNormSpec(torch.randn(k), None if rms else torch.randn(k), 1e-6, fmt, rms=rms)
    compare(row_kernels.CudaNormTransform(), "layer_norm_quantize", spec, (torch.randn(3, 11, k) * 3 + 1).half(), 5e-3)


@on_gpu
@pytest.mark.parametrize("fmt", ["asymmetric", "static4", "dynamic"])
@pytest.mark.parametrize("kind", ["plain", "odd", "wide"])
def test_rms_norm_quantize(kind, fmt):
    torch.manual_seed(0)
    x = INPUTS[kind]().half()
    spec = LayerNormSpec(torch.randn(x.shape[-1]), None, 1e-6, FORMATS[fmt], rms=True)
    if STATE["which"] == "fallback":
        assert "RMSNorm" in chosen("layer_norm_quantize").supports(spec)
        return
    assert_same_codes(cuda("layer_norm_quantize", spec, to_device(x)), reference("layer_norm_quantize", spec, x), share=1e-3)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("left, right, k", [(86, 128, 11008), (32, 48, 1536), (3, 5, 15), (0, 0, 11008), (0, 0, 77)], ids=str)
def test_gated_quantize(left, right, k, activation, dtype):
    torch.manual_seed(0)
    for clip in (None, CLIP):
        fmt = ActivationFormat(8, dynamic=True, transform=kronecker(left, right), clip=clip)
        compare(row_kernels.CudaGated(), "gated_quantize", GatedSpec(activation, fmt), torch.randn(5, 2 * k).to(dtype), 5e-3)


@on_gpu
def test_gates_of_other_formats_are_two_steps():
    """Static scales, and features that stay in float16, are quantized after torch has made the rows."""
    torch.manual_seed(0)
    x = torch.randn(7, 400).half()
    kept = ActivationFormat(4, dynamic=True, symmetric=False, columns=Columns(torch.arange(32, 200, dtype=torch.int32), fp=torch.arange(32, dtype=torch.int32)))
    for fmt in (FORMATS["asymmetric"],) if STATE["which"] == "fallback" else (FORMATS["asymmetric"], kept):
        spec = GatedSpec("silu", fmt)
        kernel = chosen("gated_quantize") if STATE["which"] == "fallback" else row_kernels.TorchGated()
        assert STATE["which"] == "fallback" or row_kernels.CudaGated().supports(spec)
        want, got = reference("gated_quantize", spec, x), kernel.run(kernel.pack(spec, device()), to_device(x))
        assert_same_codes(got, want, share=1e-2)
        if want.fp is not None:
            torch.testing.assert_close(got.fp[:, :32].cpu(), want.fp, rtol=2e-3, atol=2e-3)


@needs_library[0]
@needs_library[1]
def test_rows_that_a_block_cannot_hold_are_made_in_steps():
    torch.manual_seed(0)
    STATE["which"] = "library"
    fmt = ActivationFormat(8, dynamic=True, transform=kronecker(256, 256), clip=CLIP)
    assert not row_kernels.fits(torch.cuda.current_device(), 65536, 256, 256) and row_kernels.fits(torch.cuda.current_device(), 4096, 64, 64)
    compare(row_kernels.CudaTransform(), "quantize", fmt, torch.randn(3, 65536).half(), 5e-3)


# linear --------------------------------------------------------------------------------------------------------------

SHAPES = [(197, 64, 96), (1, 384, 1000), (16, 48, 10), (17, 70, 37), (3, 5, 1), (0, 64, 32), (300, 33, 257)]
OUTPUTS = {
    "float": None,
    "codes": OutputFormat(8, torch.tensor(0.021), torch.tensor(-9, dtype=torch.int32)),
    "codes4": OutputFormat(4, torch.tensor(0.3), torch.tensor(2, dtype=torch.int32)),
    "per column": "per column",
}


def linear_case(m, k, n, fmt="static", bits=8, activation=None, output=None, bias=True):
    if output == "per column":
        output = OutputFormat(8, torch.rand(n) * 0.05 + 0.01, torch.randint(-20, 20, (n,), dtype=torch.int32))
    fmt = FORMATS[fmt]
    params = LinearParams(codes(n, k, bits=bits), bits, (torch.rand(n) + 0.1) / k**0.5 / 2 ** (bits - 3),
                          torch.randn(n) if bias else None, fmt)
    q = codes(m, k, bits=fmt.bits)
    x = QTensor(q, torch.rand(m, 1) * 0.05 + 0.01, 0) if fmt.dynamic else QTensor(q, fmt.scale, int(fmt.zero_point))
    return LinearSpec(params, activation, output), x


@on_gpu
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("fmt", ["static", "asymmetric", "dynamic"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_is_exact_without_an_activation(shape, bits, fmt, output):
    """float32 results and codes equal the reference's bit for bit: the accumulators are, and so is each rounding after."""
    torch.manual_seed(0)
    spec, x = linear_case(*shape, fmt=fmt, bits=bits, output=OUTPUTS[output])
    if fmt == "dynamic" and output != "float" and STATE["which"] != "fallback":
        assert "not bounded" in kernels.why_not_linear(spec)
        return
    want, got = (reference("linear", spec, x, dtype=torch.float32),
                 cuda("linear", spec, to_device(x), dtype=torch.float32))
    if output == "float":
        assert torch.equal(got.cpu(), want)
    else:
        assert_same_codes(got, want)
        assert torch.equal(got.scale.cpu(), want.scale)


@on_gpu
@pytest.mark.parametrize("output", ["float", "codes"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("fmt", ["asymmetric", "dynamic"])
def test_linear_activations(fmt, activation, output):
    torch.manual_seed(0)
    spec, x = linear_case(100, 96, 200, fmt=fmt, activation=activation, output=OUTPUTS[output])
    want, got = (reference("linear", spec, x, dtype=torch.float32),
                 cuda("linear", spec, to_device(x), dtype=torch.float32))
    if output == "float":
        # the compiled kernels' GELU is a polynomial, within 8e-6 of |y|
        torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)
    else:
        assert_same_codes(got, want, share=1e-3)


@on_gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_residual(dtype, inplace, bias):
    torch.manual_seed(0)
    spec, x = linear_case(60, 64, 48, fmt="asymmetric", bias=bias)
    x = QTensor(x.codes.view(3, 20, 64), x.scale, x.zero_point)
    residual = torch.randn(3, 20, 48).to(dtype)
    want = reference("linear", spec, x, dtype=dtype, residual=residual)
    got = cuda("linear", spec, to_device(x), dtype=dtype, residual=to_device(residual.clone()), inplace=inplace)
    assert got.dtype == dtype and torch.equal(got.cpu(), want)


@on_gpu
def test_linear_takes_unsigned_codes_and_strided_ones():
    torch.manual_seed(0)
    spec, x = linear_case(40, 64, 48, fmt="asymmetric")
    want = reference("linear", spec, x, dtype=torch.float32)
    unsigned = QTensor(x.codes.view(torch.uint8) ^ 0x80, x.scale, x.zero_point + 128)
    assert torch.equal(cuda("linear", spec, to_device(unsigned), dtype=torch.float32).cpu(), want)
    wide = torch.zeros(40, 2, 64, dtype=torch.int8)
    wide[:, 0] = x.codes
    strided = QTensor(wide[:, 0], x.scale, x.zero_point)
    assert torch.equal(cuda("linear", spec, to_device(strided), dtype=torch.float32).cpu(), want)


@on_fallback
@pytest.mark.parametrize("m", [256, 272, 273, 512 + 5, 3 * 256 + 16, 3 * 256 + 17])
def test_linear_in_chunks(m, monkeypatch):
    """Chunks of 256 rows, with leftovers around the 16 rows that the GEMM refuses; in place, where a row done twice would
    show."""
    torch.manual_seed(0)
    monkeypatch.setattr(fallback, "ACCUMULATOR_BYTES", 1)
    spec, x = linear_case(m, 40, 24, fmt="dynamic")
    residual = torch.randn(m, 24)
    want = reference("linear", spec, x, dtype=torch.float32, residual=residual)
    got = cuda("linear", spec, to_device(x), dtype=torch.float32, residual=to_device(residual.clone()), inplace=True)
    assert torch.equal(got.cpu(), want)


@on_gpu
def test_linear_accumulators_at_the_extremes():
    """Every product is (−128)², the largest sum an int8 GEMM of this length can reach."""
    q = torch.full((32, 4096), -128, dtype=torch.int8)
    params = LinearParams(q[:16], 8, torch.ones(16), None, ActivationFormat(8, scale=1.0, zero_point=127))
    got = cuda("linear", LinearSpec(params), to_device(QTensor(q, torch.tensor(1.0), 127)), dtype=torch.float32)
    want = int_matmul(q, q[:16]) - 127 * q[:16].sum(1, dtype=torch.int32)
    assert torch.equal(got.cpu(), want.float())


@on_gpu
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_int4_weights_stay_packed(bits):
    spec, _ = linear_case(1, 70, 37, bits=bits)
    weight = chosen("linear").pack(spec, device()).weight
    assert weight.dtype == torch.uint8 and weight.shape == ((48, 40) if STATE["which"] == "fallback" else (64, 64))


# attention -----------------------------------------------------------------------------------------------------------

def attention_case(b, n, h, d, zero=(0, 0, 0), p_bits=8, output=None, bits=8, spread=4.0, each=False):
    """Logits of a standard deviation near `spread`, as trained ViTs have. each: scales and zero points of its own for each head."""
    sigma = 2 ** (bits - 1) / 3.5
    scale = spread**0.5 / (sigma * d**0.25)
    own = torch.arange(h) % 3 if each else torch.tensor(0)
    formats = [ActivationFormat(bits, scale=scale * d**0.25 / (1 + 0.3 * own), zero_point=z - own) for z in zero]
    params = AttentionParams(*formats, p_bits=p_bits)
    qmin, qmax = int_range(bits)
    qkv = (torch.randn(b, n, 3, h, d) * sigma + torch.tensor(zero, dtype=torch.float32)[:, None, None]).round()
    return AttentionSpec(params, h, d, d**-0.5, output), qkv.clamp(qmin, qmax).to(torch.int8)


def check_attention(spec, qkv, dtype=torch.float32, bias=None, mask=None):
    want = reference("attention", spec, *qkv.unbind(2), dtype=dtype, bias=bias, mask=mask)
    got = cuda("attention", spec, *to_device(qkv).unbind(2), dtype=dtype, bias=to_device(bias), mask=to_device(mask))
    if spec.output is not None:
        assert_same_codes(got, want, share=1e-3)
        return got, want
    assert got.dtype == dtype and got.shape == want.shape
    got = got.cpu()
    assert torch.isfinite(got).all()
    # A probability at a rounding tie may move by one code; all else is float32 rounding, then the cast's.
    error = (got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)
    assert error < {torch.float32: 1e-4, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]
    if dtype == torch.float32:
        step = 2 * float(spec.params.v.scale.max()) * 2 ** spec.params.v.bits / (2**spec.params.p_bits - 1)
        off = (got - want).abs() > 1e-5 * want.abs() + 1e-6
        assert off.float().mean() <= 1e-2 and (got - want).abs().max() <= step
    return got, want


@on_gpu
@pytest.mark.parametrize("zero", [(0, 0, 0), (11, -5, 0), (-20, 9, 33)], ids=str)
@pytest.mark.parametrize("shape", [(2, 197, 3, 64), (3, 49, 2, 32), (1, 50, 2, 80), (2, 1, 1, 16), (1, 300, 1, 24),
                                   (1, 577, 1, 128)], ids=str)
def test_attention(shape, zero):
    torch.manual_seed(0)
    check_attention(*attention_case(*shape, zero=zero))


@on_gpu
@pytest.mark.parametrize("shape", [(2, 50, 3, 32), (1, 270, 4, 64)], ids=str)
def test_attention_with_scales_of_each_head(shape):
    torch.manual_seed(0)
    spec, qkv = attention_case(*shape, zero=(11, -5, 9), each=True)
    check_attention(spec, qkv)
    check_attention(spec, qkv, bias=torch.randn(shape[2], shape[1], shape[1]))


@on_gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", [65, 290])
def test_attention_16_bit(n, dtype):
    torch.manual_seed(0)
    check_attention(*attention_case(2, n, 2, 64), dtype=dtype)


@on_gpu
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("p_bits", [8, 7, 4])
def test_attention_bits(bits, p_bits):
    torch.manual_seed(0)
    check_attention(*attention_case(2, 60, 2, 32, zero=(1, 2, 3), p_bits=p_bits, bits=bits))


@on_gpu
@pytest.mark.parametrize("per_column", [False, True])
def test_attention_to_codes(per_column):
    torch.manual_seed(0)
    n = (64,) if per_column else ()
    output = OutputFormat(8, torch.rand(n) * 0.01 + 0.01, torch.randint(-9, 9, n, dtype=torch.int32))
    spec, qkv = attention_case(2, 70, 2, 32, zero=(0, 0, 12), output=output)
    if per_column and STATE["which"] != "fallback":
        assert "one scale" in chosen("attention").supports(spec)
    else:
        check_attention(spec, qkv)


@on_gpu
@pytest.mark.parametrize("n", [49, 64, 260])
@pytest.mark.parametrize("added", ["bias", "mask", "both"])
def test_attention_bias_and_mask(n, added):
    torch.manual_seed(0)
    spec, qkv = attention_case(6, n, 2, 32, zero=(7, 1, -3))
    bias = torch.randn(2, n, n).half() if added != "mask" else None
    mask = torch.where(torch.rand(3, n, n) < 0.4, -100.0, 0.0) if added != "bias" else None
    check_attention(spec, qkv, bias=bias, mask=mask)


@on_gpu
@pytest.mark.parametrize("n", [40, 270])
def test_attention_rows_masked_everywhere_are_zero(n):
    torch.manual_seed(0)
    spec, qkv = attention_case(2, n, 2, 32, zero=(3, 0, 5))
    bias = torch.zeros(2, n, n)
    bias[:, 3] = float("-inf")
    bias[:, 4, 5:] = float("-inf")
    got, _ = check_attention(spec, qkv, bias=bias)
    assert (got[:, 3] == 0).all() and (got[:, 4] != 0).any()


@on_gpu
def test_attention_one_shared_bias_for_all_heads():
    torch.manual_seed(0)
    spec, qkv = attention_case(2, 40, 3, 32)
    check_attention(spec, qkv, bias=torch.zeros(1, 40, 40).expand(3, 40, 40))


@on_gpu
@pytest.mark.parametrize("spread", [0.0, 100.0])
def test_attention_flat_and_peaked(spread):
    torch.manual_seed(0)
    spec, qkv = attention_case(2, 197, 2, 64, spread=max(spread, 1e-3))
    check_attention(spec, qkv if spread else torch.full_like(qkv, 5))


# several segments, columns in another order, float16 columns ---------------------------------------------------------------

def columns_case(k: int, n: int, ends: tuple[int, ...], *, fp: int = 0, dynamic: bool = False, bits: int = 4, symmetric: bool = True,
                 output=None):
    """A linear layer whose columns are permuted, with a few that hold nothing."""
    order = torch.full((ends[-1],), -1, dtype=torch.int32)
    features = torch.randperm(k)
    kept, floats = features[fp:], features[:fp]
    order[torch.randperm(ends[-1])[: len(kept)]] = kept.to(torch.int32)
    columns = Columns(order, ends, floats.to(torch.int32) if fp else None)
    fmt = ActivationFormat(8, dynamic=True, columns=columns, symmetric=symmetric) if dynamic else ActivationFormat(8, scale=0.03, zero_point=-21,
                                                                                              columns=columns)
    weight = codes(n, ends[-1], bits=bits).masked_fill(order < 0, 0)
    s = len(ends)
    params = LinearParams(weight, bits, (torch.rand(s, n) + 0.1) / k**0.5 / 2 ** (bits - 2), torch.randn(n), fmt,
                          weight_fp=(torch.randn(n, fp) / 8).half() if fp else None)
    return LinearSpec(params, None, output)


def exact_columns(spec: LinearSpec, x: Tensor) -> Tensor:
    """float64, from dequantized operands: nothing here knows of column sums or folded zero points."""
    params, columns = spec.params, spec.params.input.columns
    used = x[:, columns.order[columns.order >= 0].long()]
    scale, zero, shift = params.input.scale, params.input.zero_point, 0.0
    if params.input.dynamic:
        scale, zero = used.abs().amax(1, keepdim=True) / 127, 0
    if not params.input.symmetric:
        scale = (used.amax(1, keepdim=True) - used.amin(1, keepdim=True)) / 255
        shift = used.amin(1, keepdim=True) + 128 * scale
    y, start = params.bias.double().expand(len(x), -1), 0
    for s, end in enumerate(columns.segment_ends):
        for j in range(start, end):
            if (feature := int(columns.order[j])) >= 0:
                q = (((x[:, feature : feature + 1] - shift) / scale).round() + zero).clamp(-128, 127) - zero
                y = y + (q.double() * scale + shift) * params.codes[:, j].double() * params.weight_scale[s].double()
        start = end
    if params.weight_fp is not None:
        y = y + x[:, columns.fp.long()].half().double() @ params.weight_fp.double().T
    return y


@pytest.mark.parametrize("fp", [0, 5])
@pytest.mark.parametrize("dynamic, symmetric", [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("ends", [(96,), (32, 96), (64, 75)], ids=str)
def test_the_reference_of_segments_is_the_sum_of_products(ends, dynamic, symmetric, fp):
    torch.manual_seed(0)
    spec, x = columns_case(70, 37, ends, dynamic=dynamic, symmetric=symmetric, fp=fp), torch.randn(20, 70) + 0.7
    q = reference("quantize", spec.params.input, x)
    torch.testing.assert_close(reference("linear", spec, q, dtype=torch.float32).double(), exact_columns(spec, x), rtol=1e-4,
                               atol=1e-4)


@on_gpu
@pytest.mark.parametrize("bits, fp", [(4, 0), (8, 0), (4, 5), (8, 16)])
@pytest.mark.parametrize("dynamic, symmetric", [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("ends", [(96,), (32, 96), (64, 75)], ids=str)
def test_segments(ends, dynamic, symmetric, bits, fp):
    """Quantized in order, multiplied: int + int, int + fp16 columns, rows with shifts."""
    torch.manual_seed(0)
    spec, x = columns_case(70, 37, ends, dynamic=dynamic, bits=bits, fp=fp, symmetric=symmetric), torch.randn(2, 30, 70).half()
    if STATE["which"] == "fallback":
        assert "segments" in chosen("linear").supports(spec)
        return
    want, got = reference("quantize", spec.params.input, x), cuda("quantize", spec.params.input, to_device(x))
    assert_same_codes(got, want)
    for name in ("scale", "shift", "fp"):
        a, b = getattr(got, name), getattr(want, name)
        assert b is None and a is None or torch.equal(a.cpu()[..., : b.shape[-1]] if b.ndim else a.cpu(), b)
    want, got = reference("linear", spec, want, dtype=torch.float32), cuda("linear", spec, got, dtype=torch.float32).cpu()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5) if fp else torch.testing.assert_close(got, want, rtol=0, atol=0)


@on_gpu
@pytest.mark.parametrize("m", [3, 300])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("groups, symmetric", [(2, True), (2, False), (1, False), (5, True), (5, False)])
def test_two_levels_of_scales(groups, symmetric, bits, dynamic, m):
    """Codes less a zero point, times a multiplier, of the row and the column's group, with few rows and many."""
    torch.manual_seed(0)
    n, k = 37, 70 if groups <= 2 else 150
    fmt = ActivationFormat(8, dynamic=True) if dynamic else ActivationFormat(8, scale=0.03, zero_point=-21)
    group = torch.randint(0, groups, (k,), dtype=torch.uint8) if groups <= 2 else (torch.arange(k) // 32).to(torch.uint8)
    params = LinearParams(codes(n, k, bits=bits), bits, (torch.rand(n) + 0.1) / 100, torch.randn(n), fmt,
                          weight_multiplier=torch.randint(1, largest_multiplier(bits, symmetric) + 1, (groups, n), dtype=torch.int8),
                          column_group=group)
    zero = torch.zeros(groups, n, dtype=torch.int8)
    if not symmetric:
        zero = torch.randint(-(1 << bits - 1), 1 << bits - 1, (groups, n), dtype=torch.int8)
        params = replace(params, weight_zero=zero.int())
    factors, zeros = (torch.stack([t[g] for g in params.column_group.tolist()], dim=1).double() for t in (params.weight_multiplier, zero))
    integers = (params.codes.double() - zeros) * factors
    assert torch.equal(params.integers.double(), integers)
    spec, x = LinearSpec(params), torch.randn(m, k)
    q = reference("quantize", fmt, x)
    want = reference("linear", spec, q, dtype=torch.float32)
    zero = 0 if dynamic else -21
    exact = (q.codes.double() - zero) * q.scale.double() @ (integers * params.weight_scale[:, None].double()).T
    torch.testing.assert_close(want.double(), exact + params.bias.double(), rtol=1e-5, atol=1e-4)
    assert torch.equal(cuda("linear", spec, to_device(q), dtype=torch.float32).cpu(), want)


@on_gpu
@pytest.mark.parametrize("fp", [0, 16])
def test_segments_to_codes(fp):
    torch.manual_seed(0)
    output = OutputFormat(8, torch.rand(37) * 0.05 + 0.01, torch.randint(-9, 9, (37,), dtype=torch.int32))
    spec, x = columns_case(70, 37, (32, 96), fp=fp, output=output), torch.randn(60, 70)
    if STATE["which"] == "fallback" or fp:  # of float16 columns no one knows how large the sums get
        if device().type != GPU.type:
            pytest.skip("a kernel says what it does not take where it is available")
        assert ("segments" if STATE["which"] == "fallback" else "float16 columns") in chosen("linear").supports(spec)
        return
    want, got = reference("quantize", spec.params.input, x), cuda("quantize", spec.params.input, to_device(x))
    assert_same_codes(cuda("linear", spec, got, dtype=torch.float32), reference("linear", spec, want, dtype=torch.float32), 0)


# norms to float, patches, windows ------------------------------------------------------------------------------------------

@on_gpu
@pytest.mark.parametrize("shape", [(2, 197, 384), (3, 5, 7, 96), (1, 33)], ids=str)
def test_layer_norm_to_float(shape):
    torch.manual_seed(0)
    x = (torch.randn(shape) + 3).half()
    spec = FloatNormSpec(torch.randn(shape[-1]), torch.randn(shape[-1]), 1e-6)
    want = reference("layer_norm", spec, x, dtype=torch.float16)
    if STATE["which"] == "fallback":
        return  # it has none: the reference runs
    torch.testing.assert_close(cuda("layer_norm", spec, to_device(x), dtype=torch.float16).cpu(), want, rtol=2e-3, atol=2e-3)


@on_gpu
@pytest.mark.parametrize("shape", [(2, 14, 14, 24), (1, 4, 6, 96)], ids=str)
def test_layer_norm_of_merged_patches(shape):
    torch.manual_seed(0)
    x, c = torch.randn(shape).half(), 4 * shape[-1]
    spec = LayerNormSpec(torch.randn(c), torch.randn(c), 1e-6, FORMATS["asymmetric"], merge=True)
    assert_same_codes(cuda("layer_norm_quantize", spec, to_device(x)), reference("layer_norm_quantize", spec, x), share=1e-3)


@on_gpu
@pytest.mark.parametrize("size, patch", [((224, 224), (16, 16)), ((30, 33), (14, 14)), ((56, 40), (4, 4)), ((9, 9), (3, 5))],
                         ids=str)
def test_patches(size, patch):
    torch.manual_seed(0)
    images, spec = torch.randn(2, 3, *size), PatchesSpec(FORMATS["asymmetric"], patch)
    images[1, 0, 0, 0] = float("inf")
    (want, broken), (got, same) = reference("quantize_patches", spec, images), cuda("quantize_patches", spec, to_device(images))
    assert_same_codes(got, want)
    assert broken.isnan().tolist() == same.isnan().tolist() == [False, True]
    assert cuda("quantize_patches", spec,
                to_device(images.permute(0, 1, 3, 2).contiguous().transpose(2, 3)))[0].codes.cpu().equal(want.codes)


@on_gpu
@pytest.mark.parametrize("windows", [Windows(14, 14, (7, 7)), Windows(14, 14, (7, 7), (3, 3)), Windows(10, 12, (7, 7), (3, 3)),
                                     Windows(16, 8, (8, 8), (4, 0))], ids=str)
def test_attention_in_windows(windows):
    torch.manual_seed(0)
    output = OutputFormat(8, torch.tensor(0.02), torch.tensor(3, dtype=torch.int32))
    spec, qkv = attention_case(2, windows.height * windows.width, 2, 32, zero=(3, 1, -4), output=output)
    bias, pad = torch.randn(2, windows.tokens, windows.tokens), codes(3, 2, 32)
    want = reference("attention", spec, *qkv.unbind(2), dtype=torch.float32, bias=bias, window=windows, pad=pad)
    got = cuda("attention", spec, *to_device(qkv).unbind(2), dtype=torch.float32, bias=to_device(bias), window=windows,
               pad=to_device(pad))
    assert_same_codes(got, want, share=1e-3)


# tracing: `run` of the compiled kernels, on the operators' CPU implementations ---------------------------------------------

@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_block_is_one_graph(dynamic, backend):
    torch.manual_seed(0)
    b, n, h, d = 2, 9, 2, 16
    c = h * d
    fmt = ActivationFormat(8, dynamic=True) if dynamic else FORMATS["asymmetric"]
    attention_spec, _ = attention_case(1, 1, h, d, output=OutputFormat.of(FORMATS["asymmetric"]))
    to_qkv = OutputFormat(8, torch.full((3 * c,), 0.02), torch.zeros(3 * c, dtype=torch.int32), signed_only=True)

    def layer(rows, columns, x, activation=None, output=None, bits=8):
        params = LinearParams(codes(rows, columns, bits=bits), bits, torch.full((rows,), 0.05 / columns), torch.randn(rows), x)
        return kernels.CutlassLinear().pack(LinearSpec(params, activation, output), CPU)

    static = FORMATS["asymmetric"]
    norm, norm2 = (row_kernels.CudaLayerNorm().pack(LayerNormSpec(torch.ones(c), None, 1e-6, f), CPU) for f in (static, fmt))
    qkv, proj = layer(3 * c, c, static, output=to_qkv), layer(c, c, static)
    fc1, fc2 = layer(4 * c, c, fmt, "gelu", OutputFormat.of(static), bits=4), layer(c, 4 * c, static)
    softmax = kernels.CudaAttention().pack(attention_spec, CPU)
    linear, rows, attend = kernels.CutlassLinear(), row_kernels.CudaLayerNorm(), kernels.CudaAttention()

    def block(x):
        y = linear.run(qkv, rows.run(norm, x), dtype=torch.float32)
        y = attend.run(softmax, *y.codes.view(b, n, 3, h, d).unbind(2), dtype=torch.float32)
        x = linear.run(proj, y, dtype=torch.float32, residual=x)
        y = linear.run(fc1, rows.run(norm2, x), dtype=torch.float32)
        return linear.run(fc2, y, dtype=torch.float32, residual=x, inplace=True)

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for seed in range(2):
        x = torch.randn(b, n, c, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(compiled(x.clone()), block(x.clone()))


# graphs, streams, what is refused --------------------------------------------------------------------------------------

@on_gpu
@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("bits", [8, 4])
def test_a_cuda_graph_captures_a_block(bits):
    """LayerNorm, qkv, attention and proj with its residual, replayed on new data, equal the same calls made eagerly."""
    torch.manual_seed(0)
    b, n, h, d = 4, 197, 3, 64
    c = h * d
    attention_spec, _ = attention_case(1, 1, h, d)
    heads_out = OutputFormat(8, torch.tensor(0.02), torch.tensor(4, dtype=torch.int32))
    qkv_out = OutputFormat(8, attention_spec.params.q.scale, attention_spec.params.q.zero_point)
    if device() == CPU:
        pytest.skip("needs a CUDA device")
    linear, attention, norm = (chosen(op) for op in ("linear", "attention", "layer_norm_quantize"))
    fmt = ActivationFormat(8, scale=0.02, zero_point=4)

    def layer(rows, columns, output):
        params = LinearParams(codes(rows, columns, bits=bits), bits, torch.full((rows,), 0.5 / columns), torch.randn(rows), fmt)
        return linear.pack(LinearSpec(params, None, output), GPU)

    qkv, proj = layer(3 * c, c, qkv_out), layer(c, c, None)
    softmax = attention.pack(AttentionSpec(attention_spec.params, h, d, d**-0.5, heads_out), GPU)
    ln = norm.pack(LayerNormSpec(torch.ones(c), torch.zeros(c), 1e-6, fmt), GPU)

    def block(x):
        y = linear.run(qkv, norm.run(ln, x), dtype=torch.float16)
        q, k, v = y.codes.view(b, n, 3, h, d).unbind(2)
        return linear.run(proj, attention.run(softmax, q, k, v, dtype=torch.float16), dtype=torch.float16, residual=x)

    x = torch.randn(b, n, c, device=GPU, dtype=torch.float16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        block(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = block(x)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, block(x))


def test_the_fallback_names_what_is_missing(monkeypatch):
    fallback.why_unavailable.cache_clear()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(fallback.importlib.util, "find_spec", lambda name: None)
    spec, _ = linear_case(1, 8, 8)
    for op, case in (("quantize", FORMATS["static"]), ("linear", spec), ("attention", attention_case(1, 2, 1, 16)[0]),
                     ("layer_norm_quantize", LayerNormSpec(None, None, 1e-6, FORMATS["static"]))):
        assert "triton is not installed" in dict(registered(op))["cuda"].supports(case)
    monkeypatch.undo()
    fallback.why_unavailable.cache_clear()


def test_what_is_refused_says_why():
    attention = dict(registered("attention"))["cuda"]
    spec, _ = attention_case(1, 2, 1, 512)
    assert "head_dim 512" in attention.supports(spec)
    dynamic = FORMATS["dynamic"]
    spec = AttentionSpec(AttentionParams(dynamic, dynamic, dynamic, 8), 1, 16, 0.25)
    assert "dynamically" in attention.supports(spec)
    assert "unsigned" in dict(registered("quantize"))["cuda"].supports(ActivationFormat(8, scale=1.0, signed=False))
    rows = row_kernels.CudaTransform()
    assert "ranges" in rows.supports(FORMATS["static"]) and "a matrix of 257" in rows.supports(
        ActivationFormat(8, dynamic=True, transform=Kronecker(torch.eye(257).half())))
    assert "float16" in rows.supports(ActivationFormat(8, dynamic=True, columns=Columns(fp=torch.arange(2, dtype=torch.int32))))
    assert "patches" in row_kernels.CudaNormTransform().supports(LayerNormSpec(None, None, 1e-6, dynamic, merge=True))
    spec, _ = linear_case(1, 8, 8, activation="silu")
    assert "silu" in dict(registered("linear"))["cuda"].supports(spec)


def test_the_command_line_report():
    absent = {**os.environ, "VITQ_CUDA_LIBRARY": "/nonexistent.so"}
    done = subprocess.run([sys.executable, "-m", "vitq.cuda"], capture_output=True, text=True, check=True, cwd=ROOT, env=absent)
    assert "VITQ_CUDA_LIBRARY=/nonexistent.so is not a file" in done.stdout and "cublaslt-int8+triton-epilogue" in done.stdout


@pytest.mark.skipif(not HAS_TRITON or INTERPRETED or torch.cuda.is_available(), reason="triton without a GPU only")
def test_under_the_interpreter():
    """A few of the GPU tests on the CPU, so that a machine without a GPU still checks the arithmetic."""
    names = "unpack or ties or extremes or unsigned or chunks or masked_everywhere or attention_to_codes or of_each_head or residual"
    # without the conftest, which skips every gpu test where there is no GPU
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--noconftest", "-p", "no:cacheprovider", "-m", "gpu", "-k", names]
    done = subprocess.run([*command, __file__], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
                          cwd=ROOT)
    assert done.returncode == 0 and " passed" in done.stdout and " skipped" not in done.stdout, done.stdout[-3000:]
