from __future__ import annotations

from typing import Any

from eabf_cli.core.evals.table import format_table


def result(perplexity: list[float | None], accuracy: float) -> dict[str, Any]:
    lengths = (512, 2048)
    return {
        "perplexity": [
            {"length": length, "perplexity": value} for length, value in zip(lengths, perplexity, strict=True)
        ],
        "context_gain": [{"context": 512, "nll": 3.0456}],
        "passkey": [
            {"length": 512, "depth": 0.0, "accuracy": accuracy, "num_trials": 30},
            {"length": 512, "depth": 1.0, "accuracy": 1.0, "num_trials": 10},
        ],
    }


RESULTS = {"original": result([20.271, None], 0.0), "finetuned": result([21.3, 1234.5], 0.9)}


def test_models_are_rows_and_measurements_groups_of_columns() -> None:
    expected = """\
            perplexity       loss by context   passkey
              512    2,048               512       512
original    20.27        -             3.046       25%
finetuned   21.30  1234.50             3.046       92%"""
    assert format_table(RESULTS) == expected


def test_what_is_too_wide_goes_below() -> None:
    table = format_table(RESULTS, width=48)
    assert max(map(len, table.splitlines())) <= 48
    blocks = table.split("\n\n")
    assert [block.splitlines()[0].split() for block in blocks] == [
        ["perplexity", "loss", "by", "context"],
        ["passkey"],
    ]
    assert all("finetuned" in block for block in blocks)


def test_nothing_measured_is_an_empty_table() -> None:
    assert format_table({"original": {}}) == ""
