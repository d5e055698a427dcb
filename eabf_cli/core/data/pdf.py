"""The text of a PDF file, as its text layer has it."""

from __future__ import annotations

import re
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eabf_cli.core.data.parsing import EmptyRecordError
from eabf_cli.core.errors import DataError

# PDFium keeps state per process and is not safe to call from two threads.
_PDFIUM_LOCK = threading.Lock()

# What PDFium gives for a hyphen at a line's end (one of two, by the function that is asked).
_LINE_END_HYPHEN = re.compile("[\ufffe\x02]\\s*")
_LIGATURES = {code: unicodedata.normalize("NFKC", chr(code)) for code in range(0xFB00, 0xFB07)}
_CONTROL = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def check_pdf(path: Path) -> None:
    """Refuse a PDF without text, looking no further than the first page that has some.

    Raises:
        DataError: the file cannot be opened: it is damaged, encrypted, or has no page.
        EmptyRecordError: no page has a text layer.
    """
    with _open_pages(path) as pages:
        if not any(page.strip() for page in pages):
            raise EmptyRecordError(_describe_no_text(path))


def read_pdf(path: Path) -> str:
    """The text of all pages in order, pages apart by an empty line.

    Words broken at a line's end are joined, ligatures spelled out, line ends are "\\n" and other control
    characters are gone.

    Raises:
        DataError, EmptyRecordError: see `check_pdf`.
    """
    with _open_pages(path) as pages:
        text = "\n\n".join(page for page in pages if page.strip())
    if not text:
        raise EmptyRecordError(_describe_no_text(path))
    return text


@contextmanager
def _open_pages(path: Path) -> Iterator[Iterator[str]]:
    import pypdfium2

    with _PDFIUM_LOCK:
        try:
            document = pypdfium2.PdfDocument(path)
        except pypdfium2.PdfiumError as error:
            raise DataError(_describe_refusal(path)) from error
        try:
            yield (_page_text(document, index) for index in range(len(document)))
        except pypdfium2.PdfiumError as error:
            raise DataError(f"{path} is damaged: a page cannot be read ({error})") from error
        finally:
            document.close()


def _page_text(document: Any, index: int) -> str:
    page = document[index]
    layer = page.get_textpage()
    try:
        return clean_text(layer.get_text_bounded())
    finally:
        layer.close()
        page.close()


def clean_text(text: str) -> str:
    """Text as PDFium gives it, without what belongs to the page rather than to the text."""
    text = _LINE_END_HYPHEN.sub("", text)
    return text.replace("\r\n", "\n").replace("\r", "\n").translate(_LIGATURES).translate(_CONTROL)


def _describe_refusal(path: Path) -> str:
    """Why PDFium did not open a file: its own code is an older failure's where the file has no page."""
    from pypdfium2 import raw

    document = raw.FPDF_LoadDocument(f"{path}\0".encode(), None)
    if document:
        raw.FPDF_CloseDocument(document)
        return f"{path} has no page"
    if raw.FPDF_GetLastError() == raw.FPDF_ERR_PASSWORD:
        return f"{path} is encrypted: save a copy without a password"
    return f"{path} cannot be read as a PDF: the file is damaged, or of another kind"


def _describe_no_text(path: Path) -> str:
    return f"{path} has no text layer (pages of pictures, a scan?): run it through OCR first"
