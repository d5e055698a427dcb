"""The list of references of a paper: found, checked and cut."""

from __future__ import annotations

import re
from collections.abc import Sequence

from eabf_cli.core.documents.paragraph import Paragraph

_HEADING = re.compile(
    r"(?:#+\s*)?\**(?:(?:\d{1,2}|[A-Z]|[IVX]{1,5})\.?\s+)?"
    r"(?:references(?: and notes| cited)?|bibliography|literature cited|works cited|literature|"
    r"literatur(?:verzeichnis)?|bibliogra(?:phie|f[i\u00ed]a)|r\u00e9f\u00e9rences(?: bibliographiques)?|"
    r"referencias(?: bibliogr\u00e1ficas)?|refer\u00eancias(?: bibliogr\u00e1ficas)?|"
    r"riferimenti(?: bibliografici)?|literatuur|\u53c2\u8003\u6587\u732e|\u53c3\u8003\u6587\u737b)[.:]?\**",
    re.IGNORECASE,
)
_CITATION = re.compile(
    r"\b(?:1[89]|20)\d\d[a-z]?\b|^\s*\[\w{1,8}\]|\barxiv\b|\bdoi\b|https?://|\bet al\b|\bproceedings\b|\bpp\.",
    re.IGNORECASE,
)
_APPENDIX = re.compile(
    r"(?:#+\s*)?(?:appendix|appendices|supplement\w*|supporting information|annex)\b.{0,80}", re.IGNORECASE
)
# What is cut holds at least this part of paragraphs that look like citations.
_MIN_CITATIONS = 0.6


def find_references(paragraphs: Sequence[Paragraph]) -> range:
    """Which paragraphs are the list of references, its heading first; empty if there is none.

    The list goes from its heading, a line of its own, to the next heading behind which no citations follow, or to the
    end. The last such heading counts. A part that does not look like citations is left alone.
    """
    for start in reversed(range(len(paragraphs))):
        if _HEADING.fullmatch(paragraphs[start].text.strip()):
            end = _find_end(paragraphs, start)
            if _looks_like_citations(paragraphs[start + 1 : end]):
                return range(start, end)
    return range(0)


def set_off_heading(text: str) -> str:
    """Plain text with empty lines around a heading of references, so that it is a paragraph."""
    lines = (f"\n{line}\n" if _HEADING.fullmatch(line.strip()) else line for line in text.split("\n"))
    return "\n".join(lines)


def _find_end(paragraphs: Sequence[Paragraph], start: int) -> int:
    for index in range(start + 1, len(paragraphs)):
        text = paragraphs[index].text.strip()
        if _APPENDIX.fullmatch(text):
            return index
        if paragraphs[index].is_heading and not _looks_like_citations(paragraphs[index : index + 4]):
            return index
    return len(paragraphs)


def _looks_like_citations(paragraphs: Sequence[Paragraph]) -> bool:
    num_citations = sum(_CITATION.search(paragraph.text) is not None for paragraph in paragraphs)
    return num_citations > 0 and num_citations >= _MIN_CITATIONS * len(paragraphs)
