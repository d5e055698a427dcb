"""What a run was started with: kept in JSON form, and only what differs is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.run_settings import check_settings, write_settings

STARTED = {
    "dataset": ["a.jsonl", "b.jsonl"],
    "recipe": {"learning_rate": 2e-5, "epochs": 2},
    "evaluation": None,
    "output": Path("here"),
    "data_hash": "0" * 64,
    "lengths": (64, 128),
}


def test_the_same_settings_pass_as_they_are_read_back(tmp_path: Path) -> None:
    write_settings(tmp_path, STARTED)
    check_settings(tmp_path, STARTED, kind="run")
    check_settings(tmp_path, STARTED | {"lengths": [64, 128], "output": "here"}, kind="run")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"recipe": {"learning_rate": 3e-5, "epochs": 2}}, "recipe.learning_rate 2e-05 -> 3e-05;"),
        ({"dataset": ["c.jsonl"]}, "dataset a.jsonl, b.jsonl -> c.jsonl;"),
        ({"evaluation": {"trials": 3}}, "evaluation None -> {'trials': 3};"),
        (
            {"data_hash": "1" * 64, "lengths": (64,)},
            f"data_hash {'0' * 37}... -> {'1' * 37}..., lengths 64, 128 -> 64;",
        ),
    ],
)
def test_each_setting_that_differs_is_told_and_nothing_else(
    changed: dict[str, object], told: str, tmp_path: Path
) -> None:
    write_settings(tmp_path, STARTED)
    with pytest.raises(InvalidConfigError) as error:
        check_settings(tmp_path, STARTED | changed, kind="run")
    assert str(error.value).startswith(f"run {tmp_path} was started with other settings: {told}")
