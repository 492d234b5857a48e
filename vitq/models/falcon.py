"""transformers' Falcon: rotary positions or ALiBi; q, k and v from one linear `query_key_value`, its rows in three orders (a key and value
for all heads, for each group of them, for each head); an MLP after the attention or beside it.

Canonical form: transformers' modules as they are, but linear layers that are `nn.Linear`.
"""

from __future__ import annotations

from vitq.models.adapter import UnsupportedModelError, replace
from vitq.models.language import check_module, embeddings, joined
from vitq.models.sites import LinearSite, Prepared

FAMILIES = ("Falcon",)


def fill(prepared: Prepared) -> None:
    """Find the sites of `prepared.model` and make their linear layers plain ones."""
    from transformers.models.falcon.modeling_falcon import FalconLinear

    model = prepared.model
    embeddings(prepared, "transformer.word_embeddings")
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
