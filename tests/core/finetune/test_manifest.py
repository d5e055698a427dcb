"""A checkpoint is used only as it was written: the newest of which no byte is missing or changed."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from eabf_cli.core.finetune.manifest import (
    MANIFEST_FILE,
    Elapsed,
    elapsed_at,
    newest_whole_checkpoint,
    remove_checkpoints_after,
    why_unusable,
    write_manifest,
)

NAMES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "adapter/a.bin")


def checkpoint(run: Path, step: int) -> Path:
    folder = run / f"checkpoint-{step}"
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"{name} at {step}".encode())
    write_manifest(folder, Elapsed(train_s=2.0, wall_s=3.0))
    return folder


def test_the_manifest_has_the_size_and_hash_of_every_file(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 7)
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    assert manifest["step"] == 7
    assert set(manifest["files"]) == set(NAMES)
    content = (folder / "optimizer.pt").read_bytes()
    assert manifest["files"]["optimizer.pt"] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert why_unusable(folder) is None
    assert (elapsed_at(folder), elapsed_at(None)) == (Elapsed(train_s=2.0, wall_s=3.0), Elapsed())


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "changed": flip_a_bit,
    "has changed": lambda path: path.write_bytes(path.read_bytes()[:-1]),
}


@pytest.mark.parametrize("said", DAMAGES)
@pytest.mark.parametrize("name", NAMES)
def test_any_damage_to_any_file_is_found(said: str, name: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 7)
    DAMAGES[said](folder / name)
    reason = why_unusable(folder)
    assert reason is not None
    assert name in reason
    assert said in reason


def test_a_checkpoint_that_was_never_finished_or_holds_more_is_not_used(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 7)
    (folder / "left-over").touch()
    assert "left-over" in str(why_unusable(folder))
    (folder / "left-over").unlink()
    (folder / MANIFEST_FILE).write_text("{")
    assert "damaged" in str(why_unusable(folder))
    (folder / MANIFEST_FILE).unlink()
    assert "not written to its end" in str(why_unusable(folder))


def test_the_newest_whole_one_is_taken_and_the_others_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert newest_whole_checkpoint(tmp_path) is None
    for step in (2, 9, 10):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    flip_a_bit(tmp_path / "checkpoint-10" / "scheduler.pt")
    with caplog.at_level(logging.WARNING, logger="eabf_cli"):
        assert newest_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    assert [name for name in ("checkpoint-11", "checkpoint-10", "scheduler.pt") if name not in caplog.text] == []
    remove_checkpoints_after(tmp_path, 9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-9", "checkpoint-best"]
