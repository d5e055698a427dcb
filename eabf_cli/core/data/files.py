"""Files on disk as records: JSON lines, JSON lists, Parquet, text and PDF, one by one or in a folder."""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any, overload

from eabf_cli.core.data.parsing import RECORD_KEYS, EmptyRecordError, Record, RecordReader, describe_keys, parse_record
from eabf_cli.core.data.pdf import check_pdf, read_pdf
from eabf_cli.core.errors import DataError

_WINDOW_BYTES = 2**20
_JSON_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass
class Records(Sequence[RecordReader]):
    """The records of one or several sources, as functions that read one each.

    Attributes:
        readers: one function a record, in the sources' order.
        notes: what a person should know about how the sources were read, one sentence each.
        contents: where the bytes are that the records come from: files, or the fingerprints of datasets.
    """

    readers: list[RecordReader] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    contents: list[Path | str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.readers)

    @overload
    def __getitem__(self, index: int) -> RecordReader: ...
    @overload
    def __getitem__(self, index: slice) -> list[RecordReader]: ...
    def __getitem__(self, index: int | slice) -> RecordReader | list[RecordReader]:
        return self.readers[index]

    def extend(self, other: Records) -> None:
        """Put another source's records behind these."""
        self.readers += other.readers
        self.notes += other.notes
        self.contents += other.contents

    def content_hash(self) -> str:
        """A hash of everything the records are read from.

        Files count by their bytes and kind, not by name or time: opening reads them whole anyway, a copy or
        a `touch` changes nothing, and an edit that keeps size and time is not missed.
        """
        digest = hashlib.sha256()
        for content in self.contents:
            if isinstance(content, Path):
                with open_binary(content) as file:
                    digest.update(
                        f"{content.suffix.lower()} {hashlib.file_digest(file, 'sha256').hexdigest()}".encode()
                    )
            else:
                digest.update(content.encode())
        return digest.hexdigest()


def open_file(path: Path) -> Records:
    """The records of one file.

    Raises:
        DataError: an unknown kind of file, or one that is empty or malformed anywhere.
    """
    opener = _OPENERS.get(path.suffix.lower())
    if opener is None:
        raise DataError(f"{path}: unknown kind of file {path.suffix!r}; known: {', '.join(_OPENERS)}")
    records = opener(path)
    records.contents.append(path)
    return records


def open_folder(folder: Path) -> Records:
    """The records of all files of a known kind in a folder and below it, sorted by path.

    Hidden files and folders are passed over; what else is not read is told in `notes`.

    Raises:
        DataError: no file of a known kind has a record in it, or one is malformed.
    """
    records = Records()
    ignored: Counter[str] = Counter()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.suffix.lower() not in _OPENERS:
            ignored[path.suffix or path.name] += 1
            continue
        try:
            records.extend(open_file(path))
        except EmptyRecordError as error:
            records.notes.append(f"left out: {error}")
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(ignored.items()))
    if not records:
        found = f"; other files there: {kinds}" if kinds else ""
        empty = f" ({records.notes[0]})" if records.notes else ""
        raise DataError(f"folder {folder} holds no data ({', '.join(_OPENERS)}){empty}{found}")
    if kinds:
        records.notes.append(f"files in {folder} that are no data were ignored: {kinds}")
    return records


def open_rows(rows: Any, name: str) -> Records:
    """The records of a `datasets.Dataset`, every row checked.

    Raises:
        DataError: there is no row, no column of a known name, or a malformed row.
    """
    if len(rows) == 0:
        raise DataError(f"{name} is empty: no row in it")
    columns = [key for key in RECORD_KEYS if key in rows.column_names]
    if set(columns) < {"prompt", "completion"}:
        raise DataError(f"{name}: {describe_keys(rows.column_names)}")
    chosen = rows.select_columns(columns)
    return _checked((partial(_read_row, chosen, name, index) for index in range(len(chosen))), name)


def _checked(readers: Iterable[RecordReader], name: str) -> Records:
    """Read every record once; those with nothing to train on are left out, if others remain."""
    records = Records()
    empty: list[EmptyRecordError] = []
    for reader in readers:
        try:
            reader()
            records.readers.append(reader)
        except EmptyRecordError as error:
            empty.append(error)
    if not records and empty:
        raise empty[0]
    if not records:
        raise EmptyRecordError(f"{name} is empty: no record in it")
    if empty:
        total = len(records) + len(empty)
        records.notes.append(f"{len(empty):,} of {total:,} records in {name} were left out, the first: {empty[0]}")
    return records


def _read_row(rows: Any, name: str, index: int) -> Record:
    return parse_record(rows[index], f"{name}, row {index}")


# --- Parquet -------------------------------------------------------------------------------------------


def _open_parquet(path: Path) -> Records:
    import datasets
    import pyarrow.parquet

    try:
        # The library has no words of its own for a file without rows.
        if path.stat().st_size == 0 or pyarrow.parquet.read_metadata(path).num_rows == 0:
            raise EmptyRecordError(f"{path} is empty: no row in it")
        with without_log_lines():
            # The library keeps the rows in a file that is mapped into memory, where one can be had by number.
            rows = datasets.load_dataset("parquet", data_files=str(path), split="train")
    except EmptyRecordError:
        raise
    except Exception as error:
        raise DataError(f"{path} cannot be read as Parquet: {first_line(error.__cause__ or error)}") from error
    return open_rows(rows, str(path))


@contextmanager
def without_log_lines() -> Iterator[None]:
    """Keep quiet what the `datasets` library logs beside raising it."""
    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def first_line(error: BaseException) -> str:
    """An error of a library in one line: its kind and the beginning of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


# --- JSON ----------------------------------------------------------------------------------------------


def _open_jsonl(path: Path) -> Records:
    return _checked(_line_readers(path), str(path))


def _line_readers(path: Path) -> Iterator[RecordReader]:
    with open_binary(path) as file:
        start = 0
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield partial(_read_line, path, number, start, len(line))
            start += len(line)


def _read_line(path: Path, number: int, start: int, num_bytes: int) -> Record:
    origin = f"{path}, line {number}"
    # Without its end, at which an error would be told as one of the next line.
    line = _read_bytes(path, start, num_bytes).rstrip(b"\r\n")
    return parse_record(_parse_json(line, path, start, origin), origin)


def _open_json(path: Path) -> Records:
    with open_binary(path) as file:
        window = _JsonWindow(file, path)
        if window.peek() == "[":
            return _checked(_list_readers(window, path), str(path))
    # The name is also given to files with a record a line.
    return _open_jsonl(path)


def _list_readers(window: _JsonWindow, path: Path) -> Iterator[RecordReader]:
    window.take("[")
    number = 0
    while window.peek() != "]":
        if number:
            window.take(",")
        number += 1
        window.peek()
        start = window.position
        num_bytes = window.take_value(f"{path}, record {number}")
        yield partial(_read_element, path, number, start, num_bytes)
    window.take("]")
    if window.peek():
        raise DataError(f"{path}: invalid JSON: text after the list, at byte {window.position}")


def _read_element(path: Path, number: int, start: int, num_bytes: int) -> Record:
    origin = f"{path}, record {number}"
    return parse_record(_parse_json(_read_bytes(path, start, num_bytes), path, start, origin), origin)


class _JsonWindow:
    """A JSON file read value by value, with only a part of it in memory.

    Attributes:
        position: bytes before the next character.
    """

    def __init__(self, file: BufferedReader, path: Path) -> None:
        self._file = file
        self._path = path
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._next = 0
        self._at_end = False
        self.position = 0
        if self.peek() == "\ufeff":
            self._go_to(1)

    def peek(self) -> str:
        """Go to the next character that is no white space; returns it, "" at the end."""
        while True:
            space = _JSON_SPACE.match(self._text, self._next)
            self._go_to(space.end() if space else self._next)
            if self._next < len(self._text) or self._at_end:
                return self._text[self._next : self._next + 1]
            self._read()

    def take(self, character: str) -> None:
        """Go past a character that has to be next."""
        if self.peek() != character:
            raise DataError(f"{self._path}: invalid JSON at byte {self.position}: expected {character!r}")
        self._go_to(self._next + 1)

    def take_value(self, origin: str) -> int:
        """Go past a value; returns its number of bytes."""
        while True:
            try:
                _, end = json.JSONDecoder().raw_decode(self._text, self._next)
            except json.JSONDecodeError as error:
                if self._at_end:
                    raise DataError(f"{origin}: invalid JSON: {error.msg}") from None
            except RecursionError:
                raise DataError(f"{origin}: invalid JSON: nested too deeply") from None
            else:
                # Half a number would be taken for one; it is no record in either case.
                return self._go_to(end)
            self._read()

    def _go_to(self, index: int) -> int:
        num_bytes = len(self._text[self._next : index].encode())
        self._next = index
        self.position += num_bytes
        return num_bytes

    def _read(self) -> None:
        """Drop what is done with, and double what is left."""
        self._text = self._text[self._next :]
        self._next = 0
        data = self._file.read(max(_WINDOW_BYTES, len(self._text)))
        self._at_end = not data
        try:
            self._text += self._decoder.decode(data, final=self._at_end)
        except UnicodeDecodeError as error:
            raise _invalid_utf8(self._path, self._file.tell() - len(error.object) + error.start, error) from None


def _parse_json(data: bytes, path: Path, start: int, origin: str) -> Any:
    try:
        return json.loads(_decode(data, path, start))
    except json.JSONDecodeError as error:
        raise DataError(f"{origin}: invalid JSON at column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise DataError(f"{origin}: invalid JSON: nested too deeply") from None


# --- Documents -----------------------------------------------------------------------------------------


def _open_text(path: Path) -> Records:
    return _checked([partial(_read_text, path)], str(path))


def _read_text(path: Path) -> Record:
    with open_binary(path) as file:
        text = _decode(file.read(), path, 0).replace("\r\n", "\n")
    if not text.strip():
        raise EmptyRecordError(f"{path} is empty: no text in it")
    return Record(str(path), text=text)


def _open_pdf(path: Path) -> Records:
    check_pdf(path)
    return Records([partial(_read_pdf, path)])


def _read_pdf(path: Path) -> Record:
    return Record(str(path), text=read_pdf(path))


# --- Bytes ---------------------------------------------------------------------------------------------


def open_binary(path: Path) -> BufferedReader:
    """A file to be read.

    Raises:
        DataError: the system refuses it.
    """
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _read_bytes(path: Path, start: int, num_bytes: int) -> bytes:
    with open_binary(path) as file:
        file.seek(start)
        return file.read(num_bytes)


def _decode(data: bytes, path: Path, start: int) -> str:
    try:
        # utf-8-sig: files written on Windows may begin with a byte-order mark.
        return data.decode("utf-8-sig" if start == 0 else "utf-8")
    except UnicodeDecodeError as error:
        # utf-8-sig counts from behind the mark that it takes off.
        raise _invalid_utf8(path, start + len(data) - len(error.object) + error.start, error) from None


def _invalid_utf8(path: Path, offset: int, error: UnicodeDecodeError) -> DataError:
    byte = error.object[error.start]
    return DataError(f"{path}: invalid UTF-8 at byte {offset} (0x{byte:02x}): save the file as UTF-8 text")


_OPENERS: dict[str, Callable[[Path], Records]] = {
    ".jsonl": _open_jsonl,
    ".json": _open_json,
    ".parquet": _open_parquet,
    ".txt": _open_text,
    ".md": _open_text,
    ".pdf": _open_pdf,
}
FILE_SUFFIXES = tuple(_OPENERS)
