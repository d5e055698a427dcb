"""PoSE rows: where their tokens and positions come from, and that every token sees all before it."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import find_packed_sequence_indices

from eabf_cli.core.data.samples import IGNORE_INDEX, Sample, SampleCollator, SampleSet
from eabf_cli.core.finetune.pose import PoseCollator, pose_samples
from eabf_cli.core.patching import apply_method
from eabf_cli.modeling_eabf import logit_scale
from tests.scalings import scaling_for
from tests.tiny_llama import TARGET, WINDOW, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")

BOS = 1


def sample_set(*samples: Sample) -> SampleSet:
    return SampleSet(samples=samples, num_available=len(samples), data_hash="hash")


def text(length: int, *, bos: bool = True) -> Sample:
    """A sample whose tokens tell their own place: BOS, then 1000, 1001, ..."""
    ids = [BOS] * bos + list(range(1000, 1000 + length - bos))
    return Sample(ids, list(ids))


def rows_of(sample: Sample, *, window: int = WINDOW, target: int = TARGET, **options: Any) -> list[Sample]:
    given = {"window": window, "target": target, "bos_token_id": BOS, "seed": 0} | options
    return list(pose_samples(sample_set(sample), **given).samples)


@st.composite
def drawn_rows(draw: st.DrawFn) -> tuple[Sample, int, int, list[Sample]]:
    """A sample with at least one label that can be learned, a window, a target, and the rows made of it."""
    window = draw(st.integers(4, 24))
    target = window + draw(st.integers(1, 60))
    length = draw(st.integers(2, target))
    sample = text(length, bos=draw(st.booleans()))
    learned = draw(st.sets(st.integers(1, length - 1), min_size=1))
    labels = [token if place in learned else IGNORE_INDEX for place, token in enumerate(sample.input_ids)]
    sample = Sample(sample.input_ids, labels)
    rows = rows_of(sample, window=window, target=target, seed=draw(st.integers(0, 99)))
    return sample, window, target, rows


@given(drawn_rows())
@settings(max_examples=300)
def test_positions_never_go_back_and_skip_at_most_once(drawn: tuple[Sample, int, int, list[Sample]]) -> None:
    sample, window, target, rows = drawn
    assert len(rows) == max(1, round(len(sample.input_ids) / window))
    for row in rows:
        positions = row.position_ids
        assert positions is not None
        length = min(window, len(sample.input_ids))
        assert len(row.input_ids) == len(row.labels) == len(positions) == length
        assert positions[0] == 0
        assert positions[-1] < target
        steps = [after - before for before, after in pairwise(positions)]
        assert min(steps) >= 1
        assert sum(step > 1 for step in steps) <= 1


@given(drawn_rows())
@settings(max_examples=300)
def test_a_row_is_two_spans_of_its_sample_in_order(drawn: tuple[Sample, int, int, list[Sample]]) -> None:
    sample, _, _, rows = drawn
    has_bos = sample.input_ids[0] == BOS
    place_of = {token: place for place, token in enumerate(sample.input_ids)}
    for row in rows:
        assert (row.input_ids[0] == BOS) == has_bos
        assert row.input_ids.count(BOS) == has_bos
        body = [place_of[token] for token in row.input_ids[has_bos:]]
        jumps = [after - before for before, after in pairwise(body) if after - before != 1]
        assert len(jumps) <= 1
        assert all(jump > 1 for jump in jumps)
        assert any(label != IGNORE_INDEX for label in row.labels[1:])
        for place, (token, label) in enumerate(zip(row.input_ids, row.labels, strict=True)):
            # Behind BOS a text may begin anywhere, as in every sample that was split.
            follows = place <= has_bos or place_of[token] == place_of[row.input_ids[place - 1]] + 1
            assert label == (sample.labels[place_of[token]] if follows else IGNORE_INDEX)


@given(drawn_rows())
@settings(max_examples=200)
def test_the_position_skips_where_the_text_does(drawn: tuple[Sample, int, int, list[Sample]]) -> None:
    sample, _, _, rows = drawn
    has_bos = sample.input_ids[0] == BOS
    for row in rows:
        assert row.position_ids is not None
        in_text = [i for i in range(1 + has_bos, len(row.input_ids)) if row.input_ids[i] != row.input_ids[i - 1] + 1]
        in_positions = [i for i, (a, b) in enumerate(pairwise(row.position_ids), start=1) if b - a > 1]
        if in_text and in_positions:
            assert in_text == in_positions


def test_rows_depend_on_seed_index_and_number_alone() -> None:
    long, short = text(200), text(40)
    together = pose_samples(sample_set(long, short, long), window=WINDOW, target=TARGET, bos_token_id=BOS, seed=7)
    again = pose_samples(sample_set(long, short, long), window=WINDOW, target=TARGET, bos_token_id=BOS, seed=7)
    assert together == again
    rows = together.samples
    assert len(rows) == 3 + 1 + 3
    assert list(rows[:3]) == rows_of(long, seed=7)
    assert len({tuple(row.position_ids or ()) for row in rows}) == len(rows)
    assert rows_of(long, seed=7) != rows_of(long, seed=8)
    # A second pass comes after the first and leaves it as it was.
    twice = rows_of(long, seed=7, epochs=2)
    assert twice[:3] == rows_of(long, seed=7)
    assert not any(row in twice[:3] for row in twice[3:])
    assert rows_of(long, seed=7, rows_per_sample=2) == rows_of(long, seed=7)[:2]


def test_a_sample_that_fits_is_kept_whole() -> None:
    sample = text(WINDOW)
    (row,) = rows_of(sample, rows_per_sample=5)
    assert (row.input_ids, row.labels) == (sample.input_ids, sample.labels)


def test_many_rows_reach_every_distance_of_the_long_window() -> None:
    """Distances between a query and the keys before it, and positions: all up to the last are trained."""
    rows = rows_of(text(TARGET), rows_per_sample=1500)
    distances: Counter[int] = Counter()
    positions: Counter[int] = Counter()
    for row in rows:
        assert row.position_ids is not None
        positions.update(row.position_ids)
        distances.update({query - key for query in row.position_ids for key in row.position_ids if key < query})
    assert set(positions) == set(range(TARGET))
    assert set(distances) == set(range(1, TARGET))
    # Beyond the short window no stretch of positions is trained less than half as often as the mean of them.
    beyond = [positions[position] for position in range(WINDOW, TARGET - WINDOW)]
    assert min(beyond) > 0.5 * sum(beyond) / len(beyond)


def test_all_of_a_sample_is_read_and_its_end_as_well() -> None:
    sample = text(TARGET)
    rows = rows_of(sample, rows_per_sample=1500)
    seen = Counter(token for row in rows for token in row.input_ids)
    expected = 1500 * WINDOW / TARGET
    assert min(seen[token] for token in sample.input_ids[1:]) > 0.1 * expected
    assert seen[sample.input_ids[-1]] > 0.1 * expected


def test_an_answer_at_the_end_is_in_every_row() -> None:
    sample = text(TARGET)
    labels = [IGNORE_INDEX] * (TARGET - 3) + sample.input_ids[-3:]
    for row in rows_of(Sample(sample.input_ids, labels), rows_per_sample=50):
        assert any(label in sample.input_ids[-3:] for label in row.labels)


# --- Attention across the skip ---------------------------------------------------------------------------


def patched(attn_implementation: str) -> PreTrainedModel:
    model = tiny_llama(attn_implementation=attn_implementation)
    apply_method(model, scaling_for("eabf", unscaled_layers=(0,)))
    return model


def pose_batch() -> dict[str, Tensor]:
    """Two rows that skip in the text and in the positions, one of them short and padded."""
    generator = torch.Generator().manual_seed(0)
    long, short = (
        Sample(ids, list(ids))
        for ids in ([BOS, *torch.randint(3, 4096, (n - 1,), generator=generator).tolist()] for n in (200, 50))
    )
    data = pose_samples(sample_set(long, short), window=WINDOW, target=TARGET, bos_token_id=BOS, seed=3)
    chosen = [data[1], data[len(data) - 1]]
    for row in chosen:
        assert find_packed_sequence_indices(torch.tensor([row["position_ids"]])) is not None
    return PoseCollator(pad_token_id=2)(chosen)


@torch.no_grad()
def logits_token_by_token(model: PreTrainedModel, ids: Tensor, positions: Tensor) -> Tensor:
    """A row's logits when each token is a call of its own, with all earlier keys in the cache."""
    cache, logits = None, []
    for index in range(len(ids)):
        out = model(
            input_ids=ids[None, index : index + 1],
            position_ids=positions[None, index : index + 1],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        logits.append(out.logits[0, -1])
    return torch.stack(logits)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_every_token_sees_all_before_it_across_the_skip(attn_implementation: str) -> None:
    model, batch = patched(attn_implementation), pose_batch()
    lengths = batch["attention_mask"].sum(dim=1)
    assert lengths.tolist() == [WINDOW, 50]
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                       position_ids=batch["position_ids"]).logits  # fmt: skip
    for row, length in enumerate(lengths.tolist()):
        expected = logits_token_by_token(model, batch["input_ids"][row, :length], batch["position_ids"][row, :length])
        torch.testing.assert_close(logits[row, :length], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_without_the_mask_the_row_would_fall_apart(attn_implementation: str) -> None:
    """What the collator prevents: transformers reads the skip as the border of two packed samples."""
    results = {}
    batch = {name: tensor[:1] for name, tensor in pose_batch().items()}
    for with_mask in (True, False):
        model = patched(attn_implementation)
        given = {name: batch[name] for name in batch if with_mask or name != "attention_mask"}
        loss = model(**given, use_cache=False).loss
        loss.backward()
        results[with_mask] = (loss.item(), model.model.layers[1].self_attn.q_proj.weight.grad)
    assert abs(results[True][0] - results[False][0]) > 1e-3
    assert (results[True][1] - results[False][1]).norm() > 0.1 * results[True][1].norm()


def test_the_logit_scale_follows_the_position_ids() -> None:
    """t(i) of a row is that of its skipped positions: with the scale undone at those, EABF is ABF."""
    batch = {name: tensor[:1] for name, tensor in pose_batch().items() if name != "labels"}
    scaled, plain = tiny_llama(attn_implementation="eager"), tiny_llama(attn_implementation="eager")
    apply_method(scaled, scaling_for("eabf", unscaled_layers=(0,)))
    apply_method(plain, scaling_for("abf"))
    t = logit_scale("eabf", batch["position_ids"], WINDOW)
    assert t[0, -1] > 1.05
    for layer in plain.model.layers[1:]:
        # Rotation keeps lengths, so a scale on q_proj's output is a scale on the logits.
        layer.self_attn.q_proj.register_forward_hook(lambda _, __, output: output * t[..., None])
    with torch.no_grad():
        torch.testing.assert_close(scaled(**batch).logits, plain(**batch).logits, atol=2e-5, rtol=1e-4)


def test_the_collator_is_the_plain_one_but_for_positions_and_mask() -> None:
    data = pose_samples(sample_set(text(200), text(20)), window=WINDOW, target=TARGET, bos_token_id=BOS, seed=0)
    rows = [data[0], data[len(data) - 1]]
    batch = PoseCollator(pad_token_id=2)(rows)
    plain = SampleCollator(pad_token_id=2)([{k: row[k] for k in ("input_ids", "labels")} for row in rows])
    assert torch.equal(batch["input_ids"], plain["input_ids"])
    assert torch.equal(batch["labels"], plain["labels"])
    assert batch["attention_mask"].tolist() == [[1] * WINDOW, [1] * 20 + [0] * (WINDOW - 20)]
    assert batch["position_ids"][0].tolist() == rows[0]["position_ids"]
    assert batch["position_ids"][1, :20].tolist() == rows[1]["position_ids"]
    assert batch["position_ids"].max() < TARGET
