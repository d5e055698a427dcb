"""Reading documents: PDF, HTML, Markdown and plain text to clean text, without a model."""

from eabf_cli.core.documents.document import (
    Document,
    DocumentError,
    DocumentTooLongError,
    LockedDocumentError,
    NoTextError,
)
from eabf_cli.core.documents.reading import read_document

__all__ = ["Document", "DocumentError", "DocumentTooLongError", "LockedDocumentError", "NoTextError", "read_document"]
