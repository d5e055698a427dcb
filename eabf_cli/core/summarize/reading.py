"""Reading a long prompt in chunks, into a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from eabf_cli.core import architectures
from eabf_cli.core.reading_kernel import reading_kernel

Progress = Callable[[int], None]
"""Called with the number of tokens read since the last call."""


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
