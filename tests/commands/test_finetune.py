"""`eabf finetune` as it is typed: its output, and runs that are killed and go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file

from tests.conftest import Eabf
from tests.fork_server import ForkServer
from tests.tiny_llama import TARGET, WINDOW

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 8


@pytest.fixture
def arguments(tiny_llama_folder: Path, texts_file: Path) -> list[Any]:
    """Everything but the output: 8 samples in batches of 2, two epochs."""
    options = {
        "-m": tiny_llama_folder,
        "--dataset": texts_file,
        "--samples": 8,
        "--batch-size": 2,
        "--learning-rate": 0.003,
        "--rope-theta": "paper",
        "--device": "cpu",
        "--dtype": "float32",
    }
    return ["finetune", *(part for option in options.items() for part in option)]


def printed(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, (result.stderr, result.exception)
    value: dict[str, Any] = json.loads(result.stdout)
    return value


def test_one_json_document_and_the_conversation_apart(eabf: Eabf, arguments: list[Any], workdir: Path) -> None:
    lengths = ["--lengths", f"{WINDOW},{TARGET}"]
    result = eabf(*arguments, "-o", "run", "--json", *lengths)
    value = printed(result)
    assert (value["num_steps"], value["output"], value["control"]) == (STEPS, "run", None)
    for name in ("original", "before", "after"):
        assert [entry["length"] for entry in value[name]["perplexity"]] == [WINDOW, TARGET]
    assert value["train_loss"][-1] < value["train_loss"][0]
    assert "Evaluating the finetuned model" in result.stderr
    assert "\r" not in result.stderr  # no bar where there is no terminal
    assert (workdir / "run" / "eabf_run.json").is_file()

    again = eabf(*arguments, "-o", "run", *lengths)
    assert again.exit_code == 1
    assert "--overwrite" in again.stderr
    resumed = eabf(*arguments, "-o", "run", "--resume", "--json", *lengths)
    assert printed(resumed)["train_loss"] == value["train_loss"]
    assert "finished already" in resumed.stderr


def test_the_text_is_a_table_of_before_and_after(eabf: Eabf, arguments: list[Any]) -> None:
    result = eabf(*arguments, "-o", "run", "--lengths", WINDOW)
    assert result.exit_code == 0, (result.stderr, result.exception)
    parts = ["eabf", "64 -> 256 tokens", "8 samples", "8 steps", "loss", "original", "patched", "finetuned"]
    assert result.stdout.splitlines()[-1] == "Written to run"
    assert [part for part in parts if part not in result.stdout] == []


def test_overwriting_starts_anew(eabf: Eabf, arguments: list[Any], workdir: Path) -> None:
    quick = [*arguments, "-o", "run", "--no-eval", "--json"]
    first = printed(eabf(*quick))
    (workdir / "run" / "stale").touch()
    second = printed(eabf(*quick, "--overwrite", "--seed", 7))
    assert second["seed"] == 7
    assert second["train_loss"] != first["train_loss"]
    assert not (workdir / "run" / "stale").exists()


def test_defaults_are_said_and_the_paper_s_100_samples_are_6_steps(eabf: Eabf, workdir: Path) -> None:
    result = eabf("finetune", "--samples", 100, "--factor", 4, "--batch-size", 32, "--dry-run", "--json")
    value = printed(result)
    assert (value["model"], value["dataset"]) == ("eabf-tiny", "demo-long")
    assert (value["num_samples"], value["num_steps"], value["max_position_embeddings"]) == (100, 6, 2048)
    model, data = result.stderr.splitlines()
    assert [word for word in ("eabf-tiny", "-m ") if word not in model] == []
    assert [word for word in ("demo-long", "--dataset ") if word not in data] == []
    assert list(workdir.iterdir()) == []


def test_resume_finds_the_run_by_its_default_name(eabf: Eabf, arguments: list[Any], workdir: Path) -> None:
    value = printed(eabf(*arguments, "--no-eval", "--json"))
    assert value["output"] == "eabf-runs/tiny-llama-eabf-x4"
    resumed = eabf(*arguments, "--no-eval", "--json", "--resume")
    assert printed(resumed)["train_loss"] == value["train_loss"]


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(
    fork_server: ForkServer, arguments: list[Any], workdir: Path
) -> None:
    quick = [*arguments, "--no-eval", "--json"]
    whole = fork_server.run([*quick, "-o", "whole"], cwd=workdir)
    assert whole.returncode == 0, whole.stderr

    # While the fourth checkpoint is written: what is there of it must not be used.
    killed = fork_server.run(
        [*quick, "-o", "run"], cwd=workdir, kill_at=1, kill_where=r"run/checkpoint-4/trainer_state\.json"
    )
    assert killed.was_killed
    run = workdir / "run"
    assert (run / "checkpoint-4").is_dir()
    assert not (run / "eabf_run.json").exists()

    refused = fork_server.run([*quick, "-o", "run"], cwd=workdir)
    assert refused.returncode == 1
    assert [part for part in ("not finished", "--resume", "--overwrite") if part not in refused.stderr] == []
    changed = fork_server.run([*quick, "-o", "run", "--resume", "--epochs", 3, "--learning-rate", 0.001], cwd=workdir)
    assert changed.returncode == 1
    assert [part for part in ("epochs None -> 3", "0.003 -> 0.001") if part not in changed.stderr] == []

    # Killed once more, when all is written but the file that says so.
    again = fork_server.run(
        [*quick, "-o", "run", "--resume"], cwd=workdir, kill_at=1, kill_where=r"run/\.eabf_run\.json"
    )
    assert again.was_killed
    assert "checkpoint-3" in again.stderr
    resumed = fork_server.run([*quick, "-o", "run", "--resume"], cwd=workdir)
    assert resumed.returncode == 0, resumed.stderr
    assert "checkpoint-8" in resumed.stderr

    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in (workdir / "whole").iterdir())
    expected, found = json.loads(whole.stdout), json.loads(resumed.stdout)
    assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-6)
    # The killed run had written its fourth step already.
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))
    weights = load_file(run / "model.safetensors")
    for name, weight in load_file(workdir / "whole" / "model.safetensors").items():
        torch.testing.assert_close(weights[name], weight, atol=1e-7, rtol=1e-6)
