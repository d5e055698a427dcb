"""What goes wrong is told in a few lines with the way out, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file
from transformers import BertConfig, GPT2Config

from eabf_cli.core import patch_checkpoint
from eabf_cli.core.errors import EabfError
from eabf_cli.core.sources import INDEX_FILE
from tests.conftest import Eabf
from tests.fork_server import ForkServer
from tests.tiny_llama import edit_config, write_tiny_llama

WHOLE_NUMBERS = "whole numbers"


def everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def assert_told(result: Result, said: list[str], exit_code: int = 1) -> None:
    """A refusal: its exit code, nothing on stdout, at most three lines, and what they must contain."""
    assert result.exit_code == exit_code, (result.stderr, result.exception)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.startswith(("Usage:", "Try ", "No --"))]
    assert 1 <= len([line for line in lines if line]) <= 3, result.stderr
    assert [word for word in said if word not in result.stderr] == [], result.stderr


# ---- Damaged models ------------------------------------------------------------------------------


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def missing_shard(folder: Path) -> None:
    shards(folder)[1].unlink()


def truncated_shard(folder: Path) -> None:
    shards(folder)[-1].write_bytes(shards(folder)[-1].read_bytes()[:-100])


def index_names_a_file_outside(folder: Path) -> None:
    save_file({"w": torch.ones(1)}, folder.parent / "outside.safetensors")
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"w": "../outside.safetensors"}}))


def unreadable_index(folder: Path) -> None:
    (folder / INDEX_FILE).write_text("{")


def unreadable_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama",')


def config_that_is_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def gpt2_config(folder: Path) -> None:
    GPT2Config().save_pretrained(folder)


def bert_config(folder: Path) -> None:
    BertConfig().save_pretrained(folder)


def unknown_model_type(folder: Path) -> None:
    edit_config(folder, model_type="lama")


def word_for_a_number(folder: Path) -> None:
    edit_config(folder, num_hidden_layers="three")


def word_for_a_scaling(folder: Path) -> None:
    edit_config(folder, rope_scaling="yarn")


def only_pickles(folder: Path) -> None:
    for path in [*shards(folder), folder / INDEX_FILE]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")


def no_weights(folder: Path) -> None:
    for path in [*shards(folder), folder / INDEX_FILE]:
        path.unlink()


def unreadable_tokenizer_config(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_bytes(b"\xff")


DAMAGES: list[tuple[Callable[[Path], None], list[str]]] = [
    (missing_shard, ["model-00002", "missing"]),
    (truncated_shard, ["truncated"]),
    (index_names_a_file_outside, ["../outside.safetensors", "outside the folder"]),
    (unreadable_index, [INDEX_FILE, "JSON"]),
    (unreadable_config, ["config.json", "JSON"]),
    (config_that_is_a_list, ["config.json", "list"]),
    (no_config, ["no config.json"]),
    (gpt2_config, ["gpt2", "supported", "llama"]),
    (bert_config, ["bert", "supported", "llama"]),
    (unknown_model_type, ["'lama'", "supported", "llama"]),
    (word_for_a_number, ["num_hidden_layers", "three"]),
    (word_for_a_scaling, ["rope_scaling", "yarn"]),
    (only_pickles, ["pytorch_model.bin", "convert"]),
    (no_weights, ["no weights"]),
    (unreadable_tokenizer_config, ["tokenizer_config.json", "JSON"]),
]


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = write_tiny_llama(tmp_path / "model", max_shard_size="300KB")
    assert len(shards(folder)) > 1
    return folder


@pytest.mark.parametrize(("damage", "said"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_a_damaged_model_is_one_clear_error_and_leaves_nothing(
    damage: Callable[[Path], None], said: list[str], eabf: Eabf, sharded: Path, workdir: Path, tmp_path: Path
) -> None:
    damage(sharded)
    before = everything_in(tmp_path)
    assert_told(eabf("patch", "-m", sharded, "-o", "runs/out"), said)
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("damage", [missing_shard, truncated_shard, unreadable_config, only_pickles])
def test_finetune_refuses_a_damaged_model_before_it_makes_a_folder(
    damage: Callable[[Path], None], eabf: Eabf, sharded: Path, tmp_path: Path
) -> None:
    damage(sharded)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "one two three four five six"}) + "\n")
    before = everything_in(tmp_path)
    options = ["--dataset", tmp_path / "text.jsonl", "--samples", 1, "--unscaled-layers", "none", "--no-eval"]
    assert_told(eabf("finetune", "-m", sharded, "-o", "runs/out", *options), [])
    assert everything_in(tmp_path) == before


# ---- Models that are not there -------------------------------------------------------------------


@pytest.mark.parametrize("command", ["patch", "finetune"])
@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("eabf-tinny", ["'eabf-tinny'", "not found", "eabf-tiny"]),
        ("./no-such-folder", ["no-such-folder", "not found"]),
        ("owner/no-such-model", ["owner/no-such-model", "Hub"]),
        ("model.gguf", ["model.gguf", "not found"]),
    ],
)
def test_a_misspelt_model_is_repeated_with_the_ways_to_name_one(
    command: str, model: str, said: list[str], eabf: Eabf, workdir: Path
) -> None:
    assert_told(eabf(command, "-m", model, "-o", "out"), said)
    assert everything_in(workdir) == []


# ---- Outputs that may not be written -------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "options", "said"),
    [
        ("taken", [], ["taken", "not empty", "--overwrite"]),
        ("file", ["--overwrite"], ["file", "is a file"]),
        ("model", ["--overwrite"], ["holds the source"]),
        (".", ["--overwrite"], ["holds the source"]),
        ("taken", ["--overwrite"], ["does not look like"]),
        ("file/out", [], ["file/out", "cannot write"]),
    ],
)
def test_an_output_that_may_not_be_written_is_left_as_it_is(
    output: str, options: list[str], said: list[str], eabf: Eabf, tiny_llama_folder: Path, workdir: Path
) -> None:
    shutil.copytree(tiny_llama_folder, workdir / "model")
    (workdir / "file").write_text("text")
    (workdir / "taken").mkdir()
    (workdir / "taken" / "letter.txt").write_text("dear")
    before = everything_in(workdir)
    assert_told(eabf("patch", "-m", "model", "-o", output, *options), said)
    assert everything_in(workdir) == before
    assert (workdir / "file").read_text() == "text"


def test_a_disk_that_is_too_small_is_known_before_and_named_with_both_numbers(
    eabf: Eabf, tiny_llama_folder: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(workdir)._replace(free=1000)
    monkeypatch.setattr("eabf_cli.core.files.shutil.disk_usage", Mock(return_value=full))
    assert_told(eabf("patch", "-m", tiny_llama_folder, "-o", "runs/out"), ["no space", "GiB needed", "0.00 GiB free"])
    assert everything_in(workdir) == []


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_disk_that_fills_up_on_the_way_leaves_nothing(
    file: str, eabf: Eabf, tiny_llama_folder: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copyfile = shutil.copyfile

    def failing(source: Path, target: Path) -> Any:
        if Path(source).name == file:
            Path(target).write_bytes(b"begun")
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        return copyfile(source, target)

    monkeypatch.setattr(patch_checkpoint.shutil, "copyfile", failing)
    assert_told(eabf("patch", "-m", tiny_llama_folder, "-o", "runs/out"), ["no space left", "runs/out", "-o"])
    assert everything_in(workdir) == []


# ---- Numbers that make no sense ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--factor", "0"], ["factor", "0"]),
        (["--factor", "1"], ["factor", "1", "greater than 1"]),
        (["--factor", "-4"], ["factor", "-4"]),
        (["--factor", "1e9"], ["factor", "1e+09", "largest"]),
        (["--factor", "nan"], ["factor", "nan"]),
        (["--max-length", "64"], ["64", "does not extend"]),
        (["--max-length", "0"], ["0", "does not extend"]),
        (["--original-length", "0"], ["original", "0"]),
        (["--original-length", "-5"], ["original", "-5"]),
        (["--factor", "4", "--max-length", "512"], ["factor 4", "64", "256", "512"]),
        (["--factor", "4", "--max-length", "256", "--original-length", "128"], ["factor 4", "128", "512", "256"]),
        (["--rope-theta", "0"], ["rope_theta", "0"]),
        (["--rope-theta", "inf"], ["rope_theta", "inf"]),
        (["--unscaled-layers", "0,7"], ["0,7", "0 to 2"]),
        (["--unscaled-layers", "0,1,2"], ["every layer", "abf"]),
        (["--method", "yarn", "--rope-theta", "auto"], ["yarn", "auto"]),
        (["--method", "yarn", "--unscaled-layers", "0"], ["yarn", "unscaled_layers"]),
    ],
)
@pytest.mark.parametrize("command", ["patch", "finetune"])
def test_a_number_that_makes_no_sense_is_named_with_its_value(
    command: str, options: list[str], said: list[str], eabf: Eabf, tiny_llama_folder: Path, workdir: Path
) -> None:
    assert_told(eabf(command, "-m", tiny_llama_folder, "-o", "out", *options), said)
    assert everything_in(workdir) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--factor", "four"], ["--factor", "four"]),
        (["--method", "yarm"], ["--method", "yarm", "yarn", "eabf"]),
        (["--max-length", "16k"], ["--max-length", "16k"]),
        (["--rope-theta", "papre"], ["--rope-theta", "papre", "paper", "auto"]),
        (["--unscaled-layers", "0-1"], ["--unscaled-layers", "0-1", WHOLE_NUMBERS, "none"]),
        (["--dtype", "fp8"], ["--dtype", "fp8", "bfloat16"]),
        (["--no-such-option"], ["--no-such-option"]),
        (["model"], ["model"]),
    ],
)
@pytest.mark.parametrize("command", ["patch", "finetune"])
def test_wrong_usage_exits_with_2(command: str, options: list[str], said: list[str], eabf: Eabf, workdir: Path) -> None:
    assert_told(eabf(command, *options), said, exit_code=2)
    assert everything_in(workdir) == []


def test_an_unknown_command_exits_with_2(eabf: Eabf) -> None:
    assert_told(eabf("finetun"), ["finetun"], exit_code=2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--samples", "0"], ["--samples", "0"]),
        (["--batch-size", "0"], ["--batch-size", "0"]),
        (["--batch-size", "9"], ["9", "8 samples"]),
        (["--epochs", "0"], ["--epochs", "0"]),
        (["--learning-rate", "0"], ["--learning-rate", "0.0"]),
        (["--lengths", "2"], ["lengths", "2"]),
        (["--samples", "9"], ["8 samples", "9 are asked for"]),
        (["--dataset", "missing.jsonl"], ["missing.jsonl", "not found"]),
        (["--dataset", "broken.jsonl"], ["broken.jsonl", "line 1"]),
        (["--device", "gpu"], ["gpu", "cpu"]),
        (["--resume"], ["out", "does not exist"]),
        (["--seed", "-1"], ["seed", "-1"]),
    ],
)
def test_training_settings_that_make_no_sense_make_no_folder(
    options: list[str], said: list[str], eabf: Eabf, tiny_llama_folder: Path, workdir: Path
) -> None:
    lines = [json.dumps({"text": f"{number} " * 40}) for number in range(8)]
    (workdir / "texts.jsonl").write_text("\n".join(lines))
    (workdir / "broken.jsonl").write_text("{")
    before = everything_in(workdir)
    dataset = [] if "--dataset" in options else ["--dataset", "texts.jsonl"]
    samples = [] if "--samples" in options else ["--samples", 8]
    arguments = [*dataset, *samples, "--unscaled-layers", "none", *options]
    result = eabf("finetune", "-m", tiny_llama_folder, "-o", "out", *arguments)
    assert_told(result, said, exit_code=2 if "--seed" in options else 1)
    assert everything_in(workdir) == before


# ---- The error boundary --------------------------------------------------------------------------


def test_debugging_shows_the_traceback(eabf: Eabf, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(eabf("patch", "-m", "nothing").exception, SystemExit)
    monkeypatch.setenv("EABF_DEBUG", "1")
    assert isinstance(eabf("patch", "-m", "nothing").exception, EabfError)
    monkeypatch.setenv("EABF_DEBUG", "0")
    assert isinstance(eabf("patch", "-m", "nothing").exception, SystemExit)


def test_a_bug_keeps_its_traceback(eabf: Eabf, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(patch_checkpoint, "patch_checkpoint", broken)
    assert isinstance(eabf("patch").exception, ZeroDivisionError)


def test_an_interrupt_exits_with_130_and_leaves_nothing(
    fork_server: ForkServer, tiny_llama_folder: Path, workdir: Path
) -> None:
    # Ctrl-C while the weights are copied.
    outcome = fork_server.run(
        ["patch", "-m", tiny_llama_folder, "-o", "runs/out"],
        cwd=workdir,
        kill_at=1,
        kill_where=r"partial-\d+/model",
        signal_number=signal.SIGINT,
    )
    assert outcome.returncode == 130
    assert outcome.stderr == "Interrupted.\n"
    assert outcome.stdout == ""
    assert everything_in(workdir) == []


# ---- Settings in a file --------------------------------------------------------------------------


def dry_run(eabf: Eabf, folder: Path, *options: object) -> dict[str, Any]:
    result = eabf("patch", "-m", folder, "--dry-run", "--json", *options)
    assert result.exit_code == 0, result.stderr
    value: dict[str, Any] = json.loads(result.stdout)
    return value


def test_a_file_sets_options_and_flags_win(eabf: Eabf, tiny_llama_folder: Path, workdir: Path) -> None:
    (workdir / "eabf.toml").write_text('factor = 8\nmethod = "logn"\nunscaled-layers = [0, 1]\n')
    from_file = dry_run(eabf, tiny_llama_folder, "--config", "eabf.toml")
    assert [from_file[name] for name in ("method", "factor", "unscaled_layers")] == ["logn", 8.0, [0, 1]]
    flags = ["--factor", 2, "--method", "eabf"]
    for order in ([*flags, "--config", "eabf.toml"], ["--config", "eabf.toml", *flags]):
        given = dry_run(eabf, tiny_llama_folder, *order)
        assert [given[name] for name in ("method", "factor", "unscaled_layers")] == ["eabf", 2.0, [0, 1]]


def test_a_file_s_names_are_the_flags_with_either_dash(eabf: Eabf, tiny_llama_folder: Path, workdir: Path) -> None:
    for text in ("max-length = 128", "max_length = 128"):
        (workdir / "eabf.toml").write_text(text)
        assert dry_run(eabf, tiny_llama_folder, "--config", "eabf.toml")["max_position_embeddings"] == 128


@pytest.mark.parametrize("dataset", ['"texts.jsonl"', '["texts.jsonl"]'])
def test_a_file_sets_the_dataset(dataset: str, eabf: Eabf, tiny_llama_folder: Path, workdir: Path) -> None:
    (workdir / "texts.jsonl").write_text("".join(json.dumps({"text": f"{n} " * 40}) + "\n" for n in range(8)))
    (workdir / "eabf.toml").write_text(f'dataset = {dataset}\nsamples = 8\nunscaled-layers = "none"\n')
    result = eabf("finetune", "-m", tiny_llama_folder, "--config", "eabf.toml", "--dry-run", "--json")
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert json.loads(result.stdout)["dataset"] == "texts.jsonl"
    assert json.loads(result.stdout)["num_samples"] == 8


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("factro = 8", ["eabf.toml", "factro", "factor"]),
        ("as_json = true", ["as_json", "json"]),
        ("factor = ", ["eabf.toml", "TOML"]),
        ('factor = "four"', ["--factor", "four"]),
        ('method = "yarm"', ["--method", "yarm"]),
        ('unscaled-layers = ["a"]', ["--unscaled-layers", "a", WHOLE_NUMBERS]),
        ("unscaled-layers = [0.5]", ["--unscaled-layers", "0.5", WHOLE_NUMBERS]),
        (None, ["eabf.toml", "No such file"]),
    ],
)
def test_a_file_that_makes_no_sense_is_wrong_usage(
    text: str | None, said: list[str], eabf: Eabf, tiny_llama_folder: Path, workdir: Path
) -> None:
    if text is not None:
        (workdir / "eabf.toml").write_text(text)
    assert_told(eabf("patch", "-m", tiny_llama_folder, "--dry-run", "--config", "eabf.toml"), said, exit_code=2)


# ---- Standard output -----------------------------------------------------------------------------


def test_a_result_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("A few words.")
    command = [sys.executable, "-m", "eabf_cli", "summarize", "--text-only", str(tmp_path / "notes.txt")]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "Error: standard output cannot be written: No space left on device\n"


@pytest.mark.parametrize("command", [["patch"], ["finetune"], ["entropy"], ["eval"], ["summarize", "notes.txt"]])
def test_a_model_in_a_folder_has_no_revision(
    command: list[str], eabf: Eabf, tiny_llama_folder: Path, workdir: Path
) -> None:
    (workdir / "notes.txt").write_text("A few words.")
    refused = eabf(*command, "--revision", "main", "-m", tiny_llama_folder)
    assert_told(refused, ["--revision belongs to a model of the Hub", str(tiny_llama_folder)], exit_code=2)
    assert everything_in(workdir) == ["notes.txt"]


@pytest.mark.parametrize(
    "command",
    [
        ("patch",),
        ("finetune",),
        ("entropy", "--length", 64),
        ("eval", "--tasks", "passkey", "--lengths", 64),
        ("eval", "--compare", "yarn,eabf", "--tasks", "passkey", "--lengths", "512,1024"),
    ],
    ids=lambda command: " ".join(map(str, command)),
)
def test_a_dry_run_refuses_the_folder_that_the_run_would_refuse(
    eabf: Eabf, workdir: Path, command: tuple[str, ...]
) -> None:
    (workdir / "full").mkdir()
    (workdir / "full" / "mine.txt").write_text("keep")
    result = eabf(*command, "--dry-run", "-o", "full")
    assert_told(result, ["output folder full exists and is not empty"])
    assert [path.name for path in workdir.rglob("*")] == ["full", "mine.txt"]
