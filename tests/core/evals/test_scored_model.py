from __future__ import annotations

import json
import math

import pytest

from eabf_cli.core.evals.scored_model import ScoredModel, pool_results
from eabf_cli.core.evaluation import Measured

MEASURED = Measured(
    result={"effective_length": 512},
    documents={512: [3.0, 2.5], 2048: [2.0]},
    context={512: [2.5, 2.25]},
    trials={"needles": {512: [1.0, 0.0, 1.0]}},
    prompts={"needles": {512: [0, 0, 1]}},
    key_tokens=((True, False, True), (False, True, False)),
    key_losses={512: [(0.5, 1.5), (0.25,)]},
)


def test_scores_have_the_names_of_the_results_keys() -> None:
    scores = ScoredModel.of(MEASURED).scores
    assert scores.values == {
        "perplexity": {512: [3.0, 2.5], 2048: [2.0]},
        "context_gain": {512: [2.5, 2.25]},
        "needles": {512: [1.0, 0.0, 1.0]},
        "key_tokens": {512: [0.5, 1.5, 0.25]},
    }
    assert scores.clusters == {"needles": {512: [0, 0, 1]}, "key_tokens": {512: [0, 0, 1]}}


def test_key_tokens_that_were_not_chosen_fairly_are_left_out() -> None:
    assert "key_tokens" not in ScoredModel.of(MEASURED, has_key_tokens=False).scores.values


def test_what_is_kept_on_disk_is_what_was_measured() -> None:
    scored = ScoredModel.of(MEASURED)
    assert ScoredModel.from_dict(json.loads(json.dumps(scored.to_dict()))) == scored


def test_one_result_is_left_as_it_is() -> None:
    result = {"effective_length": None, "perplexity": [{"length": 512, "perplexity": 20.0, "num_tokens": 99}]}
    assert pool_results([result]) == result


def test_results_of_several_seeds_are_averaged_entry_by_entry() -> None:
    def result(perplexity: float, accuracy: float, length: int | None, stderr: float | None) -> dict[str, object]:
        return {
            "method": "eabf",
            "effective_length": length,
            "effective_lengths": {"passkey": length},
            "perplexity": [{"length": 512, "perplexity": perplexity, "stderr": stderr, "num_tokens": 99}],
            "passkey": [{"length": 512, "depth": 0.5, "accuracy": accuracy, "num_trials": 10}],
            "notes": ["a note"],
        }

    pooled = pool_results([result(20.0, 0.5, 2048, 1.0), result(30.0, 1.0, 1024, None)])
    assert pooled == {
        "method": "eabf",
        "effective_length": 1024,
        "effective_lengths": {"passkey": 1024},
        "perplexity": [{"length": 512, "perplexity": pytest.approx(math.sqrt(600)), "stderr": None, "num_tokens": 99}],
        "passkey": [{"length": 512, "depth": 0.5, "accuracy": 0.75, "num_trials": 10}],
        "notes": ["a note"],
    }
    lacking = pool_results([result(20.0, 0.5, 2048, 1.0), result(20.0, 0.5, None, 1.0)])
    assert lacking["effective_length"] is None
    assert lacking["effective_lengths"] == {"passkey": None}
