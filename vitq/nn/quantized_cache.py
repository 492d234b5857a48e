"""A cache of transformers that holds keys and values as codes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from vitq.nn.key_values import HeadCodes, RowCodes

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


_CODED = {DynamicLayer: CodedLayer, DynamicSlidingWindowLayer: CodedSlidingWindowLayer}


class QuantizedCache(DynamicCache):
    """A `DynamicCache` whose layers hold codes. Heads are stored as the model has them, those of grouped queries once."""

    @property
    def nbytes(self) -> int:
        """What its tensors take, scales and all."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in (layer.keys, layer.values) if t is not None)


def take_codes(cache: Cache, index: int, codes: Codes) -> None:
    """See to it that layer `index` of the cache stores these codes: an empty one of a `DynamicCache` is replaced.

    Raises TypeError for a cache of another kind, ValueError for a layer that holds floats already or other codes.
    """
    if type(cache) is DynamicCache:
        cache.__class__ = QuantizedCache  # so that it tells its size
    if isinstance(cache, DynamicCache):
        while len(cache.layers) <= index:  # one that was made without a config grows as it fills
            cache.layers.append(DynamicLayer())
    layer = cache.layers[index]
    if type(layer) in _CODED and not layer.is_initialized:
        coded = object.__new__(_CODED[type(layer)])
        coded.__dict__.update(layer.__dict__, codes=codes)  # all that a window's layer knows of itself
        cache.layers[index] = layer = coded
    if type(layer) in _CODED:
        raise ValueError("the cache holds floats of another model: this one quantizes its keys and values; give an empty one, "
                         "vitq.quantized_cache(model)")
    if not isinstance(layer, _Coded):
        raise TypeError(f"a {type(cache).__name__} of {type(layer).__name__}s holds floats, or codes of its own: this model quantizes its keys and "
                        "values; leave cache_implementation= out, or give vitq.quantized_cache(model)")
    if layer.codes != codes:
        raise ValueError(f"the cache holds {layer.codes}, and this model's keys and values are {codes}: give vitq.quantized_cache(model)")
