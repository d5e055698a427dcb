"""The estimate: of the right size, and told before a weight is loaded."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from eabf_cli.core.device_memory import InsufficientMemoryError
from eabf_cli.core.entropy.memory import EntropyMemory, estimate_memory, refuse_too_large
from tests.architectures import build_tiny_config

GIB = 2**30
SMOLLM2 = LlamaConfig(
    hidden_size=576,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    intermediate_size=1536,
    vocab_size=49_152,
    tie_word_embeddings=True,
)


def estimate(config: Any = SMOLLM2, **fields: Any) -> EntropyMemory:
    settings = {"length": 16_384, "num_positions": 64, "dtype": torch.float32, "device_type": "cpu"}
    return estimate_memory(config, **(settings | fields))


def test_16k_tokens_of_smollm2_fit_into_3_gib() -> None:
    assert estimate().weights == pytest.approx(134.5e6 * 4, rel=0.01)
    for num_positions in (64, 16_384):
        assert estimate(num_positions=num_positions).total < 3 * GIB
    assert estimate(device_type="cuda").process == 0


def test_every_part_grows_with_what_it_is_made_of() -> None:
    assert estimate(length=32_768).activations == 2 * estimate().activations
    assert estimate(dtype=torch.bfloat16).weights == estimate().weights // 2
    assert estimate(num_positions=128).results == 2 * estimate().results
    # Two models and their difference, one of them in memory at a time.
    assert estimate(num_models=2).results == 3 * estimate().results
    assert estimate(num_models=2).weights == estimate().weights
    # float32 rows, and what writing them takes.
    rows = estimate(rows=True).results - estimate().results
    assert rows == 2 * 4 * 30 * 9 * 64 * 16_384
    assert set(estimate().to_dict()) == {f"{name}_gib" for name in (*asdict(estimate()), "total")}


@pytest.mark.parametrize("name", ["gemma2", "qwen3_sliding"])
def test_what_grows_with_the_square_is_bounded(name: str) -> None:
    long, longer = (estimate(build_tiny_config(name), length=length) for length in (65_536, 131_072))
    assert long.attention < 2 * 2**29
    assert longer.attention <= long.attention
    assert long.cache > 0


def test_too_large_is_told_with_both_numbers_and_a_way_out() -> None:
    needed = estimate(length=1_000_000)
    with pytest.raises(InsufficientMemoryError) as refused:
        refuse_too_large(needed, 8 * GIB, length=1_000_000, device="cpu")
    said = ["1,000,000 tokens", f"{needed.total / GIB:.1f} GiB", "8.0 GiB available", "shorter --length"]
    assert [part for part in said if part not in str(refused.value)] == []
    with pytest.raises(InsufficientMemoryError, match="without --rows"):
        refuse_too_large(estimate(rows=True, num_positions=16_384), 64 * GIB, length=16_384, device="cpu")
    refuse_too_large(estimate(), 3 * GIB, length=16_384, device="cpu")
