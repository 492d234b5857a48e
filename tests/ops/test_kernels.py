"""Every CPU implementation of every op against the int32 reference: a new registry entry is tested here for free."""

from __future__ import annotations

import pytest
import torch

import vitq.ops
from vitq.formats import ActivationFormat, Columns, QTensor, int_range
from vitq.ops import dispatch
from vitq.ops.attention import AttentionSpec
from vitq.ops.common import OutputFormat, signed, unsigned
from vitq.ops.gated import GatedSpec
from vitq.ops.layer_norm import LayerNormSpec
from vitq.ops.linear import LinearSpec, ReferenceLinear
from vitq.ops.quantize import ReferenceQuantize
from vitq.plan import AttentionParams, LinearParams

CPU = torch.device("cpu")
SHAPES = [(0, 32, 16), (1, 1, 1), (1, 384, 10), (3, 97, 37), (17, 27, 13), (197, 96, 288), (33, 1536, 5)]
QUANT = ActivationFormat(8, scale=0.05, zero_point=7)


def kernels(op: str) -> list:
    return [pytest.param(kernel, id=f"{backend}-{kernel.name}") for backend, kernel in dispatch.registered(op) if backend != "cuda"]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def codes(*shape: int, bits: int = 8, seed: int = 0) -> torch.Tensor:
    lo, hi = int_range(bits)
    return torch.randint(lo, hi + 1, shape, dtype=torch.int8, generator=generator(seed))


def run(kernel, spec, *args, **kwargs):
    why = kernel.supports(spec)
    if why is not None:
        pytest.skip(why)
    return kernel.run(kernel.pack(spec, CPU), *args, **kwargs)


def same_codes(a: QTensor, b: QTensor) -> None:
    """Equal, but that float32 constants folded in another order may move a tie: off by one in at most 0.1 %."""
    x, y = signed(a).int(), signed(b).int()
    difference = (x - y).abs()
    assert difference.numel() == 0 or int(difference.max()) <= 1
    assert float((difference > 0).double().mean()) <= 1e-3 if difference.numel() > 1000 else int((difference > 0).sum()) <= 1


# linear ---------------------------------------------------------------------------------------------------------------


def linear_spec(k: int, n: int, *, bits: int = 8, dynamic: bool = False, unit: bool = False, **kwargs) -> LinearSpec:
    scale = torch.ones(n) if unit else torch.rand(n, generator=generator(1)) * 1e-3 + 1e-4
    bias = None if unit else torch.randn(n, generator=generator(2))
    fmt = ActivationFormat(bits, dynamic=True) if dynamic else ActivationFormat(
        bits, scale=1.0 if unit else 0.02, zero_point=0 if unit else int_range(bits)[0] + 3)
    return LinearSpec(LinearParams(codes(n, k, bits=bits, seed=3), bits, scale, bias, fmt), **kwargs)


def linear_input(m: int, k: int, spec: LinearSpec) -> QTensor:
    fmt = spec.params.input
    x = codes(m, k, bits=fmt.bits)
    if fmt.dynamic:
        return QTensor(x, torch.rand(m, 1, generator=generator(4)) + 0.1, 0)
    return QTensor(x, fmt.scale, fmt.zero_point)


@pytest.mark.parametrize("m, k, n", SHAPES)
@pytest.mark.parametrize("kernel", kernels("linear"))
def test_accumulators_are_exact(kernel, m: int, k: int, n: int) -> None:
    """With unit scales and no bias the float32 result is the int32 accumulator (all below 2^24 here)."""
    spec = linear_spec(k, n, unit=True)
    y = run(kernel, spec, linear_input(m, k, spec), dtype=torch.float32)
    expected = codes(m, k).long() @ spec.params.codes.long().T
    assert torch.equal(y.double(), expected.double())


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("m, k, n", SHAPES)
@pytest.mark.parametrize("kernel", kernels("linear"))
def test_float_output(kernel, m: int, k: int, n: int, bits: int, dynamic: bool) -> None:
    spec = linear_spec(k, n, bits=bits, dynamic=dynamic)
    x = linear_input(m, k, spec)
    weight = spec.params.codes.double() * spec.params.weight_scale.double()[:, None]
    exact = ((x.codes.double() - float(x.zero_point)) * x.scale.double()) @ weight.T + spec.params.bias.double()
    y = run(kernel, spec, x, dtype=torch.float32)
    assert torch.allclose(y.double(), exact, rtol=1e-5, atol=1e-4)
    residual = torch.randn(m, n, generator=generator(5))
    kept = residual.clone()
    assert torch.allclose(run(kernel, spec, x, dtype=torch.float32, residual=residual).double(), exact + kept.double(),
                          rtol=1e-5, atol=1e-4)
    assert torch.equal(residual, kept), "a residual may be overwritten only where inplace says so"
    y = run(kernel, spec, x, dtype=torch.float32, residual=residual, inplace=True)
    assert torch.allclose(y.double(), exact + kept.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kernel", kernels("linear"))
def test_requantized_output(kernel, bits: int, activation: str | None) -> None:
    output = OutputFormat(bits, torch.tensor(0.05), torch.tensor(-3, dtype=torch.int32))
    spec = linear_spec(96, 200, activation=activation, output=output)
    x = linear_input(150, 96, spec)
    same_codes(run(kernel, spec, x, dtype=torch.float32), run(ReferenceLinear(), spec, x, dtype=torch.float32))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kernel", kernels("linear"))
def test_per_column_output(kernel, bits: int) -> None:
    """How one GEMM writes q, k and v, each in its own scale."""
    scale = torch.rand(60, generator=generator(6)) * 0.05 + 0.01
    zero = torch.randint(-3, 4, (60,), dtype=torch.int32, generator=generator(7))
    spec = linear_spec(96, 60, output=OutputFormat(bits, scale, zero, signed_only=True))
    x = linear_input(150, 96, spec)
    y = run(kernel, spec, x, dtype=torch.float32)
    assert y.codes.dtype == torch.int8
    same_codes(y, run(ReferenceLinear(), spec, x, dtype=torch.float32))


@pytest.mark.parametrize("output", ["float", "codes", "codes4", "columns", "gelu", "gelu codes", "residual"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("ends", [(32, 96), (64, 75), (32, 64, 96)], ids=str)
@pytest.mark.parametrize("kernel", kernels("linear"))
def test_segments_and_their_order(kernel, ends: tuple[int, ...], dynamic: bool, output: str) -> None:
    """Each segment with a scale of its own; the input's features in any order, as its own kernel writes them."""
    m, n, k = 150, 200, ends[-1]
    columns = Columns(torch.randperm(k, generator=generator(8)).to(torch.int32), ends)
    fmt = ActivationFormat(8, dynamic=True, columns=columns) if dynamic else ActivationFormat(8, scale=0.03, zero_point=-21,
                                                                                              columns=columns)
    scale = torch.rand(len(ends), n, generator=generator(1)) * 1e-3 + 1e-4
    params = LinearParams(codes(n, k, seed=3), 8, scale, torch.randn(n, generator=generator(2)), fmt)
    outputs = {"codes": OutputFormat(8, torch.tensor(0.05), torch.tensor(-3, dtype=torch.int32)),
               "codes4": OutputFormat(4, torch.tensor(0.5), torch.tensor(1, dtype=torch.int32)),
               "columns": OutputFormat(8, torch.rand(n, generator=generator(6)) * 0.05 + 0.02,
                                       torch.zeros(n, dtype=torch.int32), signed_only=True)}
    outputs["gelu codes"] = outputs["codes"]
    spec = LinearSpec(params, "gelu" if "gelu" in output else None, outputs.get(output))
    x = torch.randn(m, k, generator=generator(9))
    choice = dispatch.choose("quantize", "reference" if isinstance(kernel, ReferenceLinear) else "cpu", fmt, CPU)
    read = choice.kernel.run(choice.kernel.pack(fmt, CPU), x)
    want = run(ReferenceQuantize(), fmt, x)
    assert torch.equal(signed(read), want.codes)
    residual = torch.randn(m, n, generator=generator(5)) if output == "residual" else None
    got, expected = (run(which, spec, given, dtype=torch.float32, residual=residual)
                     for which, given in ((kernel, read), (ReferenceLinear(), want)))
    if isinstance(got, QTensor):
        same_codes(got, expected)
    else:
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
    weight = params.codes.double() * torch.cat([s[:, None].expand(n, b - a) for s, a, b in zip(scale, (0, *ends), ends)], 1)
    exact = ((want.codes.double() - float(want.zero_point)) * want.scale.double()) @ weight.T + params.bias.double()
    if output == "float":
        torch.testing.assert_close(expected.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kernel", kernels("linear"))
def test_both_code_layouts_and_extra_dimensions(kernel) -> None:
    spec = linear_spec(32, 24)
    x = linear_input(30, 32, spec)
    y = run(kernel, spec, x, dtype=torch.float32)
    shifted = QTensor(unsigned(x), x.scale, x.zero_point + 128)
    assert torch.equal(run(kernel, spec, shifted, dtype=torch.float32), y)
    deep = QTensor(x.codes.view(2, 3, 5, 32), x.scale, x.zero_point)
    assert torch.equal(run(kernel, spec, deep, dtype=torch.float32), y.view(2, 3, 5, 24))


@pytest.mark.parametrize("kernel", kernels("linear"))
def test_identity_decodes_weights(kernel) -> None:
    """An identity input reads the weight back: wrong packing, zero points or permutations cannot hide."""
    spec = linear_spec(24, 24, unit=True)
    x = QTensor(torch.eye(24, dtype=torch.int8), torch.ones(()), 0)
    assert torch.equal(run(kernel, spec, x, dtype=torch.float32), spec.params.codes.float().T)


# quantize, layer norm -------------------------------------------------------------------------------------------------


def awkward(m: int, k: int) -> torch.Tensor:
    """Signed, asymmetric, with outliers, ties, a row of zeros and a constant row."""
    x = torch.randn(m, k, generator=generator(8)) * 2 + 0.3
    x[0] = 0
    x[1] = -4.125
    x[2, : k // 2] = 0.025  # half a step of QUANT: a tie
    x[3, 0] = 1e4
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", [QUANT, ActivationFormat(4, scale=0.7, zero_point=-5), ActivationFormat(8, dynamic=True)])
@pytest.mark.parametrize("kernel", kernels("quantize"))
def test_quantize_is_bit_exact(kernel, fmt: ActivationFormat, dtype: torch.dtype) -> None:
    x = awkward(9, 53).to(dtype)
    for view in (x, x.T.contiguous().T, torch.cat([x, x], 1)[:, :53]):
        q = run(kernel, fmt, view)
        if fmt.dynamic:
            scale = view.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
            expected = torch.clamp(torch.round(view.float() / scale), -128, 127)
            assert torch.equal(q.scale, scale)
        else:
            expected = torch.clamp(torch.round(view.float() / fmt.scale) + fmt.zero_point, fmt.qmin, fmt.qmax)
        assert torch.equal(signed(q).float(), expected)


@pytest.mark.parametrize("output", [QUANT, ActivationFormat(4, scale=0.4, zero_point=1), ActivationFormat(8, dynamic=True)])
@pytest.mark.parametrize("kernel", kernels("layer_norm_quantize"))
def test_layer_norm(kernel, output: ActivationFormat) -> None:
    weight, bias = torch.randn(192, generator=generator(9)), torch.randn(192, generator=generator(10))
    x = awkward(400, 192)
    q = run(kernel, LayerNormSpec(weight, bias, 1e-6, output), x)
    y = torch.nn.functional.layer_norm(x.double(), (192,), weight.double(), bias.double(), 1e-6)
    scale = q.scale.double() if output.dynamic else output.scale.double()
    zero = 0 if output.dynamic else output.zero_point
    same_codes(q, QTensor(torch.clamp(torch.round(y / scale) + zero, output.qmin, output.qmax).to(torch.int8), torch.ones(()), 0))


@pytest.mark.parametrize("output", [QUANT, ActivationFormat(8, dynamic=True), ActivationFormat(4, dynamic=True, symmetric=False)])
@pytest.mark.parametrize("kernel", kernels("layer_norm_quantize"))
def test_rms_norm(kernel, output: ActivationFormat) -> None:
    weight, x = torch.randn(192, generator=generator(9)), awkward(400, 192)
    q = run(kernel, LayerNormSpec(weight, None, 1e-6, output, rms=True), x)
    y = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    same_codes(q, ReferenceQuantize().run(output, y.float()))


def test_an_rms_norm_has_no_bias() -> None:
    with pytest.raises(ValueError, match="no bias"):
        LayerNormSpec(torch.ones(4), torch.zeros(4), 1e-6, QUANT, rms=True)


# gated_quantize -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("output", [QUANT, ActivationFormat(8, dynamic=True), ActivationFormat(4, dynamic=True, clip=torch.tensor([0.5, 0.75]))])
@pytest.mark.parametrize("kernel", kernels("gated_quantize"))
def test_gated(kernel, output: ActivationFormat, activation: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 21, 154, generator=generator(1)).to(dtype)
    gate, up = x[..., :77].double(), x[..., 77:]
    y = {"silu": lambda: gate * torch.sigmoid(gate), "relu": lambda: gate.clamp_min(0.0), "gelu": lambda: gate * (1 + torch.erf(gate * 0.5**0.5)) / 2,
         "gelu_tanh": lambda: gate * (1 + torch.tanh((gate + 0.044715 * gate**3) * (2 / torch.pi) ** 0.5)) / 2}[activation]()
    q = run(kernel, GatedSpec(activation, output), x)
    assert q.shape == (3, 21, 77)
    # Each rounding to x's dtype may fall to the other side of a tie.
    same_codes(q, ReferenceQuantize().run(output, y.to(dtype) * up)) if dtype == torch.float32 else torch.testing.assert_close(
        q.dequantize(), ReferenceQuantize().run(output, y.to(dtype) * up).dequantize(), rtol=2e-2, atol=float(q.scale.max()) * 1.01)


def test_gates_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="'swish'"):
        GatedSpec("swish", QUANT)
    with pytest.raises(ValueError, match="rows of 5"):
        dispatch.choose("gated_quantize", "reference", GatedSpec("silu", QUANT), CPU).kernel.run(("silu", QUANT), torch.zeros(2, 5))


# attention ------------------------------------------------------------------------------------------------------------


def exact_attention(q, k, v, spec: AttentionSpec, bias=None, mask=None) -> torch.Tensor:
    """float64, the probabilities not quantized: [B, N, H·D]."""
    p = spec.params
    q, k, v = ((t.double() - f.zero_point.view(-1, 1)) * f.scale.double().view(-1, 1) for t, f in ((q, p.q), (k, p.k), (v, p.v)))
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) * spec.scale
    if bias is not None:
        logits = logits + bias.double()
    if mask is not None:
        logits = logits + mask.double().repeat(len(q) // len(mask), 1, 1).unsqueeze(1)
    return torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), v).flatten(2)


ONE_FORMAT = (ActivationFormat(8, scale=0.02, zero_point=9), ActivationFormat(8, scale=0.02, zero_point=-4),
              ActivationFormat(8, scale=0.01, zero_point=3))
EACH_HEAD = (ActivationFormat(8, scale=torch.tensor([0.02, 0.01, 0.03]), zero_point=torch.tensor([9, 0, -3])), ONE_FORMAT[1],
             ActivationFormat(8, scale=torch.tensor([0.01, 0.005, 0.008]), zero_point=3))


@pytest.mark.parametrize("n, d", [(1, 16), (5, 24), (49, 32), (64, 64), (197, 64)])
@pytest.mark.parametrize("formats", [ONE_FORMAT, EACH_HEAD], ids=["one format", "each head"])
@pytest.mark.parametrize("kernel", kernels("attention"))
def test_attention(kernel, formats, n: int, d: int) -> None:
    params = AttentionParams(*formats, 8)
    spec = AttentionSpec(params, 3, d, d**-0.5)
    qkv = codes(4, n, 3, 3, d)
    q, k, v = qkv.unbind(2)
    bias = torch.randn(3, n, n, generator=generator(11))
    mask = torch.zeros(2, n, n).masked_fill_(torch.rand(2, n, n, generator=generator(12)) < 0.3, -100.0)
    for extra in ({}, {"bias": bias}, {"bias": bias, "mask": mask}):
        y = run(kernel, spec, q, k, v, dtype=torch.float32, **extra)
        exact = exact_attention(q, k, v, spec, **extra)
        assert y.shape == (4, n, 3 * d)
        # a probability is off by at most half a code of 1/255 of its row's maximum
        assert (y - exact).abs().max() <= 0.5 / 255 * n * 1.3 + 1e-4
        assert (y - exact).norm() / exact.norm() < 0.015
    output = OutputFormat(8, torch.tensor(0.004), torch.tensor(2, dtype=torch.int32))
    fused = AttentionSpec(params, 3, d, d**-0.5, output)
    reference = next(k for b, k in dispatch.registered("attention") if b == "reference")
    same_codes(run(kernel, fused, q, k, v, dtype=torch.float32, bias=bias), run(reference, fused, q, k, v,
                                                                               dtype=torch.float32, bias=bias))


@pytest.mark.parametrize("kernel", kernels("attention"))
def test_a_row_that_sees_nothing_gives_zeros(kernel) -> None:
    params = AttentionParams(*(ActivationFormat(8, scale=0.02) for _ in range(3)), 8)
    q, k, v = codes(1, 8, 3, 2, 16).unbind(2)
    mask = torch.zeros(1, 8, 8)
    mask[0, 3] = -torch.inf
    y = run(kernel, AttentionSpec(params, 2, 16, 0.25), q, k, v, dtype=torch.float32, mask=mask)
    assert torch.isfinite(y).all() and (y[0, 3] == 0).all() and (y[0, 2] != 0).any()


# the public functional pipeline, and dispatch -----------------------------------------------------------------------------


def test_pipeline() -> None:
    x, weight, bias = awkward(21, 40), torch.randn(30, 40, generator=generator(13)), torch.randn(30, generator=generator(14))
    qx, qw = vitq.ops.quantize(x), vitq.ops.quantize(weight)
    acc = vitq.ops.int_matmul(qx, qw)
    assert acc.dtype == torch.int32 and torch.equal(acc.long(), qx.codes.long() @ qw.codes.long().T)
    y = vitq.ops.dequantize(acc, qx.scale, qw.scale, bias)
    assert (y - (x @ weight.T + bias)).norm() / y.norm() < 0.01
    static = vitq.ops.quantize(x, scale=0.05, zero_point=20)
    y = vitq.ops.dequantize(vitq.ops.int_matmul(static, qw), static.scale, qw.scale, bias, zero_point=20, weight=qw)
    assert torch.allclose(y, static.dequantize() @ qw.dequantize().T + bias, atol=1e-3)


def test_pipeline_errors() -> None:
    with pytest.raises(TypeError, match="float tensor"):
        vitq.ops.quantize(torch.ones(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="2 to 8 bits"):
        vitq.ops.quantize(torch.ones(3, 3), bits=9)
    with pytest.raises(ValueError, match="above 0"):
        vitq.ops.quantize(torch.ones(3, 3), scale=0.0)
    with pytest.raises(ValueError, match=r"\[\.\.\., K\]"):
        vitq.ops.int_matmul(codes(3, 4), codes(5, 6))
    with pytest.raises(TypeError, match="int8"):
        vitq.ops.int_matmul(torch.ones(3, 4), codes(5, 4))
    with pytest.raises(ValueError, match="weight="):
        vitq.ops.dequantize(torch.ones(3, 4, dtype=torch.int32), torch.ones(()), torch.ones(4), zero_point=3)


def test_fallback_is_explained_and_logged_once(monkeypatch, caplog) -> None:
    from vitq.ops import linear

    monkeypatch.setattr(linear, "cpu_int8_isa", lambda: None)
    monkeypatch.setattr(dispatch, "_LOGGED", set())
    spec = linear_spec(8, 8)
    for _ in range(2):
        choice = dispatch.choose("linear", "auto", spec, CPU)
    assert choice.backend == "reference" and choice.reason == "onednn-u8s8: this CPU has neither AMX nor AVX512-VNNI"
    assert len(caplog.records) == 1
    assert dispatch.choose("linear", "reference", spec, CPU).reason is None
    assert "needs tensors on cuda" in dispatch.choose("linear", "cuda", spec, CPU).reason
    with pytest.raises(ValueError, match="auto, reference, cpu, cuda"):
        dispatch.check_backend("gpu")
