"""Where documents and conversations are read from: files, folders, the bundled data, a Hub dataset.

A source is checked as a whole when it is opened (every line parses, every file is UTF-8) but only its places
are kept; a record is read again when it is drawn. A dataset of several gigabytes costs no memory, and whether
it is accepted does not depend on which of its records a seed picks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from eabf_cli.core.demo import DEMO_DATASET, demo_dataset_path
from eabf_cli.core.errors import DataError

DEMO_SPLITS = ("train", "heldout")
TEXT_SUFFIXES = (".txt", ".md")
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
}

# OWNER/NAME or NAME as the Hub spells them, so that a mistyped path is not looked up there.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Record:
    """One document, or one conversation.

    Attributes:
        origin: where it comes from, for error messages ("chats.jsonl, line 12").
        text: the document; None for a conversation.
        messages: the turns as {"role", "content"}, roles system, user or assistant; empty for a document.
    """

    origin: str
    text: str | None = None
    messages: tuple[dict[str, str], ...] = ()


RecordReader = Callable[[], Record]


def open_records(
    dataset: str | Path | Sequence[str | Path], *, split: str | None = None, revision: str | None = None
) -> list[RecordReader]:
    """The records of one or several sources, in the sources' order, as functions that read one each.

    Args:
        dataset: `demo-long`, a JSONL file, a text file (.txt, .md: one document), a folder of text files, a
            Hub dataset id, or a list of these.
        split: split of a Hub dataset (default `train`) or of `demo-long` (`train`, `heldout`).
        revision: revision of a Hub dataset.

    Raises:
        DataError: a source is missing, empty or malformed; the message names the file and the line or byte.
    """
    sources = [dataset] if isinstance(dataset, str | Path) else list(dataset)
    if not sources:
        raise DataError(f"no dataset given: name a file, a folder, a Hub dataset or {DEMO_DATASET!r}")
    return [reader for source in sources for reader in _open_source(str(source), split, revision)]


def demo_path(split: str = "train") -> Path:
    """The bundled `demo-long` file of one split.

    Raises:
        DataError: there is no such split.
    """
    if split not in DEMO_SPLITS:
        raise DataError(f"{DEMO_DATASET} has no split {split!r}; its splits: {', '.join(DEMO_SPLITS)}")
    return demo_dataset_path() / f"{split}.jsonl"


def parse_record(fields: Any, origin: str) -> Record:
    """Read {"messages"}, {"conversations"} or {"text"}; a conversation wins where both are present.

    Raises:
        DataError: none of the keys is there, or what they hold is empty or of another form.
    """
    if not isinstance(fields, Mapping):
        raise DataError(f'{origin}: expected an object like {{"text": ...}}, found {type(fields).__name__}')
    for key, role_key, content_key in (("messages", "role", "content"), ("conversations", "from", "value")):
        if fields.get(key) is not None:
            return Record(origin, messages=_parse_turns(fields[key], key, role_key, content_key, origin))
    if "text" not in fields:
        found = ", ".join(map(repr, fields)) or "none"
        raise DataError(f"{origin}: no key 'text', 'messages' or 'conversations'; keys found: {found}")
    text = fields["text"]
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{origin}: 'text' must be a string that is not empty, found {_short(text)}")
    return Record(origin, text=text)


def _open_source(source: str, split: str | None, revision: str | None) -> list[RecordReader]:
    if source == DEMO_DATASET:
        return _open_file(demo_path(split or "train"))
    path = Path(source).expanduser()
    if path.exists():
        if split is not None or revision is not None:
            raise DataError(f"{source} is local: a split or a revision can be chosen for a Hub dataset only")
        return _open_folder(path) if path.is_dir() else _open_file(path)
    if path.suffix in (".json", ".jsonl", *TEXT_SUFFIXES) or not _HUB_ID.fullmatch(source):
        raise DataError(f"dataset file {source} not found")
    return _open_hub(source, split or "train", revision)


def _open_folder(folder: Path) -> list[RecordReader]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in TEXT_SUFFIXES and path.is_file())
    if not files:
        raise DataError(f"folder {folder} holds no text ({', '.join(TEXT_SUFFIXES)}); JSONL files are named one by one")
    return [reader for path in files for reader in _open_file(path)]


def _open_file(path: Path) -> list[RecordReader]:
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return _open_jsonl(path)
    if suffix in TEXT_SUFFIXES:
        _read_text(path)
        return [partial(_read_text, path)]
    raise DataError(
        f"{path}: unknown kind of file {path.suffix!r}; known: .jsonl (a record a line), .txt and .md (a document)"
    )


def _open_jsonl(path: Path) -> list[RecordReader]:
    readers: list[RecordReader] = []
    with _open_binary(path) as file:
        start = 0
        for number, line in enumerate(file, start=1):
            if line.strip():
                _parse_line(line, path, number, start)
                readers.append(partial(_read_line, path, number, start))
            start += len(line)
    if not readers:
        raise DataError(f"{path} is empty: no record in it")
    return readers


def _read_line(path: Path, number: int, start: int) -> Record:
    with _open_binary(path) as file:
        file.seek(start)
        return _parse_line(file.readline(), path, number, start)


def _parse_line(line: bytes, path: Path, number: int, start: int) -> Record:
    origin = f"{path}, line {number}"
    try:
        fields = json.loads(_decode(line, path, start))
    except json.JSONDecodeError as error:
        raise DataError(f"{origin}: invalid JSON at column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise DataError(f"{origin}: invalid JSON: nested too deeply") from None
    return parse_record(fields, origin)


def _read_text(path: Path) -> Record:
    with _open_binary(path) as file:
        text = _decode(file.read(), path, 0).replace("\r\n", "\n")
    if not text.strip():
        raise DataError(f"{path} is empty: no text in it")
    return Record(str(path), text=text)


def _open_binary(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _decode(data: bytes, path: Path, start: int) -> str:
    try:
        # utf-8-sig: files written on Windows may begin with a byte-order mark.
        return data.decode("utf-8-sig" if start == 0 else "utf-8")
    except UnicodeDecodeError as error:
        # utf-8-sig counts from behind the mark that it takes off.
        offset = start + len(data) - len(error.object) + error.start
        byte = error.object[error.start]
        raise DataError(f"{path}: invalid UTF-8 at byte {offset} (0x{byte:02x}): save the file as UTF-8 text") from None


def _open_hub(name: str, split: str, revision: str | None) -> list[RecordReader]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split, revision=revision)
    except Exception as error:
        # The library lets through what its network stack, its cache or a bad split raise; all mean "no data".
        raise DataError(
            f"dataset {name!r} is no file here and cannot be loaded from the Hub "
            f"(split {split!r}, revision {revision or 'default'}): {_first_line(error)}"
        ) from error
    if len(rows) == 0:
        raise DataError(f"dataset {name!r}, split {split!r}, is empty")
    return [partial(_read_row, rows, name, index) for index in range(len(rows))]


def _read_row(rows: Any, name: str, index: int) -> Record:
    return parse_record(rows[index], f"{name}, row {index}")


def _parse_turns(turns: Any, key: str, role_key: str, content_key: str, origin: str) -> tuple[dict[str, str], ...]:
    if not isinstance(turns, list):
        raise DataError(f"{origin}: {key!r} must be a list of turns, found {_short(turns)}")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping) or role_key not in turn or content_key not in turn:
            raise DataError(
                f"{origin}: turn {number} of {key!r} must be an object with {role_key!r} and {content_key!r}"
                f", found {_short(turn)}"
            )
        role, content = ROLES.get(str(turn[role_key])), turn[content_key]
        if role is None:
            known = ", ".join(ROLES)
            raise DataError(f"{origin}: turn {number} has the role {turn[role_key]!r}; known: {known}")
        if not isinstance(content, str):
            raise DataError(f"{origin}: turn {number} must hold a string, found {_short(content)}")
        messages.append({"role": role, "content": content})
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise DataError(f"{origin}: no assistant turn with text, so there is nothing to train on")
    return tuple(messages)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
