"""A language model's fused block: norm+quantize, qkv, attention, o_proj+residual, norm+quantize, gate and up, gate·up+quantize, down_proj+residual."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from vitq.formats import QTensor
from vitq.nn.linear import QuantLinear
from vitq.nn.norm import QuantLayerNorm
from vitq.nn.packed import PackedModule, Row
from vitq.ops.gated import GatedSpec


class QuantGatedMlp(PackedModule):
    """Takes the place of a `GatedMlp`, whose linear layers are quantized: down_proj reads the codes that gating writes, but for features of an order of
    their own, which it quantizes itself."""

    def __init__(self, source: nn.Module, *, backend: str):
        super().__init__(backend)
        self.gate_up_proj: QuantLinear = source.gate_up_proj
        self.down_proj: QuantLinear = source.down_proj
        self.act_fn, self.activation = source.act_fn, source.activation

    def cases(self) -> dict[str, Any]:
        fmt = self.down_proj.input_format()
        return {} if self.activation is None or fmt.columns is not None else {"gated_quantize": GatedSpec(self.activation, fmt)}

    def forward(self, x: Tensor | QTensor, *, residual: Tensor | None = None) -> Tensor:
        """residual [..., hidden] is added, and may be overwritten."""
        hidden = self.gate_up_proj(x)
        if "gated_quantize" in self.packed():
            hidden = self.call("gated_quantize", hidden)
        else:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = self.act_fn(gate) * up
        return self.down_proj(hidden, residual=residual, inplace=residual is not None)

    def row(self, layer: str) -> Row | None:
        if not (packed := self.packed()):
            return None
        choice, bits = packed["gated_quantize"][0], self.down_proj.input_bits
        note = f"fell back: {choice.reason}" if choice.reason else ""
        return Row(layer, "gate", f"{self.activation}(gate)·up -> A{bits} {self.down_proj.timing()}", choice.backend, choice.kernel.name, 0, 0, note)


class QuantDecoderBlock(PackedModule):
    """Takes the place of a decoder layer of transformers in canonical form, children and calls alike. Its class is made a subclass of the source's too, so
    that what transformers looks for by class it finds."""

    def __init__(self, source: nn.Module, *, backend: str):
        super().__init__(backend)
        for name, value in source.__dict__.items():  # what a model asks its layers for
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)
        self.input_layernorm, self.post_attention_layernorm = (
            QuantLayerNorm(norm, backend=backend) for norm in (source.input_layernorm, source.post_attention_layernorm))
        self.self_attn, self.mlp = source.self_attn, QuantGatedMlp(source.mlp, backend=backend)

    def link(self) -> None:
        self.input_layernorm.fuse(self.self_attn.qkv_proj.input_format())
        self.post_attention_layernorm.fuse(self.mlp.gate_up_proj.input_format())

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, past_key_values: Any = None,
                use_cache: bool | None = False, position_embeddings: tuple[Tensor, Tensor] | None = None, cache: Any = None, **kwargs: Any) -> Tensor:
        """As transformers'."""
        cache = past_key_values if cache is None else cache
        context, _ = self.self_attn.context(self.input_layernorm(hidden_states), position_embeddings, attention_mask, cache,
                                            {"position_ids": position_ids, "use_cache": use_cache, **kwargs})
        hidden_states = self.self_attn.o_proj(context, residual=hidden_states)
        return self.mlp(self.post_attention_layernorm(hidden_states), residual=hidden_states)


def decoder_block(source: nn.Module, backend: str) -> QuantDecoderBlock:
    """The block that takes the place of `source`, whose four linear layers are quantized."""
    block = QuantDecoderBlock(source, backend=backend)
    block.__class__ = _class_of(type(source))
    return block


@lru_cache(maxsize=None)
def _class_of(source: type) -> type:
    return type(f"Quant{source.__name__}", (QuantDecoderBlock, source), {})
