"""Which checkpoints of a run are whole.

The Trainer writes a checkpoint file by file and takes what it finds when it goes on: without the optimizer's, the
scheduler's or the random generators' file it trains other weights and says nothing. So a manifest with the size and
the SHA-256 of every file is written last, and a checkpoint whose files differ from it, or that has none, is not used.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from eabf_cli.core.errors import CheckpointError
from eabf_cli.core.files import fsync, read_json, write_json

logger = logging.getLogger(__name__)

MANIFEST_FILE = "eabf_manifest.json"


@dataclass(frozen=True, kw_only=True)
class Elapsed:
    """Seconds that a run had taken when a checkpoint was written, over all attempts at it.

    What an attempt did behind its last checkpoint is lost, and so is its time.

    Attributes:
        train_s: of training.
        wall_s: of everything.
    """

    train_s: float = 0.0
    wall_s: float = 0.0


def write_manifest(checkpoint: Path, elapsed: Elapsed) -> None:
    """Mark a checkpoint as whole, once all of it has reached the disk."""
    files: dict[str, Any] = {}
    for path in _files(checkpoint):
        fsync(path)
        files[path.relative_to(checkpoint).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    write_json(checkpoint / MANIFEST_FILE, {"step": step_of(checkpoint), "elapsed": asdict(elapsed), "files": files})
    fsync(checkpoint)
    fsync(checkpoint.parent)


def elapsed_at(checkpoint: Path | None) -> Elapsed:
    """What a whole checkpoint's run had taken; nothing for a start without one."""
    manifest = {} if checkpoint is None else read_json(checkpoint / MANIFEST_FILE)
    return Elapsed(**manifest.get("elapsed", {}))


def why_unusable(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None if it is as it was written."""
    if not (checkpoint / MANIFEST_FILE).is_file():
        return "it was not written to its end"
    try:
        listed = read_json(checkpoint / MANIFEST_FILE)["files"]
        elapsed_at(checkpoint)
    except (CheckpointError, KeyError, TypeError):
        return f"{MANIFEST_FILE} is damaged"
    found = {path.relative_to(checkpoint).as_posix(): path for path in _files(checkpoint)}
    for name, expected in listed.items():
        if name not in found:
            return f"{name} is missing"
        if found[name].stat().st_size != expected["bytes"] or _sha256(found[name]) != expected["sha256"]:
            return f"{name} has changed"
    extra = sorted(set(found) - set(listed))
    return f"{extra[0]} does not belong to it" if extra else None


def newest_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run that is whole, or None; each newer one that is not is named in a warning."""
    for checkpoint in sorted(_checkpoints(folder), key=step_of, reverse=True):
        reason = why_unusable(checkpoint)
        if reason is None:
            return checkpoint
        logger.warning("%s is not used: %s", checkpoint, reason)
    return None


def remove_checkpoints_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of later steps: a run that goes on writes them anew, into empty folders."""
    for checkpoint in _checkpoints(folder):
        if step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def _checkpoints(folder: Path) -> list[Path]:
    named = folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return [path for path in named if path.is_dir() and path.name.rpartition("-")[2].isdigit()]


def _files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
