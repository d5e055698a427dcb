"""Lengths by default, and what does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from eabf_cli.core.device_memory import InsufficientMemoryError
from eabf_cli.core.evals.lengths import (
    EvalMemory,
    choose_lengths,
    estimate_memory,
    estimate_seconds,
    refuse_too_long,
)
from eabf_cli.core.evals.settings import EvalConfig
from tests.architectures import build_tiny_config, build_tiny_model

GIB = 2**30


def no_time(lengths: Sequence[int]) -> float:
    return 0.0


def test_six_lengths_around_the_window() -> None:
    lengths, note = choose_lengths(512, fits=lambda _: True, takes_s=no_time, dtype=torch.float32)
    assert lengths == (128, 256, 512, 1024, 2048, 4096)
    assert note == "lengths from 128 to 4,096 tokens, 8 times the pre-trained window"


def test_lengths_end_where_memory_does() -> None:
    lengths, note = choose_lengths(512, fits=lambda length: length < 1500, takes_s=no_time, dtype=torch.float32)
    assert lengths == (128, 256, 512, 1024)
    assert "2,048 would not fit into memory" in note


def test_lengths_end_where_it_would_take_hours_but_not_inside_the_window() -> None:
    lengths, note = choose_lengths(
        512, fits=lambda _: True, takes_s=lambda lengths: 4.0 * max(lengths), dtype=torch.float32
    )
    assert lengths == (128, 256, 512)
    assert "with 1,024 it would take about 1.1 hours here: --lengths asks for more" in note
    lengths, _ = choose_lengths(512, fits=lambda _: True, takes_s=lambda _: 1e9, dtype=torch.float32)
    assert lengths == (128, 256, 512)


def test_nothing_fits() -> None:
    with pytest.raises(InsufficientMemoryError, match="128 tokens"):
        choose_lengths(512, fits=lambda _: False, takes_s=no_time, dtype=torch.float32)


def memory(**parts: int) -> EvalMemory:
    names = ("weights", "cache", "activations", "attention", "logits", "process")
    return EvalMemory(**(dict.fromkeys(names, 0) | parts))


def test_a_length_that_does_not_fit_is_refused_with_one_that_does() -> None:
    def estimate(length: int) -> EvalMemory:
        return memory(weights=GIB, cache=length * 2**20)

    refuse_too_long((512, 2048), estimate, 4 * GIB, device="cpu", dtype=torch.float32)
    with pytest.raises(InsufficientMemoryError) as refused:
        refuse_too_long((512, 8192), estimate, 4 * GIB, device="cpu", dtype=torch.float32)
    message = str(refused.value)
    assert "8,192 tokens needs about 9.0 GiB (most of it cache, 8.0 GiB), and cpu has 4.0 GiB available" in message
    assert "Lengths up to about 2,048 fit; --dtype bfloat16 nearly halves it" in message
    with pytest.raises(InsufficientMemoryError, match="No length fits"):
        refuse_too_long((512,), lambda _: memory(weights=5 * GIB), 4 * GIB, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_two_bytes_a_weight_is_not_told_to_take_two(dtype: torch.dtype) -> None:
    with pytest.raises(InsufficientMemoryError) as refused:
        refuse_too_long((512,), lambda _: memory(weights=5 * GIB), 4 * GIB, device="cpu", dtype=dtype)
    assert "another --device may have more" in str(refused.value)
    assert "--dtype" not in str(refused.value)
    with pytest.raises(InsufficientMemoryError) as refused:
        choose_lengths(512, fits=lambda _: False, takes_s=no_time, dtype=dtype)
    assert "--lengths" in str(refused.value)
    assert "--dtype" not in str(refused.value)


def test_the_cache_is_counted_as_it_is_allocated() -> None:
    shape: Any = build_tiny_model("llama")
    options: dict[str, Any] = {"batch_tokens": 64, "dtype": torch.float32, "device_type": "cpu"}
    found = estimate_memory(shape, length=1000, follows_length=False, **options)
    config = build_tiny_config("llama")
    width = config.hidden_size // config.num_attention_heads
    assert found.cache == 2 * config.num_hidden_layers * config.num_key_value_heads * width * 1000 * 4
    assert found.weights == 4 * sum(weight.numel() for weight in shape.parameters())
    whole = estimate_memory(shape, length=100_000, follows_length=True, **options)
    assert whole.cache == 0
    assert whole.activations > estimate_memory(shape, length=100_000, follows_length=False, **options).activations


def test_time_grows_faster_than_the_length_and_with_the_trials() -> None:
    shape: Any = build_tiny_model("llama")
    config = EvalConfig(tasks=("passkey",), num_passkey_trials=10)

    def seconds(length: int, evaluation: EvalConfig = config) -> float:
        return estimate_seconds(shape, (length,), evaluation, num_threads=2)

    assert seconds(8192) > 2.1 * seconds(4096)
    assert seconds(4096, config.replace(num_passkey_trials=20)) == pytest.approx(2 * seconds(4096))
