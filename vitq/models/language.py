"""Steps that the adapters of transformers' language models share: the embeddings, joined linears, attention around them."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from vitq.models.adapter import UnsupportedModelError, check_children, float_part
from vitq.models.sites import HeadSite, LinearSite, Prepared


def causal_models(families: Collection[str]) -> list[type]:
    """The `ForCausalLM` classes of these families that the installed transformers has."""
    import transformers

    found = (getattr(transformers, f"{family}ForCausalLM", None) for family in families)
    return [cls for cls in found if cls is not None]


def embeddings(prepared: Prepared, name: str) -> None:
    """The token embedding `name` stays in float, and with it an `lm_head` that is tied to it; one of its own is a head."""
    prepared.tokens = True
    float_part(prepared, name, "token embedding")
    if prepared.model.lm_head.weight is prepared.model.get_submodule(name).weight:
        float_part(prepared, "lm_head", "its weight is the token embedding's")
    else:
        prepared.linears.append(LinearSite("lm_head", "head"))


class KeyValues(nn.Module):
    """Where new keys and values enter the cache, if there is one: through the identities `tap_k` and `tap_v`, which a fake quantizer can hook."""

    def __init__(self) -> None:
        super().__init__()
        self.tap_k, self.tap_v = nn.Identity(), nn.Identity()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cache: Any, layer: int, arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, T, D], k and v [B, G, T, D] of new tokens -> q as keys are to be multiplied with it, and the keys and values that are attended to:
        these, behind what `cache` holds of this layer.

        arguments: more of `cache.update`.
        """
        k, v = self.tapped(k, v)
        return (q, k, v) if cache is None else (q, *cache.update(k, v, layer, **arguments))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cache: Any, layer: int, scale: float,
               rotary: tuple[Tensor, Tensor] | None, window: int) -> Tensor | None:
        """The result [B, T, H·D] of attention, where this module attends by itself to what `cache` holds and to these new tokens; None where
        the caller is to rotate q and k, call `forward`, and attend to what that gives.

        q, k: before rotary positions (cos and sin), if there are any; window: of a sliding one, or 0.
        """
        return None

    def tapped(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.tap_k(k), self.tap_v(v)


class JoinedAttention(nn.Module):
    """Causal self-attention with H query and G key and value heads of D: one linear `qkv_proj` [hidden -> (H + 2·G)·D] in the place of
    the source's q_proj, k_proj and v_proj. A family's `forward` says what happens between `heads` and `attend`, and after."""

    def __init__(self, source: nn.Module):
        super().__init__()
        self.config, self.layer_idx, self.head_dim, self.scaling = source.config, source.layer_idx, source.head_dim, source.scaling
        self.num_key_value_groups = getattr(source, "num_key_value_groups", 1)
        self.is_causal, self.attention_dropout = True, 0.0
        self.qkv_proj = joined(source.q_proj, source.k_proj, source.v_proj)
        self.kv = KeyValues()
        self.widths = [linear.out_features for linear in (source.q_proj, source.k_proj, source.v_proj)]

    def head_site(self, name: str, proj: str) -> HeadSite:
        """Of this attention, `name`, whose output projection is the child `proj`."""
        rows, one = self.num_key_value_groups * self.head_dim, self.head_dim
        return HeadSite(name, f"{name}.qkv_proj", f"{name}.{proj}", self.widths[1] // one, (rows, one, one), rows, self.num_key_value_groups)

    def heads(self, hidden_states: Tensor) -> list[Tensor]:
        """[B, T, hidden] -> q [B, T, H, D], k and v [B, T, G, D]."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        return [t.view(shape) for t in self.qkv_proj(hidden_states).split(self.widths, dim=-1)]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, cache: Any, scaling: float, given: dict[str, Any],
               rotary: tuple[Tensor, Tensor] | None = None, **options: Any) -> tuple[Tensor, Tensor | None]:
        """q [B, H, T, D], k and v [B, G, T, D], these joined to the cache's -> (result [B, T, H·D], weights or None).

        given: the keyword arguments of the caller, which the cache and the attention of transformers may read. rotary: cos and sin by which q and
        k are rotated before.
        """
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

        y = self.kv.attend(q, k, v, attention_mask, cache, self.layer_idx, scaling, rotary, options.get("sliding_window") or 0)
        if y is not None:
            return y, None
        if rotary is not None:
            q, k = apply_rotary_pos_emb(q, k, *rotary)
        q, k, v = self.kv(q, k, v, cache, self.layer_idx, {} if cache is None else _cache_arguments(type(cache), given))
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 4:  # of all that a static cache has room for, where new tokens may be all it holds
            attention_mask = attention_mask[..., : k.shape[2]]
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        y, weights = attention(self, q, k, v, attention_mask, dropout=0.0, scaling=scaling, **options, **given)
        return y.reshape(*y.shape[:2], -1), weights


def joined(*linears: nn.Linear, known: type = nn.Linear) -> nn.Linear:
    """One nn.Linear with the outputs of those, one or several, that read the same input. known: a subclass that computes what nn.Linear does.

    Raises UnsupportedModelError for another class.
    """
    odd = next((linear for linear in linears if type(linear) not in (nn.Linear, known)), None)
    if odd is not None:
        raise UnsupportedModelError(f"a {type(odd).__name__} stands where a {known.__name__} is expected: merge it into a plain one (LoRA: "
                                    "merge the adapter) and convert again")
    biased = [linear.bias is not None for linear in linears]
    one = nn.Linear(linears[0].in_features, sum(linear.out_features for linear in linears), bias=any(biased), device="meta")
    one.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
    if any(biased):
        parts = [linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias for linear in linears]
        one.bias = nn.Parameter(torch.cat(parts), requires_grad=False)
    return one


# Of a linear layer of the canonical form that stands for several of transformers': these, in the order of its outputs.
PARTS_OF = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def source_names(name: str) -> tuple[str, ...]:
    """Of the layers of the source model that the linear layer `name` of the canonical form stands for, in the order of its outputs."""
    parent, dot, leaf = name.rpartition(".")
    return tuple(f"{parent}{dot}{part}" for part in PARTS_OF.get(leaf, (leaf,)))


def check_module(name: str, module: nn.Module, classes: Collection[str], children: set[str]) -> None:
    """Raises UnsupportedModelError unless `module` is of one of these classes of transformers, with these children at most."""
    if not is_own(module) or type(module).__name__ not in classes:
        raise UnsupportedModelError(f"vitq does not know {name!r} ({type(module).__module__}.{type(module).__name__}); known: "
                                    f"{', '.join(classes)} of transformers")
    check_children(name, module, children)


def is_own(module: nn.Module) -> bool:
    """Whether its class is one of transformers' models."""
    return type(module).__module__.startswith("transformers.models.")


def _cache_arguments(cache: type, kwargs: dict[str, Any]) -> dict[str, Any]:
    """transformers from 5.24 on hands the caller's keyword arguments to `update`."""
    return {"kwargs": kwargs} if "kwargs" in inspect.signature(cache.update).parameters else {}
