"""Key-value caches that are allocated once: such that can be cut back, and such for compiled code."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# The length of a fixed cache is a multiple of it, so that prompts of about one length share their compiled code.
_FIXED_STEP = 2048


class PreallocatedLayer(DynamicLayer):
    """A layer's keys and values in buffers of their full size from the start.

    transformers' own layer concatenates for every token, which copies all that was read before. The static one
    attends to its empty part, too, and cannot be cropped.
    """

    def __init__(self, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (batch, key-value heads, new tokens, head_dim); returns views of all there is."""
        if self._buffers is None:
            self._buffers = self._allocate(key_states), self._allocate(value_states)
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.keys, self.values = (buffer[:, :, :0] for buffer in self._buffers)
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def _allocate(self, states: Tensor) -> Tensor:
        batch, heads, _, width = states.shape
        return states.new_empty((batch, heads, self.max_length, width))


class RewindableSlidingLayer(DynamicSlidingWindowLayer):
    """A sliding layer that keeps what has left its window, so that it can be cut back any number of times.

    transformers' own forgets that at the first crop.
    """

    def __init__(self, sliding_window: int, max_length: int) -> None:
        super().__init__(sliding_window)
        self._whole = PreallocatedLayer(max_length)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (batch, key-value heads, new tokens, head_dim); returns what the new tokens can see."""
        keys, values = self._whole.update(key_states, value_states)
        self.is_initialized = True
        self.cumulative_length = keys.shape[-2]
        num_visible = self.sliding_window - 1 + key_states.shape[-2]
        self.keys, self.values = keys[:, :, -num_visible:], values[:, :, -num_visible:]
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens."""
        self._whole.crop(tokens_to_remove)
        self.cumulative_length = self._whole.get_seq_length()


def make_cache(model: PreTrainedModel, max_length: int, *, rewinds: bool = False) -> DynamicCache:
    """A cache for up to so many tokens: preallocated where a layer sees all of them, transformers' own elsewhere.

    Args:
        rewinds: sliding layers, too, can be cut back to any length, again and again; they take as much memory as
            the others then.
    """
    cache = DynamicCache(config=model.config)
    cache.layers = [_layer(layer, max_length, rewinds) for layer in cache.layers]
    return cache


def _layer(layer: DynamicLayer, max_length: int, rewinds: bool) -> DynamicLayer:
    if type(layer) is DynamicLayer:
        return PreallocatedLayer(max_length)
    if rewinds and type(layer) is DynamicSlidingWindowLayer:
        return RewindableSlidingLayer(layer.sliding_window, max_length)
    return layer


def forget_after(cache: DynamicCache, num_tokens: int) -> None:
    """Leave the first so many tokens in a cache."""
    cache.crop(num_tokens - cache.get_seq_length())


def can_be_fixed(config: PretrainedConfig) -> bool:
    """Whether every layer of a model sees all tokens, as `fixed_cache` needs it."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


def fixed_cache(model: PreTrainedModel, cache: Cache, num_tokens: int, max_length: int) -> StaticCache:
    """Move the first so many tokens of a cache into one whose shapes stay, as compiled code needs them.

    The layers are moved one after the other, and `cache` is empty afterwards: never more than one layer's keys and
    values are in memory twice.

    Args:
        max_length: tokens that it must hold; it holds up to 2,047 more.
    """
    fixed = StaticCache(config=model.config, max_cache_len=-(-max_length // _FIXED_STEP) * _FIXED_STEP)
    for number, layer in enumerate(fixed.layers if num_tokens else ()):
        filled = cache.layers[number]
        layer.update(filled.keys[:, :, :num_tokens], filled.values[:, :, :num_tokens])
        cache.layers[number] = DynamicLayer()
    return fixed
