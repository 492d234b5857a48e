"""transformers' decoders with rotary positions and gated MLPs: Llama (SmolLM2 is one), Mistral, Qwen2, Qwen3.

Canonical form: q, k and v come from one linear `qkv_proj`, gate and up from one `gate_up_proj`, so that what they share is quantized once;
norms are `nn.RMSNorm`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from vitq.models.adapter import UnsupportedModelError, check_children, float_part, replace
from vitq.models.sites import LinearSite, Prepared

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")


def adapters() -> dict[type, Any]:
    """The classes of this transformers that `fill` takes."""
    import transformers

    found = (getattr(transformers, f"{family}ForCausalLM", None) for family in FAMILIES)
    return {cls: fill for cls in found if cls is not None}


class DecoderAttention(nn.Module):
    """Causal self-attention with H query and G key and value heads of D: qkv_proj [hidden -> (H + 2·G)·D], rotary positions, o_proj.

    Takes the place of transformers' own and is called as it is: (hidden_states [B, T, hidden], position_embeddings=(cos, sin),
    attention_mask, past_key_values or cache) -> (result [B, T, hidden], weights or None).
    """

    def __init__(self, source: nn.Module):
        super().__init__()
        self.config, self.layer_idx, self.head_dim, self.scaling = source.config, source.layer_idx, source.head_dim, source.scaling
        self.num_key_value_groups, self.is_causal, self.attention_dropout = source.num_key_value_groups, True, 0.0
        self.sliding_window = getattr(source, "sliding_window", None)
        self.qkv_proj = joined(source.q_proj, source.k_proj, source.v_proj)
        self.widths = [linear.out_features for linear in (source.q_proj, source.k_proj, source.v_proj)]
        self.o_proj = source.o_proj
        self.q_norm, self.k_norm = (getattr(source, name, None) or nn.Identity() for name in ("q_norm", "k_norm"))

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Tensor | None = None,
                past_key_values: Any = None, cache: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (t.view(shape) for t in self.qkv_proj(hidden_states).split(self.widths, dim=-1))
        q, k = apply_rotary_pos_emb(self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), *position_embeddings)
        v = v.transpose(1, 2)
        cache = past_key_values if cache is None else cache
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx, **_cache_arguments(type(cache), kwargs))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        y, weights = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, sliding_window=self.sliding_window, **kwargs)
        return self.o_proj(y.reshape(*hidden_states.shape[:-1], -1)), weights


class GatedMlp(nn.Module):
    """down_proj(act(gate) · up), gate and up from one linear gate_up_proj [hidden -> 2·intermediate]."""

    def __init__(self, source: nn.Module):
        super().__init__()
        self.gate_up_proj, self.down_proj, self.act_fn = joined(source.gate_proj, source.up_proj), source.down_proj, source.act_fn

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)


def fill(prepared: Prepared) -> None:
    """Find the sites of `prepared.model` and put the modules above in the places of transformers' own."""
    model = prepared.model
    prepared.tokens = True
    prepared.exact.append("model.rotary_emb")  # angles of thousands of positions do not fit 16 bits
    float_part(prepared, "model.embed_tokens", "token embedding")
    if model.lm_head.weight is model.model.embed_tokens.weight:
        float_part(prepared, "lm_head", "its weight is the token embedding's")
    else:
        prepared.linears.append(LinearSite("lm_head", "head"))
    for i, layer in enumerate(model.model.layers):
        name = f"model.layers.{i}"
        check_children(name, layer, {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
        attention, mlp = layer.self_attn, layer.mlp
        _check(f"{name}.self_attn", attention, "Attention", {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"})
        _check(f"{name}.mlp", mlp, "MLP", {"gate_proj", "up_proj", "down_proj", "act_fn"})
        layer.self_attn, layer.mlp = DecoderAttention(attention), GatedMlp(mlp)
        prepared.linears += [LinearSite(f"{name}.self_attn.qkv_proj", "qkv", f"{name}.input_layernorm"),
                             LinearSite(f"{name}.self_attn.o_proj", "proj"),
                             LinearSite(f"{name}.mlp.gate_up_proj", "fc1", f"{name}.post_attention_layernorm"),
                             LinearSite(f"{name}.mlp.down_proj", "fc2", rows=(f"{name}.mlp.gate_up_proj", mlp.gate_proj.out_features))]
    for name, module in list(model.named_modules()):
        if _is_own(module) and type(module).__name__.endswith("RMSNorm"):
            norm = nn.RMSNorm(module.weight.shape[0], module.variance_epsilon)
            norm.weight = module.weight
            replace(model, name, norm)


def joined(*linears: nn.Linear) -> nn.Linear:
    """One linear with the outputs of several that read the same input."""
    if any(type(linear) is not nn.Linear for linear in linears):
        odd = next(linear for linear in linears if type(linear) is not nn.Linear)
        raise UnsupportedModelError(f"a {type(odd).__name__} stands where nn.Linear is expected: merge it into a plain one (LoRA: merge the "
                                    "adapter) and convert again")
    biased = [linear.bias is not None for linear in linears]
    one = nn.Linear(linears[0].in_features, sum(linear.out_features for linear in linears), bias=any(biased))
    one.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
    if any(biased):
        parts = [linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias for linear in linears]
        one.bias = nn.Parameter(torch.cat(parts), requires_grad=False)
    return one


def _check(name: str, module: nn.Module, suffix: str, children: set[str]) -> None:
    if not _is_own(module) or type(module).__name__ not in {f"{family}{suffix}" for family in FAMILIES}:
        raise UnsupportedModelError(f"vitq does not know {name!r} ({type(module).__module__}.{type(module).__name__}); known: "
                                    f"{', '.join(f'{family}{suffix}' for family in FAMILIES)} of transformers")
    check_children(name, module, children)


def _is_own(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.models.")


def _cache_arguments(cache: type, kwargs: dict[str, Any]) -> dict[str, Any]:
    """transformers from 5.24 on hands the caller's keyword arguments to `update`."""
    return {"kwargs": kwargs} if "kwargs" in inspect.signature(cache.update).parameters else {}
