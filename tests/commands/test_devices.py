"""`--device` means the same to every command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import Eabf

COMMANDS = {
    "patch": ["--dry-run"],
    "finetune": ["--dry-run"],
    "entropy": ["--dry-run"],
    "summarize": ["paper.txt", "-m", "eabf-tiny"],
    "export": ["model"],
    "eval": ["--dry-run"],
}


@pytest.mark.parametrize("device", ["cuda:1", "mps"])
@pytest.mark.parametrize("command", COMMANDS)
def test_an_absent_device_is_refused_with_those_that_are_there(
    eabf: Eabf, workdir: Path, monkeypatch: pytest.MonkeyPatch, command: str, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    (workdir / "paper.txt").write_text("Words of murnep. " * 20)
    result = eabf(command, *COMMANDS[command], "--device", device)
    assert result.exit_code == 1
    assert f"Error: device '{device}' is not on this machine, which has cpu, cuda:0\n" in result.stderr
    assert result.stdout == ""
    assert [path.name for path in workdir.iterdir()] == ["paper.txt"]
