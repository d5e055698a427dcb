"""The two ways to an entropy, against sums in float64 over whole attention matrices."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from eabf_cli.core.entropy import kernels
from eabf_cli.core.entropy.kernels import LogitRule, can_fuse, causal_entropy, entropy_of_logits, row_blocks

BATCH, HEADS, KEY_HEADS, LENGTH, WIDTH = 2, 6, 2, 50, 16
SCALE = 0.3
RULE = LogitRule(scale=SCALE)
TOLERANCE = 1e-4


def queries_and_keys(seed: int = 0, *, spread: float = 2.0, num_keys: int = LENGTH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = spread * torch.randn(BATCH, HEADS, LENGTH, WIDTH, generator=generator)
    return query, torch.randn(BATCH, KEY_HEADS, num_keys, WIDTH, generator=generator)


def causal_mask(num_keys: int = LENGTH) -> Tensor:
    """`(1, 1, Q, K)`, True where a key is visible: the last query is at the last key."""
    return torch.ones(LENGTH, num_keys, dtype=torch.bool).tril(num_keys - LENGTH)[None, None]


def brute_force(query: Tensor, key: Tensor, visible: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """-sum p ln p in float64, query head by query head."""
    repeated = key.double().repeat_interleave(HEADS // KEY_HEADS, 1)
    logits = SCALE * query.double() @ repeated.transpose(2, 3) + bias
    return torch.special.entr(logits.masked_fill(~visible, -torch.inf).softmax(-1)).sum(-1)


def in_blocks(query: Tensor, key: Tensor, mask: Tensor | None = None, rule: LogitRule = RULE) -> Tensor:
    blocks = row_blocks(query, key, torch.arange(query.shape[2]), mask, rule)
    return torch.cat([block.entropy for block in blocks], 2)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=0)


@given(seed=st.integers(0, 10**6), spread=st.floats(0.0, 30.0))
def test_entropy_lies_between_zero_and_the_logarithm_of_the_visible_keys(seed: int, spread: float) -> None:
    query, key = queries_and_keys(seed, spread=spread)
    expected = brute_force(query, key, causal_mask())
    bound = torch.arange(1, LENGTH + 1).log()
    for entropy in (in_blocks(query, key), causal_entropy(query, key, SCALE)):
        assert_close(entropy, expected)
        assert (entropy >= 0).all()
        assert (entropy <= bound + TOLERANCE).all()


def test_uniform_logits_give_the_logarithm_of_the_visible_keys() -> None:
    query, key = queries_and_keys()
    expected = torch.arange(1, LENGTH + 1).double().log().expand(BATCH, HEADS, -1)
    for same in ((torch.zeros_like(query), key), (query, key[:, :, :1].expand_as(key).contiguous())):
        assert_close(in_blocks(*same), expected, 1e-6)
        assert_close(causal_entropy(*same, SCALE), expected, 1e-6)


@pytest.mark.parametrize("offset", [0.0, 60.0], ids=["spread", "a common part of all keys"])
def test_large_logits_lose_nothing_to_cancellation(offset: float) -> None:
    query, key = queries_and_keys(spread=50.0)
    key = key + offset
    logits = SCALE * query.double() @ key.double().repeat_interleave(3, 1).transpose(2, 3)
    assert logits.abs().max() > (150 if offset == 0 else 2000)
    expected = brute_force(query, key, causal_mask())
    # The keys themselves have been rounded to float32: what they were before is not asked.
    assert_close(causal_entropy(query, key, SCALE), expected)
    assert_close(in_blocks(query, key), expected)


def hidden_as(kind: str, visible: Tensor) -> Tensor:
    if kind == "booleans":
        return visible
    lowest = -math.inf if kind == "minus infinity" else torch.finfo(torch.float32).min
    return torch.zeros(visible.shape).masked_fill(~visible, lowest)


@pytest.mark.parametrize("kind", ["booleans", "minus infinity", "the lowest number"])
def test_masks_hide_keys(kind: str) -> None:
    query, key = queries_and_keys(num_keys=LENGTH + 7)
    visible = causal_mask(LENGTH + 7).repeat(BATCH, 1, 1, 1)
    visible[1, :, :, :11] = False
    visible[0, :, :, 20:31] = False
    blocks = list(row_blocks(query, key, torch.arange(LENGTH), hidden_as(kind, visible), RULE))
    expected = torch.nan_to_num(brute_force(query, key, visible))
    assert_close(torch.cat([block.entropy for block in blocks], 2), expected)
    assert torch.equal(torch.cat([block.num_visible for block in blocks], 1), visible.sum(-1)[:, 0])


def test_a_query_without_a_visible_key_has_no_entropy() -> None:
    query, key = queries_and_keys()
    visible = causal_mask().clone()
    visible[..., :5, :] = False
    entropy = in_blocks(query, key, visible)
    assert (entropy[:, :, :5] == 0).all()
    assert_close(entropy[:, :, 5:], brute_force(query, key, visible)[:, :, 5:])


def test_numbers_in_a_mask_are_added_to_the_logits() -> None:
    query, key = queries_and_keys()
    bias = torch.randn(1, HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1))
    mask = bias.masked_fill(~causal_mask(), torch.finfo(torch.float32).min)
    assert_close(in_blocks(query, key, mask), brute_force(query, key, causal_mask(), bias.double()))


def test_without_a_whole_mask_padding_and_a_sliding_window_hide_keys() -> None:
    query, key = queries_and_keys(num_keys=LENGTH + 7)
    distance = torch.arange(LENGTH)[:, None] + 7 - torch.arange(LENGTH + 7)
    padding = torch.ones(BATCH, LENGTH + 7, dtype=torch.long)
    padding[0, :6] = 0
    visible = causal_mask(LENGTH + 7) & (distance < 9) & padding[:, None, None].bool()
    entropy = in_blocks(query, key, padding, LogitRule(scale=SCALE, sliding_window=9))
    assert_close(entropy, torch.nan_to_num(brute_force(query, key, visible)))


def test_sinks_take_probability_and_have_no_part_of_their_own() -> None:
    query, key = queries_and_keys()
    sinks = torch.tensor([-3.0, -1.0, 0.0, 2.0, 5.0, 9.0])
    module = SimpleNamespace(num_key_value_groups=HEADS // KEY_HEADS, sinks=sinks.double(), training=False)
    mask = hidden_as("the lowest number", causal_mask()).double()
    _, weights = eager_attention_forward(module, query.double(), key.double(), key.double(), mask, scaling=SCALE)
    rule = LogitRule(scale=SCALE, sinks=sinks)
    assert_close(in_blocks(query, key, None, rule), torch.special.entr(weights).sum(-1))
    blocks = row_blocks(query, key, torch.arange(LENGTH), None, rule)
    assert_close(torch.cat([block.probabilities for block in blocks], 2), weights)


@pytest.mark.parametrize("block_logits", [1, 3 * BATCH * HEADS * LENGTH, 2**21])
def test_blocks_of_any_size_give_the_same(block_logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BLOCK_LOGITS", block_logits)
    query, key = queries_and_keys()
    rows = torch.tensor([0, 3, 4, 17, 40, 49])
    blocks = list(row_blocks(query, key, rows, None, RULE))
    expected = brute_force(query, key, causal_mask())[:, :, rows]
    assert_close(torch.cat([block.entropy for block in blocks], 2), expected)
    assert [row for block in blocks for row in range(6)[block.rows]] == list(range(6))


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_what_is_not_a_number_stays_that_and_harms_nobody_else(value: float) -> None:
    query, key = queries_and_keys()
    query[0, 2, 7] = value
    for entropy in (in_blocks(query, key), causal_entropy(query, key, SCALE)):
        broken = entropy.isnan()
        assert broken[0, 2, 7]
        assert broken.sum() == 1
    query, key = queries_and_keys()
    key[0, 1, 30] = math.nan
    for entropy in (in_blocks(query, key), causal_entropy(query, key, SCALE)):
        assert entropy[0, 3:, 30:].isnan().all()
        assert not entropy[0, :3].isnan().any()
        assert not entropy[1].isnan().any()
    assert not in_blocks(query, key)[0, :, :30].isnan().any()


def test_a_logit_of_minus_infinity_has_no_part() -> None:
    logits = torch.tensor([0.0, -math.inf, math.log(3.0), -math.inf]).expand(1, 1, 1, 4).clone()
    entropy, probabilities = entropy_of_logits(logits)
    assert probabilities.flatten().tolist() == pytest.approx([0.25, 0, 0.75, 0])
    assert float(entropy) == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75), abs=1e-6)


def test_half_precision_is_read_exactly() -> None:
    query, key = (tensor.bfloat16() for tensor in queries_and_keys())
    expected = brute_force(query.float(), key.float(), causal_mask())
    assert_close(in_blocks(query, key), expected)
    assert_close(causal_entropy(query, key, SCALE), expected)


def test_only_plain_causal_attention_is_fused() -> None:
    query, key = queries_and_keys()
    assert can_fuse(query, key, None, RULE)
    assert can_fuse(query, key, None, LogitRule(scale=SCALE, sliding_window=LENGTH))
    assert not can_fuse(query, key, causal_mask(), RULE)
    assert not can_fuse(query[:, :, 1:], key, None, RULE)
    for rule in ({"softcap": 5.0}, {"sinks": torch.zeros(HEADS)}, {"sliding_window": LENGTH - 1}):
        assert not can_fuse(query, key, None, LogitRule(scale=SCALE, **rule))
