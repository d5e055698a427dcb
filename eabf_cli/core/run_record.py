"""`eabf_run.json`: how an output folder was made, so that a rerun can prove it."""

from __future__ import annotations

import platform
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from eabf_cli.core.files import read_json, write_json

RUN_FILE = "eabf_run.json"
_PACKAGES = ("eabf-cli", "torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "huggingface-hub")


def run_record(command: str, arguments: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """The contents of a run file.

    Args:
        command: subcommand that made the folder.
        arguments: the configuration it ran with (never a token: those are huggingface_hub's own affair).
        results: what it printed with `--json`.
    """
    return {
        "command": command,
        "argv": sys.argv[1:],
        "arguments": arguments,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
        "commit": source_commit(),
        "platform": platform.platform(),
        "num_threads": torch.get_num_threads(),
        **results,
    }


def write_run_record(folder: Path, record: dict[str, Any]) -> None:
    """Write the run file; it comes last, so that its presence means a whole folder."""
    write_json(folder / RUN_FILE, record)


def read_run_record(folder: Path) -> dict[str, Any] | None:
    """The run file of a folder, or None where there is none."""
    return read_json(folder / RUN_FILE) if (folder / RUN_FILE).is_file() else None


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


@cache
def source_commit() -> str | None:
    """The commit of a source checkout; None for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        shown = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return shown.stdout.strip() or None
