"""What reading a document gives, and the refusals that are its own."""

from __future__ import annotations

from dataclasses import dataclass

from eabf_cli.core.errors import DataError


class DocumentError(DataError):
    """A document cannot be read: missing, damaged, locked, of another kind."""


class LockedDocumentError(DocumentError):
    """A document is encrypted, and no password or a wrong one was given."""


class NoTextError(DocumentError):
    """A document is sound, but there is no text in it."""


class DocumentTooLongError(DocumentError):
    """A document has more words than asked for.

    Attributes:
        name: what messages call it.
        num_pages: the pages that were to be read; None for a document without pages.
        num_words: how many words they hold; an estimate from a sample if `is_estimate`.
        max_words: how many were asked for.
    """

    def __init__(self, name: str, *, num_pages: int | None, num_words: int, max_words: int, is_estimate: bool) -> None:
        self.name = name
        self.num_pages = num_pages
        self.num_words = num_words
        self.max_words = max_words
        self.is_estimate = is_estimate
        pages = "" if num_pages is None else f"{num_pages:,} pages with "
        about = "about " if is_estimate else ""
        way_out = "give a part of it" if num_pages is None else "choose some with --pages, as in --pages 1-20"
        super().__init__(f"{name} has {pages}{about}{num_words:,} words, at most {max_words:,} can be read: {way_out}")


@dataclass(frozen=True)
class Document:
    """The text of a document, in reading order.

    Attributes:
        text: headings and paragraphs, apart by empty lines; a paragraph is one line.
        num_pages: how many pages were read; None for a document without pages.
        kind: "pdf", "html", "markdown" or "text".
        warnings: what may be wrong with the text, a sentence each.
        title: as the document gives it, if it does.
        num_pages_in_file: how many pages there are, read or not; None for a document without pages.
        num_reference_words: the words of the list of references that was left out.
    """

    text: str
    num_pages: int | None
    kind: str
    warnings: tuple[str, ...] = ()
    title: str | None = None
    num_pages_in_file: int | None = None
    num_reference_words: int = 0

    @property
    def num_words(self) -> int:
        return len(self.text.split())
