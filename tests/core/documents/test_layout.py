"""What is read of PDF files whose words are known."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from reportlab.pdfgen.canvas import Canvas

from eabf_cli.core.documents import Document, read_document
from tests.core.documents.pdf_builder import (
    BOLD,
    FONT,
    HEIGHT,
    LEADING,
    UNICODE_FONT,
    Page,
    build_pdf,
    make_words,
    share_in_order,
)

TOP, LEFT, FULL = 700, 72, 468


def read(tmp_path: Path, content: bytes, **options: object) -> Document:
    path = tmp_path / "paper.pdf"
    path.write_bytes(content)
    return read_document(path, **options)  # type: ignore[arg-type]


def columns_page(words: list[str], num_columns: int, *, y: float = TOP, num_lines: int = 50) -> tuple[Page, list[str]]:
    """A page of columns, and the words that it had no place for."""
    page, gap = Page(), 18
    width = (FULL - gap * (num_columns - 1)) / num_columns
    for column in range(num_columns):
        words = (
            page.put_column(
                words, LEFT + column * (width + gap), y, width, num_lines=num_lines, size=9, hyphenates=True
            )
            if words
            else words
        )
    return page, words


@pytest.mark.parametrize("num_columns", [1, 2, 3])
@pytest.mark.parametrize("by_row", [False, True], ids=["column by column", "row by row"])
def test_columns_are_read_one_after_another(tmp_path: Path, num_columns: int, by_row: bool) -> None:
    words = make_words(1500, seed=num_columns)
    pages, left = [], words
    while left:
        page, left = columns_page(left, num_columns)
        if by_row:
            page.row_by_row()
        pages.append(page)
    document = read(tmp_path, build_pdf(pages))
    assert document.num_pages == len(pages)
    assert share_in_order(words, document.text.split()) >= 0.98
    # One paragraph, though columns and pages part it.
    assert len(document.text.split("\n\n")) <= 3


@pytest.mark.parametrize("by_row", [False, True], ids=["column by column", "row by row"])
def test_a_last_page_with_columns_of_few_lines(tmp_path: Path, by_row: bool) -> None:
    words = make_words(1300, seed=9)
    pages, left = [], words
    for num_lines in (50, 50, 3):
        page, left = columns_page(left, 2, num_lines=num_lines)
        if by_row:
            page.row_by_row()
        pages.append(page)
    shown = words[: len(words) - len(left)]
    assert share_in_order(shown, read(tmp_path, build_pdf(pages)).text.split()) >= 0.98


@pytest.mark.parametrize("by_row", [False, True], ids=["column by column", "row by row"])
def test_title_abstract_figure_and_table_across_two_columns(tmp_path: Path, by_row: bool) -> None:
    words = make_words(1200, seed=11)
    abstract, before, beneath, caption = words[:100], words[100:280], words[280:600], words[600:630]
    page = Page()
    page.put_centered("Gel Homint Karlo of Murnep", 730, size=17, font=BOLD)
    page.put_centered("Nep Ostper and Quarin Sol", 700, size=11)
    page.put_centered("Abstract", 675, size=11, font=BOLD)
    page.put_column(abstract, LEFT, 660, FULL)
    # Two columns, a figure with a caption over both, two columns again.
    rest = page.put_column(before, LEFT, 530, 225, num_lines=16)
    assert not page.put_column(rest, LEFT + 243, 530, 225, num_lines=20)
    page.put_column(["Figure", "1:", *caption], LEFT, 255, FULL, size=9)
    rest = page.put_column(beneath, LEFT, 215, 225, num_lines=14)
    if by_row:
        page.row_by_row()
    text = read(tmp_path, build_pdf([page])).text
    shown = beneath[: len(beneath) - len(rest)]
    expected = ["Gel", "Homint", "Karlo", "of", "Murnep", "Nep", "Ostper", "and", "Quarin", "Sol", "Abstract"]
    expected += [*abstract, *before, "Figure", "1:", *caption, *shown]
    assert share_in_order(expected, text.split()) >= 0.98
    assert text.startswith("Gel Homint Karlo of Murnep\n\nNep Ostper and Quarin Sol\n\nAbstract\n\n")


def test_running_heads_and_page_numbers_go(tmp_path: Path) -> None:
    words = make_words(1600, seed=3)
    pages, left = [], words
    while left:
        page = Page()
        number = len(pages) + 7
        page.put("Nep Ostper et al." if number % 2 else "A Study of Murnep", LEFT, 760, size=9)
        left = page.put_column(left, LEFT, TOP, FULL, num_lines=14)
        page.put(str(number), 300, 40, size=9)
        page.put("Journal of Gel 12 (2024)", LEFT, 25, size=8)
        pages.append(page)
    assert len(pages) >= 6
    document = read(tmp_path, build_pdf(pages))
    assert document.text.split() == words
    # A page alone: those around it tell what repeats.
    alone = read(tmp_path, build_pdf(pages), pages="4")
    assert set(alone.text.split()) <= set(words)
    assert (alone.num_pages, alone.num_pages_in_file) == (1, len(pages))


def test_a_page_with_nothing_but_what_repeats_keeps_it(tmp_path: Path) -> None:
    pages = []
    for _ in range(5):
        page = Page()
        page.put("Thank you", LEFT, 760)
        pages.append(page)
    assert read(tmp_path, build_pdf(pages)).text.split("\n\n") == ["Thank you"] * 5


def test_words_broken_at_line_ends_are_whole_and_compounds_keep_their_hyphen(tmp_path: Path) -> None:
    page = Page()
    lines = [
        "The interpo-",
        "lation of two-",
        "way traffic: two-way roads are state-of-the-",
        "art and Entropy-",
        "Aware, pre-",
        "and post-war, in 2019-",
        "2020.",
    ]
    for number, line in enumerate(lines):
        page.put(line, LEFT, TOP - 12 * number)
    text = " ".join(read(tmp_path, build_pdf([page])).text.split())
    assert text == (
        "The interpolation of two-way traffic: two-way roads are state-of-the-art and Entropy-Aware, "
        "pre- and post-war, in 2019-2020."
    )


def test_ligatures_are_spelled_out_and_formulas_stay(tmp_path: Path) -> None:
    page = Page()
    page.put("e\ufb03cient \ufb01nd o\ufb00er \ufb02ow x\u00b2 \u00bd \u2264 \u03b8", LEFT, TOP, font=UNICODE_FONT)
    assert read(tmp_path, build_pdf([page])).text == "efficient find offer flow x\u00b2 \u00bd \u2264 \u03b8"


def test_a_stamp_in_the_margin_is_no_text(tmp_path: Path) -> None:
    words = make_words(200, seed=5)
    page = Page()
    page.put_column(words, LEFT, TOP, FULL)
    document = read(tmp_path, build_pdf([page], stamp="arXiv:2401.07004v1 [cs.CL] 13 Jan 2024"))
    assert document.text.split() == words


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_a_turned_page_reads_as_an_upright_one(tmp_path: Path, rotation: int) -> None:
    """Once turned for the viewer only, once with its text drawn sideways."""
    words = make_words(400, seed=6)
    page = Page()
    rest = page.put_column(words, LEFT, TOP, 220)
    assert not rest
    assert read(tmp_path, build_pdf([page], rotation=rotation)).text.split() == words

    buffer = io.BytesIO()
    canvas = Canvas(buffer, pagesize=(HEIGHT, HEIGHT), invariant=True)
    canvas.translate(HEIGHT / 2, HEIGHT / 2)
    canvas.rotate(rotation)
    canvas.setFont(FONT, 10)
    for line in page.lines:
        for x, word in line.words:
            canvas.drawString(x - HEIGHT / 2, line.y - HEIGHT / 2, word)
    canvas.save()
    assert read(tmp_path, buffer.getvalue()).text.split() == words


def test_a_footnote_does_not_stand_in_a_sentence(tmp_path: Path) -> None:
    words = make_words(300, seed=8)
    first, second = Page(), Page()
    rest = first.put_column(words, LEFT, TOP, FULL, num_lines=9)
    assert not words[len(words) - len(rest) - 1].endswith((".", ","))
    first.put("1 Karlo nepos is a footnote.", LEFT, 120, size=7)
    second.put_column(rest, LEFT, TOP, FULL)
    text = read(tmp_path, build_pdf([first, second])).text
    assert text.split("\n\n") == [" ".join(words), "1 Karlo nepos is a footnote."]


@pytest.mark.parametrize("indent", [0, 15], ids=["spaced", "indented"])
def test_paragraphs_and_headings(tmp_path: Path, indent: float) -> None:
    page, y, parts = Page(), TOP, []
    for number, title in enumerate(["Introduction", "Methods of Gel"], start=1):
        page.put(f"{number} {title}", LEFT, y, size=12, font=BOLD)
        parts.append(f"{number} {title}")
        y -= 20
        for seed in (1, 2, 3):
            words = make_words(60, seed=seed + 10 * number)
            before = len(page.lines)
            page.put_column(words, LEFT, y, FULL, indent=indent)
            parts.append(" ".join(words))
            y -= LEADING * 10 * (len(page.lines) - before) + (0 if indent else 7)
        y -= 12
    assert read(tmp_path, build_pdf([page])).text.split("\n\n") == parts


def test_a_table_is_read_row_by_row(tmp_path: Path) -> None:
    page = Page()
    rows = [["Method", "Window", "Score"]] + [[f"gel{n}", f"{n}k", f"{n}.5"] for n in range(1, 12)]
    for number, row in enumerate(rows):
        for column, cell in enumerate(row):
            page.put(cell, LEFT + 120 * column, TOP - 12 * number)
    text = read(tmp_path, build_pdf([page])).text
    assert text.split("\n") == ["  ".join(row) for row in rows]


def test_a_slide_deck_gives_titles_and_points(tmp_path: Path) -> None:
    pages, expected = [], []
    for number in range(1, 8):
        page = Page()
        page.put(f"Slide about gel {'abcdefg'[number - 1]}", 60, 600, size=32, font=BOLD)
        expected.append(f"Slide about gel {'abcdefg'[number - 1]}")
        for point, y in enumerate((500, 440, 380)):
            page.put(f"\u2022 Point {number}.{point} of homint", 80, y, size=22, font=UNICODE_FONT)
            expected.append(f"\u2022 Point {number}.{point} of homint")
        page.put(str(number), 580, 20, size=12)
        pages.append(page)
    text = read(tmp_path, build_pdf(pages)).text
    assert [line for line in text.split("\n") if line] == expected


def test_the_heads_of_odd_and_even_pages_go_from_a_paper_of_six(tmp_path: Path) -> None:
    pages, words = [], []
    for number in range(1, 7):
        page = Page()
        if number > 1:
            page.put("The Name of the Title" if number % 2 else "Homint and Murnep", LEFT, 760)
        body = make_words(120, seed=number)
        page.put_column(body, LEFT, TOP, FULL)
        words += body
        pages.append(page)
    assert read(tmp_path, build_pdf(pages)).text.split() == words


def slide(title: str, *points: str) -> Page:
    page = Page()
    page.put(title, 60, 600, size=24)
    for number, point in enumerate(points):
        page.put(point, 80, 540 - 60 * number, size=24)
    return page


def test_of_a_slide_that_is_built_up_only_the_last_step_is_read(tmp_path: Path) -> None:
    steps = ["Alpha murnep.", "Beta homint.", "Gamma tolgar."]
    pages = [slide("Points of gel", *steps[:number]) for number in range(4)]
    pages += [slide("Points of gel", "Delta murnep."), slide("Others", "Alpha murnep.")]
    for number, page in enumerate(pages):
        page.put(str(number + 1), 580, 20, size=12)
    document = read(tmp_path, build_pdf(pages))
    expected = ["Points of gel", *steps, "Points of gel", "Delta murnep.", "Others", "Alpha murnep."]
    assert [line for line in document.text.split("\n") if line] == expected
    assert document.num_pages == 6


def test_the_same_words_elsewhere_on_the_next_page_are_read_twice(tmp_path: Path) -> None:
    first, second = Page(), Page()
    first.put("Words of murnep.", LEFT, TOP)
    second.put("Words of murnep.", LEFT, TOP - 40)
    second.put("And homint.", LEFT, TOP - 80)
    text = read(tmp_path, build_pdf([first, second])).text
    assert text.split() == ["Words", "of", "murnep."] * 2 + ["And", "homint."]


def test_a_label_in_two_pieces_does_not_run_into_the_next_page(tmp_path: Path) -> None:
    first, second = slide("Title of murnep is long enough for a column"), slide("The next slide tells of homint")
    first.put("Genotype matrix", 80, 300, size=24)
    first.put("no perfect phylogeny", 80, 200, size=24)
    text = read(tmp_path, build_pdf([first, second])).text
    assert "phylogeny\n\nThe next" in text


def test_pages_without_text_among_others_are_told(tmp_path: Path) -> None:
    written = Page()
    written.put("Words of murnep.", LEFT, TOP)
    document = read(tmp_path, build_pdf([written, Page(), written, Page()]))
    (warning,) = document.warnings
    assert "2 of 4 pages have no text (pages 2, 4)" in warning


def test_a_broken_font_is_told_with_its_page(tmp_path: Path) -> None:
    page = Page()
    page.put('The di!culties of e"cient o!ers', LEFT, TOP)
    sound = Page()
    sound.put("AT&T's 100% sure! R&D isn't #1 (yes!) \"quoted\" x&y a/b", LEFT, TOP)
    (warning,) = read(tmp_path, build_pdf([sound, page])).warnings
    assert "'di!culties' on page 2" in warning
    assert "3 words on 1 page" in warning
    assert read(tmp_path, build_pdf([sound])).warnings == ()
