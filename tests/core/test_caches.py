"""Caches that are cut back: what is read behind the cut is what a new cache would have given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from eabf_cli.core.caches import can_be_fixed, fixed_cache, forget_after, make_cache
from tests.architectures import SLIDING_WINDOW, build_tiny_model, random_tokens

LENGTH = 60
SLIDING = ("mistral_sliding", "gemma3_text", "qwen2_sliding", "cohere2", "olmo3")


@torch.no_grad()
def read(model: PreTrainedModel, tokens: Tensor, cache: DynamicCache) -> Tensor:
    """Logits of tokens behind a cache `(tokens, vocabulary)`."""
    start = cache.get_seq_length()
    positions = torch.arange(start, start + tokens.shape[1])[None]
    return model(tokens, position_ids=positions, past_key_values=cache, use_cache=True).logits[0]


@torch.no_grad()
def read_whole(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    return model(tokens, use_cache=False).logits[0]


@pytest.mark.parametrize("name", ["llama", *SLIDING])
def test_a_cache_can_be_cut_back_again_and_again(name: str) -> None:
    model = build_tiny_model(name)
    tokens, other = random_tokens(LENGTH), random_tokens(LENGTH, seed=1)
    cache = make_cache(model, LENGTH, rewinds=True)
    read(model, tokens, cache)
    # Deeper than the sliding window, inside it, and back to before what was cut already.
    for kept, count in ((LENGTH - SLIDING_WINDOW // 2, 5), (40, 20), (15, 30), (3, 2), (0, LENGTH)):
        forget_after(cache, kept)
        assert cache.get_seq_length() == kept
        found = read(model, other[:, kept : kept + count], cache)
        row = torch.cat([tokens[:, :kept], other[:, kept : kept + count]], dim=1)
        torch.testing.assert_close(found, read_whole(model, row)[kept:], atol=2e-5, rtol=1e-4)
        # What was kept is what it was.
        forget_after(cache, kept)
        read(model, tokens[:, kept:], cache)


def test_without_that_a_sliding_layer_keeps_to_its_window() -> None:
    model = build_tiny_model("mistral_sliding")
    cache = make_cache(model, LENGTH)
    read(model, random_tokens(LENGTH), cache)
    assert {layer.keys.shape[-2] for layer in cache.layers} == {SLIDING_WINDOW - 1}
    with pytest.raises(RuntimeError, match="past"):
        forget_after(cache, 40)


def test_more_tokens_than_there_is_room_for_are_an_error() -> None:
    model = build_tiny_model("llama")
    cache = make_cache(model, 10, rewinds=True)
    with pytest.raises(RuntimeError):
        read(model, random_tokens(11), cache)


def test_a_fixed_cache_holds_what_was_read_and_can_be_cut_back() -> None:
    model = build_tiny_model("llama")
    tokens, other = random_tokens(LENGTH), random_tokens(LENGTH, seed=1)
    cache = make_cache(model, LENGTH)
    read(model, tokens, cache)
    expected = read_whole(model, torch.cat([tokens[:, :40], other[:, 40:]], dim=1))[40:]
    for _ in range(2):
        cache = fixed_cache(model, cache, 40, LENGTH)
        assert {layer.keys.shape[-2] for layer in cache.layers} == {2048}
        torch.testing.assert_close(read(model, other[:, 40:], cache), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "expected"), [("llama", True), *((name, False) for name in SLIDING)])
def test_sliding_layers_cannot_be_fixed(name: str, expected: bool) -> None:
    assert can_be_fixed(build_tiny_model(name).config) is expected
