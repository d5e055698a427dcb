"""The text of a PDF file: its text layer in reading order, without what belongs to the pages."""

from __future__ import annotations

import mmap
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eabf_cli.core.documents.document import (
    DocumentError,
    DocumentTooLongError,
    LockedDocumentError,
    NoTextError,
)
from eabf_cli.core.documents.page_ranges import parse_page_ranges
from eabf_cli.core.documents.paragraph import Paragraph

# PDFium keeps state per process and is not safe to call from two threads.
_PDFIUM_LOCK = threading.Lock()

# Of more pages than this, a sample tells whether they are too long to be read.
_PAGES_WITHOUT_SAMPLE = 50
_PAGES_WITHOUT_BOUND = 200
_SAMPLE_PAGES = 5
_BOUND_SAMPLE_PAGES = 20
# An estimate is that much off at most, or the exact number decides.
_ESTIMATE_ERROR = 1.25
_OBJECT = re.compile(rb"\d+\s+\d+\s+obj\b")
# Of fewer pages than this, some beside them are looked at for what repeats at their edges.
_PAGES_FOR_EDGES = 5
# What programs write when nobody gave a title.
_NO_TITLES = ("", "untitled", "untitled document", "document1")


@dataclass(frozen=True)
class PdfText:
    """What was read of a PDF.

    Attributes:
        paragraphs: in reading order (see `paragraph.Paragraph`), words still broken at lines' ends.
    """

    paragraphs: list[Paragraph]
    num_pages: int
    num_pages_in_file: int
    title: str | None
    warnings: tuple[str, ...]


def read_pdf(
    source: Path | bytes,
    name: str,
    *,
    pages: str | None = None,
    password: str | None = None,
    max_words: int | None = None,
    sample_bound: Callable[[], int | None] | None = None,
) -> PdfText:
    """Read some pages of a PDF, or all.

    Args:
        source: the file, or its bytes.
        name: what messages call it.
        pages: see `page_ranges.parse_page_ranges`.
        max_words: refuse many pages whose sample tells of more words.
        sample_bound: gives the same for hundreds of pages, which take long to read; a smaller number, or None.

    Raises:
        DocumentError: the file is damaged, or has no page.
        LockedDocumentError: it is encrypted.
        NoTextError: no page has a text layer, or one with more than page numbers and stamps.
        DocumentTooLongError: by an estimate.
        InvalidConfigError: there is no such page.
    """
    from eabf_cli.core.documents.layout import lay_out
    from eabf_cli.core.documents.words import read_words

    with _open(source, name, password) as document:
        num_pages = len(document)
        chosen = parse_page_ranges(pages, num_pages, name)
        if max_words is not None and len(chosen) > _PAGES_WITHOUT_SAMPLE:
            num_words = _estimate_words(document, chosen, _SAMPLE_PAGES)
            _check_length(num_words, max_words, len(chosen), name)
        if sample_bound is not None and len(chosen) > _PAGES_WITHOUT_BOUND:
            num_words = _estimate_words(document, chosen, _BOUND_SAMPLE_PAGES)
            # A scan is refused for what it is.
            if num_words and (bound := sample_bound()) is not None:
                _check_length(num_words, bound, len(chosen), name)
        read = [read_words(document, index) for index in chosen]
        if not any(page.words for page in read):
            raise NoTextError(_describe_no_text(name, len(chosen)))
        beside = [read_words(document, index) for index in _beside(chosen, num_pages)]
        title = document.get_metadata_value("Title").strip()
    paragraphs, warnings = lay_out(read, beside)
    if not paragraphs:
        raise NoTextError(_describe_no_text(name, len(chosen)))
    return PdfText(paragraphs, len(chosen), num_pages, None if title.lower() in _NO_TITLES else title, tuple(warnings))


def check_pdf(source: Path | bytes, name: str, *, password: str | None = None) -> None:
    """Refuse a PDF without text, looking no further than the first page that has some.

    Raises:
        DocumentError, NoTextError: see `read_pdf`.
    """
    from eabf_cli.core.documents.words import read_words

    with _open(source, name, password) as document:
        pages = (read_words(document, index) for index in range(len(document)))
        if not any(page.has_letters or (page.words and not page.is_picture) for page in pages):
            raise NoTextError(_describe_no_text(name, len(document)))


@contextmanager
def _open(source: Path | bytes, name: str, password: str | None) -> Iterator[Any]:
    import pypdfium2

    with _PDFIUM_LOCK:
        try:
            document = pypdfium2.PdfDocument(source, password=password)
        except pypdfium2.PdfiumError as error:
            raise _refusal(source, name, password) from error
        try:
            if not _has_end(source):
                raise DocumentError(f"{name} is cut off: the end of the PDF is missing; get the file again")
            yield document
        except pypdfium2.PdfiumError as error:
            raise DocumentError(f"{name} is damaged: a page cannot be read ({error}); get the file again") from error
        finally:
            document.close()


def _has_end(source: Path | bytes) -> bool:
    """Whether a file's last object is followed by "%%EOF"; other things may stand behind that.

    PDFium opens what is there of a file that is cut off, and one that is made for the web has such a mark at its
    beginning, too.
    """
    if isinstance(source, bytes):
        return _ends_with_mark(source)
    with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _ends_with_mark(content)


def _ends_with_mark(content: bytes | mmap.mmap) -> bool:
    mark = content.rfind(b"%%EOF")
    return mark >= 0 and _OBJECT.search(content[mark:]) is None


def _refusal(source: Path | bytes, name: str, password: str | None) -> DocumentError:
    """Why PDFium did not open a file: its own code is an older failure's where the file has no page."""
    from pypdfium2 import raw

    key = None if password is None else f"{password}\0".encode()
    if isinstance(source, bytes):
        document = raw.FPDF_LoadMemDocument64(source, len(source), key)
    else:
        document = raw.FPDF_LoadDocument(f"{source}\0".encode(errors="surrogateescape"), key)
    if document:
        raw.FPDF_CloseDocument(document)
        return DocumentError(f"{name} has no page: there is nothing to read")
    code = raw.FPDF_GetLastError()
    if code == raw.FPDF_ERR_PASSWORD and password is not None:
        return LockedDocumentError(f"{name} is encrypted, and the password is wrong: give another with --password")
    if code == raw.FPDF_ERR_PASSWORD:
        return LockedDocumentError(f"{name} is encrypted: give its password with --password")
    if code == raw.FPDF_ERR_SECURITY:
        return DocumentError(f"{name} is encrypted in a way that cannot be read: save a copy without a password")
    return DocumentError(f"{name} cannot be read as a PDF: the file is damaged or cut off; get it again")


def _describe_no_text(name: str, num_pages: int) -> str:
    pages = "its page is a picture" if num_pages == 1 else f"its {num_pages:,} pages are pictures"
    return (
        f"{name} has no text layer ({pages} or blank, a scan?), and OCR is out of scope: "
        "run it through an OCR program first"
    )


def _estimate_words(document: Any, chosen: Sequence[int], num_sampled: int) -> int:
    from eabf_cli.core.documents.words import read_words

    step = len(chosen) / num_sampled
    sample = [chosen[int((number + 0.5) * step)] for number in range(num_sampled)]
    return sum(len(read_words(document, index).words) for index in sample) * len(chosen) // num_sampled


def _check_length(num_words: int, max_words: int, num_pages: int, name: str) -> None:
    if num_words > _ESTIMATE_ERROR * max_words:
        raise DocumentTooLongError(
            name, num_pages=num_pages, num_words=num_words, max_words=max_words, is_estimate=True
        )


def _beside(chosen: Sequence[int], num_pages: int) -> list[int]:
    """Pages around the chosen ones: a running head is known by its repetition."""
    if len(chosen) >= _PAGES_FOR_EDGES:
        return []
    around = range(max(chosen[0] - 2, 0), min(chosen[-1] + 3, num_pages))
    return [index for index in around if index not in chosen][: 2 * _PAGES_FOR_EDGES]
