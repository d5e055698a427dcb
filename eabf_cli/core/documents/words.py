"""The words of a PDF page with their places, as PDFium's text layer has them.

Coordinates are in points, x to the right and y upwards, on the page turned so that its text runs from left to right.
"""

from __future__ import annotations

import ctypes
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from eabf_cli.core.documents.accents import Box, place_accents
from eabf_cli.core.documents.broken_fonts import without_foreign_signs

LINE_END_HYPHEN = "\u00ad"

# The Latin ligatures, and the shapes that letters of Hebrew and Arabic take in words.
_SHAPES = (*range(0xFB00, 0xFB07), *range(0xFB1D, 0xFDFC), *range(0xFE70, 0xFEFD))
_LIGATURES = {code: unicodedata.normalize("NFKC", chr(code)) for code in _SHAPES}
_INVISIBLE = dict.fromkeys((0xAD, 0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF))
_MARKED = re.compile("\\w[\u0300-\u036f]+")
# What PDFium gives for a hyphen at a line's end, if FPDFText_IsHyphen says so; elsewhere it is a font's code.
_HYPHEN_CODE = 2
_BOLD_NAME = re.compile(r"bold|black|heavy|semibd|cmbx|sfbx|-medi(?!um)", re.IGNORECASE)
_BOLD_WEIGHT = 650
# A space is at least this part of the font's size.
_SPACE = 0.15
# What a library stamps onto a scan has so many words at most.
_STAMP_WORDS = 60
_PICTURE_SHARE = 0.5
_TABLE_WORDS = 20
_TABLE_LINES = 4


@dataclass(slots=True)
class Word:
    """A run of characters without space.

    Attributes:
        size: the font's size, as it is on the page.
        order: its number in the order in which the page draws its text.
        angle: the direction in which it runs on the page: 0 for left to right, 90 for upwards, 180 or 270.
    """

    text: str
    left: float
    right: float
    baseline: float
    size: float
    is_bold: bool
    order: int
    angle: int = 0


@dataclass(frozen=True)
class PageWords:
    """One page.

    Attributes:
        index: its number, from 0.
        words: the words that run the way of most of its text, in drawing order.
        width, height: its sides, when turned so that they run from left to right.
        across: other words, each group turned as if it were a page; stamps in the margin and the labels of axes are
            not among them.
        is_picture: a picture covers most of it, as on a scan.
    """

    index: int
    words: list[Word]
    width: float
    height: float
    across: tuple[list[Word], ...] = ()
    is_picture: bool = False

    @property
    def has_letters(self) -> bool:
        return any(character.isalpha() for word in self.words for character in word.text)


def read_words(document: Any, index: int) -> PageWords:
    """The words of one page of a `pypdfium2.PdfDocument`. The caller holds the lock on PDFium."""
    page = document[index]
    layer = page.get_textpage()
    try:
        width, height = page.get_size()
        if page.get_rotation() % 180:
            width, height = height, width
        by_angle: dict[int, list[Word]] = defaultdict(list)
        for word in _words(layer):
            by_angle[word.angle].append(word)
        # Looking at each picture of a page takes time, and a scan with more text has a text layer.
        is_picture = sum(map(len, by_angle.values())) <= _STAMP_WORDS and _has_large_picture(page)
    finally:
        layer.close()
        page.close()
    main = max(by_angle, key=lambda angle: sum(len(word.text) for word in by_angle[angle]), default=0)
    turned = {angle: _turned(words, angle, width, height) for angle, words in by_angle.items()}
    across = tuple(words for angle, words in turned.items() if angle != main and _is_table(words))
    sides = (height, width) if main % 180 else (width, height)
    return PageWords(index, turned.get(main, []), *sides, across, is_picture)


def _has_large_picture(page: Any) -> bool:
    from pypdfium2 import raw

    page_area = page.get_width() * page.get_height()
    for picture in page.get_objects(filter=[raw.FPDF_PAGEOBJ_IMAGE]):
        left, bottom, right, top = picture.get_bounds()
        if (right - left) * (top - bottom) >= _PICTURE_SHARE * page_area:
            return True
    return False


def clean_characters(text: str) -> str:
    """Text with its ligatures spelled out and without invisible characters; a control character becomes U+FFFD.

    Other compatibility characters stay: in a formula, x\u00b2 is not x2.
    """
    if text.isascii() and text.isprintable():
        return text
    text = text.translate(_LIGATURES).translate(_INVISIBLE)
    text = _MARKED.sub(lambda marked: unicodedata.normalize("NFC", marked[0]), text)
    return "".join("\ufffd" if unicodedata.category(character) in ("Cc", "Cn") else character for character in text)


def _words(layer: Any) -> Iterator[Word]:
    from pypdfium2 import raw

    box, x, y = raw.FS_RECTF(), ctypes.c_double(), ctypes.c_double()
    characters: list[str] = []
    word: Word | None = None
    order, height = 0, 0.0
    drawn = [_character(raw, layer, index) for index in range(layer.count_chars())]
    letters, accents = place_accents(drawn, lambda index: _ink(raw, layer, index))
    for index, character in enumerate(drawn):
        if index in accents:
            continue
        is_generated = raw.FPDFText_IsGenerated(layer, index)
        if character.isspace() or is_generated:
            # Around an accent that is drawn apart PDFium sees spaces where there are none.
            if word and not (is_generated and {index - 1, index + 1} & accents):
                yield from _finished(word, characters)
                word = None
            continue
        character = letters.get(index, character)
        raw.FPDFText_GetLooseCharBox(layer, index, box)
        raw.FPDFText_GetCharOrigin(layer, index, x, y)
        is_apart = word and {index - 1, index - 2} & accents and _is_behind_space(word, box)
        if word and (is_apart or _is_elsewhere(word, box, x.value, y.value)):
            yield from _finished(word, characters)
            word = None
        if word is None:
            size, angle = _size_and_angle(raw, layer, index)
            word = Word("", box.left, box.right, y.value, size, _is_bold(raw, layer, index), order, angle)
            # In rotated text the line's place is across.
            if angle % 180:
                word.left, word.right, word.baseline = box.bottom, box.top, x.value
            characters = []
            order += 1
            height = box.top - box.bottom
        elif box.top - box.bottom > 1.15 * height and not word.angle:
            # An index or a footnote's mark came first: the larger letters tell the line.
            height = box.top - box.bottom
            word.baseline, word.size = y.value, _size_and_angle(raw, layer, index)[0]
        characters.append(character)
        low, high = (box.bottom, box.top) if word.angle % 180 else (box.left, box.right)
        word.left, word.right = min(word.left, low), max(word.right, high)
    if word:
        yield from _finished(word, characters)


def _character(raw: Any, layer: Any, index: int) -> str:
    code = raw.FPDFText_GetUnicode(layer, index)
    if code == _HYPHEN_CODE and raw.FPDFText_IsHyphen(layer, index) == 1:
        return LINE_END_HYPHEN
    return chr(code)


def _ink(raw: Any, layer: Any, index: int) -> Box:
    """What a character covers, on the page turned so that it stands upright."""
    left, right, bottom, top = (ctypes.c_double() for _ in range(4))
    raw.FPDFText_GetCharBox(layer, index, left, right, bottom, top)
    sides = left.value, right.value, bottom.value, top.value
    for _ in range(_size_and_angle(raw, layer, index)[1] // 90):
        sides = sides[2], sides[3], -sides[1], -sides[0]
    return sides


def _is_behind_space(word: Word, box: Any) -> bool:
    low, right = (box.bottom, word.right) if word.angle % 180 else (box.left, word.right)
    return bool(low - right > _SPACE * word.size)


def _is_elsewhere(word: Word, box: Any, x: float, y: float) -> bool:
    """Whether a character does not go on with the word, though no space is between: PDFium leaves it out after a
    hyphen at a line's end."""
    if word.angle % 180:
        return abs(x - word.baseline) > word.size
    is_far = box.left > word.right + word.size or box.right < word.left - 0.2 * word.size
    return is_far or abs(y - word.baseline) > 0.8 * word.size


def _finished(word: Word, characters: list[str]) -> Iterator[Word]:
    ends_broken = characters[-1] == LINE_END_HYPHEN
    # Characters beyond U+FFFF may come as the two halves of UTF-16.
    text = "".join(characters).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    text = without_foreign_signs(clean_characters(text))
    if text or ends_broken:
        word.text = text + (LINE_END_HYPHEN if ends_broken else "")
        yield word


def _size_and_angle(raw: Any, layer: Any, index: int) -> tuple[float, int]:
    matrix = raw.FS_MATRIX()
    raw.FPDFText_GetMatrix(layer, index, matrix)
    scale = math.hypot(matrix.c, matrix.d) or 1.0
    angle = round(math.degrees(math.atan2(matrix.b, matrix.a)) / 90) * 90 % 360
    return (raw.FPDFText_GetFontSize(layer, index) * scale) or 1.0, angle


def _is_bold(raw: Any, layer: Any, index: int) -> bool:
    if raw.FPDFText_GetFontWeight(layer, index) >= _BOLD_WEIGHT:
        return True
    buffer = ctypes.create_string_buffer(128)
    raw.FPDFText_GetFontInfo(layer, index, buffer, 128, None)
    return _BOLD_NAME.search(buffer.value.decode("latin-1")) is not None


def _turned(words: list[Word], angle: int, width: float, height: float) -> list[Word]:
    """Words of one angle on the page turned so that they run from left to right."""
    for word in words:
        if angle == 90:
            # The lines of text that runs upwards follow each other to the right.
            word.baseline = width - word.baseline
        elif angle == 180:
            word.left, word.right, word.baseline = width - word.right, width - word.left, height - word.baseline
        elif angle == 270:
            word.left, word.right = height - word.right, height - word.left
    return words


def _is_table(words: list[Word]) -> bool:
    """Whether text across the page is a table or the like; a stamp in the margin and an axis' label have few lines."""
    return len(words) >= _TABLE_WORDS and len({round(word.baseline) for word in words}) >= _TABLE_LINES
