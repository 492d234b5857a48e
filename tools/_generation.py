"""A prompt and the tokens after it, as CUDA graphs with a static cache, and models with random weights: what tools/llm_benchmark.py times."""
from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import vitq

ATTENTION = "as_masked"  # transformers knows no masks for this name, so it leaves a mask as it is, and none where none is given


def attention(module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scaling: float | None = None,
              **_: Any) -> tuple[torch.Tensor, None]:
    """SDPA at its fastest: of a prompt causal and without a mask, so that it is a flash kernel; of one token with the queries of a group as rows."""
    batch, heads, tokens, dim = q.shape
    if mask is None:
        k, v = k[:, :, :tokens], v[:, :, :tokens]
    elif tokens == 1:
        q = q.reshape(batch, k.shape[1], -1, dim)
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] > k.shape[1])
    return y.reshape(batch, heads, tokens, dim).transpose(1, 2), None


def cache_name(model: nn.Module) -> str:
    """What the model calls its cache: transformers before 5.24 had another name."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def prepare(model: nn.Module) -> nn.Module:
    """The model with the attention above. Raises ValueError for one with a sliding window, which it leaves out, and one whose attention is its own."""
    from transformers import AttentionInterface

    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(f"a {type(model).__name__} is not timed here: its attention takes no other in its place")
    if getattr(model.config, "use_sliding_window", True) and getattr(model.config, "sliding_window", None):
        raise ValueError("a model with a sliding window is not timed here: set its config's sliding_window to None")
    AttentionInterface.register(ATTENTION, attention)
    model.config._attn_implementation = ATTENTION
    return model


class Case:
    """One model at one batch size: a prefill and a decode that can be called again and again."""

    def __init__(self, model: nn.Module, cache: Any, call: Callable[..., Any], batch: int, prompt: int, decode: int, device: torch.device):
        self.model, self.cache, self.call, self.decode_tokens = prepare(model), cache, call, decode
        vocabulary = model.get_input_embeddings().num_embeddings
        self.ids = torch.randint(vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(0)).to(device)
        self.length, self.kept = cache.layers[0].max_cache_len, {cache_name(model): cache}
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.places = torch.arange(self.length, device=device)
        self.prefill_graph = self.step_graph = None
        self.notes: list[str] = []

    def prefill(self, ids: torch.Tensor) -> None:
        self.cache.reset()
        positions = self.places[None, : ids.shape[1]].expand(len(ids), -1)
        logits = self.call(input_ids=ids, position_ids=positions, **self.kept, use_cache=True, logits_to_keep=1).logits
        self.token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        self.position.fill_(ids.shape[1])

    def step(self, token: torch.Tensor) -> None:
        mask = (self.places <= self.position).expand(len(token), 1, 1, -1)
        logits = self.call(input_ids=token, position_ids=self.position.expand(len(token), 1), attention_mask=mask, **self.kept, use_cache=True).logits
        self.token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        self.position += 1

    def capture(self) -> None:
        """Both as CUDA graphs, where they can be."""
        for _ in range(2):  # what is compiled in the first is tuned, or compiled once more, in the second
            self.prefill(self.ids)
            self.step(self.token)
        for name, fn, static in (("prefill", self.prefill, self.ids), ("step", self.step, self.token)):
            seen = [getattr(layer, "seen", None) for layer in self.cache.layers]
            torch.cuda.synchronize()
            replay, reason = vitq.evaluate.cuda_graph(fn, static, warmup=0)
            if reason:
                self.notes.append(f"{name} without a graph: {reason[:80]}")
            else:
                setattr(self, f"{name}_graph", partial(replay, static))
            for layer, count in zip(self.cache.layers, seen):
                if count is not None:
                    layer.seen = count

    def run_prefill(self, _: torch.Tensor) -> None:
        (self.prefill_graph or (lambda: self.prefill(self.ids)))()

    def run_decode(self, _: torch.Tensor) -> None:
        """From the prompt on, as many tokens as asked for; the prompt's keys and values stay."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.ids.shape[1])
            if hasattr(layer, "seen"):
                layer.seen = self.ids.shape[1]
        self.position.fill_(self.ids.shape[1])
        for _ in range(self.decode_tokens):
            (self.step_graph or (lambda: self.step(self.token)))()


@torch.inference_mode()
def measure(case: Case, repeats: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds of a prefill and of a token after it, and the peak of memory in both, of all GPUs together."""
    if device.type == "cuda":
        case.capture()
    case.run_prefill(case.ids)
    prefill = vitq.timing.time_model(case.run_prefill, case.ids, repeats=repeats, warmup=1)
    decode = vitq.timing.time_model(case.run_decode, case.ids, repeats=repeats, warmup=1)
    found = {"prefill_ms": prefill.median_ms, "prefill_spread": prefill.spread, "decode_ms": decode.median_ms / case.decode_tokens, "decode_spread": decode.spread,
             "notes": case.notes}
    if device.type == "cuda":
        found["peak_gb"] = sum(torch.cuda.max_memory_allocated(each) for each in range(torch.cuda.device_count())) / 1e9
    return found


# Sizes of models whose weights are random: those that decide about time and memory.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": dict(family="Llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                       num_key_value_heads=32, max_position_embeddings=4096, tie_word_embeddings=False),
    "llama-3-8b": dict(family="Llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                       num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0, tie_word_embeddings=False),
    "qwen2.5-7b": dict(family="Qwen2", vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                       num_key_value_heads=4, max_position_embeddings=32768, rope_theta=1000000.0, tie_word_embeddings=False),
    "tiny": dict(family="Llama", vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 max_position_embeddings=4096, tie_word_embeddings=False),
}


def executed_recipe(name: str, option: str, changes: Sequence[str] = ()) -> vitq.Recipe:
    """A recipe that runs in the time of the named one. Codes are rounded to nearest and weights stay where they are, whatever solver and transforms: that changes
    no time. Raises ValueError, which names the option, for one that nothing executes."""
    recipe = vitq.profiling.quick_recipe(name).with_overrides(["solver=rtn", "transforms=[]", *changes])
    if recipe.execution == "simulated":
        raise ValueError(f"{option} {name} is for simulation, and nothing executes all that it holds: give another")
    return recipe


def random_tokens(vocabulary: int, device: torch.device) -> list[torch.Tensor]:
    """For what a recipe measures where its results are no matter: a batch of 8 sequences of 64."""
    return [torch.randint(2, vocabulary, (8, 64), device=device)]


def random_model(name: str, device: torch.device, layers: int | None = None) -> nn.Module:
    """A float16 model (bfloat16 on a CPU) in one of SHAPES with random weights, made on the device."""
    import transformers

    sizes = dict(SHAPES[name])
    family = sizes.pop("family")
    if layers is not None:
        sizes["num_hidden_layers"] = layers
    config = getattr(transformers, f"{family}Config")(**sizes, bos_token_id=None, eos_token_id=None)
    with torch.device(device), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16 if device.type == "cuda" else torch.bfloat16,
                                                             attn_implementation="sdpa").eval()
