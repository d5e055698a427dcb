"""Sets known words in PDF files, column by column or row by row, so that a test can compare what is read."""

from __future__ import annotations

import difflib
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
from reportlab.lib.pdfencrypt import StandardEncryption
from reportlab.pdfbase import pdfmetrics
from reportlab.pdfbase.ttfonts import TTFont
from reportlab.pdfgen.canvas import Canvas

WIDTH, HEIGHT = 612, 792
LEADING = 1.2
FONT, BOLD = "Times-Roman", "Times-Bold"
UNICODE_FONT = "DejaVuSerif"
pdfmetrics.registerFont(
    TTFont(UNICODE_FONT, str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{UNICODE_FONT}.ttf"))
)

_SYLLABLES = ["ba", "co", "di", "fu", "gel", "hom", "int", "kar", "lo", "mur", "nep", "ost", "per", "qua", "rin", "sol"]


def make_words(number: int, seed: int) -> list[str]:
    """Words like those of a text: sentences with commas, capitals and full stops."""
    draw = random.Random(seed)
    words: list[str] = []
    while len(words) < number:
        sentence = ["".join(draw.choices(_SYLLABLES, k=draw.randint(1, 4))) for _ in range(draw.randint(5, 18))]
        sentence[0] = sentence[0].capitalize()
        sentence[len(sentence) // 2] += ","
        sentence[-1] += "."
        words += sentence
    words = words[:number]
    words[-1] = words[-1].rstrip(".,") + "."
    return words


@dataclass
class SetLine:
    """A line as it is drawn: words with their x, and y of the baseline."""

    words: list[tuple[float, str]]
    y: float
    size: float
    font: str


@dataclass
class Page:
    """What is drawn on a page, in drawing order."""

    lines: list[SetLine] = field(default_factory=list)

    def put(self, text: str, x: float, y: float, *, size: float = 10, font: str = FONT) -> None:
        self.lines.append(SetLine([(x, text)], y, size, font))

    def put_centered(self, text: str, y: float, *, size: float = 10, font: str = FONT) -> None:
        self.put(text, (WIDTH - pdfmetrics.stringWidth(text, font, size)) / 2, y, size=size, font=font)

    def put_column(
        self,
        words: Sequence[str],
        x: float,
        y: float,
        width: float,
        *,
        num_lines: int | None = None,
        size: float = 10,
        font: str = FONT,
        indent: float = 0.0,
        hyphenates: bool = False,
    ) -> list[str]:
        """Draw a justified paragraph from a baseline downwards; returns the words for which no line was left."""
        left = list(words)
        count = 0
        while left and (num_lines is None or count < num_lines):
            first = indent if count == 0 else 0.0
            line, left = _break(left, width - first, size, font, hyphenates=hyphenates)
            ends = not left
            self.lines.append(_justified(line, x + first, y, width - first, size, font, ends=ends))
            y -= LEADING * size
            count += 1
        return left

    def row_by_row(self) -> None:
        """Draw as some programs do: every row of the page from left to right."""
        self.lines.sort(key=lambda line: (-line.y, line.words[0][0]))


def _break(words: list[str], width: float, size: float, font: str, *, hyphenates: bool) -> tuple[list[str], list[str]]:
    line = [words[0]]
    rest = words[1:]
    while rest and pdfmetrics.stringWidth(" ".join([*line, rest[0]]), font, size) <= width:
        line.append(rest.pop(0))
    if hyphenates and rest and len(rest[0]) > 6 and rest[0].isalpha():
        head, tail = rest[0][:3] + "-", rest[0][3:]
        if pdfmetrics.stringWidth(" ".join([*line, head]), font, size) <= width:
            line.append(head)
            rest[0] = tail
    return line, rest


def _justified(words: list[str], x: float, y: float, width: float, size: float, font: str, *, ends: bool) -> SetLine:
    space = pdfmetrics.stringWidth(" ", font, size)
    if not ends and len(words) > 1:
        space = (width - sum(pdfmetrics.stringWidth(word, font, size) for word in words)) / (len(words) - 1)
    places = []
    for word in words:
        places.append((x, word))
        x += pdfmetrics.stringWidth(word, font, size) + space
    return SetLine(places, y, size, font)


def build_pdf(
    pages: Sequence[Page],
    *,
    password: str | None = None,
    title: str | None = None,
    stamp: str | None = None,
    rotation: int = 0,
) -> bytes:
    """A PDF of these pages; `stamp` runs upwards in the first page's left margin."""
    buffer = io.BytesIO()
    security = None if password is None else StandardEncryption(password, strength=128)
    canvas = Canvas(buffer, pagesize=(WIDTH, HEIGHT), encrypt=security, invariant=True)
    if title is not None:
        canvas.setTitle(title)
    for number, page in enumerate(pages):
        if rotation:
            canvas.setPageRotation(rotation)
        if stamp is not None and number == 0:
            canvas.saveState()
            canvas.translate(30, 250)
            canvas.rotate(90)
            canvas.setFont(FONT, 20)
            canvas.drawString(0, 0, stamp)
            canvas.restoreState()
        for line in page.lines:
            text = canvas.beginText()
            text.setFont(line.font, line.size)
            for x, word in line.words:
                text.setTextOrigin(x, line.y)
                text.textOut(word)
            canvas.drawText(text)
        canvas.showPage()
    canvas.save()
    return buffer.getvalue()


def share_in_order(expected: Sequence[str], found: Sequence[str]) -> float:
    """Which part of the words is found in the same order: the longest common subsequence's, from below."""
    matcher = difflib.SequenceMatcher(None, list(expected), list(found), autojunk=False)
    same = sum(block.size for block in matcher.get_matching_blocks())
    return same / max(len(expected), len(found))
