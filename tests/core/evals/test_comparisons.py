"""Differences are paired by seed and unit, drawn by cluster, and corrected over everything that is compared."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import numpy as np
import pytest

from eabf_cli.core.evals.comparisons import (
    BEYOND,
    INSIDE,
    LOSSES,
    Bootstrap,
    UnitScores,
    difference_entries,
    interval_entries,
    summary_sentences,
)
from eabf_cli.core.evals.statistics import bootstrap_mean, holm

WINDOW, TARGET = 512, 2048
BOOTSTRAP = Bootstrap(seed=0, num_resamples=2_000)


def scores(seed: int, *, loss: float = 3.0, accuracy: float = 0.9) -> UnitScores:
    """Documents that differ much more than models do; fewer of them are long."""
    documents, rng = np.random.default_rng(0).normal(0, 1, 12), np.random.default_rng(seed)
    values: dict[str, dict[int, list[float]]] = {"perplexity": {}, "passkey": {}}
    for length, count in ((256, 12), (512, 12), (1024, 10), (2048, 8), (4096, 6)):
        values["perplexity"][length] = (loss + documents[:count] + rng.normal(0, 0.02, count)).tolist()
        values["passkey"][length] = (rng.random(30) < accuracy).astype(float).tolist()
    return UnitScores(values, {"passkey": {length: [n // 3 for n in range(30)] for length in values["passkey"]}})


MODELS = {
    "original": [scores(1, loss=3.5, accuracy=0.1)],
    "yarn": [scores(seed, loss=3.02) for seed in (2, 3, 6, 8)],
    "eabf": [scores(seed) for seed in (4, 5, 7, 9)],
}


def entries(**changes: Any) -> dict[tuple[Any, ...], dict[str, Any]]:
    found = difference_entries(MODELS, "eabf", BOOTSTRAP, window=WINDOW, target_window=TARGET, **changes)
    return {(e["model"], e["measurement"], e["span"], tuple(e["lengths"])): e for e in found}


def test_every_length_and_both_spans_of_every_other_model_are_compared() -> None:
    found = entries()
    lengths = (256, 512, 1024, 2048, 4096)
    for model in ("original", "yarn"):
        for measurement in ("perplexity", "passkey"):
            for length in lengths:
                assert (model, measurement, None, (length,)) in found
            assert (model, measurement, INSIDE, (256, 512)) in found
            # Beyond the target window no method claims to work.
            assert (model, measurement, BEYOND, (1024, 2048)) in found
    assert len(found) == 2 * 2 * 7


def test_differences_are_those_of_the_same_document_and_seed() -> None:
    entry = entries()["yarn", "perplexity", None, (2048,)]
    rows = [
        [a - b for a, b in zip(mine.values["perplexity"][2048], theirs.values["perplexity"][2048], strict=True)]
        for mine, theirs in zip(MODELS["yarn"], MODELS["eabf"], strict=True)
    ]
    expected = bootstrap_mean(rows, seed=0, num_resamples=2_000)
    assert {name: entry[name] for name in expected.to_dict()} == expected.to_dict()
    assert (entry["num_units"], entry["num_seeds"]) == (8, 4)
    # The documents' own spread, fifty times as large, is not in the interval.
    assert entry["high"] - entry["low"] < 0.3


def test_a_model_of_one_seed_is_compared_with_every_seed() -> None:
    entry = entries()["original", "perplexity", None, (512,)]
    ours = [fmean(model.values["perplexity"][512]) for model in MODELS["eabf"]]
    theirs = fmean(MODELS["original"][0].values["perplexity"][512])
    assert entry["num_seeds"] == 4
    assert entry["mean"] == pytest.approx(theirs - fmean(ours))


def test_spans_average_a_documents_losses_and_put_trials_side_by_side() -> None:
    found = entries()
    beyond = found["yarn", "perplexity", BEYOND, (1024, 2048)]
    # The eight documents that have both lengths.
    both = [
        fmean(model.values["perplexity"][1024][:8] + model.values["perplexity"][2048])
        for name in ("yarn", "eabf")
        for model in MODELS[name]
    ]
    assert beyond["num_units"] == 8
    assert beyond["mean"] == pytest.approx(fmean(both[:4]) - fmean(both[4:]))
    assert found["yarn", "passkey", BEYOND, (1024, 2048)]["num_units"] == 60


def test_trials_of_one_prompt_are_drawn_together() -> None:
    entry = entries()["yarn", "passkey", None, (512,)]
    rows = [
        [a - b for a, b in zip(mine.values["passkey"][512], theirs.values["passkey"][512], strict=True)]
        for mine, theirs in zip(MODELS["yarn"], MODELS["eabf"], strict=True)
    ]
    options: dict[str, Any] = {"seed": 0, "num_resamples": 2_000, "bounds": (-1.0, 1.0)}
    together = bootstrap_mean(rows, clusters=[n // 3 for n in range(30)], **options)
    assert (entry["low"], entry["high"]) == (together.low, together.high)
    assert together != bootstrap_mean(rows, **options)


def test_p_values_are_corrected_over_models_and_lengths_of_a_measurement() -> None:
    found = entries()
    for measurement in ("perplexity", "passkey"):
        for is_span in (False, True):
            family = {key: e for key, e in found.items() if key[1] == measurement and (key[2] is not None) == is_span}
            assert len(family) == (4 if is_span else 10)
            adjusted = holm({key: e["p_value"] for key, e in family.items()})
            assert {key: e["adjusted_p_value"] for key, e in family.items()} == adjusted


def test_outcomes_know_that_losses_are_better_small_and_shares_large() -> None:
    found = entries()
    assert found["original", "perplexity", BEYOND, (1024, 2048)]["outcome"] == "worse"
    assert found["original", "passkey", BEYOND, (1024, 2048)]["outcome"] == "worse"
    assert found["yarn", "passkey", INSIDE, (256, 512)]["outcome"] == "open"
    turned = difference_entries(MODELS, "original", BOOTSTRAP, window=WINDOW, target_window=TARGET)
    assert {e["outcome"] for e in turned if e["model"] == "eabf"} == {"better"}


def test_losses_of_tokens_are_drawn_by_document() -> None:
    rng = np.random.default_rng(0)
    documents = [n // 5 for n in range(40)]
    losses = {name: rng.normal(2, 1, 40).tolist() for name in ("a", "b")}
    models = {
        name: [
            UnitScores({"key_tokens": {256: values, 1024: values}}, {"key_tokens": {256: documents, 1024: documents}})
        ]
        for name, values in losses.items()
    }
    found = difference_entries(models, "a", BOOTSTRAP, window=WINDOW, target_window=TARGET)
    rows = [[b - a for a, b in zip(losses["a"], losses["b"], strict=True)]]
    expected = bootstrap_mean(rows, clusters=documents, seed=0, num_resamples=2_000)
    assert all((entry["low"], entry["high"]) == (expected.low, expected.high) for entry in found)


def test_lengths_that_a_model_lacks_are_left_out() -> None:
    short = UnitScores({"perplexity": {512: [3.0] * 12}})
    found = difference_entries(
        {"short": [short], "eabf": MODELS["eabf"]}, "eabf", BOOTSTRAP, window=WINDOW, target_window=TARGET
    )
    assert [(e["span"], e["lengths"]) for e in found] == [(None, [512])]


def test_intervals_of_one_model_hold_its_mean_and_stay_within_bounds() -> None:
    found = {(e["measurement"], e["length"]): e for e in interval_entries(MODELS["eabf"], BOOTSTRAP)}
    assert len(found) == 10
    for (measurement, length), entry in found.items():
        values = [model.values[measurement][length] for model in MODELS["eabf"]]
        assert entry["mean"] == pytest.approx(fmean(fmean(row) for row in values))
        assert entry["low"] <= entry["mean"] <= entry["high"]
        if measurement == "passkey":
            assert entry["low"] >= 0
            assert entry["high"] <= 1


def test_no_loss_has_an_interval_below_zero_and_differences_may() -> None:
    losses = {512: [0.01, 0.02, 0.9]}
    scores = UnitScores(dict.fromkeys(LOSSES, losses))
    assert {entry["low"] for entry in interval_entries([scores], Bootstrap(seed=0))} == {0.0}
    other = UnitScores({"perplexity": {512: [0.02, 0.01, 0.8]}})
    (entry, _) = difference_entries(
        {"a": [other], "b": [scores]}, "b", Bootstrap(seed=0), window=512, target_window=512
    )
    assert entry["low"] < 0


def test_sentences_tell_who_beats_whom_in_what() -> None:
    found = list(entries().values())
    beyond, inside = summary_sentences(found)
    assert beyond.startswith("Beyond the original window (at 1,024 and 2,048 tokens), eabf is better than ")
    assert "original (perplexity and passkey)" in beyond
    assert inside.startswith("Inside the original window (at 256 and 512 tokens), eabf is ")
    nothing = [entry | {"outcome": "open"} for entry in found]
    assert summary_sentences(nothing)[0].endswith("eabf is not told apart from original and yarn.")
