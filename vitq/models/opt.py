"""transformers' OPT: learned positions, LayerNorms before or after what they belong to, an MLP of fc1 and fc2 with ReLU or another activation.

Canonical form: q, k and v come from one linear `qkv_proj`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vitq.models.adapter import float_part
from vitq.models.language import JoinedAttention, check_module, embeddings
from vitq.models.sites import CacheSite, LinearSite, Prepared

FAMILIES = ("OPT",)


class OptAttention(JoinedAttention):
    """Attention without positions of its own.

    Takes the place of transformers' own and is called as it is: (hidden_states [B, T, hidden], attention_mask, past_key_values or
    cache) -> (result [B, T, hidden], weights or None).
    """

    def __init__(self, source: nn.Module):
        super().__init__(source)
        self.out_proj = source.out_proj

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None, cache: Any = None,
                **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        q, k, v = (t.transpose(1, 2) for t in self.heads(hidden_states))
        # OPT scales q, not q·k as others do: in 16 bits these round differently.
        y, weights = self.attend(q * self.scaling, k, v, attention_mask, past_key_values if cache is None else cache, 1.0, kwargs)
        return self.out_proj(y), weights


def fill(prepared: Prepared) -> None:
    """Find the sites of `prepared.model` and put the attention above in the place of transformers' own."""
    decoder = prepared.model.model.decoder
    embeddings(prepared, "model.decoder.embed_tokens")
    float_part(prepared, "model.decoder.embed_positions", "position embedding")
    # Factors of the embeddings, with few of the weights: 0.3 % of those of OPT-350M.
    for name, reason in (("project_in", "part of the token embedding"), ("project_out", "part of the output embedding")):
        if getattr(decoder, name) is not None:
            float_part(prepared, f"model.decoder.{name}", reason)
    for i, layer in enumerate(decoder.layers):
        name = f"model.decoder.layers.{i}"
        prepared.stages.append(name)
        check_module(name, layer, ["OPTDecoderLayer"], {"self_attn", "self_attn_layer_norm", "fc1", "activation_fn", "fc2", "final_layer_norm"})
        check_module(f"{name}.self_attn", layer.self_attn, ["OPTAttention"], {"q_proj", "k_proj", "v_proj", "out_proj"})
        layer.self_attn = OptAttention(layer.self_attn)
        prepared.heads.append(layer.self_attn.head_site(f"{name}.self_attn", "out_proj"))
        prepared.caches.append(CacheSite(f"{name}.self_attn"))
        # A norm that comes after feeds the residual too.
        norms = (f"{name}.self_attn_layer_norm", f"{name}.final_layer_norm") if layer.do_layer_norm_before else (None, None)
        rows = (f"{name}.fc1", 0) if type(layer.activation_fn) is nn.ReLU else None  # which keeps a positive factor
        prepared.linears += [LinearSite(f"{name}.self_attn.qkv_proj", "qkv", norms[0]), LinearSite(f"{name}.self_attn.out_proj", "proj"),
                             LinearSite(f"{name}.fc1", "fc1", norms[1]), LinearSite(f"{name}.fc2", "fc2", rows=rows)]
