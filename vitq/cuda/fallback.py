"""The kernels of the CUDA backend that need no compiled library: cuBLASLt's int8 GEMM through `torch._int_mm`, with Triton
for everything around it. They run what `vitq.cuda.kernels` passes over.

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

from vitq.cuda.layout import unit_columns
from vitq.formats import ActivationFormat, QTensor, pack_int4, unpack_int4
from vitq.ops.attention import AttentionSpec, CutsWindows, why_not_static_int8
from vitq.ops.common import signed
from vitq.ops.dispatch import register
from vitq.ops.gated import GatedByQuantize
from vitq.ops.layer_norm import LayerNormSpec
from vitq.ops.linear import LinearSpec, check_float_only, fold
from vitq.ops.patches import PatchesByQuantize, PatchesSpec
from vitq.ops.quantize import on_device, ordered, why_not_in_one_pass
from vitq.ops.windows import merge_patches

# cuBLASLt's int8 GEMM, as `torch._int_mm` calls it: more than 16 rows, and K and N multiples of 8. Multiples of 16 bytes
# keep its loads aligned.
MIN_ROWS, MULTIPLE = 32, 16
# int32 accumulators held at once; more rows are worked on in chunks. Chunks small enough to stay in the L2 were slower on
# an H200 (DeiT-S qkv at batch 200: 167 µs whole, 194 in 48 MB chunks, 294 in 8 MB ones), so this only bounds memory.
ACCUMULATOR_BYTES = 1 << 30
WIDEST_LAYER_NORM = 32768
WIDEST_HEAD = 256


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


@register("quantize", "cuda")
class TritonQuantize:
    name = "triton-quantize"

    def supports(self, spec: ActivationFormat) -> str | None:
        return _why_not_signed(spec) or why_not_in_one_pass(spec) or why_unavailable()

    def pack(self, spec: ActivationFormat, device: torch.device) -> ActivationFormat:
        return on_device(spec, device)

    def run(self, packed: ActivationFormat, x: Tensor) -> QTensor:
        from vitq.cuda.triton import quantize

        if packed.dynamic:
            codes, scales = quantize.quantize_dynamic(x, packed.bits)
            return QTensor(ordered(codes, packed), scales, 0)
        codes = quantize.quantize_static(x, packed.scale, packed.zero_point, packed.bits)
        return QTensor(ordered(codes, packed), packed.scale, packed.zero_point)


@register("layer_norm_quantize", "cuda")
class TritonLayerNorm:
    name = "triton-layer-norm"

    def supports(self, spec: LayerNormSpec) -> str | None:
        if spec.rms:
            return "it takes no RMSNorm"
        for parameter in (spec.weight, spec.bias):
            if parameter is not None and parameter.numel() > WIDEST_LAYER_NORM:
                return f"{parameter.numel()} features, more than the {WIDEST_LAYER_NORM} that one program holds"
        return _why_not_signed(spec.output) or why_not_in_one_pass(spec.output) or why_unavailable()

    def pack(self, spec: LayerNormSpec, device: torch.device) -> LayerNormSpec:
        weight, bias = (None if t is None else t.detach().to(device, torch.float32).contiguous()
                        for t in (spec.weight, spec.bias))
        return replace(spec, weight=weight, bias=bias, output=on_device(spec.output, device))

    def run(self, packed: LayerNormSpec, x: Tensor) -> QTensor:
        from vitq.cuda.triton import layer_norm

        x = merge_patches(x) if packed.merge else x
        codes, scales = layer_norm.layer_norm_quantize(x, packed.weight, packed.bias, packed.eps, packed.output)
        codes, fmt = ordered(codes, packed.output), packed.output
        return QTensor(codes, fmt.scale, fmt.zero_point) if scales is None else QTensor(codes, scales, 0)


@register("gated_quantize", "cuda")
class TritonGated(GatedByQuantize):
    name = "torch+triton-quantize"
    quantize = TritonQuantize()


@register("quantize_patches", "cuda")
class TritonPatches(PatchesByQuantize):
    name = "triton-quantize+torch"
    quantize = TritonQuantize()

    def supports(self, spec: PatchesSpec) -> str | None:
        return self.quantize.supports(spec.format)


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """weight: int8 [N', K'], or uint8 [N', K'/2] holding packed int4, both padded with zeros to multiples of MULTIPLE."""

    weight: Tensor
    n: int
    k: int
    epilogue: Any
    dynamic: bool


@register("linear", "cuda")
class CublasLtLinear:
    """Weights of up to 4 bits with one level of scales stay packed int4 in GPU memory; each call widens them into a buffer of its own. The caching
    allocator hands the same memory to the next layer, and keeps streams and graphs apart, as a shared buffer would not."""

    name = "cublaslt-int8+triton-epilogue"

    def supports(self, spec: LinearSpec) -> str | None:
        n, k = spec.params.codes.shape
        if not n or not k:
            return f"the weight is empty ({n} x {k})"
        if spec.activation not in (None, "relu", "gelu", "gelu_tanh"):
            return f"activation {spec.activation!r} is not in its epilogue"
        if not spec.params.plain:
            return "segments, asymmetric weights and float16 columns are not in its GEMM"
        return _why_not_signed(spec.params.input) or why_unavailable()

    def pack(self, spec: LinearSpec, device: torch.device) -> PackedLinear:
        from vitq.cuda.triton.epilogue import Epilogue

        params = spec.params
        n, k = params.codes.shape
        codes = F.pad(params.integers.detach(), (0, -k % MULTIPLE, 0, -n % MULTIPLE))
        weight = pack_int4(codes) if params.weight_bits <= 4 and params.weight_multiplier is None else codes
        folded = fold(spec)
        constants = Epilogue(
            scale=folded.scale[0].to(device).contiguous(), bias=folded.bias.to(device), folded=folded.to_codes,
            activation=spec.activation, output=None if spec.output is None else spec.output.to(device))
        return PackedLinear(weight.to(device).contiguous(), n, k, constants, params.input.dynamic)

    def unpack(self, packed: PackedLinear) -> Tensor:
        weight = packed.weight if packed.weight.dtype == torch.int8 else unpack_int4(packed.weight, 2 * packed.weight.shape[1])
        return weight[: packed.n, : packed.k].contiguous()

    def run(self, packed: PackedLinear, x: QTensor, *, dtype: torch.dtype, residual: Tensor | None = None,
            inplace: bool = False, out: Tensor | None = None) -> Tensor | QTensor:
        from vitq.cuda.triton.epilogue import epilogue

        check_float_only(packed.epilogue.output, residual, out)
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
            other = None if residual is None else unit_columns(residual.reshape(m, n))
            for start, acc in _accumulate(_padded(codes.reshape(m, packed.k)), _widened(packed), m):
                part = slice(start, start + acc.shape[0])
                epilogue(packed.epilogue, acc, flat[part], None if row_scale is None else row_scale[part],
                         None if other is None else other[part])
        if out is not None:
            return out.copy_(y)
        return y if output is None else QTensor(y, output.scale, output.zero_point)


@register("attention", "cuda")
class TritonAttention(CutsWindows):
    name = "triton-attention-s8"

    def supports(self, spec: AttentionSpec) -> str | None:
        return why_not_static_int8(spec, WIDEST_HEAD) or why_unavailable()

    def pack(self, spec: AttentionSpec, device: torch.device) -> Any:
        from vitq.cuda.triton.attention import Constants

        return Constants.of(spec, device)

    def attend(self, packed: Any, q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype, bias: Tensor | None,
               mask: Tensor | None) -> Tensor | QTensor:
        from vitq.cuda.triton.attention import attention

        y = attention(packed, q, k, v, dtype, bias, mask)
        return y if packed.output is None else QTensor(y, packed.output.scale, packed.output.zero_point)


def _why_not_signed(fmt: ActivationFormat) -> str | None:
    return None if fmt.signed else "unsigned codes do not fit int8"


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
