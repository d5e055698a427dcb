"""`eabf export` as it is typed: from a finetune run to a folder that works alone, and what is said on the way."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eabf_cli.core.checkpoint import load_model
from tests.conftest import Eabf
from tests.fork_server import ForkServer
from tests.outcomes import succeeded
from tests.tiny_llama import TARGET, WINDOW, logits

pytestmark = pytest.mark.usefixtures("one_thread")

CONTRACT_KEYS = {"output", "files", "repo_id", "commit_url", "verified"}

ALONE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
prompt = torch.arange(3, 103)[None]
print(model.generate(prompt, max_new_tokens=8, do_sample=False)[0, 100:].tolist())
print(tokenizer.model_max_length)
assert not any(name.startswith("eabf_cli") for name in sys.modules)
"""


def finetune(eabf: Eabf, model: Path, texts: Path, *options: Any) -> Path:
    """A short run under the default name."""
    short = ["--samples", 4, "--batch-size", 2, "--epochs", 1, "--no-eval", "--rope-theta", "paper", "--device", "cpu"]
    result = eabf("finetune", "-m", model, "--dataset", texts, "--json", *short, *options)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return Path(json.loads(result.stdout)["output"])


def run_alone(script: str, folder: Path, tmp_path: Path) -> list[str]:
    """Run a script with transformers alone, in a home of its own; the lines that it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment | {"HF_HOME": str(tmp_path / "home")},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("tuning", [("--tuning", "full"), ("--tuning", "lora", "--no-merge")])
def test_the_newest_run_becomes_a_folder_that_works_alone(
    tuning: tuple[str, ...], eabf: Eabf, llama_copy: Path, texts_file: Path, workdir: Path, tmp_path: Path
) -> None:
    run = finetune(eabf, llama_copy, texts_file, *tuning)
    result = succeeded(eabf("export", "-o", "exported", "--json"))
    value = json.loads(result.stdout)
    assert set(value) >= CONTRACT_KEYS
    assert (value["source"], value["output"], value["commit_url"]) == (str(run), "exported", None)
    assert value["verified"] <= value["verification"]["tolerance"]
    assert f"newest finished run {run}" in result.stderr
    assert "\r" not in result.stderr

    tuned = load_model(run, dtype="float32", device="cpu")
    expected = tuned.generate(torch.arange(3, 103)[None], max_new_tokens=8, do_sample=False)[0, 100:].tolist()
    expected_logits = logits(tuned)
    shutil.rmtree(llama_copy)
    shutil.rmtree(workdir / "eabf-runs")
    assert torch.equal(logits(load_model("exported", dtype="float32", device="cpu")), expected_logits)
    if "full" in tuning:
        assert run_alone(ALONE, workdir / "exported", tmp_path) == [str(expected), str(TARGET)]


def test_the_text_says_what_was_verified_and_verify_does_it_again(
    eabf: Eabf, tiny_llama_folder: Path, workdir: Path
) -> None:
    succeeded(eabf("patch", "-m", tiny_llama_folder, "-o", "patched", "--rope-theta", "paper"))
    said = succeeded(eabf("export", "patched", "-o", "exported")).stdout.splitlines()
    assert said[0] == f"patched: eabf, window {WINDOW} -> {TARGET} tokens, rope_theta 500,000"
    assert said[1].startswith("Verified exported in a clean process: logits differ by at most")
    assert said[-1].startswith("Written to exported: ")

    before = {path.name: path.read_bytes() for path in (workdir / "exported").iterdir()}
    again = json.loads(succeeded(eabf("export", "--verify", "exported", "--json")).stdout)
    assert again["verified"] <= again["verification"]["tolerance"]
    assert {path.name: path.read_bytes() for path in (workdir / "exported").iterdir()} == before
    with (workdir / "exported" / "model.safetensors").open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\x3f")
    changed = eabf("export", "--verify", "exported")
    assert changed.exit_code == 1
    assert "model.safetensors" in changed.stderr
    assert changed.stdout == ""


def test_a_dry_run_shows_the_files_and_the_changes(eabf: Eabf, tiny_llama_folder: Path, workdir: Path) -> None:
    succeeded(eabf("patch", "-m", tiny_llama_folder, "-o", "patched", "--rope-theta", "paper"))
    said = succeeded(eabf("export", "patched", "--dtype", "bfloat16", "--dry-run")).stdout
    size = sum(weight.numel() * 2 for weight in load_file(tiny_llama_folder / "model.safetensors").values())
    assert re.search(rf"model\.safetensors +{size / 1e6:.2f} MB", said)
    assert "eabf-runs/patched-export" in said
    assert re.search("dtype +float32 -> bfloat16", said)
    assert [path.name for path in workdir.iterdir()] == ["patched"]


def test_a_killed_export_leaves_nothing_that_loads(fork_server: ForkServer, eabf: Eabf, workdir: Path) -> None:
    succeeded(eabf("patch", "-o", "patched"))
    killed = fork_server.run(["export", "patched", "-o", "exported"], cwd=workdir, kill_at=1, kill_where=r"README\.md")
    assert killed.was_killed
    assert not (workdir / "exported").exists()


def test_on_a_full_disk_nothing_is_left(fork_server: ForkServer, eabf: Eabf, workdir: Path) -> None:
    succeeded(eabf("patch", "-o", "patched"))
    refused = fork_server.run(["export", "patched", "-o", "exported"], cwd=workdir, refuse_where=r"modeling_eabf\.py")
    assert refused.returncode == 1
    assert "no space left for exported" in refused.stderr
    assert [path.name for path in workdir.iterdir()] == ["patched"]


def test_without_a_run_the_error_says_what_to_do(eabf: Eabf, workdir: Path) -> None:
    result = eabf("export")
    assert result.exit_code == 1
    assert "no finished finetune run" in result.stderr
    assert len(result.stderr.splitlines()) <= 3
    assert list(workdir.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--private"], "--private belongs to --to-hub"),
        (["--revision", "main"], "--revision belongs to --to-hub"),
        (["--accept-license"], "--accept-license belongs to --to-hub"),
        (["--verify"], "--verify needs a folder or a Hub id"),
        (["--verify", "folder", "-o", "out"], "--output has no meaning with --verify"),
        (["--verify", "folder", "--to-hub", "owner/name"], "--to-hub has no meaning with --verify"),
        (["--compat", "gguf"], "'gguf' is not one of"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], said: str, eabf: Eabf) -> None:
    result = eabf("export", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
