"""Shared by the tests of language models: small ones of transformers with healthy random weights, token ids, quick recipes."""

from __future__ import annotations

import torch
import transformers
from torch import nn

import vitq
from vitq.models.decoder import FAMILIES

SIZES = dict(hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=128,
             pad_token_id=0, eos_token_id=None, bos_token_id=1)
CASES = [(family, {}) for family in FAMILIES] + [("Llama", {"tie_word_embeddings": True, "attention_bias": True}),
                                                  ("Mistral", {"sliding_window": 8}), ("Qwen3", {"head_dim": 24}),
                                                  ("Llama", {"num_key_value_heads": 4, "mlp_bias": True})]


def build(family: str = "Llama", **kwargs) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **kwargs})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.05 if parameter.ndim > 1 else 0.1))
    return model


def ids(batch: int = 3, tokens: int = 20, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, SIZES["vocab_size"], (batch, tokens), generator=torch.Generator().manual_seed(seed))


def quick(name: str, *changes: str) -> vitq.Recipe:
    return vitq.Recipe.from_yaml(name).with_overrides(["weight.observer=minmax", "calib_size=4", *changes])
