"""The run that is exported when none is named, and the folder that it goes to."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from eabf_cli.core.errors import CheckpointError
from eabf_cli.core.export.runs import default_output, newest_run


def write_run(name: str, finished: str, command: str = "finetune") -> None:
    folder = Path("eabf-runs") / name
    folder.mkdir(parents=True)
    (folder / "eabf_run.json").write_text(json.dumps({"command": command, "finished": finished}))


@pytest.mark.usefixtures("workdir")
def test_the_finetune_run_that_finished_last_is_taken_and_named(caplog: pytest.LogCaptureFixture) -> None:
    write_run("b", "2026-03-01T10:00:00+00:00")
    write_run("c", "2026-03-02T09:00:00+00:00")
    write_run("a", "2026-03-01T23:00:00+00:00")
    write_run("exported", "2026-03-03T10:00:00+00:00", command="export")
    write_run("patched", "2026-03-03T10:00:00+00:00", command="patch")
    write_run("damaged", "2026-03-04T10:00:00+00:00")
    Path("eabf-runs/damaged/eabf_run.json").write_text("{")
    Path("eabf-runs/unfinished").mkdir()
    with caplog.at_level(logging.INFO, logger="eabf_cli"):
        assert newest_run() == "eabf-runs/c"
    assert "newest finished run eabf-runs/c" in caplog.text


@pytest.mark.usefixtures("workdir")
@pytest.mark.parametrize("commands", [[], ["patch", "export"]])
def test_without_a_finetune_run_the_error_says_what_to_name(commands: list[str]) -> None:
    for command in commands:
        write_run(command, "2026-03-01T10:00:00+00:00", command=command)
    with pytest.raises(CheckpointError, match=r"no finished finetune run below .*eabf finetune"):
        newest_run()


@pytest.mark.usefixtures("workdir")
@pytest.mark.parametrize(
    ("source", "compat", "expected"),
    [
        ("owner/some.model-7b", None, "some.model-7b-export"),
        ("eabf-tiny", None, "eabf-tiny-export"),
        ("eabf-runs/run", None, "run-export"),
        ("eabf-runs/run/", "abf", "run-export-abf"),
        ("eabf-runs/run/adapter", None, "run-export"),
        ("eabf-runs/run/checkpoint-6", None, "run-checkpoint-6-export"),
        (".", None, "work-export"),
    ],
)
def test_an_output_is_named_after_its_source(source: str, compat: str | None, expected: str) -> None:
    for name in ("adapter", "checkpoint-6"):
        Path("eabf-runs/run", name).mkdir(parents=True)
    assert default_output(source, compat) == Path("eabf-runs") / expected
