"""A series goes on where it stopped, and its table shows what was measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _scripts_on_path() -> Iterator[None]:
    sys.path.insert(0, str(REPOSITORY / "scripts"))
    yield
    sys.path.remove(str(REPOSITORY / "scripts"))


def result(perplexity: float) -> dict[str, Any]:
    """An evaluation at two lengths; passkeys at two depths with 3 of 4 and 0 of 1 found at the longer."""
    found = [
        {"length": 512, "depth": 0.0, "accuracy": 1.0, "num_trials": 5},
        {"length": 2048, "depth": 0.0, "accuracy": 0.75, "num_trials": 4},
        {"length": 2048, "depth": 1.0, "accuracy": 0.0, "num_trials": 1},
    ]
    after = {
        "lengths": [512, 2048],
        "perplexity": [{"length": 512, "perplexity": perplexity}, {"length": 2048, "perplexity": 2 * perplexity}],
        "context_gain": [{"context": 512, "nll": 3.25}, {"context": 2048, "nll": 3.125}],
        **dict.fromkeys(("passkey", "needles", "repeated_span"), found),
    }
    return {"after": after, "train_s": 7.4}


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    from demo_series import result_file, run_missing

    calls: list[str] = []

    def job(name: str) -> dict[str, Any]:
        calls.append(name)
        if name == "broken, seed 1":
            raise RuntimeError("killed")
        return {"name": name}

    names = ["first, seed 1", "broken, seed 1", "last"]
    for _ in range(2):
        with pytest.raises(RuntimeError):
            run_missing(tmp_path, {name: lambda name=name: job(name) for name in names})
    assert calls == ["first, seed 1", "broken, seed 1", "broken, seed 1"]
    assert json.loads(result_file(tmp_path, "first, seed 1").read_text()) == {"name": "first, seed 1"}


def test_the_table_has_a_row_for_each_result_that_is_there(tmp_path: Path) -> None:
    from demo_series import results_table, run_missing

    run_missing(tmp_path, {"b": lambda: result(31.0), "a": lambda: result(30.0)})
    table = results_table(tmp_path, ["a", "missing", "b"], {"training": lambda found: f"{found['train_s']:.0f} s"})
    head, _, *rows = table.splitlines()
    assert head == (
        "| variant | perplexity 512 / 2,048 | loss, context 512 / 2,048 | passkey 512 / 2,048 "
        "| unseen needles | repeated span | training |"
    )
    retrieved = "100% / 60%"
    assert rows == [
        f"| a | 30.00 / 60.00 | 3.250 / 3.125 | {retrieved} | {retrieved} | {retrieved} | 7 s |",
        f"| b | 31.00 / 62.00 | 3.250 / 3.125 | {retrieved} | {retrieved} | {retrieved} | 7 s |",
    ]


def test_every_variant_of_the_study_trains_the_same_samples() -> None:
    """The names say how a variant's steps and tokens compare with those of full-length training."""
    from long_training_study import BATCH_SIZE, EPOCHS, ROWS_PER_SAMPLE, VARIANTS

    num_samples, window = 100, 512
    full_steps, full_tokens = EPOCHS * num_samples // BATCH_SIZE, EPOCHS * num_samples * ROWS_PER_SAMPLE * window
    for name, variant in VARIANTS.items():
        rows = EPOCHS * num_samples * (variant.pose_rows or 1)
        length = window if variant.pose_rows is not None else ROWS_PER_SAMPLE * window
        assert ("pose" in name) == (variant.pose_rows is not None)
        assert ("restoration" in name) == (variant.restoration is not None)
        has_steps, has_tokens = ("full" in name or what in name for what in ("same steps", "tokens"))
        assert (rows // variant.batch_size == full_steps) == has_steps
        assert (rows * length == full_tokens) == has_tokens
