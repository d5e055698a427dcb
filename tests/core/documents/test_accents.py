"""Accents that a page draws apart from their letters."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from reportlab.pdfbase import pdfmetrics
from reportlab.pdfgen.canvas import Canvas

from eabf_cli.core.documents import read_document
from eabf_cli.core.documents.accents import place_accents
from tests.core.documents.pdf_builder import UNICODE_FONT

SIZE = 11
ACCENTS = "\u00b4`\u00a8\u02c6\u02dc\u02c7\u02da\u00b8"


def draw(text: str, *, letter_first: bool = False, angle: int = 0) -> bytes:
    """A line whose accents, each before its letter in `text`, are set over the letter as TeX's OT1 fonts do it."""
    buffer = io.BytesIO()
    canvas = Canvas(buffer, pagesize=(800, 800), invariant=True)
    canvas.translate(400, 400)
    canvas.rotate(angle)
    x = 0.0

    def put(sign: str, left: float, y: float = 0.0) -> None:
        line = canvas.beginText(left, y)
        line.setFont(UNICODE_FONT, SIZE)
        line.textOut(sign)
        canvas.drawText(line)

    for run in re.findall(rf"[{ACCENTS}].|[^{ACCENTS}]+", text):
        letter = run[-1] if run[0] in ACCENTS else run
        width = pdfmetrics.stringWidth(letter, UNICODE_FONT, SIZE)
        if letter_first or letter == run:
            put(letter, x)
        if letter != run:
            off = (width - pdfmetrics.stringWidth(run[0], UNICODE_FONT, SIZE)) / 2
            put(run[0], x + off, 2.5 if letter.isupper() else 0.0)
            if not letter_first:
                put(letter, x)
        x += width
    canvas.save()
    return buffer.getvalue()


@pytest.mark.parametrize("letter_first", [False, True], ids=["accent first", "letter first"])
@pytest.mark.parametrize(
    ("drawn", "read"),
    [
        ("le Th\u00b4eor`eme na\u00a8\u0131f", "le Th\u00e9or\u00e8me na\u00eff"),
        ("K\u00a8onnen \u00a8uber \u00a8Ol", "K\u00f6nnen \u00fcber \u00d6l"),
        ("ma\u02dcnana cami\u00b4on \u00b4arbol", "ma\u00f1ana cami\u00f3n \u00e1rbol"),
        (
            "un gar\u00b8con, l'h\u02c6otel, \u02c7Skoda, \u02daAngstr\u00a8om",
            "un gar\u00e7on, l'h\u00f4tel, \u0160koda, \u00c5ngstr\u00f6m",
        ),
    ],
)
def test_an_accent_drawn_apart_is_put_onto_its_letter(
    tmp_path: Path, drawn: str, read: str, letter_first: bool
) -> None:
    path = tmp_path / "paper.pdf"
    path.write_bytes(draw(drawn, letter_first=letter_first))
    assert read_document(path).text == read


@pytest.mark.parametrize("angle", [90, 270])
def test_on_a_turned_page_too(tmp_path: Path, angle: int) -> None:
    path = tmp_path / "paper.pdf"
    path.write_bytes(draw("le Th\u00b4eor`eme de gar\u00b8con", angle=angle))
    assert read_document(path).text == "le Th\u00e9or\u00e8me de gar\u00e7on"


def test_signs_beside_letters_and_hats_of_formulas_stay(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    canvas = Canvas(buffer, pagesize=(400, 200), invariant=True)
    canvas.setFont(UNICODE_FONT, SIZE)
    canvas.drawString(50, 100, "`a' and ~e^2 and \u00b4 e \u02c6x")
    canvas.save()
    path = tmp_path / "paper.pdf"
    path.write_bytes(buffer.getvalue())
    assert read_document(path).text == "`a' and ~e^2 and \u00b4 e \u02c6x"


def test_decomposed_letters_are_composed(tmp_path: Path) -> None:
    path = tmp_path / "paper.pdf"
    buffer = io.BytesIO()
    canvas = Canvas(buffer, pagesize=(400, 200), invariant=True)
    canvas.setFont(UNICODE_FONT, SIZE)
    canvas.drawString(50, 100, "cafe\u0301 u\u0308ber")
    canvas.save()
    path.write_bytes(buffer.getvalue())
    assert read_document(path).text == "caf\u00e9 \u00fcber"


def test_an_accent_goes_to_the_letter_that_it_covers() -> None:
    boxes = {
        "a": (0.0, 5.0, 0.0, 5.0),
        "e": (6.0, 11.0, 0.0, 5.0),
        # Over the e, though it stands in the text before the a; and one over nothing.
        "\u00b4": (8.0, 9.5, 6.0, 7.5),
        "`": (30.0, 32.0, 6.0, 7.5),
    }
    characters = ["\u00b4", "a", "e", "`"]
    letters, used = place_accents(characters, lambda index: boxes[characters[index]])
    assert (letters, used) == ({2: "\u00e9"}, {0})
