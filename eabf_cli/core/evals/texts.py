"""The texts that are measured on: files, folders, data sets, or the held-out documents of `demo-long`."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from eabf_cli.core.data.parsing import Record
from eabf_cli.core.data.records import open_records
from eabf_cli.core.demo import DEMO_DATASET
from eabf_cli.core.documents import read_document
from eabf_cli.core.errors import DataError
from eabf_cli.core.evals.settings import EvalRunConfig

TEXT_SUFFIXES = (".pdf", ".html", ".htm", ".md", ".markdown", ".txt", ".text")
"""Which files of a folder are read; a file that is named is read whatever its name."""

NAMED_DATASETS = {"pg19": ("emozilla/pg19", "test"), "proof-pile": ("emozilla/proofpile-test-tokenized", "test")}
"""The field's long texts by name: their place on the Hub, and the split."""

# So many candidates for each document that is wanted: the longest of them are measured on.
_CANDIDATES = 20


@dataclass(frozen=True, kw_only=True)
class TextSet:
    """Texts to measure on.

    Attributes:
        source: where they come from, in words.
        texts: one for each document.
        names: what to call each in a message.
        files: the files and folders that are read, which no output may replace.
        notes: what a person should know about the choice, one sentence each.
    """

    source: str
    texts: tuple[str, ...]
    names: tuple[str, ...]
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def content_hash(self) -> str:
        """SHA-256 over all texts, in hex."""
        digest = hashlib.sha256()
        for text in self.texts:
            digest.update(hashlib.sha256(text.encode()).digest())
        return digest.hexdigest()


def read_texts(config: EvalRunConfig) -> TextSet:
    """Read the texts that a configuration names, each text once.

    Of a data set with many more than are wanted, the seed draws.

    Raises:
        DataError: one is missing, empty or malformed.
        EabfError: a document that cannot be read.
    """
    if config.evaluation.documents is not None:
        texts = config.evaluation.documents
        names = tuple(f"document {number}" for number in range(1, len(texts) + 1))
        return TextSet(source="texts given", texts=texts, names=names)
    found = [(str(path), read_document(path).text) for path in _files(config)]
    records, notes = _records(config)
    found += [(record.origin, _record_text(record)) for record in records]
    found, more_notes = _without_copies(found)
    sources = [str(source) for source in (*config.text, *config.dataset)]
    local = tuple(path for path in map(Path, sources) if path.exists())
    return TextSet(
        source=", ".join(sources) or f"{DEMO_DATASET} (held out)",
        texts=tuple(text for _, text in found),
        names=tuple(name for name, _ in found),
        files=local,
        notes=(*notes, *more_notes),
    )


def _without_copies(found: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], tuple[str, ...]]:
    """Names and texts without those whose text is another's: errors are over documents that differ."""
    first: dict[str, str] = {}
    for name, text in found:
        first.setdefault(text, name)
    num_copies = len(found) - len(first)
    if not num_copies:
        return found, ()
    note = f"left out for having the same text as another: {num_copies:,} of {len(found):,} documents"
    return [(name, text) for text, name in first.items()], (note,)


def _files(config: EvalRunConfig) -> Iterator[Path]:
    for path in map(Path, config.text):
        if not path.is_dir():
            yield path
            continue
        inside = [file for file in sorted(path.rglob("*")) if file.is_file() and not _is_hidden(file, path)]
        readable = [file for file in inside if file.suffix.lower() in TEXT_SUFFIXES]
        if not readable:
            raise DataError(f"folder {path} holds no document ({', '.join(TEXT_SUFFIXES)})")
        yield from readable


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _records(config: EvalRunConfig) -> tuple[list[Record], tuple[str, ...]]:
    if config.dataset:
        readers, notes = [], []
        for name in config.dataset:
            source, split = NAMED_DATASETS.get(str(name).lower(), (name, config.dataset_split))
            opened = open_records(source, split=config.dataset_split or split)
            readers += opened.readers
            notes += opened.notes
    elif config.text:
        return [], ()
    else:
        opened = open_records(DEMO_DATASET, split="heldout")
        readers, notes = opened.readers, opened.notes
    most = _CANDIDATES * config.evaluation.num_documents
    if len(readers) > most:
        notes.append(f"{most:,} of {len(readers):,} records were drawn to choose documents from")
        readers = random.Random(config.seed).sample(readers, most)
    return [read() for read in readers], tuple(notes)


def _record_text(record: Record) -> str:
    """A document's text; of a conversation, what was said, one turn after the other."""
    if record.text is not None:
        return record.text
    return "\n\n".join(message["content"] for message in record.messages)
