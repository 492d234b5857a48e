"""Shared by the tests of language models: small ones of transformers with healthy random weights, token ids, quick recipes."""

from __future__ import annotations

import torch
import transformers
from torch import nn

import vitq
from vitq.models.decoder import FAMILIES

SIZES = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=128, pad_token_id=0, eos_token_id=None, bos_token_id=1)
OWN_SIZES = {family: dict(intermediate_size=112, num_key_value_heads=2) for family in FAMILIES}
OWN_SIZES |= {"OPT": dict(ffn_dim=112, max_position_embeddings=256), "Falcon": dict(ffn_hidden_size=112)}
GQA = {"new_decoder_architecture": True, "num_kv_heads": 2}  # of Falcon-40B
OLD = {"multi_query": False, "parallel_attn": False, "bias": True, "alibi": True}  # of Falcon-RW
# What the families' adapters tell apart, each once.
CASES = [(family, {}) for family in OWN_SIZES] + [
    ("Llama", {"tie_word_embeddings": True, "attention_bias": True}), ("Mistral", {"sliding_window": 8}), ("Qwen3", {"head_dim": 24}),
    ("Llama", {"num_key_value_heads": 4, "mlp_bias": True}),
    ("OPT", {"do_layer_norm_before": False, "word_embed_proj_dim": 48}),
    ("OPT", {"activation_function": "gelu", "enable_bias": False, "tie_word_embeddings": False, "attn_implementation": "eager"}),
    ("OPT", {"layer_norm_elementwise_affine": False, "word_embed_proj_dim": 48, "tie_word_embeddings": False}),
    ("Falcon", GQA), ("Falcon", {**GQA, "num_ln_in_parallel_attn": 1, "bias": True, "tie_word_embeddings": False}), ("Falcon", OLD),
    ("Falcon", {"alibi": True, "attn_implementation": "eager"}), ("Falcon", {"multi_query": False, "parallel_attn": False}),
]


def build(family: str = "Llama", **kwargs) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **OWN_SIZES[family], **kwargs})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.05 if parameter.ndim > 1 else 0.1))
    return model


def layers(model: nn.Module) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def ids(batch: int = 3, tokens: int = 20, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, SIZES["vocab_size"], (batch, tokens), generator=torch.Generator().manual_seed(seed))


def quick(name: str, *changes: str) -> vitq.Recipe:
    return vitq.Recipe.from_yaml(name).with_overrides(["weight.observer=minmax", "calib_size=4", *changes])
