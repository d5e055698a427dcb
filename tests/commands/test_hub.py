"""Models by their Hub id, from a Hub on loopback. huggingface_hub reads its settings when it is imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from eabf_cli.core.demo import demo_model_path
from tests.hub import COMMIT, local_hub

REPO = "somebody/tiny-llama"


def run_eabf(endpoint: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_python(endpoint, home, "-m", "eabf_cli", *arguments)


def run_python(endpoint: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=home,
        check=False,
    )


@pytest.fixture
def repo_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "repo"
    shutil.copytree(demo_model_path(), folder)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle that nobody wants")
    return folder


def test_patch_takes_a_hub_id(repo_folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with local_hub(REPO, repo_folder) as (endpoint, asked):
        planned = run_eabf(endpoint, home, "patch", "-m", REPO, "--factor", "2", "--dry-run", "--json")
        assert planned.returncode == 0, planned.stderr
        assert not [request for request in asked if "model.safetensors" in request]
        assert json.loads(planned.stdout)["warnings"] == []
        written = run_eabf(endpoint, home, "patch", "-m", REPO, "--factor", "2", "-o", "out", "--json")
    assert written.returncode == 0, written.stderr
    result = json.loads(written.stdout)
    assert result["max_position_embeddings"] == 1024
    record = json.loads((home / "out" / "eabf_run.json").read_text())
    assert record["revision"] == COMMIT
    assert not [request for request in asked if "pytorch_model.bin" in request]
    assert (home / "out" / "model.safetensors").read_bytes() == (repo_folder / "model.safetensors").read_bytes()
    assert f"base_model: {REPO}" in (home / "out" / "README.md").read_text()


def test_a_tokenizer_is_fetched_without_the_weights(repo_folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    program = f"from eabf_cli import load_tokenizer; print(len(load_tokenizer({REPO!r})))"
    with local_hub(REPO, repo_folder) as (endpoint, asked):
        loaded = run_python(endpoint, home, "-c", program)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.strip() == "4096"
    assert not [request for request in asked if "model.safetensors" in request]


def test_a_misspelt_hub_id_is_one_clear_error(repo_folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with local_hub(REPO, repo_folder) as (endpoint, _):
        failed = run_eabf(endpoint, home, "patch", "-m", "somebody/tiny-lama", "-o", "out")
    assert failed.returncode == 1
    assert "somebody/tiny-lama" in failed.stderr
    assert "check the spelling" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert len(failed.stderr.strip().splitlines()) <= 3
    assert not (home / "out").exists()
