"""transformers' Falcon: rotary positions or ALiBi; q, k and v from one linear `query_key_value`, its rows in three orders (a key and value
for all heads, for each group of them, for each head); an MLP after the attention or beside it.

Canonical form: transformers' modules as they are, but linear layers that are `nn.Linear`.
"""

from __future__ import annotations

from torch import nn

from vitq.models.adapter import UnsupportedModelError, replace
from vitq.models.language import check_module, embeddings, joined
from vitq.models.sites import HeadSite, LinearSite, Prepared

FAMILIES = ("Falcon",)


def fill(prepared: Prepared) -> None:
    """Find the sites of `prepared.model` and make their linear layers plain ones."""
    from transformers.models.falcon.modeling_falcon import FalconLinear

    model = prepared.model
    embeddings(prepared, "transformer.word_embeddings")
    if model.config.alibi:
        prepared.joint_heads = "ALiBi gives each head a slope by its place, so heads cannot change places"
    prepared.exact.append("transformer.rotary_emb")  # angles of thousands of positions do not fit 16 bits
    for i, layer in enumerate(model.transformer.h):
        name = f"transformer.h.{i}"
        prepared.stages.append(name)
        check_module(name, layer, ["FalconDecoderLayer"],
                     {"self_attention", "mlp", "input_layernorm", "post_attention_layernorm", "ln_attn", "ln_mlp"})
        if type(layer.self_attention).__name__ == "FalconFlashAttention2":
            raise UnsupportedModelError(f"{name}.self_attention is a FalconFlashAttention2, which reads the dtype of a weight that the integer "
                                        "layer has not: load the model with attn_implementation='sdpa'")
        check_module(f"{name}.self_attention", layer.self_attention, ["FalconAttention"], {"query_key_value", "dense", "attention_dropout"})
        check_module(f"{name}.mlp", layer.mlp, ["FalconMLP"], {"dense_h_to_4h", "act", "dense_4h_to_h"})
        if hasattr(layer, "ln_attn"):
            attention_norm, mlp_norm = f"{name}.ln_attn", f"{name}.ln_mlp"
        elif hasattr(layer, "post_attention_layernorm"):
            attention_norm, mlp_norm = f"{name}.input_layernorm", f"{name}.post_attention_layernorm"
        else:  # one norm feeds both
            attention_norm = mlp_norm = f"{name}.input_layernorm"
        sites = [LinearSite(f"{name}.self_attention.query_key_value", "qkv", attention_norm),
                 LinearSite(f"{name}.self_attention.dense", "proj"),
                 LinearSite(f"{name}.mlp.dense_h_to_4h", "fc1", mlp_norm),
                 LinearSite(f"{name}.mlp.dense_4h_to_h", "fc2")]
        for site in sites:
            replace(model, site.name, joined(model.get_submodule(site.name), known=FalconLinear))
        prepared.linears += sites
        if not model.config.alibi:
            prepared.heads.append(_head_site(f"{name}.self_attention", layer.self_attention))


def _head_site(name: str, attention: nn.Module) -> HeadSite:
    """The rows of query_key_value are those of one unit after another, but for one key and value of all heads, which are one unit."""
    units = attention.num_kv_heads
    queries, one = attention.num_heads // units, attention.head_dim
    return HeadSite(name, f"{name}.query_key_value", f"{name}.dense", units, ((queries + 2) * one,), queries * one, queries)
