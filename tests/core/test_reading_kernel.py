"""Chunks behind a cache: the same hidden states as one pass over everything, without a mask where none is needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from eabf_cli.core import architectures, reading_kernel
from eabf_cli.core.patching import apply_method
from eabf_cli.core.scaling_config import RopeScalingConfig
from tests.architectures import ALL_CONFIGS, ARCHITECTURE_CONFIGS, WINDOW, build_tiny_model, random_tokens

LENGTH = 2 * WINDOW + 5
CHUNKS = (WINDOW - 5, 1, 20, LENGTH - WINDOW - 16)


def read_in_chunks(model: PreTrainedModel, tokens: Tensor, cache: Any) -> Tensor:
    hidden, start = [], 0
    for size in CHUNKS:
        positions = torch.arange(start, start + size)[None].expand(len(tokens), -1)
        outputs = architectures.decoder(model)(
            input_ids=tokens[:, start : start + size], position_ids=positions, past_key_values=cache, use_cache=True
        )
        hidden.append(outputs.last_hidden_state)
        start += size
    assert start == LENGTH
    return torch.cat(hidden, 1)


@torch.no_grad()
def check_chunks(model: PreTrainedModel, *, tolerance: float = 2e-5, cache: Any = None) -> None:
    tokens = random_tokens(LENGTH, batch=2)
    whole = architectures.decoder(model)(input_ids=tokens, use_cache=False).last_hidden_state
    with reading_kernel.reading_kernel(model):
        chunks = read_in_chunks(model, tokens, cache or DynamicCache(config=model.config))
    assert (chunks - whole).abs().max() <= tolerance * whole.abs().max()


@pytest.mark.parametrize("family", ALL_CONFIGS)
def test_chunks_of_a_plain_model_are_the_whole(family: str) -> None:
    check_chunks(build_tiny_model(family))


@pytest.mark.parametrize("family", ARCHITECTURE_CONFIGS)
def test_chunks_of_a_scaled_model_are_the_whole(family: str) -> None:
    model = build_tiny_model(family)
    apply_method(model, RopeScalingConfig(method="eabf", factor=4.0))
    check_chunks(model)


@pytest.mark.parametrize("method", ["yarn", "native", "logn"])
def test_chunks_under_other_methods_are_the_whole(method: str) -> None:
    model = build_tiny_model("llama")
    apply_method(model, RopeScalingConfig(method=method, factor=4.0))
    check_chunks(model)


def test_chunks_in_bfloat16_are_the_whole() -> None:
    check_chunks(build_tiny_model("llama", dtype=torch.bfloat16), tolerance=0.05)


def test_chunks_in_a_static_cache_are_the_whole() -> None:
    """Its empty part lies behind the last query, and has to be hidden."""
    model = build_tiny_model("llama")
    check_chunks(model, cache=StaticCache(config=model.config, max_cache_len=LENGTH + 10))


def test_values_of_another_width_than_keys_are_attended_to() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, length, width) for length, width in ((5, 8), (12, 8), (12, 6)))
    found, _ = reading_kernel._attention(torch.nn.Module(), query, key, value, None, scaling=0.3)
    logits = 0.3 * query @ key.transpose(2, 3)
    hidden = torch.ones(5, 12).triu(8).bool()
    expected = logits.masked_fill(hidden, -torch.inf).softmax(-1) @ value
    torch.testing.assert_close(found, expected.transpose(1, 2))


@torch.no_grad()
def test_no_mask_is_made_for_a_chunk_that_sees_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[Any] = []
    plain = reading_kernel._attention

    def watched(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        masks.append(mask)
        return plain(module, query, key, value, mask, **kwargs)

    monkeypatch.setattr(reading_kernel, "_attention", watched)
    check_chunks(build_tiny_model("llama"))
    assert len(masks) == 4 * len(CHUNKS)
    assert masks == [None] * len(masks)


def test_a_model_is_left_as_it_was() -> None:
    model = build_tiny_model("llama")
    with pytest.raises(IndexError), torch.no_grad(), reading_kernel.reading_kernel(model):
        model(input_ids=torch.tensor([[10**6]]))
    assert model.config._attn_implementation == "sdpa"


def test_other_kernels_are_left_alone() -> None:
    model = build_tiny_model("llama", attn_implementation="eager")
    with reading_kernel.reading_kernel(model):
        assert model.config._attn_implementation == "eager"
    check_chunks(model)
