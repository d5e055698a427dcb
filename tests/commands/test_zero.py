"""`eabf finetune` in two processes under DeepSpeed ZeRO-3, which divides every weight over them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.commands.test_finetune import QUICK, STEPS, all_arguments, run_alone
from tests.commands.test_processes import launch
from tests.conftest import Eabf
from tests.fork_server import ForkServer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

# What `accelerate launch` makes of its configuration file.
ZERO_3 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
}
# A step computes the same numbers as one process does, added up in another order; 1e-6 was seen. A resumption that had
# lost the optimizer's state was 0.07 off.
LOSS_TOLERANCE = 1e-4
# AdamW divides by gradients that may be as small as their rounding, and a step changes a weight by up to the learning
# rate of 3e-3: up to 1e-5 was seen.
WEIGHT_TOLERANCE = 1e-4

# DeepSpeed would spend half a minute on compiling an operation that inference alone uses, and print on stdout. It does
# not come to that, but to the printing.
PROGRAM = """
import os, signal, sys
from eabf_cli import cli, output
from eabf_cli.core.finetune import progress
output.quiet_libraries()
import deepspeed.comm
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: print("compiled")
append_metrics = progress.append_metrics

def killed_after(folder, line):
    append_metrics(folder, line)
    if str(line["step"]) == os.environ.get("KILLED_AFTER_STEP"):
        os.kill(os.getpid(), signal.SIGKILL)

progress.append_metrics = killed_after
cli.main(prog_name="eabf")
"""


def launch_zero(arguments: list[Any], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "program.py").write_text(PROGRAM)
    return launch(arguments, folder, program=("program.py",), **ZERO_3, **environment)


def assert_run_of_one_process(run: Path, expected: Path) -> None:
    """The losses of every step and the final weights are those of one process."""
    records = [json.loads((folder / "eabf_run.json").read_text()) for folder in (run, expected)]
    assert records[0]["num_processes"] == 2
    assert len(records[0]["train_loss"]) == STEPS
    assert records[0]["train_loss"] == pytest.approx(records[1]["train_loss"], abs=LOSS_TOLERANCE)
    for path in expected.rglob("*.safetensors"):
        weights, whole = load_file(run / path.relative_to(expected)), load_file(path)
        assert weights.keys() == whole.keys()
        for name, weight in whole.items():
            torch.testing.assert_close(weights[name], weight, atol=WEIGHT_TOLERANCE, rtol=0)


def num_held(checkpoint: Path, rank: int) -> dict[str, int]:
    """How many elements of the trained weights, and of their moments, a process wrote to a checkpoint."""
    (file,) = checkpoint.glob(f"global_step*/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    # Written by the test itself, with DeepSpeed's own classes in it. `fp32_flat_groups` is what stage 3 alone writes.
    kept = torch.load(file, weights_only=False)["optimizer_state_dict"]
    states = kept["optimizer_state_dict"]["state"].values()
    return {
        "weights": sum(group.numel() for group in kept["fp32_flat_groups"]),
        "moments": sum(state[name].numel() for state in states for name in ("exp_avg", "exp_avg_sq")),
    }


@pytest.fixture
def in_one_process(
    fork_server: ForkServer, tiny_llama_folder: Path, texts_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[list[Any], Path]]:
    """Runs a tuning in one process; returns its arguments and its folder."""

    def run(tuning: str) -> tuple[list[Any], Path]:
        command = [*all_arguments(tiny_llama_folder, texts_file), "--tuning", tuning]
        return command, run_alone(fork_server, command, tmp_path_factory.mktemp("alone"))

    return run


def test_a_killed_run_of_divided_weights_goes_on_and_ends_as_that_of_one_process(
    fork_server: ForkServer, in_one_process: Callable[[str], tuple[list[Any], Path]], workdir: Path
) -> None:
    command, alone = in_one_process("full")
    command += [*QUICK, "-o", "run", "--save-steps", 2]
    killed = launch_zero(command, workdir, KILLED_AFTER_STEP="3")
    assert killed.returncode != 0
    run = workdir / "run"
    assert not (run / "eabf_run.json").exists()
    assert [line["step"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())] == [1, 2, 3]

    num_parameters = sum(weight.numel() for weight in load_file(alone / "model.safetensors").values())
    held = [num_held(run / "checkpoint-2", rank) for rank in range(2)]
    assert held == 2 * [{"weights": num_parameters // 2, "moments": num_parameters}]

    # Without ZeRO the optimizer's state would not be found, and other weights be trained without a word.
    whole = fork_server.run([*command, "--resume"], cwd=workdir)
    assert whole.returncode == 1
    assert "sharding DeepSpeed ZeRO-3 -> None" in whole.stderr

    resumed = launch_zero([*command, "--resume"], workdir)
    assert resumed.returncode == 0, resumed.stderr
    assert "from checkpoint-2" in resumed.stderr
    assert_run_of_one_process(run, alone)
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in alone.iterdir())
    # What DeepSpeed prints goes where the conversation is.
    assert json.loads(resumed.stdout)["train_loss"] == json.loads((run / "eabf_run.json").read_text())["train_loss"]
    assert "compiled" in resumed.stderr


def test_adapters_of_divided_weights_end_as_those_of_one_process(
    in_one_process: Callable[[str], tuple[list[Any], Path]], workdir: Path
) -> None:
    command, alone = in_one_process("lora")
    launched = launch_zero([*command, *QUICK, "-o", "run"], workdir)
    assert launched.returncode == 0, launched.stderr
    assert_run_of_one_process(workdir / "run", alone)


def test_float32_weights_stay_float32_under_bfloat16(tiny_llama_folder: Path, texts_file: Path, workdir: Path) -> None:
    command = [*all_arguments(tiny_llama_folder, texts_file), "--dtype", "auto", "--tuning", "full", "--epochs", 1]
    launched = launch_zero([*command, *QUICK, "-o", "run"], workdir)
    assert launched.returncode == 0, launched.stderr
    # DeepSpeed computes with bfloat16 copies where the CPU has it; what its optimizer holds is not rounded.
    for name, weight in load_file(workdir / "run" / "model.safetensors").items():
        assert not torch.equal(weight, weight.bfloat16().float()), name


@pytest.fixture
def launched_with(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what a launcher would, in one process; before a refusal there is nothing to share out."""

    def set_environment(**environment: str) -> None:
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return set_environment


AUTO = {"gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        # None: accelerate's own variables.
        (None, "zero3_save_16bit_model: true"),
        (AUTO | {"zero_optimization": {"stage": 3}}, "stage3_gather_16bit_weights_on_model_save: true"),
        (
            {"zero_optimization": {"stage": 2}, "train_batch_size": 8, "scheduler": {"type": "WarmupLR"}},
            "does not leave gradient_accumulation_steps, gradient_clipping, train_batch_size, scheduler to the options",
        ),
    ],
    ids=["accelerate", "deepspeed", "recipe"],
)
def test_a_configuration_that_would_not_do_is_refused_before_anything_is_made(
    config: dict[str, Any] | None,
    told: str,
    eabf: Eabf,
    tiny_llama_folder: Path,
    texts_file: Path,
    workdir: Path,
    tmp_path: Path,
    launched_with: Any,
) -> None:
    if config is None:
        launched_with(**ZERO_3 | {"ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "false"})
    else:
        (tmp_path / "zero.json").write_text(json.dumps(config))
        launched_with(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_CONFIG_FILE=str(tmp_path / "zero.json"))
    result = eabf(*all_arguments(tiny_llama_folder, texts_file), *QUICK, "-o", "run")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert told in result.stderr
    assert list(workdir.iterdir()) == []


def test_deepspeed_that_cannot_be_had_is_one_message(
    eabf: Eabf,
    tiny_llama_folder: Path,
    texts_file: Path,
    workdir: Path,
    launched_with: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = [*all_arguments(tiny_llama_folder, texts_file), *QUICK, "-o", "run"]
    launched_with(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_CONFIG_FILE="nowhere.json")
    result = eabf(*command)
    assert result.exit_code == 1
    assert "configuration of DeepSpeed cannot be used" in result.stderr
    assert "nowhere.json" in result.stderr
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    result = eabf(*command)
    assert result.exit_code == 1
    assert "DeepSpeed, which is not installed: pip install deepspeed" in result.stderr
    assert list(workdir.iterdir()) == []


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "asks for bf16 precision, and this run is in float32"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "asks for fp16 precision, and this run is in float32"),
        (ZERO_3 | {"ACCELERATE_MIXED_PRECISION": "bf16"}, "asks for bf16 precision, and this run is in float32"),
    ],
    ids=["plain", "float16", "zero-3"],
)
def test_another_precision_of_the_launcher_is_refused_before_anything_is_made(
    environment: dict[str, str],
    told: str,
    eabf: Eabf,
    tiny_llama_folder: Path,
    texts_file: Path,
    workdir: Path,
    launched_with: Any,
) -> None:
    launched_with(**environment)
    result = eabf(*all_arguments(tiny_llama_folder, texts_file), *QUICK, "-o", "run")
    assert result.exit_code == 1
    assert told in result.stderr
    assert list(workdir.iterdir()) == []
