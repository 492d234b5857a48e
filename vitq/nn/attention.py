"""QuantAttention: qkv -> attention on int8 codes -> proj, with nothing in float in between where the recipe says so."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitq.formats import ActivationFormat, QTensor
from vitq.nn.linear import QuantLinear
from vitq.nn.packed import PackedModule, Row
from vitq.ops.attention import AttentionSpec, window_bias
from vitq.ops.common import OutputFormat
from vitq.ops.quantize import on_device
from vitq.plan import AttentionParams
from vitq.quantizers.uniform import quantize
from vitq.recipe import LayerSpec


class QuantAttention(PackedModule):
    """Takes the place of a `TappedAttention` (same children, same forward) and of its two matmuls.

    qk, pv: what the recipe asks of them, both quantized or both in float. Buffers if quantized: operand_scale float32
    [3] and operand_zero_point int32 [3], for q, k and v.
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
            self.register_buffer("operand_scale", torch.ones(3))
            self.register_buffer("operand_zero_point", torch.zeros(3, dtype=torch.int32))
        self._output: OutputFormat | None = None
        self._codes_in = False
        self._bias: Tensor | None = None

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
            columns = self.num_heads * self.head_dim
            self.qkv.fuse(output=OutputFormat(
                self.bits[0], self.operand_scale.repeat_interleave(columns),
                self.operand_zero_point.repeat_interleave(columns), signed_only=True) if self._codes_in else None)

    def device(self) -> torch.device:
        return (next(self.parameters(), None) if next(self.buffers(), None) is None else next(self.buffers())).device

    def invalidate(self) -> None:
        super().invalidate()
        self._bias = None

    def cases(self) -> dict[str, Any]:
        if not self.quantized:
            return {}
        q, k, v = self.operands()
        return {"attention": AttentionSpec(AttentionParams(q, k, v, self.p_bits), self.num_heads, self.head_dim, self.scale,
                                           self._output)}

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
                mask: Tensor | None = None) -> Tensor:
        if mask is None:
            mask = window_mask(attn_mask, is_causal, x.shape[0], x.shape[1], x.device)
        return self.proj(self.attend(x, mask))

    def attend(self, x: Tensor | QTensor, mask: Tensor | None = None) -> Tensor | QTensor:
        """x [B, N, C] -> what proj reads [B, N, H·D]: codes, or float where a norm, a gate or the recipe asks for it.

        mask: float [W, N, N]; row b of the batch uses mask[b % W].
        """
        b, n, _ = x.shape
        if self._bias is None and self.position_bias is not None:
            self._bias = self.position_bias()
        shape = (b, n, 3, self.num_heads, self.head_dim)
        qkv = self.qkv(x)
        if self._codes_in:
            q, k, v = qkv.codes.view(shape).unbind(2)
        else:
            q, k, v = qkv.view(shape).unbind(2)
            q, k = self.q_norm(q), self.k_norm(k)
            if self.quantized:
                formats = [on_device(fmt, q.device) for fmt in self.operands()]
                q, k, v = (quantize(t, f.scale, f.zero_point, f.bits) for t, f in zip((q, k, v), formats))
        if self.quantized:
            y = self.call("attention", q, k, v, dtype=self.dtype, bias=self._bias, mask=mask)
        else:
            extra = window_bias(self._bias, mask, b)
            y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=self.scale,
                                               attn_mask=None if extra is None else extra.to(q.dtype))
            y = y.transpose(1, 2).reshape(b, n, -1)
        if isinstance(y, QTensor):
            return y
        y = self.norm(y)
        return y if self.gate is None else y * self.gate(x).sigmoid()

    def rows(self, layer: str) -> list[Row]:
        if not self.quantized:
            note = "the recipe leaves the attention matmuls in float"
            return [Row(f"{layer}.{op}", op, str(self.dtype)[6:], "torch", "sdpa", 0, note) for op in ("qk", "pv")]
        choice = self.packed()["attention"][0]
        note = f"fell back: {choice.reason}" if choice.reason else ""
        if not self._codes_in:
            note = "; ".join(filter(None, ["q, k, v pass through float (qk-norm)", note]))
        q, k, v = self.bits
        formats = (f"A{q}·A{k} static per tensor", f"P{self.p_bits} per row · A{v} static per tensor")
        own = self.own_bytes()
        return [Row(f"{layer}.{op}", op, fmt, choice.backend, choice.kernel.name, own if op == "qk" else 0, note)
                for op, fmt in zip(("qk", "pv"), formats)]


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
