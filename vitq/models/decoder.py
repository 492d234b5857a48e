"""transformers' decoders with rotary positions and gated MLPs: Llama (SmolLM2 is one), Mistral, Qwen2, Qwen3.

Canonical form: q, k and v come from one linear `qkv_proj`, gate and up from one `gate_up_proj`, so that what they share is quantized once;
norms are `nn.RMSNorm`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vitq.models.adapter import check_children, replace
from vitq.models.language import JoinedAttention, check_module, embeddings, is_own, joined
from vitq.models.sites import BlockSite, CacheSite, LinearSite, Prepared

# Activations of configs, by vitq's names.
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "relu": "relu"}
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")


class DecoderAttention(JoinedAttention):
    """Attention with rotary positions, q and k normalised before where the source does so.

    Takes the place of transformers' own and is called as it is: (hidden_states [B, T, hidden], position_embeddings=(cos, sin),
    attention_mask, past_key_values or cache) -> (result [B, T, hidden], weights or None).
    """

    def __init__(self, source: nn.Module):
        super().__init__(source)
        self.sliding_window = getattr(source, "sliding_window", None)
        self.o_proj = source.o_proj
        self.q_norm, self.k_norm = (getattr(source, name, None) or nn.Identity() for name in ("q_norm", "k_norm"))

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Tensor | None = None,
                past_key_values: Any = None, cache: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        y, weights = self.context(hidden_states, position_embeddings, attention_mask, past_key_values if cache is None else cache, kwargs)
        return self.o_proj(y), weights

    def context(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Tensor | None, cache: Any,
                given: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """What o_proj reads, [B, T, H·D], and weights or None. given: the keyword arguments of the caller."""
        q, k, v = self.heads(hidden_states)
        return self.attend(self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2), attention_mask,
                           cache, self.scaling, given, position_embeddings, sliding_window=self.sliding_window)


class GatedMlp(nn.Module):
    """down_proj(act(gate) · up), gate and up from one linear gate_up_proj [hidden -> 2·intermediate]."""

    def __init__(self, source: nn.Module):
        super().__init__()
        self.gate_up_proj, self.down_proj, self.act_fn = joined(source.gate_proj, source.up_proj), source.down_proj, source.act_fn
        self.activation = _activation(source.act_fn, source.config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)


def _activation(module: nn.Module, name: str) -> str | None:
    """vitq's name of the activation that a config calls `name`, None for one that is not known or not that of the module."""
    from transformers.activations import ACT2FN

    return ACTIVATIONS.get(name) if type(module) is type(ACT2FN[name]) else None


def fill(prepared: Prepared) -> None:
    """Find the sites of `prepared.model` and put the modules above in the places of transformers' own."""
    model = prepared.model
    embeddings(prepared, "model.embed_tokens")
    prepared.exact.append("model.rotary_emb")  # angles of thousands of positions do not fit 16 bits
    for i, layer in enumerate(model.model.layers):
        name = f"model.layers.{i}"
        prepared.stages.append(name)
        check_children(name, layer, {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
        attention, mlp = layer.self_attn, layer.mlp
        check_module(f"{name}.self_attn", attention, [f"{family}Attention" for family in FAMILIES],
                     {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"})
        check_module(f"{name}.mlp", mlp, [f"{family}MLP" for family in FAMILIES], {"gate_proj", "up_proj", "down_proj", "act_fn"})
        layer.self_attn, layer.mlp = DecoderAttention(attention), GatedMlp(mlp)
        prepared.heads.append(layer.self_attn.head_site(f"{name}.self_attn", "o_proj"))
        prepared.caches.append(CacheSite(f"{name}.self_attn"))
        prepared.blocks.append(BlockSite(name, "decoder"))
        prepared.linears += [LinearSite(f"{name}.self_attn.qkv_proj", "qkv", f"{name}.input_layernorm"),
                             LinearSite(f"{name}.self_attn.o_proj", "proj"),
                             LinearSite(f"{name}.mlp.gate_up_proj", "fc1", f"{name}.post_attention_layernorm"),
                             LinearSite(f"{name}.mlp.down_proj", "fc2", rows=(f"{name}.mlp.gate_up_proj", mlp.gate_proj.out_features))]
    for name, module in list(model.named_modules()):
        if is_own(module) and type(module).__name__.endswith("RMSNorm"):
            norm = nn.RMSNorm(module.weight.shape[0], module.variance_epsilon)
            norm.weight = module.weight
            replace(model, name, norm)
