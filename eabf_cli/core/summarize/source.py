"""The documents to summarize, read before anything heavy is imported, so that a bad one is refused at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from eabf_cli.core.documents import DocumentTooLongError, read_document
from eabf_cli.core.errors import DataError
from eabf_cli.core.summarize.longest_window import longest_window
from eabf_cli.core.summarize.settings import References, SummarizeConfig, check_standard_input

STDIN = "-"
# No model's window holds more words than this, so that a library's worth of pages need not be read to be refused.
_MAX_WORDS = 750_000


@dataclass(frozen=True, kw_only=True)
class SourceText:
    """The text of one document.

    Attributes:
        name: what the user called it.
        num_pages: None for what has no pages.
        warnings: what is doubtful about the text.
    """

    name: str
    text: str
    num_pages: int | None = None
    warnings: tuple[str, ...] = ()


def read_documents(config: SummarizeConfig) -> list[SourceText]:
    """Read the documents that a configuration names.

    Raises:
        EabfError: one that cannot be read or has no text; one that is too long for any model, unless it is to be
            cut or read in sections.
    """
    is_refused = config.too_long == "error"
    try:
        return read_texts(
            config.files,
            pages=config.pages,
            password=config.password,
            references=config.references,
            max_words=_MAX_WORDS if is_refused else None,
            sample_bound=partial(longest_window, config) if is_refused else None,
        )
    except DocumentTooLongError as error:
        if error.max_words == _MAX_WORDS:
            raise
        raise DataError(
            f"{error.name} has {error.num_pages:,} pages with about {error.num_words:,} words, which are more than the "
            f"{error.max_words:,} tokens that the window holds at most\n"
            "Give --pages, as in --pages 1-20, a larger --factor, --too-long truncate-middle or --too-long map-reduce"
        ) from error


def read_texts(
    files: Iterable[str | Path],
    *,
    pages: str | None = None,
    password: str | None = None,
    references: References = "drop",
    max_words: int | None = None,
    sample_bound: Callable[[], int | None] | None = None,
) -> list[SourceText]:
    """The cleaned texts of files ("-" is standard input); see `read_document` for the options.

    Raises:
        EabfError: a file that cannot be read or has no text.
    """
    files = list(files)
    check_standard_input(files)
    texts = []
    for name in files:
        document = read_document(
            name,
            pages=pages,
            password=password,
            references=references,
            max_words=max_words,
            sample_bound=sample_bound,
        )
        texts.append(
            SourceText(
                name="standard input" if str(name) == STDIN else str(name),
                text=document.text,
                num_pages=document.num_pages,
                warnings=tuple(document.warnings),
            )
        )
    return texts
