"""A paragraph of a document, of whatever kind, and the headings that papers share."""

from __future__ import annotations

import re
from dataclasses import dataclass

HEADING_WORDS = 16
_NUMBERED = r"(?:[A-Z]|\d{1,2}|[IVX]{1,5})(?:\.\d{1,2}){0,3}\.?"
NUMBERED_HEADING = re.compile(_NUMBERED + r"\s+[A-Z]\S*(?:\s\S+){0,11}")
KNOWN_HEADING = re.compile(
    rf"(?:{_NUMBERED}\s+)?(?:abstract|introduction|conclusions?|references|bibliography|literature cited|"
    r"acknowledge?ments?|appendix|appendices|supplementary material)\.?",
    re.IGNORECASE,
)


@dataclass
class Paragraph:
    """A paragraph, a heading, an item of a list or the row of a table; of a PDF also where it stands.

    Attributes:
        lines: their texts; a line's last word may end in `words.LINE_END_HYPHEN` or "-".
        page: the number of the page on which it ends, from 0.
        size: the size of its font in points.
        is_heading: whether it is a heading.
        is_aside: not part of the running text: a note, a caption, a table.
        is_row: whether it is close to others of its kind, as the rows of a table and the items of a list are.
        fills_last_line: whether the last line reaches the column's edge, so that the text may go on.
        begins_column: whether it is the first of its block.
        is_indented: whether the first line is set in.
        block: the number of its last block on the page; `left` and `right` are its edges.
    """

    lines: list[str]
    page: int = 0
    size: float = 0.0
    is_heading: bool = False
    is_aside: bool = False
    is_row: bool = False
    fills_last_line: bool = False
    begins_column: bool = False
    is_indented: bool = False
    block: int = 0
    left: float = 0.0
    right: float = 0.0

    @property
    def text(self) -> str:
        return " ".join(self.lines)


def is_heading_text(text: str) -> bool:
    """Whether a paragraph of plain text reads like a heading: a numbered title, or one that papers share."""
    if "\n" in text or len(text.split()) > HEADING_WORDS or text.endswith((".", ",", ";")):
        return False
    return any(pattern.fullmatch(text) for pattern in (KNOWN_HEADING, NUMBERED_HEADING))
