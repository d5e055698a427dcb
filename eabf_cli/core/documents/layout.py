"""From the words of pages to paragraphs in reading order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from eabf_cli.core.documents.broken_fonts import describe_broken_fonts
from eabf_cli.core.documents.line_numbers import without_line_numbers
from eabf_cli.core.documents.lines import Line, find_gutters, find_lines
from eabf_cli.core.documents.overlays import unfinished_steps
from eabf_cli.core.documents.paragraph import Paragraph
from eabf_cli.core.documents.paragraphs import body_size, gather_labels, join_paragraphs, page_paragraphs
from eabf_cli.core.documents.reading_order import find_blocks
from eabf_cli.core.documents.right_to_left import describe_right_to_left
from eabf_cli.core.documents.running_heads import without_running_heads
from eabf_cli.core.documents.words import PageWords

_LISTED_PAGES = 12
_KNOWN_SHARE = 0.3


def lay_out(pages: Sequence[PageWords], beside: Sequence[PageWords] = ()) -> tuple[list[Paragraph], list[str]]:
    """The paragraphs of a document, and warnings about its text.

    A page with nothing but what repeats is left as it is, but for page numbers and for the stamps on scans.

    Args:
        pages: the pages to be read.
        beside: pages near them, which help to see what repeats at the edges.
    """
    counted = without_line_numbers([*pages, *beside])
    pages, beside = counted[: len(pages)], counted[len(pages) :]
    lines = _find_lines(pages)
    around = zip([*pages, *beside], [*lines, *_find_lines(beside)], strict=True)
    kept = [
        _own_lines(page, found, rest)
        for page, found, rest in zip(pages, lines, without_running_heads(list(around)), strict=False)
    ]
    steps = unfinished_steps(kept)
    blocks = []
    for number, page in enumerate(pages):
        blocks.append([] if number in steps else find_blocks(kept[number]))
        for group in page.across:
            blocks[-1] += find_blocks(find_lines(group, find_gutters(group)))
    size = body_size(blocks)
    paragraphs = [
        paragraph
        for page, found_blocks in zip(pages, blocks, strict=True)
        for paragraph in page_paragraphs(found_blocks, page.index, size)
    ]
    warnings = [*_describe_empty(pages, kept), *_describe_fonts(pages), *describe_right_to_left(pages)]
    return join_paragraphs(gather_labels(paragraphs)), warnings


def _find_lines(pages: Sequence[PageWords]) -> list[list[Line]]:
    """Each page's lines; where most pages have gutters, a few lines are enough to tell one."""
    gutters = [find_gutters(page.words) for page in pages]
    counts = Counter(round((gutter.left + gutter.right) / 8) * 4 for found in gutters for gutter in found)
    known = [middle for middle, count in counts.items() if count >= max(2, _KNOWN_SHARE * len(pages))]
    if known:
        gutters = [find_gutters(page.words, known) for page in pages]
    return [find_lines(page.words, found) for page, found in zip(pages, gutters, strict=True)]


def _own_lines(page: PageWords, lines: Sequence[Line], rest: list[Line]) -> list[Line]:
    """A page's lines without running heads, if they are text of its own; all where it has no others.

    Args:
        rest: the lines that are no running heads.
    """
    if page.is_picture and not page.has_letters:
        return []
    return rest or ([] if page.is_picture or not page.has_letters else list(lines))


def _describe_empty(pages: Sequence[PageWords], kept: Sequence[Sequence[Line]]) -> list[str]:
    empty = [page.index + 1 for page, lines in zip(pages, kept, strict=True) if not lines and not page.across]
    if not empty:
        return []
    listed = ", ".join(map(str, empty[:_LISTED_PAGES])) + (", ..." if len(empty) > _LISTED_PAGES else "")
    plural = "s" * (len(empty) > 1)
    return [f"{len(empty):,} of {len(pages):,} pages have no text (page{plural} {listed}): blank, pictures or scans"]


def _describe_fonts(pages: Sequence[PageWords]) -> list[str]:
    return describe_broken_fonts([(page.index + 1, " ".join(word.text for word in page.words)) for page in pages])
