"""PDF files as training data: the text of each is a record."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eabf_cli.core.data.parsing import EmptyRecordError
from eabf_cli.core.documents import LockedDocumentError, NoTextError, pdf, read_document
from eabf_cli.core.errors import DataError


def check_pdf(path: Path) -> None:
    """Refuse a PDF without text, looking no further than the first page that has some.

    Raises:
        DataError: the file cannot be opened: it is damaged, encrypted, or has no page.
        EmptyRecordError: no page has a text layer.
    """
    with _refused_as_data(path):
        pdf.check_pdf(path, str(path))


def read_pdf(path: Path) -> str:
    """The text of all pages in reading order, its references too; see `documents.read_document`.

    Raises:
        DataError, EmptyRecordError: see `check_pdf`.
    """
    with _refused_as_data(path):
        return read_document(path, references="keep").text


@contextmanager
def _refused_as_data(path: Path) -> Iterator[None]:
    try:
        yield
    except NoTextError as error:
        raise EmptyRecordError(str(error)) from error
    except LockedDocumentError as error:
        # No option here takes a password.
        raise DataError(f"{path} is encrypted: save a copy without a password") from error
