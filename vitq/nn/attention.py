"""QuantAttention: qkv -> attention on int8 codes -> proj, with nothing in float in between where the recipe says so."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitq.formats import ActivationFormat, QTensor
from vitq.nn.linear import QuantLinear
from vitq.nn.packed import PackedModule, Row
from vitq.ops.attention import AttentionSpec, window_bias
from vitq.ops.common import OutputFormat, signed
from vitq.ops.windows import Windows, from_windows, shift_mask, to_windows
from vitq.plan import AttentionParams
from vitq.quantizers.uniform import quantize
from vitq.recipe import LayerSpec


class QuantAttention(PackedModule):
    """Takes the place of a `TappedAttention` (same children, same forward) and of its two matmuls.

    qk, pv: what the recipe asks of them, both quantized or both in float. Buffers if quantized: operand_scale float32
    and operand_zero_point int32, for q, k and v: [3], or [3, H] where any of the three has a scale for each head.
    """

    def __init__(self, source: nn.Module, qk: LayerSpec, pv: LayerSpec, *, dtype: torch.dtype, backend: str):
        super().__init__(backend)
        self.num_heads, self.head_dim, self.scale, self.dtype = source.num_heads, source.head_dim, source.scale, dtype
        self.qkv, self.proj = source.qkv, source.proj
        self.q_norm, self.k_norm, self.norm, self.gate = source.q_norm, source.k_norm, source.norm, source.gate
        self.position_bias = None if source.position_bias is None else source.position_bias.float()
        self.quantized = not qk.is_float
        if self.quantized:
            self.bits = (qk.input.bits, qk.other.bits, pv.other.bits)
            self.p_bits = pv.input.bits
            self.per_head = tuple(spec.granularity == "per_head" for spec in (qk.input, qk.other, pv.other))
            shape = (3, self.num_heads) if any(self.per_head) else (3,)
            self.register_buffer("operand_scale", torch.ones(shape))
            self.register_buffer("operand_zero_point", torch.zeros(shape, dtype=torch.int32))
        self._output: OutputFormat | None = None
        self._codes_in = False

    def set_params(self, params: AttentionParams) -> None:
        for i, fmt in enumerate((params.q, params.k, params.v)):
            self.operand_scale[i] = fmt.scale
            self.operand_zero_point[i] = fmt.zero_point
        self.invalidate()

    def operands(self) -> list[ActivationFormat]:
        return [ActivationFormat(bits, scale=s, zero_point=z)
                for bits, s, z in zip(self.bits, self.operand_scale, self.operand_zero_point)]

    def link(self) -> None:
        """qkv writes codes if they need no float step (qk-norm) in between; attention writes proj's codes likewise."""
        plain_out = isinstance(self.norm, nn.Identity) and self.gate is None
        self._output = None
        if self.quantized and plain_out and isinstance(self.proj, QuantLinear):
            self._output = OutputFormat.of(self.proj.input_format())
        plain_in = isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity)
        self._codes_in = (self.quantized and plain_in and isinstance(self.qkv, QuantLinear) and not self.qkv.dynamic
                          and len(set(self.bits)) == 1)
        if isinstance(self.qkv, QuantLinear):
            output = None
            if self._codes_in:
                columns = 3 * self.num_heads * self.head_dim  # each operand's, or each head's, after one another
                scale, zero_point = (t.flatten().repeat_interleave(columns // t.numel()) for t in (self.operand_scale, self.operand_zero_point))
                output = OutputFormat(self.bits[0], scale, zero_point, signed_only=True)
            self.qkv.fuse(output=output)

    def device(self) -> torch.device:
        return (next(self.parameters(), None) if next(self.buffers(), None) is None else next(self.buffers())).device

    def cases(self) -> dict[str, Any]:
        if not self.quantized:
            return {}
        formats = self.operands()
        cases: dict[str, Any] = {"attention": AttentionSpec(AttentionParams(*formats, self.p_bits), self.num_heads, self.head_dim,
                                                            self.scale, self._output)}
        if not self._codes_in:
            cases |= {f"quantize:{name}": fmt for name, fmt in zip("qkv", formats) if not fmt.scale.ndim}
        return cases

    def derive(self) -> dict[str, Tensor]:
        """bias: the relative position bias [H, N, N], gathered. pad [3, H, D]: what qkv makes of a token of zeros, which is
        what Swin pads its windows with."""
        if self.position_bias is None:
            return {}
        zeros = torch.zeros(1, 1, self.qkv.in_features, dtype=self.dtype, device=self.device())
        return {"bias": self.position_bias(), "pad": torch.stack([t.view(t.shape[2:]) for t in self._project(zeros)])}

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
                mask: Tensor | None = None) -> Tensor:
        if mask is None:
            mask = window_mask(attn_mask, is_causal, x.shape[0], x.shape[1], x.device)
        return self.proj(self.attend(x, mask))

    def attend(self, x: Tensor | QTensor, mask: Tensor | None = None, window: Windows | None = None,
               first: int | None = None) -> Tensor | QTensor:
        """x [B, N, C] -> what proj reads [B, N, H·D]: codes, or float where a norm, a gate or the recipe asks for it.

        mask: float [W, N, N]; row b of the batch uses mask[b % W]. window: x is [B, height, width, C] instead, and each
        window of it attends to itself; the result is [B, height, width, H·D]. first: only the first tokens' rows of the
        result are wanted, [B, first, H·D].
        """
        lead = x.shape[:-1]
        q, k, v = self._project(x)
        if first is not None:
            lead, q, mask = (lead[0], first), q[:, :first], None if mask is None else mask[:, :first]
        if self.gate is None:
            del x  # attention is the block's widest point: let the norm's codes go
        bias, pad = self.derived("bias"), self.derived("pad")
        if self.quantized:
            y = self.call("attention", q, k, v, dtype=self.dtype, bias=bias, mask=mask, window=window, pad=pad)
        else:
            y = self._float_attention(q, k, v, bias, mask, window, pad)
        del q, k, v
        if isinstance(y, QTensor):
            return QTensor(y.codes.view(*lead, y.codes.shape[-1]), y.scale, y.zero_point)
        y = self.norm(y.view(*lead, y.shape[-1]))
        return y if self.gate is None else y * self.gate(x)[:, :first].sigmoid()

    def _project(self, x: Tensor | QTensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, ..., C] -> q, k, v [B, N, H, D]: codes, or float where the attention is."""
        shape = (x.shape[0], math.prod(x.shape[1:-1]), 3, self.num_heads, self.head_dim)
        qkv = self.qkv(x)
        if self._codes_in:
            return qkv.codes.view(shape).unbind(2)
        q, k, v = qkv.view(shape).unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.quantized:
            q, k, v = (self._codes(name, t) for name, t in zip("qkv", (q, k, v)))
        return q, k, v

    def _codes(self, name: str, x: Tensor) -> Tensor:
        """int8 codes of the operand `name`, x [B, N, H, D]."""
        if not any(self.per_head):
            return signed(self.call(f"quantize:{name}", x))
        i = "qkv".index(name)
        return quantize(x, self.operand_scale[i].unsqueeze(-1), self.operand_zero_point[i].unsqueeze(-1), self.bits[i])

    def _float_attention(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None,
                         window: Windows | None, pad: Tensor | None) -> Tensor:
        if window is not None:
            q, k, v = (to_windows(t, window, p) for t, p in zip((q, k, v), pad))
            mask = shift_mask(window, q.device)
        extra = window_bias(bias, mask, q.shape[0])
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=self.scale,
                                           attn_mask=None if extra is None else extra.to(q.dtype))
        y = y.transpose(1, 2).reshape(q.shape[0], q.shape[1], self.num_heads * self.head_dim)
        return y if window is None else from_windows(y, window)

    def rows(self, layer: str) -> list[Row]:
        if not self.quantized:
            note = "the recipe leaves the attention matmuls in float"
            return [Row(f"{layer}.{op}", op, str(self.dtype)[6:], "torch", "sdpa", 0, 0, note) for op in ("qk", "pv")]
        choice = self.packed()["attention"][0]
        note = f"fell back: {choice.reason}" if choice.reason else ""
        if not self._codes_in:
            why = "their bits differ" if len(set(self.bits)) > 1 else "qkv is in parts" if any(self.qkv.children()) else \
                "qkv is dynamic or in float" if not isinstance(self.qkv, QuantLinear) or self.qkv.dynamic else "qk-norm"
            note = "; ".join(filter(None, [f"q, k, v pass through float ({why})", note]))
        (q, k, v), (q_each, k_each, v_each) = self.bits, ("per head" if each else "per tensor" for each in self.per_head)
        qk_each = q_each if q_each == k_each else f"{q_each} and {k_each}"
        formats = (f"A{q}·A{k} static {qk_each}", f"P{self.p_bits} per row · A{v} static {v_each}")
        sizes = (self.own_bytes(), self.held_bytes()), (0, 0)  # qk's row is for both
        return [Row(f"{layer}.{op}", op, fmt, choice.backend, choice.kernel.name, *size, note) for op, fmt, size in zip(("qk", "pv"), formats, sizes)]


def window_mask(attn_mask: Tensor | None, is_causal: bool, batch: int, n: int, device: torch.device) -> Tensor | None:
    """timm's attn_mask (bool or additive, broadcastable to [B, 1, N, N]) or is_causal as float32 [1 or B, N, N].

    Raises ValueError for a mask that differs between heads.
    """
    if is_causal:
        return torch.full((1, n, n), float("-inf"), device=device).triu_(1)
    if attn_mask is None:
        return None
    mask = attn_mask
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=device).masked_fill_(~mask, float("-inf"))
    if mask.ndim >= 3 and mask.shape[-3] != 1:  # [.., heads, N, N]
        raise ValueError(f"attn_mask of shape {list(attn_mask.shape)} differs between heads, which the quantized attention "
                         "does not take; give one that broadcasts to [batch, 1, tokens, tokens]")
    mask = mask.reshape(-1, *mask.shape[-2:]).float()
    return mask.expand(mask.shape[0], n, n).contiguous()
