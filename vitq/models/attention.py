"""Float multi-head self-attention with its four operands exposed as taps.

One module stands for timm's `Attention` (ViT) and `WindowAttention` (Swin): the same projections, an optional relative
position bias, and `tap_q, tap_k, tap_p, tap_v` identities through which queries, keys, probabilities and values pass,
so that an observer or a fake quantizer can hook what fused attention hides.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RelativePositionBias(nn.Module):
    """Swin's learned bias: a table [(2·Wh−1)(2·Ww−1), heads] gathered into [heads, N, N] with N = Wh·Ww."""

    def __init__(self, table: Tensor, index: Tensor):
        super().__init__()
        self.table = nn.Parameter(table.detach().clone(), requires_grad=False)
        self.register_buffer("index", index.clone(), persistent=False)

    def forward(self) -> Tensor:
        n = self.index.shape[0]
        return self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()


class TappedAttention(nn.Module):
    """softmax(scale · q kᵀ + bias) v, then norm and gate where the source has them, then proj.

    forward(x [B, N, C], attn_mask broadcastable to [B, heads, N, N] or None, mask [nW, N, N] or None) -> [B, N, C_out];
    `mask` is Swin's shift mask, where window w of an image uses mask[w].
    """

    def __init__(self, *, num_heads: int, head_dim: int, scale: float, qkv: nn.Linear, proj: nn.Linear,
                 q_norm: nn.Module | None = None, k_norm: nn.Module | None = None, norm: nn.Module | None = None,
                 gate: nn.Linear | None = None, position_bias: RelativePositionBias | None = None):
        super().__init__()
        self.num_heads, self.head_dim, self.scale = num_heads, head_dim, scale
        self.qkv, self.proj = qkv, proj
        self.q_norm = q_norm if q_norm is not None else nn.Identity()
        self.k_norm = k_norm if k_norm is not None else nn.Identity()
        self.norm = norm if norm is not None else nn.Identity()
        self.gate = gate
        self.position_bias = position_bias
        self.tap_q, self.tap_k, self.tap_p, self.tap_v = (nn.Identity() for _ in range(4))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
                mask: Tensor | None = None) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.unbind(2)  # [B, N, H, D]
        q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = self.tap_q(q).transpose(1, 2), self.tap_k(k).transpose(1, 2), self.tap_v(v).transpose(1, 2)
        logits = (q @ k.transpose(-2, -1)) * self.scale
        logits = add_bias(logits, self.position_bias() if self.position_bias is not None else None, mask,
                          attn_mask, is_causal)
        y = self.tap_p(logits.softmax(dim=-1)) @ v
        y = self.norm(y.transpose(1, 2).reshape(b, n, -1))
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        return self.proj(y)


def add_bias(logits: Tensor, position_bias: Tensor | None, mask: Tensor | None, attn_mask: Tensor | None,
             is_causal: bool) -> Tensor:
    """logits [B, H, N, N] plus every additive term a ViT or Swin block can ask for (see `TappedAttention`)."""
    b, h, n, _ = logits.shape
    if position_bias is not None:
        logits = logits + position_bias
    if mask is not None:
        windows = mask.shape[0]
        logits = (logits.view(-1, windows, h, n, n) + mask.unsqueeze(1)).view(b, h, n, n)
    if is_causal:  # as in scaled_dot_product_attention, is_causal and attn_mask exclude each other
        logits = logits + torch.full((n, n), float("-inf"), device=logits.device).triu_(1)
    elif attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, float("-inf"))
        else:
            logits = logits + attn_mask
    return logits
