from __future__ import annotations

import math
from typing import Any

import pytest

from eabf_cli.core.evals.suite_results import average_entry, format_suites


def entry(suite: str, task: str, length: int, value: float, stderr: float | None, **more: Any) -> dict[str, Any]:
    return {
        "suite": suite,
        "task": task,
        "length": length,
        "metrics": [{"metric": "score", "filter": "none", "value": value, "stderr": stderr}],
        "num_samples": 10,
        "num_inputs": 10,
        "num_cut": 0,
        "max_input_tokens": length,
    } | more


def test_the_average_counts_each_task_once_and_adds_independent_errors() -> None:
    entries = [
        entry("a", "a", 512, 0.2, 0.03),
        entry("b", "b", 512, 0.6, 0.04, num_samples=1000, num_cut=3),
        entry("c", "c", 512, 0.9, 0.01),
        entry("a", "a", 1024, 0.4, 0.03),
    ]
    average = average_entry("both", 512, entries, ("a", "b"))
    assert average is not None
    assert average["metrics"][0]["value"] == pytest.approx(0.4)
    assert average["metrics"][0]["stderr"] == pytest.approx(math.sqrt(0.03**2 + 0.04**2) / 2)
    assert (average["num_samples"], average["num_cut"]) == (1010, 3)
    assert average_entry("both", 1024, entries, ("a", "b")) is None


def test_an_error_that_one_task_lacks_is_not_known_for_the_average() -> None:
    average = average_entry("both", 512, [entry("a", "a", 512, 0.2, 0.03), entry("b", "b", 512, 0.6, None)], ("a", "b"))
    assert average is not None
    assert average["metrics"][0]["stderr"] is None


def test_the_table_has_a_row_per_metric_and_a_column_per_length() -> None:
    filters = [
        {"metric": "exact_match", "filter": "strict-match", "value": 0.25, "stderr": 0.05},
        {"metric": "exact_match", "filter": "flexible-extract", "value": 0.5, "stderr": None},
    ]
    entries = [
        entry("gsm8k", "gsm8k", 512, 0, None, metrics=filters),
        # A group with a score of its own stands for its tasks.
        entry("ruler", "niah_single_1", 512, 0.9, 0.1),
        entry("ruler", "ruler", 512, 0.7, 0.02, num_cut=3, num_inputs=130),
        entry("ruler", "ruler", 2048, 0.1, 0.02),
    ]
    expected = """\
task   metric                                    512           2,048
gsm8k  exact_match (strict-match)      0.2500 ±0.0500               -
       exact_match (flexible-extract)          0.5000               -
ruler  score                           0.7000 ±0.0200  0.1000 ±0.0200
       inputs cut                            3 of 130        0 of 10"""
    assert format_suites(entries).split() == expected.split()
    assert len({len(line.rstrip()) for line in format_suites(entries).splitlines()}) == 1
