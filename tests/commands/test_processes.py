"""`eabf finetune` in several processes, as torchrun and accelerate launch start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.commands.test_finetune import QUICK, all_arguments, run_alone
from tests.fork_server import ForkServer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

REPOSITORY = Path(__file__).resolve().parents[2]
# --standalone finds a free port of this machine.
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def launch(
    arguments: list[Any], cwd: Path, *, program: tuple[str, ...] = ("-m", "eabf_cli"), **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TORCHRUN, *program, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def alone(
    fork_server: ForkServer, tiny_llama_folder: Path, texts_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run in one process."""
    return run_alone(fork_server, all_arguments(tiny_llama_folder, texts_file), tmp_path_factory.mktemp("alone"))


def test_two_processes_train_what_one_does(
    alone: Path, tiny_llama_folder: Path, texts_file: Path, workdir: Path
) -> None:
    launched = launch([*all_arguments(tiny_llama_folder, texts_file), *QUICK, "-o", "run"], workdir)
    assert launched.returncode == 0, launched.stderr
    # One of them speaks.
    result = json.loads(launched.stdout)
    assert result["num_processes"] == 2
    expected = json.loads((alone / "eabf_run.json").read_text())
    assert result["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-4)
    assert (result["num_steps"], result["num_tokens"]) == (expected["num_steps"], expected["num_tokens"])
    weights = load_file(workdir / "run" / "model.safetensors")
    for name, weight in load_file(alone / "model.safetensors").items():
        torch.testing.assert_close(weights[name], weight, atol=1e-4, rtol=1e-3)
    assert sorted(path.name for path in (workdir / "run").iterdir()) == sorted(path.name for path in alone.iterdir())


def test_two_processes_go_on_where_they_were_stopped(
    alone: Path, tiny_llama_folder: Path, texts_file: Path, workdir: Path
) -> None:
    arguments = [*all_arguments(tiny_llama_folder, texts_file), *QUICK, "-o", "run", "--save-steps", 3]
    whole = launch(arguments, workdir)
    assert whole.returncode == 0, whole.stderr
    expected = load_file(workdir / "run" / "model.safetensors")

    stop = "import signal, eabf_cli.core.finetune.progress as progress\n"
    stop += "kept = progress.append_metrics\n"
    stop += "def append(folder, line):\n    kept(folder, line)\n"
    stop += "    if line['step'] == 4: signal.raise_signal(signal.SIGTERM)\n"
    stop += "progress.append_metrics = append\n"
    (workdir / "stopped.py").write_text(f"{stop}from eabf_cli.cli import main\nmain()\n")
    stopped = launch([*arguments, "--overwrite"], workdir, program=("stopped.py",))
    # Only the main process was told to stop; both did, after the same step.
    assert "stopped after step 5 of 8, with a checkpoint" in stopped.stderr
    assert stopped.returncode != 0
    assert (workdir / "run" / "checkpoint-5" / "eabf_manifest.json").is_file()

    resumed = launch([*arguments, "--resume"], workdir)
    assert resumed.returncode == 0, resumed.stderr
    assert "checkpoint-5" in resumed.stderr
    for name, weight in load_file(workdir / "run" / "model.safetensors").items():
        assert torch.equal(weight, expected[name]), name


def test_what_cannot_be_shared_out_is_refused_by_all(tiny_llama_folder: Path, texts_file: Path, workdir: Path) -> None:
    arguments = [*all_arguments(tiny_llama_folder, texts_file), *QUICK, "-o", "run", "--batch-size", 3]
    refused = launch(arguments, workdir)
    assert refused.returncode != 0
    assert refused.stderr.count("batch size 3 cannot be shared out to 2 processes") == 1


ALONE = """
import os
from eabf_cli.cli import main
from eabf_cli.core.errors import CheckpointError
from eabf_cli.core.finetune import run

def check_folder(*arguments):
    if os.environ["RANK"] == "1":
        raise CheckpointError("no space on this machine")

run.check_folder = check_folder
main(prog_name="eabf")
"""


def test_what_goes_wrong_in_one_process_alone_is_told_by_it(
    tiny_llama_folder: Path, texts_file: Path, workdir: Path
) -> None:
    (workdir / "alone.py").write_text(ALONE)
    arguments = [*all_arguments(tiny_llama_folder, texts_file), *QUICK, "-o", "run"]
    refused = launch(arguments, workdir, program=("alone.py",))
    assert refused.returncode != 0
    assert refused.stderr.count("Error: no space on this machine") == 1


LATE = """
import os, time
from eabf_cli.cli import main
from eabf_cli.core.finetune import run

check_folder = run.check_folder

def late(*arguments):
    if os.environ["RANK"] == "1":
        time.sleep(3)
    check_folder(*arguments)

run.check_folder = late
main(prog_name="eabf")
"""


def test_a_late_process_does_not_refuse_the_folder_that_another_made(
    tiny_llama_folder: Path, texts_file: Path, workdir: Path
) -> None:
    (workdir / "late.py").write_text(LATE)
    arguments = [*all_arguments(tiny_llama_folder, texts_file), *QUICK, "-o", "run"]
    launched = launch(arguments, workdir, program=("late.py",))
    assert launched.returncode == 0, launched.stderr


def test_sharding_on_cpus_is_refused(tiny_llama_folder: Path, texts_file: Path, workdir: Path) -> None:
    arguments = [*all_arguments(tiny_llama_folder, texts_file), *QUICK, "-o", "run"]
    refused = launch(arguments, workdir, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    assert refused.returncode != 0
    assert "does not shard on this device" in refused.stderr
    assert list(workdir.iterdir()) == []
