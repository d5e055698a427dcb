"""One call for every kind of document."""

from __future__ import annotations

import re
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from eabf_cli.core.documents.citations import find_references, set_off_heading
from eabf_cli.core.documents.content import HEAD_BYTES, STDIN_NAME, decode_html, decode_text, describe_zip, find_kind
from eabf_cli.core.documents.document import Document, DocumentError, DocumentTooLongError, NoTextError
from eabf_cli.core.documents.paragraph import Paragraph, is_heading_text
from eabf_cli.core.errors import InvalidConfigError

# A text file of fewer bytes is read before its words are counted.
_BYTES_WITHOUT_ESTIMATE = 2**25
_BYTES_PER_WORD = 20
# Vertical tabs and form feeds part words as spaces do.
_CONTROL = {
    code: " " if chr(code).isspace() else None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"
}
_BLANK_LINES = re.compile(r"\n[ \t]*\n\s*")
_WEB_ADDRESS = re.compile(r"(?:https?|ftp|file)://", re.IGNORECASE)
_MARKDOWN_HEADING = re.compile(r"#{1,6}\s+\S")
_RULED_HEADING = re.compile(r"[^\n]+\n(?:=+|-+)\s*")


def read_document(
    source: Path | str,
    *,
    pages: str | None = None,
    password: str | None = None,
    references: Literal["drop", "keep"] = "drop",
    max_words: int | None = None,
    sample_bound: Callable[[], int | None] | None = None,
) -> Document:
    """Read a document's text: PDF, HTML, Markdown or plain text, told by its bytes first and by its name next.

    Args:
        source: a file, or "-" for standard input.
        pages: which pages of a PDF, as in "3", "1-8", "1-3,7" or "5-"; all by default.
        password: opens an encrypted PDF.
        references: "drop" cuts a paper's list of references, and nothing behind it; "keep" leaves it.
        max_words: refuse a longer document. One of many pages is refused by a sample of them, if that tells of a
            quarter more, before the others are read.
        sample_bound: called for a PDF of hundreds of pages with text: how many words a sample of them may tell of, less
            a quarter; None for any number.

    Raises:
        DocumentError: the file is missing, damaged, locked, of another kind, or text in another encoding than UTF-8.
        NoTextError: there is no text in it: it is empty, or a scan without a text layer.
        DocumentTooLongError: it has more than `max_words` words.
        InvalidConfigError: a page does not exist, or pages are asked for of a document that has none.
    """
    name = STDIN_NAME if str(source) == "-" else str(source)
    content = _read_standard_input() if str(source) == "-" else _open_file(name)
    head = content[:HEAD_BYTES] if isinstance(content, bytes) else _read_head(content)
    suffix = content.suffix.lower() if isinstance(content, Path) else ""
    if head.startswith(b"PK\x03\x04") and (kind := describe_zip(_read_all(content))):
        raise DocumentError(f"{name} is {kind}, whatever its name says: save it as PDF or text first")
    kind = find_kind(head, suffix, name)
    if kind == "pdf":
        document = _read_pdf(
            content,
            name,
            references,
            pages=pages,
            password=password,
            max_words=max_words,
            sample_bound=sample_bound,
        )
    elif pages is not None:
        raise InvalidConfigError(f"--pages {pages}: {name} has no pages, only PDF files have")
    else:
        document = _read_text(content, name, kind, references, max_words)
    if not document.text:
        raise NoTextError(f"{name} is empty: no text in it")
    if max_words is not None and document.num_words > max_words:
        raise DocumentTooLongError(
            name, num_pages=document.num_pages, num_words=document.num_words, max_words=max_words, is_estimate=False
        )
    return document


def _read_pdf(content: Path | bytes, name: str, references: str, **options: Any) -> Document:
    from eabf_cli.core.documents.hyphens import Hyphenation
    from eabf_cli.core.documents.pdf import read_pdf

    pdf = read_pdf(content, name, **options)
    hyphenation = Hyphenation(line for paragraph in pdf.paragraphs for line in paragraph.lines)
    for paragraph in pdf.paragraphs:
        paragraph.lines = [hyphenation.join(paragraph.lines)]
    paragraphs, num_cut = _without_references(pdf.paragraphs, references)
    return Document(
        _joined(paragraphs),
        pdf.num_pages,
        "pdf",
        pdf.warnings,
        pdf.title,
        num_pages_in_file=pdf.num_pages_in_file,
        num_reference_words=num_cut,
    )


def _read_text(content: Path | bytes, name: str, kind: str, references: str, max_words: int | None) -> Document:
    if isinstance(content, Path) and max_words is not None:
        num_bytes = content.stat().st_size
        # No language has so few words in so many bytes.
        num_words = num_bytes // _BYTES_PER_WORD
        if num_bytes > _BYTES_WITHOUT_ESTIMATE and num_words > max_words:
            raise DocumentTooLongError(name, num_pages=None, num_words=num_words, max_words=max_words, is_estimate=True)
    data = _read_all(content)
    title = None
    if kind == "html":
        from eabf_cli.core.documents.html import read_html

        paragraphs, title = read_html(decode_html(data, name))
    else:
        text = decode_text(data, name).replace("\r\n", "\n").replace("\r", "\n").translate(_CONTROL)
        paragraphs = _plain_paragraphs(text, kind)
        if references == "drop":
            # The heading of a list need not be a paragraph of its own; without a list nothing is changed.
            set_off = _plain_paragraphs(set_off_heading(text), kind)
            paragraphs = set_off if find_references(set_off) else paragraphs
    paragraphs, num_cut = _without_references(paragraphs, references)
    return Document(_joined(paragraphs), None, kind, title=title, num_reference_words=num_cut)


def _plain_paragraphs(text: str, kind: str) -> list[Paragraph]:
    parts = (part.rstrip() for part in _BLANK_LINES.split(text.strip("\n")))
    return [Paragraph([part], is_heading=_is_heading(part, kind)) for part in parts if part.strip()]


def _is_heading(part: str, kind: str) -> bool:
    if kind == "markdown":
        return _MARKDOWN_HEADING.match(part) is not None or _RULED_HEADING.fullmatch(part) is not None
    return is_heading_text(part)


def _without_references(paragraphs: Sequence[Paragraph], references: str) -> tuple[list[Paragraph], int]:
    """The paragraphs without the list of references, and how many words that had."""
    cut = set(find_references(paragraphs)) if references == "drop" else set()
    num_words = sum(len(paragraphs[index].text.split()) for index in cut)
    return [paragraph for index, paragraph in enumerate(paragraphs) if index not in cut], num_words


def _joined(paragraphs: Sequence[Paragraph]) -> str:
    """One text: an empty line between paragraphs, none between the rows of a table or the items of a list."""
    parts: list[str] = []
    for before, paragraph in zip([None, *paragraphs], paragraphs, strict=False):
        if before is not None:
            parts.append("\n" if before.is_row and paragraph.is_row else "\n\n")
        parts.append(paragraph.text)
    return "".join(parts).strip()


def _read_standard_input() -> bytes:
    if sys.stdin is None:
        raise DocumentError(f"{STDIN_NAME} is closed: pipe a document into it")
    try:
        return sys.stdin.buffer.read()
    except OSError as error:
        raise DocumentError(f"{STDIN_NAME} cannot be read: {error.strerror or error}") from error


def _open_file(name: str) -> Path | bytes:
    """A file that can be read several times, or all of one that cannot, such as a pipe."""
    path = Path(name)
    try:
        if not name:
            raise DocumentError("the name of a file is empty: name a document, or - for standard input")
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise DocumentError(f"{path} is a folder, a document is needed: name the files in it")
        if not stat.S_ISREG(mode):
            return path.read_bytes()
        with path.open("rb"):
            return path
    except FileNotFoundError as error:
        if _WEB_ADDRESS.match(name):
            raise DocumentError(f"{name} is an address, files are read: download it first") from error
        raise DocumentError(f"{path} does not exist: check the path") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DocumentError(f"{path} cannot be read: {reason}") from error


def _read_head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


def _read_all(content: Path | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()
