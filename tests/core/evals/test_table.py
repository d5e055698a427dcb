from __future__ import annotations

from typing import Any

from eabf_cli.core.evals.table import format_evaluation, format_table


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


def share(length: int, num_right: int, num_trials: int, **fields: Any) -> dict[str, Any]:
    return {"length": length, "accuracy": num_right / num_trials, "num_trials": num_trials, **fields}


EVALUATION = {
    "original_max_position_embeddings": 512,
    "max_position_embeddings": 2048,
    "context_gain": [
        {"context": 512, "nll": 3.0, "stderr": 0.1, "key_nll": 1.0, "key_stderr": None, "difference": 0.0,
         "difference_stderr": 0.0, "num_documents": 2},
        {"context": 2048, "nll": 2.8, "stderr": 0.1, "key_nll": 0.5, "key_stderr": 0.25, "difference": -0.2,
         "difference_stderr": 0.04, "num_documents": 2},
    ],
    "perplexity": [
        {"length": 512, "perplexity": 20.0, "stderr": 1.5, "num_documents": 3},
        {"length": 2048, "perplexity": None, "stderr": None, "num_documents": 0},
    ],
    "passkey": [share(512, 5, 5, depth=0.0), share(512, 0, 5, depth=1.0), share(2048, 1, 5, depth=0.0)],
    "repeated_span": [{"length": 512, "accuracy": 0.5, "stderr": 0.125, "num_trials": 4}],
    "perplexity_by_position": [{"start": 1, "end": 1024, "perplexity": 20.0, "stderr": None, "num_documents": 1}],
    "effective_length": 512,
    "retrieval": [{"length": 512}],
    "notes": ["something was left out"],
}  # fmt: skip


def test_an_evaluation_is_a_table_by_length_and_what_follows_from_it() -> None:
    assert (
        format_evaluation(EVALUATION)
        == """\
tokens                     512          2,048
loss by context  3.000 ± 0.100  2.800 ± 0.100
  on key tokens          1.000  0.500 ± 0.250
perplexity        20.00 ± 1.50              -
passkey            50% (24-76)     20% (4-62)
repeated span      50% (15-85)              -

passkey by depth
depth            512       2,048
0%     100% (57-100)  20% (4-62)
100%       0% (0-43)           -

perplexity by position
        1 to 1,023  20.00

Documents: perplexity 3; loss by context 2; perplexity by position 1.

With 2,048 tokens visible the loss on the same tokens is 0.200 ± 0.040 lower than with 512.
Effective length: 512 tokens (pre-trained window 512, window 2,048).

Note: something was left out"""
    )


def test_a_difference_within_twice_its_error_may_be_chance() -> None:
    gain = [dict(entry) for entry in EVALUATION["context_gain"]]
    gain[1] |= {"difference": 0.05, "difference_stderr": 0.04}
    shown = format_evaluation({"context_gain": gain})
    assert shown.endswith("is 0.050 ± 0.040 higher than with 512, which may be chance.")


def test_nothing_retrieved_has_no_effective_length() -> None:
    shown = format_evaluation(EVALUATION | {"effective_length": None})
    assert "Effective length: none." in shown


def test_many_lengths_go_below_each_other() -> None:
    spans = [{"length": 2**power, "accuracy": 0.5, "stderr": 0.1, "num_trials": 9} for power in range(2, 22)]
    lines = format_evaluation({"repeated_span": spans}).splitlines()
    assert max(map(len, lines)) <= 110
    headers = [line.split()[1:] for line in lines if line.startswith("tokens")]
    assert [name for names in headers for name in names] == [f"{2**power:,}" for power in range(2, 22)]


def test_nothing_measured_is_an_empty_text() -> None:
    assert format_evaluation({"lengths": [512]}) == ""
