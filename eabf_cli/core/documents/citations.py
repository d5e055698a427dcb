"""The list of references of a paper: found, checked and cut."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from eabf_cli.core.documents.paragraph import Paragraph

_NAMES = (
    r"(?:list of )?references(?: and notes| and further reading| cited)?",
    r"reference list",
    r"notes and references",
    r"(?:selected |annotated )?bibliography",
    r"literature cited",
    r"cited literature",
    r"works cited",
    r"literature",
    r"literatur(?:verzeichnis)?",
    r"bibliogra(?:phie|f[i\u00ed]a)",
    r"r\u00e9f\u00e9rences(?: bibliographiques)?",
    r"referencias(?: bibliogr\u00e1ficas)?",
    r"refer\u00eancias(?: bibliogr\u00e1ficas)?",
    r"riferimenti(?: bibliografici)?",
    r"literatuur",
    r"litteratur",
    r"literatura",
    # "Literature" and "list of literature" in Russian, "references" in Chinese and Korean.
    r"\u043b\u0438\u0442\u0435\u0440\u0430\u0442\u0443\u0440\u0430",
    r"\u0441\u043f\u0438\u0441\u043e\u043a \u043b\u0438\u0442\u0435\u0440\u0430\u0442\u0443\u0440\u044b",
    r"\u53c2\u8003\u6587\u732e",
    r"\u53c3\u8003\u6587\u737b",
    r"\ucc38\uace0 ?\ubb38\ud5cc",
)
_HEADING = re.compile(
    rf"(?:#+\s*)?\**(?:(?:\d{{1,2}}|[A-Z]|[IVX]{{1,5}})\.?\s+)?(?:{'|'.join(_NAMES)})[.:]?\**", re.IGNORECASE
)
_CITATION = re.compile(
    r"\b(?:1[89]|20)\d\d[a-z]?\b|^\s*\[\w{1,8}\]|\barxiv\b|\bdoi\b|https?://|\bet al\b|\bproceedings\b|\bpp\.",
    re.IGNORECASE,
)
_APPENDIX = re.compile(
    r"(?:#+\s*)?(?:appendix|appendices|supplement\w*|supporting information|annex)\b.{0,80}", re.IGNORECASE
)
# "[7] A. Author", "7. A. Author", and "7A. Author", whose number was raised.
_ENTRY = re.compile(r"^(?:\[(\d{1,3})\]|\(?(\d{1,3})[.)]?)\s*(?=\S*[^\W\d_])", re.MULTILINE)
_AUTHOR = re.compile(r"\b[A-Z]\.(?:[ -]?[A-Z]\.)*~? ?[^\W\d_a-z][^\W\d_]+|\b[^\W\d_a-z][^\W\d_]+,? [A-Z]\.|\bet al\b")
_YEAR = re.compile(r"\b(?:1[89]|20)\d\d[a-z]?\b|\barxiv\b|\bdoi\b", re.IGNORECASE)
# A list without a heading has at least so many entries, most of which name an author and a year.
_MIN_ENTRIES = 5
_MIN_SURE = 0.7
# Entries may run into each other, and so many paragraphs may stand between two: the rest of one, or a page of tables.
_MAX_STEP = 4
_MAX_RESTS = 4
_MAX_BETWEEN = 25
_CAPTION = re.compile(r"(?:fig(?:ure|\.)|table)\s*\w{1,4}\s*[.:|]", re.IGNORECASE)
# What is cut holds at least this part of paragraphs that look like citations.
_MIN_CITATIONS = 0.6


def find_references(paragraphs: Sequence[Paragraph]) -> Sequence[int]:
    """Which paragraphs are the list of references, its heading first; empty if there is none.

    The list goes from its heading, a line of its own, to the next heading behind which no citations follow, or to the
    end. The last such heading counts. A part that does not look like citations is left alone. Without a heading, it is
    the last row of paragraphs that are numbered from 1 and name authors and years.
    """
    for start in reversed(range(len(paragraphs))):
        if _HEADING.fullmatch(paragraphs[start].text.strip()):
            end = _find_end(paragraphs, start)
            if _looks_like_citations(paragraphs[start + 1 : end]):
                return range(start, end)
    return _find_numbered(paragraphs)


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


@dataclass(frozen=True)
class _Entry:
    """A numbered paragraph, or one of several in a paragraph."""

    paragraph: int
    number: int
    in_brackets: bool
    is_sure: bool


def _find_numbered(paragraphs: Sequence[Paragraph]) -> Sequence[int]:
    """The last list whose entries are numbered from 1, and show by authors and years that they are citations.

    A table or figure between two entries stays.
    """
    found = [entry for index, paragraph in enumerate(paragraphs) for entry in _entries(index, paragraph)]
    for last in reversed(range(len(found))):
        if not found[last].is_sure:
            continue
        row = [found[last]]
        for entry in reversed(found[:last]):
            if row[-1].paragraph - entry.paragraph > _MAX_BETWEEN + 1:
                break
            if entry.in_brackets == row[-1].in_brackets and 1 <= row[-1].number - entry.number <= _MAX_STEP:
                row.append(entry)
        is_list = row[-1].number == 1 and len(row) >= _MIN_ENTRIES
        if is_list and sum(entry.is_sure for entry in row) >= _MIN_SURE * len(row):
            return _with_rests(sorted({entry.paragraph for entry in row}), paragraphs)
    return []


def _with_rests(numbered: Sequence[int], paragraphs: Sequence[Paragraph]) -> list[int]:
    """Numbered paragraphs, and what between two of them may be the rest of one: a few of its lines, no table."""
    rests = [
        index
        for before, behind in pairwise(numbered)
        if behind - before <= _MAX_RESTS + 1
        for index in range(before + 1, behind)
        if not (paragraphs[index].is_heading or paragraphs[index].is_row or _CAPTION.match(paragraphs[index].text))
    ]
    return sorted([*numbered, *rests])


def _entries(index: int, paragraph: Paragraph) -> Iterator[_Entry]:
    text = paragraph.text.strip()
    matches = list(_ENTRY.finditer(text))
    if not matches or matches[0].start() > 0:
        return
    ends = [match.start() for match in matches[1:]] + [len(text)]
    for match, end in zip(matches, ends, strict=True):
        content = text[match.end() : end]
        is_sure = _AUTHOR.search(content) is not None and _YEAR.search(content) is not None
        yield _Entry(index, int(match[1] or match[2]), match[1] is not None, is_sure)
