from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from eabf_cli.core.evals.judgement import ALTERNATIVES, choose_clusters, judge
from eabf_cli.core.evals.verdict_rows import Stretch
from eabf_cli.core.evals.verdict_settings import VerdictConfig

TITLES = {name: name.upper() for name in ("extended", "extended_last_window", *ALTERNATIVES)}


def stretches(num_documents: int, pieces: int = 1, per_piece: int = 3) -> list[Stretch]:
    return [
        Stretch(
            document=document, piece=piece, tokens=range(100), piece_start=0, start=10 * number, end=10 * number + 8
        )
        for document in range(num_documents)
        for piece in range(pieces)
        for number in range(per_piece)
    ]


def losses(num_stretches: int, **behind: float) -> dict[str, list[float]]:
    """Noisy losses; each alternative is behind the extended model by so much on average."""
    rng = np.random.default_rng(1)
    extended = rng.normal(3, 0.5, num_stretches)
    made = {"extended": extended, "extended_last_window": extended + 0.3}
    for name in ALTERNATIVES:
        made[name] = extended + behind.get(name, 0.4) + rng.normal(0, 0.1, num_stretches)
    return {name: values.tolist() for name, values in made.items()}


def verdict(num_documents: int = 10, **behind: float) -> dict[str, Any]:
    found = stretches(num_documents)
    return judge(losses(len(found), **behind), found, TITLES, VerdictConfig())


def test_better_than_every_alternative_wins() -> None:
    result = verdict()
    assert result["wins"]
    assert 0.99 < result["confidence"] < 1
    assert result["sentence"].startswith("Yes: ")
    assert result["resampled"] == "documents"
    assert (result["num_documents"], result["num_stretches"], result["num_tokens"]) == (10, 30, 240)


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_one_better_alternative_is_enough_to_lose(name: str) -> None:
    result = verdict(**{name: -0.2})
    assert not result["wins"]
    assert result["confidence"] < 0.01
    assert result["sentence"].startswith("No: ")
    assert f"'{name.upper()}' is ahead" in result["sentence"]


def test_a_lead_that_may_be_chance_is_not_a_win() -> None:
    result = verdict(yarn=0.02)
    assert not result["wins"]
    assert 0.5 < result["confidence"] < 0.95
    assert result["sentence"].startswith("Not shown: ")
    assert f"{math.floor(1000 * result['confidence']) / 10:g} % confidence" in result["sentence"]


def test_rows_are_the_mean_losses_and_paired_differences() -> None:
    found = stretches(10)
    made = losses(len(found))
    result = judge(made, found, TITLES, VerdictConfig())
    by_name = {row["name"]: row for row in result["rows"]}
    assert list(by_name) == ["extended", "last_window", "retrieved", "yarn", "extended_last_window"]
    for name, row in by_name.items():
        mean = sum(made[name]) / len(made[name])
        assert row["nll"] == pytest.approx(mean)
        assert row["perplexity"] == pytest.approx(math.exp(mean))
        if name in ALTERNATIVES:
            assert row["difference"]["mean"] == pytest.approx(mean - by_name["extended"]["nll"])
            # Paired: the spread of the losses themselves, five times as large, is not in it.
            assert row["difference"]["high"] - row["difference"]["low"] < 0.2
    assert result["inside"]["mean"] == pytest.approx(
        by_name["extended_last_window"]["nll"] - by_name["last_window"]["nll"]
    )


def test_what_is_drawn_follows_from_how_much_there_is() -> None:
    assert choose_clusters(stretches(5))[0] == "documents"
    name, clusters = choose_clusters(stretches(2, pieces=3))
    assert (name, len(set(clusters))) == ("pieces", 6)
    name, clusters = choose_clusters(stretches(1, pieces=2))
    assert (name, len(set(clusters))) == ("stretches", 6)


def test_a_single_stretch_proves_nothing() -> None:
    found = stretches(1, per_piece=1)
    result = judge(losses(1), found, TITLES, VerdictConfig())
    assert not result["wins"]
    assert result["confidence"] == 0
    assert result["rows"][1]["difference"]["low"] is None
