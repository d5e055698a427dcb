"""Writing a folder whole or not at all."""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from eabf_cli.core.errors import CheckpointError, EabfError, OutputExistsError

# An index of the largest models has a few MB.
_LARGEST_JSON_BYTES = 256 * 2**20
_MARKERS = ("eabf_run.json", "config.json", "eabf_settings.json")


def check_target(target: Path, *, overwrite: bool, sources: tuple[Path, ...] = ()) -> None:
    """Refuse a target folder that must not be written, before any work is done.

    Raises:
        OutputExistsError: it is a file, or a folder with something in it and `overwrite` is off, or a
            folder that holds a source or does not look like one of our outputs.
    """
    if target.is_file():
        raise OutputExistsError(f"output {target} is a file, a folder is needed: choose another with -o")
    resolved = target.resolve()
    for source in sources:
        if resolved == source.resolve() or resolved in source.resolve().parents:
            raise OutputExistsError(f"output {target} holds the source {source}: choose another folder with -o")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise OutputExistsError(f"output folder {target} exists and is not empty: choose another, or give --overwrite")
    if not any((target / marker).is_file() for marker in _MARKERS):
        raise OutputExistsError(
            f"output folder {target} does not look like a checkpoint or a run (no {', no '.join(_MARKERS)}): "
            "it will not be replaced, choose another"
        )


@contextmanager
def whole_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling that becomes `target` when the block ends well, and vanishes otherwise.

    Raises:
        CheckpointError: the disk is full or the place cannot be written.
        OutputExistsError: see `check_target`.
    """
    check_target(target, overwrite=overwrite)
    partial = _sibling(target, "partial", os.getpid())
    new_parents = [parent for parent in target.parents if not parent.exists()]
    try:
        with disk_errors_explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(target, "partial")
            partial.mkdir()
            yield partial
            for path in [*partial.rglob("*"), partial]:
                fsync(path)
            _move_into_place(partial, target)
            _remove_abandoned(target, "replaced")
            fsync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in new_parents:
            # Only those in which nothing came to lie go.
            with suppress(OSError):
                parent.rmdir()


@contextmanager
def disk_errors_explained(target: Path, *, way_out: str = "choose another -o") -> Iterator[None]:
    """Turn the operating system's refusal to write into an error that names the place and the way out.

    Args:
        way_out: from a full disk.

    Raises:
        CheckpointError: the disk is full or the place cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise _explained(error, target, way_out) from error
    except (SafetensorError, RuntimeError) as error:
        refusal = _refusal_behind(error, target)
        if refusal is None:
            raise
        raise _explained(refusal, target, way_out) from error


def _sibling(target: Path, kind: str, pid: int | str) -> Path:
    return target.parent / f".{target.name}.eabf-{kind}-{pid}"


def _move_into_place(partial: Path, target: Path) -> None:
    if not target.exists():
        os.replace(partial, target)
        return
    replaced = _sibling(target, "replaced", os.getpid())
    os.replace(target, replaced)
    try:
        os.replace(partial, target)
    except BaseException:
        os.replace(replaced, target)
        raise
    shutil.rmtree(replaced)


def _explained(error: OSError, target: Path, way_out: str) -> EabfError:
    if error.errno == errno.ENOSPC:
        free = shutil.disk_usage(_existing_parent(target)).free
        return CheckpointError(f"no space left for {target} ({free / 2**30:.2f} GiB free): {way_out}")
    return CheckpointError(f"cannot write {target}: {error.strerror or error}")


def _refusal_behind(error: Exception, target: Path) -> OSError | None:
    """The operating system's refusal that a library tells in an error of its own; None if that is of something else."""
    told = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
    if told is not None:
        return OSError(int(told[1]), os.strerror(int(told[1])))
    if not re.search(r"inline_container|PytorchStreamWriter", str(error)):
        return None
    # torch.save does not tell which one it was. It writes pieces of up to some MiB.
    is_full = shutil.disk_usage(_existing_parent(target)).free < 64 * 2**20
    return OSError(errno.ENOSPC, "") if is_full else OSError(str(error))


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.resolve().parents if parent.exists())


def check_space(target: Path, num_bytes: int) -> None:
    """Refuse early what the disk cannot hold.

    Raises:
        CheckpointError: fewer than `num_bytes` bytes are free where the target will lie.
    """
    free = shutil.disk_usage(_existing_parent(target)).free
    if free < num_bytes:
        raise CheckpointError(
            f"no space for {target}: {num_bytes / 2**30:.2f} GiB needed, {free / 2**30:.2f} GiB free; choose another -o"
        )


def _remove_abandoned(target: Path, kind: str) -> None:
    """Delete what killed runs left beside the target; a folder of a process that lives is left alone."""
    for left in target.parent.glob(_sibling(Path(glob.escape(str(target))), kind, "*").name):
        pid = left.name.rpartition("-")[2]
        if pid.isdigit() and not _is_alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def use_default_mode(folder: Path) -> None:
    """Give a folder's weight files the mode that the umask gives new files: safetensors makes them for their owner."""
    # The umask itself can be read only by changing it, for all threads.
    new = folder / ".eabf-mode"
    new.touch()
    try:
        for path in folder.glob("*.safetensors"):
            shutil.copymode(new, path)
    finally:
        new.unlink()


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing, unreadable, too large or too deep, or holds something else.
    """
    try:
        if path.stat().st_size > _LARGEST_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than {_LARGEST_JSON_BYTES / 2**20:.0f} MiB: it will not be read")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: is {path.parent} a model folder?") from error
    # ValueError: bad UTF-8, bad JSON, an integer of thousands of digits.
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, an object is expected")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object atomically, keys in the order given."""
    _write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        CheckpointError: the disk is full or the place cannot be written.
    """
    with disk_errors_explained(path):
        _write_whole(path, text)


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        fsync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
