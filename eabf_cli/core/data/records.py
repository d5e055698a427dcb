"""Where documents and conversations are read from: files, folders, the bundled data, a Hub dataset.

A source is checked as a whole when it is opened (every record parses, every file is UTF-8) but only its places
are kept; a record is read again when it is drawn. A dataset of several gigabytes costs no memory, and whether
it is accepted does not depend on which of its records a seed picks. A record that is well formed but has
nothing to train on is left out and told in a note; a source with no other is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eabf_cli.core.data.files import (
    FILE_SUFFIXES,
    Records,
    first_line,
    open_file,
    open_folder,
    open_rows,
    without_log_lines,
)
from eabf_cli.core.demo import DEMO_DATASET, demo_dataset_path
from eabf_cli.core.errors import DataError

DEMO_SPLITS = ("train", "heldout")

# OWNER/NAME or NAME as the Hub spells them, so that a mistyped path is not looked up there.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def open_records(
    dataset: str | Path | Sequence[str | Path], *, split: str | None = None, revision: str | None = None
) -> Records:
    """The records of one or several sources, in the sources' order, as functions that read one each.

    Args:
        dataset: `demo-long`, a file (.jsonl, .json with a list or a record a line, .parquet; .txt, .md and .pdf
            are one document each), a folder with any of these, a folder as the Hub serves a dataset (with its
            README.md), a Hub dataset id, or a list of these.
        split: split of a Hub dataset or of a folder like one (default `train`), or of `demo-long` (`train`,
            `heldout`).
        revision: revision of a Hub dataset.

    Raises:
        DataError: a source is missing, empty or malformed; the message names the file and the line, record, row
            or byte.
    """
    sources = [dataset] if isinstance(dataset, str | Path) else list(dataset)
    if not sources:
        raise DataError(f"no dataset given: name a file, a folder, a Hub dataset or {DEMO_DATASET!r}")
    records = Records()
    for source in sources:
        records.extend(_open_source(str(source), split, revision))
    return records


def demo_path(split: str = "train") -> Path:
    """The bundled `demo-long` file of one split.

    Raises:
        DataError: there is no such split.
    """
    if split not in DEMO_SPLITS:
        raise DataError(f"{DEMO_DATASET} has no split {split!r}; its splits: {', '.join(DEMO_SPLITS)}")
    return demo_dataset_path() / f"{split}.jsonl"


def _open_source(source: str, split: str | None, revision: str | None) -> Records:
    if source == DEMO_DATASET:
        return open_file(demo_path(split or "train"))
    if not source.strip():
        raise DataError("the dataset has an empty name: give a file, a folder or a Hub id")
    path = Path(source).expanduser()
    if not path.exists():
        if path.suffix.lower() in FILE_SUFFIXES or not _HUB_ID.fullmatch(source):
            raise DataError(f"dataset file {source} not found")
        return _open_dataset(source, split or "train", revision)
    if revision is not None:
        raise DataError(f"{source} is local: a revision can be chosen for a Hub dataset only")
    if path.is_dir() and (split is not None or _has_dataset_card(path)):
        return _open_dataset(str(path), split or "train", None)
    if split is not None:
        raise DataError(f"{source} is a file: a split can be chosen for a Hub dataset, or a folder like one, only")
    return open_folder(path) if path.is_dir() else open_file(path)


def _has_dataset_card(folder: Path) -> bool:
    """Whether a folder is a dataset as the Hub serves it: its README.md begins with YAML, and is no document."""
    card = folder / "README.md"
    if not card.is_file():
        return False
    with card.open("rb") as file:
        return file.read(4).rstrip() == b"---"


def _open_dataset(name: str, split: str, revision: str | None) -> Records:
    import datasets

    try:
        with without_log_lines():
            rows: Any = datasets.load_dataset(name, split=split, revision=revision)
    except Exception as error:
        # The library lets through what its network stack, its cache or a bad split raise; all mean "no data".
        is_here = Path(name).is_dir()
        place = "cannot be loaded" if is_here else "is no file here and cannot be loaded from the Hub"
        way_out = (
            "" if is_here else "\nCheck the spelling and the connection (HF_HUB_OFFLINE, HF_ENDPOINT), or give a file"
        )
        raise DataError(
            f"dataset {name!r} {place} (split {split!r}, revision {revision or 'default'}): "
            f"{first_line(error)}{way_out}"
        ) from error
    records = open_rows(rows, f"dataset {name!r}, split {split!r}")
    records.contents.append(f"dataset {rows._fingerprint}")
    return records
