"""attention: softmax(scale·(q − zq)(k − zk)ᵀ·sq·sk + bias)(v − zv)·sv on int8 codes, in one op.

Probabilities are requantized between the two matmuls: with e = exp(logit − row maximum), the unsigned code is
round(e·P), P = 2^p_bits − 1, and the row is divided by P·Σe at the end. So the largest probability of each row uses the
top code, and 1/197 does not vanish, which a fixed scale of 1/P would let happen.

Tokens are those of a sequence, or of an image that is cut into windows (`vitq.ops.windows`): then q, k, v and the result
are in image order, and each window attends to itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitq.cpu import loader
from vitq.formats import QTensor
from vitq.ops.common import OutputFormat, requantize
from vitq.ops.dispatch import register
from vitq.ops.windows import Windows, from_windows, shift_mask, to_windows
from vitq.plan import AttentionParams


@dataclass(frozen=True)
class AttentionSpec:
    """scale: the softmax scale (head_dim^-0.5 as a rule); output: None for a float result."""

    params: AttentionParams
    num_heads: int
    head_dim: int
    scale: float
    output: OutputFormat | None = None

    def constants(self) -> dict[str, list]:
        """What kernels multiply by and subtract, on the host: logit_scale (q scale · k scale · softmax scale) and v_scale, floats of float32
        values; q_zero, k_zero, v_zero. One of each, or one a head where any operand has that."""
        p = self.params
        scales = (p.q.scale.cpu() * p.k.scale.cpu() * self.scale, p.v.scale.cpu())
        zeros = tuple(f.zero_point.cpu() for f in (p.q, p.k, p.v))
        shape = max((t.shape for t in (*scales, *zeros)), key=len) or (1,)
        names = ("logit_scale", "v_scale", "q_zero", "k_zero", "v_zero")
        return {name: t.expand(shape).tolist() for name, t in zip(names, (*scales, *zeros))}


def window_bias(bias: Tensor | None, mask: Tensor | None, batch: int) -> Tensor | None:
    """bias [H, N, N] and mask [W, N, N] (row b uses mask[b % W]) as one float32 tensor [batch or 1, H or 1, N, N]."""
    total = None if bias is None else bias.float().unsqueeze(0)
    if mask is not None:
        expanded = mask.float().unsqueeze(1).repeat(batch // mask.shape[0], 1, 1, 1)
        total = expanded if total is None else total + expanded
    return total


class CutsWindows:
    """`run` for kernels whose `attend` knows sequences only: windows are cut before and put back after."""

    fewer_queries = False  # whether `attend` takes fewer queries than keys

    def run(self, packed: Any, q: Tensor, k: Tensor, v: Tensor, *, dtype: torch.dtype, bias: Tensor | None = None,
            mask: Tensor | None = None, window: Windows | None = None, pad: Tensor | None = None) -> Tensor | QTensor:
        """q, k, v int8 [B, N, H, D], strided with a contiguous D -> [B, N, H·D] in `dtype`, or codes; q may have fewer tokens M.

        bias: float32 [H, M, N]; mask: float32 [W, M, N], row b of the batch uses mask[b % W]. With `window`, M = N =
        height·width tokens in image order, bias is [H, T, T] over the T tokens of a window, the mask is the shift's own,
        and pad int8 [3, H, D] holds the codes of q, k and v where the image is padded.
        """
        if window is None and q.shape[1] < k.shape[1] and not self.fewer_queries:
            queries, missing = q.shape[1], k.shape[1] - q.shape[1]
            bias, mask = (None if t is None else F.pad(t, (0, 0, 0, missing)) for t in (bias, mask))
            y = self.attend(packed, F.pad(q, (0, 0, 0, 0, 0, missing)), k, v, dtype, bias, mask)
            if isinstance(y, QTensor):
                return QTensor(y.codes[:, :queries].contiguous(), y.scale, y.zero_point)
            return y[:, :queries].contiguous()
        if window is None:
            return self.attend(packed, q, k, v, dtype, bias, mask)
        q, k, v = (to_windows(t, window, None if pad is None else pad[i]) for i, t in enumerate((q, k, v)))
        y = self.attend(packed, q, k, v, dtype, bias, shift_mask(window, q.device))
        if isinstance(y, QTensor):
            return QTensor(from_windows(y.codes, window), y.scale, y.zero_point)
        return from_windows(y, window)


def why_not_static_int8(spec: AttentionSpec, widest_head: int) -> str | None:
    """None where q, k and v are int8 codes of static scales and heads are at most so wide, as a CUDA kernel takes them."""
    if not 1 <= spec.head_dim <= widest_head:
        return f"head_dim {spec.head_dim} is over {widest_head}"
    for name in ("q", "k", "v"):
        fmt = getattr(spec.params, name)
        if fmt.dynamic:
            return f"{name} is quantized dynamically; this kernel takes static scales"
        if not fmt.signed:
            return f"{name}: unsigned codes do not fit int8"
    return None


@register("attention", "reference")
class ReferenceAttention(CutsWindows):
    name = "torch-int32"
    fewer_queries = True

    def supports(self, spec: AttentionSpec) -> str | None:
        return None

    def pack(self, spec: AttentionSpec, device) -> AttentionSpec:
        return spec

    def attend(self, packed: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype, bias: Tensor | None,
               mask: Tensor | None) -> Tensor | QTensor:
        params, (b, n, h, d) = packed.params, q.shape
        # one a tensor, or one a head [H, 1, 1]
        logit_scale, v_scale, *zeros = (t.to(q.device).reshape(-1, 1, 1) for t in (
            params.q.scale * params.k.scale * packed.scale, params.v.scale, *(f.zero_point for f in (params.q, params.k, params.v))))
        q, k, v = (t.transpose(1, 2).double() - zero for t, zero in zip((q, k, v), zeros))
        # float64 holds every accumulator exactly, so this is the int32 result
        acc = (q @ k.transpose(-2, -1)).float()
        logits = acc * logit_scale
        extra = window_bias(bias, mask, b)
        if extra is not None:
            logits = logits + extra
        top = 2.0**params.p_bits - 1
        maximum = logits.amax(dim=-1, keepdim=True)
        e = torch.exp(logits - torch.where(torch.isinf(maximum), torch.zeros_like(maximum), maximum))
        total = e.sum(dim=-1, keepdim=True)
        acc = (torch.round(e * top).double() @ v).float()
        y = torch.where(total > 0, acc * (v_scale / (top * total)), torch.zeros_like(acc))
        y = y.transpose(1, 2).reshape(b, n, h * d)
        return y.to(dtype) if packed.output is None else requantize(y, packed.output)


@register("attention", "cpu")
class CpuAttention(CutsWindows):
    name = "c-vnni"

    def supports(self, spec: AttentionSpec) -> str | None:
        from vitq.cpu.kernels import MAX_HEAD_DIM

        if spec.head_dim > MAX_HEAD_DIM:
            return f"head_dim {spec.head_dim} is above {MAX_HEAD_DIM}"
        return loader.why_unavailable()

    def pack(self, spec: AttentionSpec, device) -> tuple:
        output = {}
        if spec.output is not None:
            from vitq.formats import int_range

            qmin, qmax = int_range(spec.output.bits)
            output = dict(out_scale=float(spec.output.scale), out_zero_point=int(spec.output.zero_point), out_qmin=qmin,
                          out_qmax=qmax)
        return spec, dict(**spec.constants(), p_bits=spec.params.p_bits, **output), 0 if spec.output is None else int(spec.output.zero_point) + 128

    def attend(self, packed: tuple, q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype, bias: Tensor | None,
               mask: Tensor | None) -> Tensor | QTensor:
        from vitq.cpu import kernels

        spec, constants, handed_on = packed
        written = torch.float32 if dtype == torch.float16 else dtype  # the C kernel writes no float16
        y = kernels.attention_int8(q, k, v, bias=bias, mask=mask, out_dtype=written, **constants)
        return y.to(dtype) if spec.output is None else QTensor(y, spec.output.scale, handed_on)
