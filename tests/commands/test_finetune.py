"""`eabf finetune` as it is typed: its output, and runs that are killed and go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import Eabf
from tests.fork_server import ForkServer
from tests.outcomes import printed
from tests.tiny_llama import TARGET, WINDOW

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 8


QUICK = ("--no-eval", "--json")


@pytest.fixture
def arguments(tiny_llama_folder: Path, texts_file: Path) -> list[Any]:
    return all_arguments(tiny_llama_folder, texts_file)


def all_arguments(model: Path, texts_file: Path) -> list[Any]:
    """Everything but the output: 8 samples in batches of 2, two epochs."""
    options = {
        "-m": model,
        "--dataset": texts_file,
        "--samples": 8,
        "--batch-size": 2,
        "--learning-rate": 0.003,
        "--rope-theta": "paper",
        "--device": "cpu",
        "--dtype": "float32",
    }
    return ["finetune", *(part for option in options.items() for part in option)]


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
    assert result.stdout.splitlines()[-4:] == [
        "Written to run",
        "Next: eabf eval -m run",
        "Next: eabf summarize -m run paper.pdf",
        "Next: eabf export run --to-hub OWNER/NAME",
    ]
    assert [part for part in parts if part not in result.stdout] == []


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--restore-share", 0.5], "--restore-share belongs to --restore-weight, which is not given"),
        (["--tuning", "full", "--no-merge", "--lora-rank", 8], "--lora-rank, --no-merge belongs to --tuning lora"),
        (["--tuning", "full", "--train-embeddings"], "--train-embeddings belongs to --tuning lora and qlora"),
        (["--revision", "main"], "--revision belongs to a model of the Hub, and --model"),
        (["--no-eval", "--lengths", 64], "--lengths says where to measure, and --no-eval measures nothing"),
        (["--pose", "--too-short", "drop"], "--too-short has no effect with --pose"),
    ],
)
def test_an_option_without_effect_is_refused(
    flags: list[Any], told: str, eabf: Eabf, arguments: list[Any], workdir: Path
) -> None:
    result = eabf(*arguments, "-o", "run", *flags)
    assert result.exit_code == 2, result.stderr
    assert told in result.stderr
    assert list(workdir.iterdir()) == []


def test_the_demo_model_has_no_revision(eabf: Eabf) -> None:
    result = eabf("finetune", "--revision", "main", "--dry-run")
    assert result.exit_code == 2
    assert "--model eabf-tiny is none" in result.stderr


def test_settings_of_adapters_that_auto_does_not_choose_are_told(eabf: Eabf, arguments: list[Any]) -> None:
    result = eabf(*arguments, "--lora-rank", 8, "--dry-run", "--json")
    assert printed(result)["tuning"] == "full"
    assert "full tuning was chosen" in result.stderr
    assert "no effect" in result.stderr
    plain = eabf(*arguments, "--dry-run", "--json")
    assert "no effect" not in plain.stderr


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


@pytest.fixture(scope="module")
def uninterrupted(
    fork_server: ForkServer, tiny_llama_folder: Path, texts_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a run that nothing stopped."""
    return run_alone(fork_server, all_arguments(tiny_llama_folder, texts_file), tmp_path_factory.mktemp("whole"))


def run_alone(fork_server: ForkServer, arguments: list[Any], folder: Path) -> Path:
    """Finetune in one process without a stop; the run's folder."""
    outcome = fork_server.run([*arguments, *QUICK, "-o", "run"], cwd=folder)
    assert outcome.returncode == 0, outcome.stderr
    return folder / "run"


def assert_same_run(run: Path, expected: Path) -> None:
    """The same files, losses and steps, and the same weights to the bit."""
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in expected.iterdir())
    records = [json.loads((folder / "eabf_run.json").read_text()) for folder in (run, expected)]
    assert records[0]["train_loss"] == records[1]["train_loss"]
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))
    weights = load_file(run / "model.safetensors")
    for name, weight in load_file(expected / "model.safetensors").items():
        assert torch.equal(weights[name], weight), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "number", "resumes_from"),
    [
        (r"run/metrics\.jsonl", 1, "its beginning"),
        (r"run/metrics\.jsonl", 4, "checkpoint-2"),
        (r"run/checkpoint-4/.*config\.json", 1, "checkpoint-3"),
        (r"run/checkpoint-4/trainer_state\.json", 1, "checkpoint-3"),
        (r"run/checkpoint-4/\.eabf_manifest", 1, "checkpoint-3"),
        (r"run/checkpoint-1$", 3, "checkpoint-3"),  # made, and later taken away to make room for the fourth
        (r"run/\.eabf_run\.json", 1, "checkpoint-8"),
    ],
)
def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(
    where: str,
    number: int,
    resumes_from: str,
    fork_server: ForkServer,
    arguments: list[Any],
    workdir: Path,
    uninterrupted: Path,
) -> None:
    command = [*arguments, *QUICK, "-o", "run"]
    killed = fork_server.run(command, cwd=workdir, kill_at=number, kill_where=where)
    assert killed.was_killed
    assert not (workdir / "run" / "eabf_run.json").exists()
    resumed = fork_server.run([*command, "--resume"], cwd=workdir)
    assert resumed.returncode == 0, resumed.stderr
    assert resumes_from in resumed.stderr
    assert_same_run(workdir / "run", uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["lora", "qlora"])
def test_a_killed_run_of_an_adapter_ends_with_the_same_adapter(
    tuning: str, fork_server: ForkServer, arguments: list[Any], workdir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    command = [*arguments, "--tuning", tuning]
    whole = run_alone(fork_server, command, tmp_path_factory.mktemp("whole"))
    command += [*QUICK, "-o", "run"]
    killed = fork_server.run(command, cwd=workdir, kill_at=1, kill_where=r"run/checkpoint-4/trainer_state\.json")
    assert killed.was_killed
    resumed = fork_server.run([*command, "--resume"], cwd=workdir)
    assert resumed.returncode == 0, resumed.stderr
    assert "checkpoint-3" in resumed.stderr
    assert_same_run(workdir / "run", whole)
    adapter = load_file(workdir / "run" / "adapter" / "adapter_model.safetensors")
    for name, weight in load_file(whole / "adapter" / "adapter_model.safetensors").items():
        assert torch.equal(adapter[name], weight), name


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_says_how_to_go_on_and_does(
    number: signal.Signals, fork_server: ForkServer, arguments: list[Any], workdir: Path, uninterrupted: Path
) -> None:
    command = [*arguments, *QUICK, "-o", "run", "--save-steps", 100]
    stopped = fork_server.run(command, cwd=workdir, kill_at=1, kill_where=r"run/metrics\.jsonl", signal_number=number)
    assert stopped.returncode == 130, stopped.stderr
    assert stopped.stdout == ""
    last = stopped.stderr.splitlines()[-1]
    assert [part for part in ("Interrupted", "with a checkpoint", "--resume -o run") if part not in last] == []
    assert "Traceback" not in stopped.stderr

    refused = fork_server.run(command, cwd=workdir)
    assert refused.returncode == 1
    assert [part for part in ("not finished", "--resume", "--overwrite") if part not in refused.stderr] == []
    changed = fork_server.run([*command, "--resume", "--epochs", 3, "--learning-rate", 0.001], cwd=workdir)
    assert changed.returncode == 1
    assert [part for part in ("epochs None -> 3", "0.003 -> 0.001") if part not in changed.stderr] == []

    # How often it saves is no part of what it trains.
    resumed = fork_server.run([*command, "--resume", "--save-steps", 2], cwd=workdir)
    assert resumed.returncode == 0, resumed.stderr
    assert "checkpoint-1" in resumed.stderr
    assert_same_run(workdir / "run", uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "number"),
    # The eighth change of the metrics, which were emptied first, is that of the seventh step; then the eighth begins.
    [(r"run/metrics\.jsonl", 8), (r"run/metrics\.jsonl", 9), (r"run/checkpoint-8/trainer_state\.json", 1)],
)
def test_a_run_stopped_in_its_last_step_is_interrupted_and_goes_on(
    where: str, number: int, fork_server: ForkServer, arguments: list[Any], workdir: Path, uninterrupted: Path
) -> None:
    command = [*arguments, *QUICK, "-o", "run"]
    sent = {"kill_at": number, "kill_where": where, "signal_number": signal.SIGTERM}
    stopped = fork_server.run(command, cwd=workdir, **sent)
    assert stopped.returncode == 130, stopped.stderr
    assert stopped.stdout == ""
    said = ("Interrupted", f"after step {STEPS} of {STEPS}, with a checkpoint", "--resume -o run")
    assert [part for part in said if part not in stopped.stderr.splitlines()[-1]] == []
    assert not (workdir / "run" / "eabf_run.json").exists()

    manifest_file = workdir / "run" / f"checkpoint-{STEPS}" / "eabf_manifest.json"
    manifest = json.loads(manifest_file.read_text())
    assert 0 < manifest["elapsed"]["train_s"] < manifest["elapsed"]["wall_s"]
    manifest["elapsed"] = {"train_s": 500.0, "wall_s": 1000.0}
    manifest_file.write_text(json.dumps(manifest))
    resumed = fork_server.run([*command, "--resume"], cwd=workdir)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(workdir / "run", uninterrupted)
    # What the first attempt took is counted.
    result = json.loads(resumed.stdout)
    assert 500 < result["train_s"] < 1000 < result["wall_s"] < 1500
    assert result["tokens_per_s"] == pytest.approx(result["num_tokens"] / result["train_s"])


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_good_checkpoint(
    fork_server: ForkServer, arguments: list[Any], workdir: Path, uninterrupted: Path
) -> None:
    command = [*arguments, *QUICK, "-o", "run"]
    # A file of the second checkpoint is refused by the system, as on a full disk.
    full = fork_server.run(command, cwd=workdir, refuse_where=r"run/checkpoint-2/trainer_state\.json")
    assert full.returncode == 1
    assert "no space left for run" in full.stderr
    assert "Traceback" not in full.stderr
    resumed = fork_server.run([*command, "--resume"], cwd=workdir)
    assert resumed.returncode == 0, resumed.stderr
    assert "checkpoint-1" in resumed.stderr
    assert_same_run(workdir / "run", uninterrupted)


def test_a_probe_tells_what_it_did_not_see(fork_server: ForkServer, arguments: list[Any], workdir: Path) -> None:
    planned = fork_server.run([*arguments, *QUICK, "--dry-run"], cwd=workdir)
    of_lengths = json.loads(planned.stdout)["memory"]["tunings"]["full"]["lengths_gib"]
    probed = fork_server.run([*arguments, "--no-eval", "--dry-run", "--probe"], cwd=workdir)
    assert probed.returncode == 0, probed.stderr
    # Kernels for every length are those of bfloat16, which is chosen on a CPU that has it.
    said = f"Rows of different lengths take up to {of_lengths:.2f} GiB more, which this did not see."
    assert (said in probed.stdout.splitlines()) == (of_lengths >= 0.01)
    assert list(workdir.iterdir()) == []


def test_what_libraries_print_does_not_get_into_the_json(arguments: list[Any], workdir: Path) -> None:
    # transformers prints a line when it finds this set, and trackers when they begin.
    environment = os.environ | {"WANDB_MODE": "offline"}
    command = [sys.executable, "-m", "eabf_cli", *map(str, arguments), *QUICK, "--dry-run"]
    done = subprocess.run(command, cwd=workdir, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["num_steps"] == STEPS
    assert "WANDB offline mode" in done.stderr
