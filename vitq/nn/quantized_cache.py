"""A cache of transformers that holds keys and values as codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, StaticCache, StaticLayer, StaticSlidingWindowLayer

from vitq.ops.cached_attention import HeadCodes, RowCodes, write

Codes = tuple[RowCodes | HeadCodes | None, RowCodes | HeadCodes | None]  # of keys and of values, None for those that stay in float


class _Coded:
    """Mixed into a layer of a cache, whose `keys` and `values` are then the bytes of `RowCodes`, [B, heads, tokens, bytes], or of `HeadCodes`,
    [B, 1, tokens, bytes]: what transformers does with them along the batch and the tokens stays as it is."""

    supports_early_init = False  # it would be of floats
    codes: Codes

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """New keys and values [B, heads, T, D] -> the numbers of those that are to be attended to."""
        new = key_states, value_states
        kept = super().update(*(x if codes is None else codes.pack(x) for x, codes in zip(new, self.codes)), *args, **kwargs)
        return tuple(rows if codes is None else codes.unpack(rows, x.shape[-1], x.dtype) for rows, x, codes in zip(kept, new, self.codes))


class CodedLayer(_Coded, DynamicLayer):
    pass


class CodedSlidingWindowLayer(_Coded, DynamicSlidingWindowLayer):
    pass


class StaticCodedLayer(StaticLayer):
    """A layer whose bytes have their place from the start: `keys` and `values` are those of `RowCodes`, [B, heads, N, bytes], or of `HeadCodes`, [B, 1, N,
    bytes], or floats where the recipe leaves them; N is max_cache_len or up to 15 more. state: int64 [2], how many tokens they hold, and a 0 that
    kernels count with.

    seen: the same number, as far as the host knows it: nothing waits for a GPU to tell. traced: tokens came since in code that `torch.compile` made, which counts
    on the device alone. A window is in the mask that transformers makes, not in the memory.
    """

    codes: Codes
    state: Tensor | None = None
    seen, traced = 0, False
    float_prefill = False

    def __init__(self, codes: Codes, max_cache_len: int, float_prefill: bool = False):
        super().__init__(max_cache_len=max_cache_len)
        self.codes, self.float_prefill = codes, float_prefill

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device, self.batch_size = key_states.device, key_states.shape[0]
        none = (x[:, :, :0] for x in (key_states, value_states))
        self.keys, self.values = (self._rows(x if codes is None else codes.pack(x)) for x, codes in zip(none, self.codes))
        self.state = torch.zeros(2, dtype=torch.long, device=self.device)
        self.cumulative_length = self.state[0]
        self.is_initialized = True

    def _rows(self, new: Tensor) -> Tensor:
        return new.new_zeros(*new.shape[:2], self.max_cache_len + -self.max_cache_len % 16, new.shape[-1])  # kernels read 16 at once

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """New keys and values [B, heads, T, D] -> the numbers of those that are to be attended to: the first to come, alone, or all that there is room for."""
        first = self.begin(key_states, value_states)
        new = key_states, value_states
        written = [write(rows, x, codes, self.cumulative_length) for rows, x, codes in zip((self.keys, self.values), new, self.codes)]
        self.cumulative_length += key_states.shape[2]
        if first and self.float_prefill:
            return new
        kept = written if first else (rows[:, :, : self.max_cache_len] for rows in (self.keys, self.values))
        return tuple(rows if codes is None else codes.unpack(rows, x.shape[-1], x.dtype) for rows, x, codes in zip(kept, new, self.codes))

    def begin(self, key_states: Tensor, value_states: Tensor) -> bool:
        """Count new tokens [B, heads, T, D], which are about to be written; whether they are known to be the first. Raises ValueError where they do not fit."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, _, tokens, _ = key_states.shape
        if batch != self.batch_size:
            other = "give a new cache" if self.codes == (None, None) else f"vitq.quantized_cache(model, max_length=…, batch_size={batch})"
            raise ValueError(f"the cache is of {self.batch_size} sequences, and {batch} came: {other}")
        for rows, new, codes in zip((self.keys, self.values), (key_states, value_states), self.codes):
            if codes is None and rows.dtype != new.dtype:
                raise ValueError(f"the cache is of {rows.dtype}, and {new.dtype} came: give one that no other model has filled")
        if torch.compiler.is_compiling():
            self.traced = True
            return False
        first = self.known() == 0
        self.count(tokens)
        return first

    def known(self) -> int:
        """How many tokens there are, asked of the device where only it knows."""
        if self.traced:
            self.seen, self.traced = int(self.state[0]), False
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As transformers', but that the first tokens attend to one another alone."""
        first = not torch.compiler.is_compiling() and self.known() == 0
        return (query_length if first else self.max_cache_len), 0

    def count(self, tokens: int) -> None:
        """Count tokens that are written by a graph, or are about to be. Raises ValueError where they do not fit."""
        if self.known() + tokens > self.max_cache_len:
            raise ValueError(f"the cache has room for {self.max_cache_len} tokens, holds {self.seen}, and {tokens} came: give a larger max_length, or reset()")
        self.seen += tokens

    def crop(self, tokens_to_remove: int) -> None:
        """As transformers'. Raises ValueError where there are not as many tokens."""
        if abs(tokens_to_remove) > self.known():
            raise ValueError(f"the cache holds {self.seen} tokens, of which {abs(tokens_to_remove)} are to be removed")
        super().crop(tokens_to_remove)
        self.seen -= abs(tokens_to_remove)

    def reset(self) -> None:
        self.cumulative_length.zero_()  # what lies behind it is not read
        self.seen, self.traced = 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        there = self.known()
        for rows in (self.keys, self.values):
            rows[:, :, :there] = rows[beam_idx.to(rows.device), :, :there]  # where graphs look for them


_CODED = {DynamicLayer: CodedLayer, DynamicSlidingWindowLayer: CodedSlidingWindowLayer, StaticLayer: StaticCodedLayer}


class _Sized:
    """Mixed into a cache."""

    @property
    def nbytes(self) -> int:
        """What its tensors take, scales and all."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in (layer.keys, layer.values) if t is not None)


class QuantizedCache(_Sized, DynamicCache):
    """A `DynamicCache` whose layers hold codes. Heads are stored as the model has them, those of grouped queries once."""


class StaticQuantizedCache(_Sized, StaticCache):
    """A `StaticCache` whose layers hold codes, with all their memory from the start. Made by `vitq.quantized_cache(model, max_length=…)`.

    layers: codes of each layer's keys and values, and an empty tensor [B, heads, 0, D] of the type in which they come.
    """

    def __init__(self, layers: Sequence[tuple[Codes, Tensor]], max_length: int, float_prefill: bool = False):
        Cache.__init__(self, layers=[StaticCodedLayer(codes, max_length, float_prefill) for codes, _ in layers])
        for layer, (_, empty) in zip(self.layers, layers):
            layer.lazy_initialization(empty, empty)


_QUANTIZED = {DynamicCache: QuantizedCache, StaticCache: StaticQuantizedCache}


def take_codes(cache: Cache, index: int, codes: Codes) -> Any:
    """Layer `index` of the cache, which stores these codes: an empty one of a `DynamicCache` or `StaticCache` is replaced.

    Raises TypeError for a cache of another kind, ValueError for a layer that holds floats already or other codes.
    """
    cache.__class__ = _QUANTIZED.get(type(cache), type(cache))  # so that it tells its size
    if isinstance(cache, DynamicCache):
        while len(cache.layers) <= index:  # one that was made without a config grows as it fills
            cache.layers.append(DynamicLayer())
    layer = _coded(cache, index, codes)
    if type(layer) in _CODED:
        raise ValueError("the cache holds floats of another model: this one quantizes its keys and values; give an empty one, "
                         "vitq.quantized_cache(model)")
    if isinstance(layer, StaticSlidingWindowLayer):
        raise TypeError("a static cache of a model with a sliding window comes from vitq.quantized_cache(model, max_length=…): leave "
                        "cache_implementation= out")
    if not isinstance(layer, (_Coded, StaticCodedLayer)):
        raise TypeError(f"a {type(cache).__name__} of {type(layer).__name__}s holds floats, or codes of its own: this model quantizes its keys and "
                        "values; leave cache_implementation= out, or give vitq.quantized_cache(model)")
    if layer.codes != codes:
        holds = "floats of another model" if layer.codes == (None, None) else layer.codes
        raise ValueError(f"the cache holds {holds}, and this model's keys and values are {codes}: give vitq.quantized_cache(model)")
    return layer


def static_layer(cache: Cache, index: int) -> StaticCodedLayer | None:
    """Layer `index` of a static cache, which has a place for floats that kernels can fill: an empty one of a `StaticCache` is replaced. None for all others.

    Raises ValueError for one that stores codes.
    """
    layers = getattr(cache, "layers", ())
    if index >= len(layers):
        return None
    traced = torch.compiler.is_compiling()  # in which transformers' own, that counts on the device alone, stays as it is
    layer = _coded(cache, index, (None, None)) if type(layers[index]) is StaticLayer and not traced else layers[index]
    if isinstance(layer, (_Coded, StaticCodedLayer)) and layer.codes != (None, None):
        raise ValueError(f"the cache holds {layer.codes}, and this model's keys and values are floats: give a cache of transformers, or none")
    return layer if isinstance(layer, StaticCodedLayer) else None


def _coded(cache: Cache, index: int, codes: Codes) -> Any:
    """Layer `index`, for these codes if it is empty and one of transformers'."""
    layer = cache.layers[index]
    early = type(layer) is StaticLayer and layer.is_initialized and not getattr(layer, "filled", False)
    if early and not (layer.cumulative_length.is_cuda and torch.cuda.is_current_stream_capturing()):
        # With prefill_chunk_size transformers makes it of floats before anything comes. The question waits for a GPU, so it is asked once.
        layer.filled = int(layer.cumulative_length) > 0
        layer.is_initialized = layer.filled
    if type(layer) in _CODED and not layer.is_initialized:
        coded = object.__new__(_CODED[type(layer)])
        coded.__dict__.update(layer.__dict__, codes=codes)  # all that a window's layer knows of itself
        cache.layers[index] = layer = coded
    return layer
