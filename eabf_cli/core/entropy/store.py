"""What has been measured of each document, on disk: so that a measurement can go on, and takes no memory."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from eabf_cli.core.entropy.recorder import Recorder
from eabf_cli.core.errors import CheckpointError, OutputExistsError
from eabf_cli.core.files import disk_errors_explained, fsync, read_json, write_json
from eabf_cli.core.run_settings import in_json_form, refuse_changes

SETTINGS_FILE = "settings.json"
ROWS_FILE = "rows.safetensors"


class DocumentStore:
    """Measurements by side ("model", "compare") and document.

    A file appears whole, under its name, or not at all: a killed process costs the document that it was at.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, side: str, index: int) -> bool:
        """Whether a document's measurement is there."""
        return self._path(side, index).is_file()

    def put(self, side: str, index: int, recorder: Recorder) -> None:
        """Keep what was measured of a document, its distributions in a file of their own.

        Raises:
            CheckpointError: the disk is full.
        """
        with disk_errors_explained(self.folder):
            if recorder.rows is not None:
                _write(self.folder / ROWS_FILE, {"rows": recorder.rows[0]})
            tensors = {"entropy": recorder.entropy[0], "visible_keys": recorder.visible_keys}
            if recorder.scores is not None:
                mass = recorder.scores
                tensors |= {"sink": mass.sink, "recent": mass.recent, "by_distance": mass.by_distance}
                tensors["num_queries"] = mass.num_queries
            _write(self._path(side, index), tensors)

    def get(self, side: str, index: int) -> dict[str, Tensor]:
        """What was measured of a document: `entropy` (layers, heads, positions), `visible_keys` (layers, positions),
        and with scores `sink`, `recent` (layers, heads), `by_distance` (layers, heads, buckets), `num_queries`."""
        return load_file(self._path(side, index))

    def _path(self, side: str, index: int) -> Path:
        return self.folder / f"{side}-{index:06}.safetensors"


@contextmanager
def open_store(output: Path | None, settings: dict[str, Any], *, resume: bool) -> Iterator[DocumentStore]:
    """The store of a measurement: beside its output folder until it is done, or a temporary one without an output.

    It stays after a failure, for `resume`, if a document was finished; an interrupt says so.

    Args:
        settings: what decides the numbers; a resumed measurement has to have the same.

    Raises:
        InvalidConfigError: it was started with other settings.
        CheckpointError: the place cannot be written.
    """
    if output is None:
        with tempfile.TemporaryDirectory(prefix="eabf-entropy-") as temporary:
            yield DocumentStore(Path(temporary))
        return
    folder = partial_folder(output)
    new_parents = [parent for parent in folder.parents if not parent.exists()]
    if resume:
        _check_settings(folder, settings)
    else:
        with disk_errors_explained(output):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_json(folder / SETTINGS_FILE, settings)
    try:
        yield DocumentStore(folder)
    except BaseException as error:
        num_measured = len(list(folder.glob("*-*.safetensors")))
        if num_measured and isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"{num_measured} measurements are kept; go on with --resume -o {output}") from error
        if not num_measured:
            shutil.rmtree(folder, ignore_errors=True)
            for parent in new_parents:
                if not any(parent.iterdir()):
                    parent.rmdir()
        raise
    shutil.rmtree(folder)


def partial_folder(output: Path) -> Path:
    """Where the measurements of an unfinished run lie."""
    return output.parent / f".{output.name}.eabf-entropy"


def check_resumable(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse to resume what was not begun, and to begin anew what could be resumed.

    Raises:
        CheckpointError, OutputExistsError: so.
    """
    is_begun = (partial_folder(output) / SETTINGS_FILE).is_file()
    if resume and not is_begun:
        raise CheckpointError(f"{output} has no unfinished measurement: leave --resume out to start one there")
    if is_begun and not resume and not overwrite:
        raise OutputExistsError(
            f"the measurement for {output} is not finished: go on with --resume, or start anew with --overwrite"
        )


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    before, after = (
        {name: str(value) for name, value in values.items()}
        for values in (read_json(folder / SETTINGS_FILE), in_json_form(settings))
    )
    refuse_changes(before, after, name="the measurement", way_out="with --overwrite")


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    fsync(partial)
    os.replace(partial, path)
    fsync(path.parent)
