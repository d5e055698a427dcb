"""Lines to paragraphs: a paragraph may go on in the next column or on the next page."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

from eabf_cli.core.documents.lines import Line
from eabf_cli.core.documents.paragraph import HEADING_WORDS, KNOWN_HEADING, NUMBERED_HEADING, Paragraph
from eabf_cli.core.documents.reading_order import Block
from eabf_cli.core.documents.words import LINE_END_HYPHEN

_BULLET = re.compile(r"(?:[\u2022\u25aa\u25cf\u25e6\u2023\u2219\u00b7]|\(?[a-z0-9]{1,2}[.)]|\[\d{1,3}\])\s")
_CAPTION = re.compile(r"(?:fig(?:ure|\.)|table|algorithm|listing)\s*\w{1,4}\s*[.:|]", re.IGNORECASE)
_SENTENCE_END = re.compile(r"""[.!?:;][)\]"'\u201d\u2019]*$""")
# How far ahead the rest of a paragraph may be found behind notes, figures and tables.
_LOOKAHEAD = 40


def body_size(pages: Sequence[Sequence[Block]]) -> float:
    """The size of the font in which most of the text is set, in points."""
    counts: Counter[float] = Counter()
    for blocks in pages:
        for block in blocks:
            for line in block.lines:
                counts[round(2 * line.size) / 2] += len(line.text)
    return counts.most_common(1)[0][0] if counts else 1.0


def page_paragraphs(blocks: Sequence[Block], page: int, size: float) -> list[Paragraph]:
    """The paragraphs of one page in reading order.

    Args:
        blocks: the page's blocks in reading order.
        size: see `body_size`.
    """
    paragraphs = []
    for number, block in enumerate(blocks):
        for lines in _split(block, size):
            paragraph = _paragraph(lines, block, page, size)
            paragraph.block, paragraph.left, paragraph.right = number, block.left, block.right
            paragraph.begins_column = lines[0] is block.lines[0]
            paragraphs.append(paragraph)
    return paragraphs


def _paragraph(lines: Sequence[Line], block: Block, page: int, size: float) -> Paragraph:
    text = " ".join(line.text for line in lines)
    is_small = lines[0].size < 0.93 * size
    is_row = all(line.is_row for line in lines)
    is_heading = not is_row and _is_heading(lines, text, size)
    return Paragraph(
        [line.text for line in lines],
        page,
        size=max(lines, key=lambda line: len(line.text)).size,
        is_heading=is_heading,
        is_aside=not is_heading and (is_small or is_row or _CAPTION.match(text) is not None),
        is_row=is_row,
        fills_last_line=lines[-1].right > block.right - 2 * lines[-1].size,
        is_indented=lines[0].left > block.left + 0.7 * lines[0].size,
    )


def _is_heading(lines: Sequence[Line], text: str, size: float) -> bool:
    if len(lines) > 3 or len(text.split()) > HEADING_WORDS or not re.search(r"[^\W\d_]{2}", text):
        return False
    if KNOWN_HEADING.fullmatch(text):
        return True
    is_distinct = lines[0].size > 1.07 * size or all(line.is_bold for line in lines)
    if text.endswith((".", ",", ";")) and not lines[0].size > 1.3 * size:
        return False
    return is_distinct or (len(lines) == 1 and NUMBERED_HEADING.fullmatch(text) is not None and len(text) < 80)


def _split(block: Block, size: float) -> Iterator[list[Line]]:
    lines = block.lines
    gaps = [line.baseline - below.baseline for line, below in pairwise(lines)]
    # Within paragraphs lines are nearer than between them, so a list of short ones has few such gaps.
    leading = sorted(gaps)[len(gaps) // 4] if gaps else 0.0
    is_hanging = _is_hanging(block)
    paragraph = [lines[0]]
    for index in range(1, len(lines)):
        if gaps[index - 1] > 1.25 * leading or _begins(block, index, is_hanging=is_hanging):
            yield from _verse(paragraph, block, size)
            paragraph = []
        paragraph.append(lines[index])
    yield from _verse(paragraph, block, size)


def _verse(lines: list[Line], block: Block, size: float) -> Iterator[list[Line]]:
    """A paragraph, or its lines one by one where most end far from the column's edge: a program, a verse."""
    edge = block.right - 0.25 * (block.right - block.left)
    num_short = sum(line.right < edge for line in lines[:-1])
    is_title = lines[0].size > 1.07 * size or lines[0].is_bold
    is_broken = any(line.ends_broken for line in lines)
    if len(lines) > 2 and not is_broken and num_short > 0.5 * (len(lines) - 1) and not is_title:
        yield from ([line] for line in lines)
    else:
        yield lines


def _is_hanging(block: Block) -> bool:
    """Whether the first line of each paragraph stands out to the left, as in lists of references."""
    num_in = sum(line.left > block.left + 0.7 * line.size for line in block.lines)
    return len(block.lines) >= 3 and num_in > 0.5 * len(block.lines)


def _begins(block: Block, index: int, *, is_hanging: bool) -> bool:
    """Whether a line begins a paragraph in the middle of a block."""
    before, line = block.lines[index - 1], block.lines[index]
    em = line.size
    if abs(line.size - before.size) > 0.08 * em or line.is_bold != before.is_bold or line.is_row or before.is_row:
        return True
    if (bullet := _BULLET.match(line.text)) and not before.ends_broken and line.left < before.left + 3 * em:
        other = _BULLET.match(before.text)
        follows = other is not None and abs(line.left - before.left) < 0.3 * em and other[0][-2] == bullet[0][-2]
        if follows or _ends_item(before, block):
            return True
    if is_hanging:
        stands_out = line.left <= block.left + 0.3 * em
        return stands_out and (before.left > block.left + 0.7 * em or _ends_item(before, block))
    is_short = before.right < block.right - max(0.2 * (block.right - block.left), 3 * em)
    ends_sentence = _SENTENCE_END.search(before.text) is not None
    if is_short and ends_sentence:
        return True
    if line.left > before.left + 0.7 * em and line.left < before.left + 6 * em:
        if _BULLET.match(before.text):
            return False
        after = block.lines[index + 1] if index + 1 < len(block.lines) else None
        return ends_sentence if after is None else after.left < line.left - 0.7 * em
    return False


def _ends_item(line: Line, block: Block) -> bool:
    """Whether an entry of a list may end with this line; "et al." at its very edge is no sign."""
    is_short = line.right < block.right - 2 * line.size
    return is_short or (_SENTENCE_END.search(line.text) is not None and not line.text.endswith("et al."))


def join_paragraphs(paragraphs: Sequence[Paragraph]) -> list[Paragraph]:
    """Put together what a column's end, a page's end, a figure or a note parts: notes come behind the paragraph."""
    left = list(paragraphs)
    result = []
    while left:
        paragraph = left.pop(0)
        result.append(paragraph)
        if paragraph.is_heading or paragraph.is_aside:
            continue
        num_lines = len(paragraph.lines)
        while (index := _find_rest(paragraph, left, num_lines=num_lines)) is not None:
            rest = left.pop(index)
            num_lines = len(rest.lines)
            paragraph.lines = [*paragraph.lines, *rest.lines]
            paragraph.fills_last_line = rest.fills_last_line
            paragraph.block, paragraph.page = rest.block, rest.page
            paragraph.left, paragraph.right = rest.left, rest.right
    return result


def _find_rest(paragraph: Paragraph, following: Sequence[Paragraph], *, num_lines: int) -> int | None:
    """Where a paragraph goes on, whose last piece has so many lines."""
    last = paragraph.lines[-1]
    is_broken = last.endswith((LINE_END_HYPHEN, "-"))
    if _SENTENCE_END.search(last) or not (paragraph.fills_last_line or is_broken):
        return None
    for index, other in enumerate(following[:_LOOKAHEAD]):
        if other.page > paragraph.page + 1:
            return None
        if other.is_aside:
            continue
        is_elsewhere = other.page != paragraph.page or other.left > paragraph.right
        if is_elsewhere:
            # Of one line it cannot be told whether it fills the column.
            is_full = num_lines > 1 and other.begins_column and not other.is_indented
            goes_on = other.text[0].islower() or is_broken or is_full
        else:
            # Between two blocks of one column stands a formula more often than a note.
            goes_on = index == 0 and other.block != paragraph.block and (other.text[0].islower() or is_broken)
        is_alike = abs(other.size - paragraph.size) <= 0.08 * paragraph.size
        return index if goes_on and is_alike and not other.is_heading else None
    return None


def gather_labels(paragraphs: Sequence[Paragraph]) -> list[Paragraph]:
    """The labels of a drawing, which stand alone all over it, put on one line."""
    result: list[Paragraph] = []
    for paragraph in paragraphs:
        if result and _is_label(paragraph) and _is_label(result[-1]) and paragraph.page == result[-1].page:
            result[-1].lines = [*result[-1].lines, *paragraph.lines]
        else:
            result.append(paragraph)
    return result


def _is_label(paragraph: Paragraph) -> bool:
    return paragraph.is_aside and not paragraph.is_row and all(len(line.split()) <= 3 for line in paragraph.lines)
