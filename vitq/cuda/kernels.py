"""The fallback kernels of the CUDA backend, as `vitq.ops.dispatch` sees them.

Triton is imported when a kernel is packed, never here: this module must load on a machine that lacks it, so that
`supports` can say so.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitq.formats import ActivationFormat, QTensor, pack_int4
from vitq.ops.attention import AttentionSpec
from vitq.ops.common import OutputFormat, signed
from vitq.ops.dispatch import register
from vitq.ops.layer_norm import LayerNormSpec
from vitq.ops.linear import LinearSpec
from vitq.ops.quantize import on_device

# cuBLASLt's int8 GEMM, as `torch._int_mm` calls it: more than 16 rows, and K and N multiples of 8. Multiples of 16 bytes
# keep its loads aligned.
MIN_ROWS, MULTIPLE = 32, 16
# int32 accumulators held at once; more rows are worked on in chunks. Chunks small enough to stay in the L2 were slower on
# an H200 (DeiT-S qkv at batch 200: 167 µs whole, 194 in 48 MB chunks, 294 in 8 MB ones), so this only bounds memory.
ACCUMULATOR_BYTES = 1 << 30
WIDEST_LAYER_NORM = 32768
WIDEST_HEAD = 256

KERNELS: dict[str, Any] = {}


@functools.cache
def why_unavailable() -> str | None:
    """None where Triton kernels can run on the current CUDA device, else the reason."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":  # runs on CPU tensors: for debugging and tests
        return None
    if torch.version.hip is not None:
        return "this is a ROCm build of PyTorch; an NVIDIA GPU is needed"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"the GPU is sm_{major}{minor}, sm_80 or newer is needed"


def _kernel(op: str):
    def add(cls: type) -> type:
        KERNELS[op] = cls
        return register(op, "cuda")(cls)

    return add


@_kernel("quantize")
class TritonQuantize:
    name = "triton-quantize"

    def supports(self, spec: ActivationFormat) -> str | None:
        return _why_not_signed(spec) or why_unavailable()

    def pack(self, spec: ActivationFormat, device: torch.device) -> ActivationFormat:
        return on_device(spec, device)

    def run(self, packed: ActivationFormat, x: Tensor) -> QTensor:
        from vitq.cuda.triton import quantize

        if packed.dynamic:
            return QTensor(*quantize.quantize_dynamic(x, packed.bits), 0)
        codes = quantize.quantize_static(x, packed.scale, packed.zero_point, packed.bits)
        return QTensor(codes, packed.scale, packed.zero_point)


@_kernel("layer_norm_quantize")
class TritonLayerNorm:
    name = "triton-layer-norm"

    def supports(self, spec: LayerNormSpec) -> str | None:
        for parameter in (spec.weight, spec.bias):
            if parameter is not None and parameter.numel() > WIDEST_LAYER_NORM:
                return f"{parameter.numel()} features, more than the {WIDEST_LAYER_NORM} that one program holds"
        return _why_not_signed(spec.output) or why_unavailable()

    def pack(self, spec: LayerNormSpec, device: torch.device) -> LayerNormSpec:
        weight, bias = (None if t is None else t.detach().to(device, torch.float32).contiguous()
                        for t in (spec.weight, spec.bias))
        return LayerNormSpec(weight, bias, spec.eps, on_device(spec.output, device))

    def run(self, packed: LayerNormSpec, x: Tensor) -> QTensor:
        from vitq.cuda.triton import layer_norm

        codes, scales = layer_norm.layer_norm_quantize(x, packed.weight, packed.bias, packed.eps, packed.output)
        return QTensor(codes, packed.output.scale, packed.output.zero_point) if scales is None else QTensor(codes, scales, 0)


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """weight: int8 [N', K'], or uint8 [N', K'/2] holding packed int4, both padded with zeros to multiples of MULTIPLE."""

    weight: Tensor
    n: int
    k: int
    epilogue: Any
    dynamic: bool


@_kernel("linear")
class CublasLtLinear:
    """Weights of up to 4 bits stay packed int4 in GPU memory; each call widens them into a buffer of its own. The caching
    allocator hands the same memory to the next layer, and keeps streams and graphs apart, as a shared buffer would not."""

    name = "cublaslt-int8+triton-epilogue"

    def supports(self, spec: LinearSpec) -> str | None:
        n, k = spec.params.codes.shape
        if not n or not k:
            return f"the weight is empty ({n} x {k})"
        if spec.activation not in (None, "relu", "gelu", "gelu_tanh"):
            return f"activation {spec.activation!r} is not in its epilogue"
        return _why_not_signed(spec.params.input) or why_unavailable()

    def pack(self, spec: LinearSpec, device: torch.device) -> PackedLinear:
        from vitq.cuda.triton.epilogue import Epilogue

        params = spec.params
        n, k = params.codes.shape
        codes = F.pad(params.codes.detach(), (0, -k % MULTIPLE, 0, -n % MULTIPLE))
        weight = pack_int4(codes) if params.weight_bits <= 4 else codes
        scale, correction = params.weight_scale.float(), None
        if not params.input.dynamic:
            # One float32 product, as the reference forms it. The zero point is subtracted from the accumulator as an
            # integer for the same reason: in the bias it would round differently.
            scale = scale * params.input.scale.to(scale.device)
            if int(params.input.zero_point):
                row_sums = params.codes.sum(dim=1, dtype=torch.int32)
                correction = (row_sums * int(params.input.zero_point)).to(device)
        constants = Epilogue(
            scale=scale.detach().to(device).contiguous(), correction=correction,
            bias=None if params.bias is None else params.bias.detach().to(device, torch.float32).contiguous(),
            activation=spec.activation, output=_output_on(spec.output, device))
        return PackedLinear(weight.to(device).contiguous(), n, k, constants, params.input.dynamic)

    def run(self, packed: PackedLinear, x: QTensor, *, dtype: torch.dtype, residual: Tensor | None = None,
            inplace: bool = False) -> Tensor | QTensor:
        from vitq.cuda.triton.epilogue import epilogue

        codes, output, n = signed(x), packed.epilogue.output, packed.n
        if codes.shape[-1] != packed.k:
            raise ValueError(f"linear: the input has {codes.shape[-1]} features, the weight takes {packed.k}")
        shape = (*codes.shape[:-1], n)
        m = codes.shape[:-1].numel()
        if inplace and residual is not None and output is None and residual.dtype == dtype and residual.is_contiguous():
            y = residual
        else:
            y = torch.empty(shape, dtype=dtype if output is None else torch.int8, device=codes.device)
        if m:
            flat = y.view(m, n)
            row_scale = x.scale.reshape(m).contiguous() if packed.dynamic else None
            other = None if residual is None else _unit_columns(residual.reshape(m, n))
            for start, acc in _accumulate(_padded(codes.reshape(m, packed.k)), _widened(packed), m):
                part = slice(start, start + acc.shape[0])
                epilogue(packed.epilogue, acc, flat[part], None if row_scale is None else row_scale[part],
                         None if other is None else other[part])
        return y if output is None else QTensor(y, output.scale, output.zero_point)


@_kernel("attention")
class TritonAttention:
    name = "triton-attention-s8"

    def supports(self, spec: AttentionSpec) -> str | None:
        if not 1 <= spec.head_dim <= WIDEST_HEAD:
            return f"head_dim {spec.head_dim} is over {WIDEST_HEAD}"
        for name in ("q", "k", "v"):
            fmt = getattr(spec.params, name)
            if fmt.dynamic:
                return f"{name} is quantized dynamically; this kernel takes static scales"
            if why := _why_not_signed(fmt):
                return f"{name}: {why}"
        return why_unavailable()

    def pack(self, spec: AttentionSpec, device: torch.device) -> Any:
        from vitq.cuda.triton.attention import Constants

        params = spec.params
        return Constants(logit_scale=float(params.q.scale) * float(params.k.scale) * spec.scale,
                         v_scale=float(params.v.scale), q_zero=int(params.q.zero_point), v_zero=int(params.v.zero_point),
                         p_bits=params.p_bits, output=_output_on(spec.output, device))

    def run(self, packed: Any, q: Tensor, k: Tensor, v: Tensor, *, dtype: torch.dtype, bias: Tensor | None = None,
            mask: Tensor | None = None) -> Tensor | QTensor:
        from vitq.cuda.triton.attention import attention

        y = attention(packed, q, k, v, dtype, bias, mask)
        return y if packed.output is None else QTensor(y, packed.output.scale, packed.output.zero_point)


def _why_not_signed(fmt: ActivationFormat) -> str | None:
    return None if fmt.signed else "unsigned codes do not fit int8"


def _output_on(output: OutputFormat | None, device: torch.device) -> OutputFormat | None:
    if output is None:
        return None
    scale = output.scale.detach().to(device, torch.float32).contiguous()
    zero_point = output.zero_point.detach().to(device, torch.int32)
    return replace(output, scale=scale, zero_point=zero_point.expand(scale.shape).contiguous())


def _unit_columns(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _padded(codes: Tensor) -> Tensor:
    """[M, K] as a contiguous matrix that the GEMM takes. What the padding holds does not matter: extra columns meet zero
    weights, extra rows are not read."""
    m, k = codes.shape
    if m > 16 and k % MULTIPLE == 0:
        return codes.contiguous()
    padded = torch.empty((m if m > 16 else MIN_ROWS, k + -k % MULTIPLE), dtype=torch.int8, device=codes.device)
    padded[:m, :k].copy_(codes)
    return padded


def _widened(packed: PackedLinear) -> Tensor:
    if packed.weight.dtype == torch.int8:
        return packed.weight
    from vitq.cuda.triton.quantize import unpack_int4

    return unpack_int4(packed.weight)


def _accumulate(a: Tensor, weight: Tensor, m: int):
    """Yield (first row, int32 [rows, N']) until `m` rows of a·weightᵀ are done; the next item overwrites the last."""
    total, n = a.shape[0], weight.shape[0]
    # whole tiles of 256 rows, and never 16 rows or fewer left over
    chunk = max(ACCUMULATOR_BYTES // (4 * n) // 256, 1) * 256
    acc = torch.empty((min(total, chunk + 16), n), dtype=torch.int32, device=a.device)
    start = 0
    while start < total:
        stop = start + chunk if total - start > chunk + 16 else total
        torch._int_mm(a[start:stop], weight.t(), out=acc[: stop - start])
        yield start, acc[: min(stop, m) - start]
        start = stop
