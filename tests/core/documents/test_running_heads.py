"""What repeats at the edges of pages goes; titles of slides and of chapters stay."""

from __future__ import annotations

from pathlib import Path

import pytest
from reportlab.pdfgen.canvas import Canvas

from eabf_cli.core.documents import read_document
from eabf_cli.core.documents.page_numbers import bare_number, outer_number, page_offsets
from tests.core.documents.pdf_builder import BOLD, FONT, Page, build_pdf, make_words

LEFT, RIGHT, TOP, FULL = 72, 480, 700, 468


def read(tmp_path: Path, pages: list[Page]) -> str:
    path = tmp_path / "paper.pdf"
    path.write_bytes(build_pdf(pages))
    return read_document(path).text


def make_deck(path: Path, titles: list[str], *, with_numbers: bool) -> list[str]:
    """Slides of 16:9 with a foot; returns the words that are theirs."""
    canvas = Canvas(str(path), pagesize=(720, 405), invariant=True)
    expected: list[str] = []
    for number, title in enumerate(titles, start=1):
        points = [f"Point {word}." for word in make_words(4, seed=number)]
        canvas.setFont(BOLD, 26)
        canvas.drawString(40, 360, title)
        canvas.setFont(FONT, 16)
        for row, point in enumerate(points):
            canvas.drawString(60, 295 - 26 * row, point)
        canvas.setFont(FONT, 9)
        canvas.drawString(40, 12, "N. Ostper, On gel")
        if with_numbers:
            canvas.drawString(680, 12, str(number))
        canvas.showPage()
        expected += " ".join([title, *points]).split()
    canvas.save()
    return expected


@pytest.mark.parametrize("with_numbers", [True, False], ids=["numbered slides", "no numbers"])
@pytest.mark.parametrize(
    "titles",
    [
        [f"Experiment {number}" for number in range(1, 7)],
        ["Motivation", "Results", "Results", "Results", "Results", "Conclusion"],
        [f"Results ({number}/6)" for number in range(1, 7)],
        ["Opening", "Outline", "Case 1", "Case 2", "Case 3", "Case 4", "Closing", "Thanks", "Backup", "More"],
    ],
    ids=["numbered", "repeated", "parts", "cases"],
)
def test_titles_of_slides_stay(tmp_path: Path, titles: list[str], with_numbers: bool) -> None:
    path = tmp_path / "deck.pdf"
    expected = make_deck(path, titles, with_numbers=with_numbers)
    assert read_document(path).text.split() == expected


def test_a_numbered_line_as_large_as_the_text_stays_where_the_slides_are_numbered_otherwise(tmp_path: Path) -> None:
    pages, expected = [], []
    for number in range(1, 9):
        page = Page()
        title = f"Case {number - 3}" if 4 <= number <= 7 else f"Slide {'abcdefgh'[number - 1]} of gel"
        point = " ".join(make_words(6, seed=number))
        page.put(title, LEFT, 745, size=12)
        page.put(point, LEFT, 400, size=12)
        page.put(f"{number} / 8", RIGHT, 30, size=12)
        expected += [title, point]
        pages.append(page)
    assert [line for line in read(tmp_path, pages).split("\n") if line] == expected


@pytest.mark.parametrize("num_pages", range(4, 10))
@pytest.mark.parametrize("numbers", ["head", "foot"])
def test_alternate_heads_of_a_short_paper_go(tmp_path: Path, num_pages: int, numbers: str) -> None:
    pages, words = [], []
    for number in range(1, num_pages + 1):
        page = Page()
        if number > 1:
            page.put("The Name of the Title" if number % 2 else "Homint and Murnep", 200, 760, size=9)
        if numbers == "foot" or number == 1:
            page.put(str(number), 300, 40, size=9)
        else:
            page.put(str(number), RIGHT if number % 2 else LEFT, 760, size=9)
        body = make_words(120, seed=number)
        page.put_column(body, LEFT, TOP, FULL)
        words += body
        pages.append(page)
    assert read(tmp_path, pages).split() == words


def test_heads_that_change_with_every_section_go_by_their_page_numbers(tmp_path: Path) -> None:
    pages, words = [], []
    for number, section in enumerate(["Gel", "Homint", "Karlo"], start=41):
        page = Page()
        page.put(f"{number - 40} {section}", LEFT, 760, size=10)
        page.put(str(number), RIGHT, 760, size=10)
        body = make_words(300, seed=number)
        page.put_column(body, LEFT, TOP, FULL)
        words += body
        pages.append(page)
    assert read(tmp_path, pages).split() == words


@pytest.mark.parametrize("first", [1, 7])
def test_a_head_larger_than_the_text_goes_if_it_alone_counts_the_pages(tmp_path: Path, first: int) -> None:
    pages, words = [], []
    for number in range(first, first + 6):
        page = Page()
        page.put(f"{number} K. T. Homint", LEFT, 760, size=12)
        body = make_words(200, seed=number)
        page.put_column(body, LEFT, TOP, FULL, size=9)
        words += body
        pages.append(page)
    assert read(tmp_path, pages).split() == words


def test_numbered_chapters_of_a_page_each_keep_their_titles(tmp_path: Path) -> None:
    pages, expected = [], []
    for number in range(1, 6):
        page = Page()
        page.put(f"Chapter {number}", LEFT, 745, size=20, font=BOLD)
        body = make_words(150, seed=number)
        page.put_column(body, LEFT, 690, FULL)
        page.put(str(number), 300, 40)
        expected += [f"Chapter {number}", " ".join(body)]
        pages.append(page)
    assert read(tmp_path, pages).split("\n\n") == expected


def test_the_same_words_at_the_edges_of_far_pages_are_text(tmp_path: Path) -> None:
    pages, words = [], []
    for number in range(1, 8):
        page = Page()
        body = ["Karlo", "again."] * (number in (2, 6)) + make_words(100, seed=number)
        for start, y in ((0, 755), (len(body) // 2, 600)):
            page.put_column(body[start : start + len(body) // 2] if start == 0 else body[start:], LEFT, y, 150)
        words += body
        pages.append(page)
    assert read(tmp_path, pages).split() == words


def test_bare_and_outer_numbers() -> None:
    assert [bare_number(text) for text in ("12", "- 12 -", "Page 3 of 9", "xiv", "XL")] == [12, 12, 3, 14, 40]
    assert [bare_number(text) for text in ("12 a", "iix", "", "1.5", "ill")] == [None] * 5
    assert [outer_number(text) for text in ("12  The Title", "The Title  xii", "3 Results", "1  2")] == [12, 12] + [
        None
    ] * 2


def test_offsets_are_those_of_numbers_that_go_up_with_the_pages() -> None:
    numbers = [(page, page + 1) for page in range(10)]
    year, case = [(page, 2024) for page in range(10)], [(page, page - 2) for page in range(3, 7)]
    assert page_offsets([*numbers, *year, *case]) == {1}
    assert page_offsets(case) == {-2}
    # An article's pages and the volume's.
    assert page_offsets([*numbers, *((page, page + 127) for page in range(10))]) == {1, 127}
