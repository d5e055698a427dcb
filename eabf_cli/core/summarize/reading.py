"""Reading a long prompt: in chunks, into a cache that is allocated once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from eabf_cli.core import architectures
from eabf_cli.core.reading_kernel import reading_kernel

Progress = Callable[[int], None]
"""Called with the number of tokens read since the last call."""


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


def make_cache(model: PreTrainedModel, max_length: int) -> DynamicCache:
    """A cache for up to so many tokens: preallocated where a layer sees all of them, transformers' own elsewhere."""
    cache = DynamicCache(config=model.config)
    # Sliding and other special layers keep their own, small caches.
    cache.layers = [PreallocatedLayer(max_length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@torch.no_grad()
def read_tokens(
    model: PreTrainedModel,
    ids: Sequence[int],
    cache: DynamicCache,
    *,
    chunk_tokens: int,
    progress: Progress | None = None,
) -> Tensor:
    """Run the model over tokens behind those in the cache, and put their keys and values into it.

    In chunks, so that activations, and the attention mask, of a few tokens only are in memory at a time; logits
    are computed for the last token of each alone. Frequencies that follow the length of a call (`dynamic`,
    longrope) need the prompt in one piece.

    Returns:
        logits after the last token (vocabulary).
    """
    if architectures.follows_length(model.config.get_text_config()):
        chunk_tokens = len(ids)
    num_before = cache.get_seq_length()
    row = torch.tensor([list(ids)], device=model.device)
    with reading_kernel(model):
        for start in range(0, len(ids), chunk_tokens):
            chunk = row[:, start : start + chunk_tokens]
            positions = torch.arange(num_before + start, num_before + start + chunk.shape[1], device=model.device)
            outputs = model(
                input_ids=chunk, position_ids=positions[None], past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            if progress is not None:
                progress(chunk.shape[1])
    return outputs.logits[0, -1]


def forget_after(cache: DynamicCache, num_tokens: int) -> None:
    """Leave the first so many tokens in a cache."""
    cache.crop(num_tokens - cache.get_seq_length())
