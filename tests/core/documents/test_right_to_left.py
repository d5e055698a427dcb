"""Pages of Hebrew, which are drawn from left to right and read from right to left."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
import pytest
from reportlab.pdfbase import pdfmetrics
from reportlab.pdfbase.ttfonts import TTFont
from reportlab.pdfgen.canvas import Canvas

from eabf_cli.core.documents import Document, read_document
from eabf_cli.core.documents.words import clean_characters

FONT = "DejaVuSans"
pdfmetrics.registerFont(TTFont(FONT, str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{FONT}.ttf")))
HEBREW = "השמש הייתה חמה והבית עמד פתוח"


def draw(tmp_path: Path, lines: list[list[str]]) -> Document:
    """Lines of words in the order in which they are read, the first at the right; Hebrew words glyph by glyph."""
    buffer = io.BytesIO()
    canvas = Canvas(buffer, pagesize=(600, 400), invariant=True)
    canvas.setFont(FONT, 12)
    for row, words in enumerate(lines):
        shown = [word if word.isascii() else word[::-1] for word in words]
        canvas.drawRightString(550, 300 - 15 * row, " ".join(reversed(shown)))
    canvas.save()
    path = tmp_path / "paper.pdf"
    path.write_bytes(buffer.getvalue())
    return read_document(path)


def test_words_and_letters_are_read_from_right_to_left(tmp_path: Path) -> None:
    words = HEBREW.split()
    document = draw(tmp_path, [words, words[::-1], words])
    assert document.text.split() == [*words, *words[::-1], *words]
    (warning,) = document.warnings
    assert "1 page (1) runs from right to left" in warning


def test_latin_words_in_such_a_line_keep_their_order(tmp_path: Path) -> None:
    first, second, third, *rest = HEBREW.split()
    # The two Latin words are read, and drawn, from left to right: "attention entropy".
    document = draw(tmp_path, [HEBREW.split(), [first, "entropy", "attention", second, third], rest])
    assert document.text.split() == [*HEBREW.split(), first, "attention", "entropy", second, third, *rest]


def test_a_hebrew_word_in_english_changes_nothing(tmp_path: Path) -> None:
    word = HEBREW.split()[0]
    document = draw(tmp_path, [["hills.", "the", "from", word, "wind", "mild", "The"]])
    assert document.text == f"The mild wind {word} from the hills."
    assert document.warnings == ()


@pytest.mark.parametrize(
    ("shaped", "plain"),
    [("\ufefb", "\u0644\u0627"), ("\ufe91\ufef4\ufe96", "\u0628\u064a\u062a"), ("\ufb2a", "\u05e9\u05c1")],
)
def test_shapes_of_letters_become_the_letters(shaped: str, plain: str) -> None:
    assert clean_characters(shaped) == plain
