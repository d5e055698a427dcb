"""Folders are written whole or not at all, and what is there already is not lost."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file

from eabf_cli.core import files
from eabf_cli.core.errors import CheckpointError, OutputExistsError
from eabf_cli.core.files import (
    check_space,
    check_target,
    disk_errors_explained,
    read_json,
    use_default_mode,
    whole_folder,
    write_json,
)

DEAD_PID = 2**22 + 1  # above the largest that Linux and macOS give out


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make_checkpoint(folder: Path, text: str = "{}") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(text)
    return folder


def write_and_raise(target: Path, error: type[BaseException], *, overwrite: bool = False) -> None:
    with whole_folder(target, overwrite=overwrite) as partial:
        (partial / "config.json").write_text("new")
        raise error


def test_the_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with whole_folder(target) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "file").write_text("text")
        assert not target.exists()
        assert partial.parent == tmp_path
    assert (target / "sub" / "file").read_text() == "text"
    assert names_in(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, CheckpointError, OSError])
def test_nothing_is_left_when_the_block_fails(error: type[BaseException], tmp_path: Path) -> None:
    expected = CheckpointError if error is OSError else error
    with pytest.raises(expected):
        write_and_raise(tmp_path / "a" / "b" / "out", error)
    assert names_in(tmp_path) == []


def test_parents_that_were_there_stay_when_the_block_fails(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "a" / "b" / "out"):
        raise RuntimeError
    assert names_in(tmp_path) == ["a"]
    assert names_in(tmp_path / "a") == []


def test_overwriting_replaces_the_folder_as_a_whole(tmp_path: Path) -> None:
    target = make_checkpoint(tmp_path / "out", "old")
    (target / "stale").write_text("stale")
    with whole_folder(target, overwrite=True) as partial:
        assert (target / "config.json").read_text() == "old"
        (partial / "config.json").write_text("new")
    assert names_in(target) == ["config.json"]
    assert (target / "config.json").read_text() == "new"
    assert names_in(tmp_path) == ["out"]


def test_a_failed_overwrite_keeps_the_old_folder(tmp_path: Path) -> None:
    target = make_checkpoint(tmp_path / "out", "old")
    with pytest.raises(RuntimeError):
        write_and_raise(target, RuntimeError, overwrite=True)
    assert (target / "config.json").read_text() == "old"
    assert names_in(tmp_path) == ["out"]


def test_a_failed_rename_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = make_checkpoint(tmp_path / "out", "old")
    replace = os.replace

    def failing(source: Any, destination: Any) -> None:
        if destination == target and "partial" in str(source):
            raise OSError(errno.EIO, "Input/output error")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(CheckpointError, match="Input/output error"), whole_folder(target, overwrite=True):
        pass
    assert (target / "config.json").read_text() == "old"
    assert names_in(tmp_path) == ["out"]


def test_what_a_killed_run_left_is_removed_and_what_a_running_one_writes_is_not(tmp_path: Path) -> None:
    for kind in ("partial", "replaced"):
        make_checkpoint(tmp_path / f".out.eabf-{kind}-{DEAD_PID}")
    alive = make_checkpoint(tmp_path / f".out.eabf-partial-{os.getppid()}")
    other = make_checkpoint(tmp_path / f".other.eabf-partial-{DEAD_PID}")
    with whole_folder(tmp_path / "out"):
        pass
    assert names_in(tmp_path) == sorted([alive.name, other.name, "out"])


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_empty_folder_is_a_target(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with whole_folder(tmp_path / "out", overwrite=overwrite) as partial:
        (partial / "file").touch()
    assert names_in(tmp_path / "out") == ["file"]


def test_a_target_that_exists_is_refused_with_the_way_out(tmp_path: Path) -> None:
    target = make_checkpoint(tmp_path / "out")
    with pytest.raises(OutputExistsError, match=r"out exists.*--overwrite"):
        check_target(target, overwrite=False)
    check_target(target, overwrite=True)


def test_a_file_and_a_folder_of_something_else_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(OutputExistsError, match="is a file"):
        check_target(tmp_path / "file", overwrite=True)
    with pytest.raises(OutputExistsError, match="does not look like"):
        check_target(tmp_path / "photos", overwrite=True)


def test_a_source_is_never_replaced_however_it_is_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_checkpoint(tmp_path / "models" / "source")
    (tmp_path / "link").symlink_to(source)
    monkeypatch.chdir(tmp_path)
    for target in (source, Path("models/source"), Path("models/../models/source"), tmp_path / "link", Path("models")):
        with pytest.raises(OutputExistsError, match="holds the source"):
            check_target(target, overwrite=True, sources=(source,))
    check_target(tmp_path / "models" / "source-2", overwrite=True, sources=(source,))


def test_a_parent_that_is_a_file_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(CheckpointError, match="cannot write"), whole_folder(tmp_path / "file" / "out"):
        pass
    assert (tmp_path / "file").read_text() == "text"


def test_a_full_disk_is_named_as_such(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no space left for .*out.*GiB free.*-o"), whole_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names_in(tmp_path) == []


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may become larger than 64 KiB: what the operating system refuses is then refused for real."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files")
def test_a_refusal_that_a_library_tells_in_its_own_error_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"weight": torch.zeros(2**16)}
    with (
        pytest.raises(CheckpointError, match=r"cannot write .*out: File too large"),
        disk_errors_explained(tmp_path / "out"),
    ):
        save_file(weights, tmp_path / "weights")
    with pytest.raises(CheckpointError, match=r"cannot write .*out: "), disk_errors_explained(tmp_path / "out"):
        torch.save(weights, tmp_path / "moments")
    monkeypatch.setattr(files.shutil, "disk_usage", Mock(return_value=shutil.disk_usage(tmp_path)._replace(free=0)))
    with (
        pytest.raises(CheckpointError, match=r"no space left for .*out .*: make room"),
        disk_errors_explained(tmp_path / "out", way_out="make room"),
    ):
        torch.save(weights, tmp_path / "moments")


def test_an_error_of_something_else_stays_itself(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), disk_errors_explained(tmp_path / "out"):
        raise RuntimeError("shapes differ")


def test_too_little_space_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=3 * 2**30)
    monkeypatch.setattr(files.shutil, "disk_usage", Mock(return_value=usage))
    check_space(tmp_path / "new" / "out", 3 * 2**30)
    with pytest.raises(CheckpointError, match=r"3\.50 GiB needed, 3\.00 GiB free"):
        check_space(tmp_path / "new" / "out", 7 * 2**29)


def test_json_is_written_atomically_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"b": "\N{GREEK SMALL LETTER THETA}", "a": [1]})
    assert list(json.loads(path.read_text(encoding="utf-8")).items()) == [("b", "θ"), ("a", [1])]

    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"new": 1})
    assert read_json(path) == {"b": "θ", "a": [1]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, ["value.json is missing", "model folder"]),
        (b"", ["not readable JSON"]),
        (b'{"a": 1', ["not readable JSON"]),
        (b"\xff\xfe", ["not readable JSON"]),
        (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", ["not readable JSON"]),
        (b'{"a": ' + b"9" * 5_000 + b"}", ["not readable JSON"]),
        (b"[1]", ["a JSON list", "an object is expected"]),
        (b"null", ["NoneType", "an object is expected"]),
    ],
)
def test_json_of_another_form_is_refused_by_name(content: bytes | None, said: list[str], tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        read_json(path)
    assert [word for word in said if word not in str(error.value)] == []
    assert str(path) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_json_larger_than_any_index_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    path.touch()
    # Sparse: as long as it says, and no block of it is written.
    os.truncate(path, 2**40)
    with pytest.raises(CheckpointError, match="larger than 256 MiB"):
        read_json(path)


def test_a_folder_where_json_is_expected_is_refused(tmp_path: Path) -> None:
    (tmp_path / "value.json").mkdir()
    with pytest.raises(CheckpointError, match="not readable JSON"):
        read_json(tmp_path / "value.json")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_weight_files_get_the_mode_of_new_files(tmp_path: Path, umask: int, mode: int) -> None:
    weights = tmp_path / "model.safetensors"
    weights.touch(0o600)
    before = os.umask(umask)
    try:
        use_default_mode(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(weights.stat().st_mode) == mode
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
