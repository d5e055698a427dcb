"""Which documents are measured: read from files and data sets, cut to one length, never padded."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eabf_cli.core.data.files import Records
from eabf_cli.core.data.parsing import Record, RecordReader
from eabf_cli.core.data.records import open_records
from eabf_cli.core.data.sample_set import hash_tokens
from eabf_cli.core.data.tokenization import encode_chat
from eabf_cli.core.demo import DEMO_DATASET
from eabf_cli.core.entropy.positions import largest_position
from eabf_cli.core.entropy.settings import EntropyConfig
from eabf_cli.core.errors import DataError, InvalidConfigError

TEXT_SUFFIXES = (".txt", ".md", ".pdf")
MAX_DEFAULT_LENGTH = 32_768
"""A longer document is read only if that is asked for."""
_MIN_DEFAULT_LENGTH = 16
_CHARACTERS_PER_TOKEN = 8
# The last tokens of a cut text may differ from those of the whole text.
_CUT_MARGIN = 64


@dataclass(frozen=True, kw_only=True)
class Document:
    """The first tokens of a text.

    Attributes:
        origin: where it comes from, for messages.
        read: reads the text again.
    """

    origin: str
    input_ids: array[int]
    read: RecordReader


@dataclass(frozen=True, kw_only=True)
class DocumentSet:
    """The documents to measure, all of one length.

    Attributes:
        source: where they come from, in words.
        length: tokens of each.
        num_skipped: documents that were read and are shorter.
        data_hash: sha256 of all tokens.
        notes: what a person should know about the choice, one sentence each.
    """

    source: str
    documents: tuple[Document, ...]
    length: int
    num_skipped: int
    data_hash: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.documents)


def choose_documents(
    config: EntropyConfig,
    tokenizer: Any,
    *,
    window: int,
    target: int,
    fits: Callable[[int], bool],
) -> DocumentSet:
    """Read the documents that a config asks for, in order, until there are enough of the length.

    Text files come first, in the order given; of a data set with more documents than are wanted, the seed draws.
    Documents with the same first tokens count once.

    Args:
        window: the pre-trained window c, in tokens.
        target: the window that the model stands under.
        fits: whether documents of a length fit into memory (for the length that is chosen here).

    Raises:
        DataError: a source is missing or malformed, or no document is long enough.
        InvalidConfigError: a position beyond the length that was chosen.
    """
    source, records = _open(config)
    readers = _ordered(config, records)
    notes = [*records.notes]
    tokens: dict[int, tuple[Record, array[int]]] = {}
    length = config.length
    if length is None:
        longest = _longest_wanted(config, window, target)
        for index, reader in enumerate(readers[: config.num_documents]):
            tokens[index] = _encode(tokenizer, reader(), longest)
        length, note = default_length([len(ids) for _, ids in tokens.values()], window, longest, fits)
        last = largest_position(config.positions)
        if last is not None and last > length:
            raise InvalidConfigError(
                f"position {last:,} is beyond the length of {length:,} tokens, which is what the documents have: "
                "give smaller --positions, or longer documents with --length"
            )
        notes.append(note)
    chosen: list[Document] = []
    seen: set[bytes] = set()
    num_skipped = num_duplicates = longest_found = 0
    for index, reader in enumerate(readers):
        if len(chosen) == config.num_documents:
            break
        record, ids = tokens.pop(index) if index in tokens else _encode(tokenizer, reader(), length)
        longest_found = max(longest_found, len(ids))
        if len(ids) < length:
            num_skipped += 1
            continue
        ids = ids[:length]
        fingerprint = hash_tokens(ids)
        num_duplicates += fingerprint in seen
        if fingerprint not in seen:
            chosen.append(Document(origin=record.origin, input_ids=ids, read=reader))
        seen.add(fingerprint)
    if not chosen:
        raise DataError(
            f"no document of {source} has {length:,} tokens: the longest of {len(readers):,} has {longest_found:,}\n"
            "Give a smaller --length, or longer documents with --text or --dataset"
        )
    if num_skipped:
        notes.append(f"skipped for having fewer than {length:,} tokens: {count_documents(num_skipped)}")
    if num_duplicates:
        notes.append(f"left out for beginning with the tokens of another: {count_documents(num_duplicates)}")
    if len(chosen) < config.num_documents and not config.texts:
        notes.append(f"{count_documents(len(chosen))} found where {config.num_documents:,} are asked for")
    return DocumentSet(
        source=source,
        documents=tuple(chosen),
        length=length,
        num_skipped=num_skipped,
        data_hash=hashlib.sha256(b"".join(hash_tokens(document.input_ids) for document in chosen)).hexdigest(),
        notes=tuple(notes),
    )


def default_length(
    num_tokens: Sequence[int], window: int, longest: int, fits: Callable[[int], bool]
) -> tuple[int, str]:
    """The length where none is asked for: as far beyond the pre-trained window as the documents show it.

    `longest` is four times the pre-trained window, the target window if that is larger, and at most 32,768. It is
    halved until at least half of the documents are as long, and fit into memory.

    Args:
        num_tokens: of each document, counted up to `longest`.
        window: the pre-trained window.

    Returns:
        the length, and a sentence about it.

    Raises:
        DataError: that would come to fewer than 16 tokens.
    """
    length = longest
    while 2 * sum(count >= length for count in num_tokens) < len(num_tokens) or not fits(length):
        length //= 2
        if length < _MIN_DEFAULT_LENGTH:
            raise DataError(
                f"the documents are too short to choose a length: most have fewer than {_MIN_DEFAULT_LENGTH} tokens; "
                "give longer ones, or a --length"
            )
    if length > window:
        place = f"{length / window:g} times the pre-trained window of {window:,}"
    elif length == window:
        place = "the pre-trained window"
    else:
        place = f"inside the pre-trained window of {window:,}: longer documents would show what happens beyond it"
    return length, f"length {length:,} tokens, {place}"


def default_tokens(tokenizer: Any, text: str, num_tokens: int) -> array[int]:
    """The first tokens of a text as the tokenizer gives them by default, special tokens included.

    A text of ten million tokens is not tokenised for the first few thousand: a prefix that gives enough of them is.
    """
    for size in _prefix_sizes(len(text), num_tokens):
        ids = tokenizer(text[:size], verbose=False)["input_ids"]
        if size == len(text) or len(ids) - _CUT_MARGIN >= num_tokens:
            break
    return array("q", ids[:num_tokens])


def count_documents(count: int) -> str:
    """A number of documents, in words."""
    return f"{count:,} document{'' if count == 1 else 's'}"


def check_same_tokens(documents: DocumentSet, tokenizer: Any, name: str) -> None:
    """Refuse a second tokenizer that would read the documents otherwise.

    Raises:
        InvalidConfigError: it gives other tokens; the message names the document.
    """
    for document in documents.documents:
        _, ids = _encode(tokenizer, document.read(), documents.length)
        if ids != document.input_ids:
            raise InvalidConfigError(
                f"{name} reads {document.origin} as other tokens, so its entropy cannot be compared: "
                "--compare takes a model with the same tokenizer"
            )


def _open(config: EntropyConfig) -> tuple[str, Records]:
    records = Records()
    for path in config.texts:
        if not path.is_file():
            raise DataError(f"text file {path} not found")
        if path.suffix.lower() not in TEXT_SUFFIXES:
            raise DataError(
                f"{path}: a text file ends in {', '.join(TEXT_SUFFIXES)}; other kinds may be read with --dataset"
            )
        records.extend(open_records(path))
    sources = config.datasets
    if sources:
        records.extend(open_records(sources, split=config.dataset_split))
    if not config.texts and not sources:
        return f"{DEMO_DATASET} (held out)", open_records(DEMO_DATASET, split="heldout")
    return ", ".join(map(str, (*config.texts, *sources))), records


def _ordered(config: EntropyConfig, records: Records) -> list[RecordReader]:
    texts, others = records[: len(config.texts)], records[len(config.texts) :]
    if len(others) > config.num_documents - len(texts):
        others = random.Random(config.seed).sample(others, len(others))
    return [*texts, *others]


def _longest_wanted(config: EntropyConfig, window: int, target: int) -> int:
    longest = min(max(4 * window, target), MAX_DEFAULT_LENGTH)
    return max(longest, largest_position(config.positions) or 0)


def _encode(tokenizer: Any, record: Record, num_tokens: int) -> tuple[Record, array[int]]:
    if record.text is not None:
        return record, default_tokens(tokenizer, record.text, num_tokens)
    ids = encode_chat(tokenizer, record.messages, record.origin, max_tokens=num_tokens).input_ids
    return record, array("q", ids[:num_tokens])


def _prefix_sizes(num_characters: int, num_tokens: int) -> Iterator[int]:
    """Ever longer prefixes, in characters; the last one is the whole."""
    size = _CHARACTERS_PER_TOKEN * (num_tokens + _CUT_MARGIN)
    while size < num_characters:
        yield size
        size *= 4
    yield num_characters


def local_sources(config: EntropyConfig) -> tuple[Path, ...]:
    """The files and folders that are read, which no output may replace."""
    return tuple(path for path in map(Path, (*config.texts, *config.datasets)) if path.exists())
