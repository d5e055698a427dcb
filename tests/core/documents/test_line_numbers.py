"""Manuscripts with numbered lines; other numbers at the edge stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from eabf_cli.core.documents import read_document
from tests.core.documents.pdf_builder import BOLD, LEADING, Page, build_pdf, make_words

LEFT, RIGHT, TOP, FULL = 100, 560, 700, 440


def read(tmp_path: Path, pages: list[Page]) -> str:
    path = tmp_path / "paper.pdf"
    path.write_bytes(build_pdf(pages))
    return read_document(path).text


@pytest.mark.parametrize("restarts", [True, False], ids=["on every page anew", "through"])
@pytest.mark.parametrize("x", [70, RIGHT], ids=["left", "right"])
@pytest.mark.parametrize("size", [5, 10])
@pytest.mark.parametrize("step", [1, 5])
def test_the_numbers_of_lines_go(tmp_path: Path, step: int, size: int, x: int, restarts: bool) -> None:
    pages, words, number = [], [], 0
    for seed in range(3):
        page, body = Page(), make_words(420, seed=seed)
        page.put_column(body, LEFT, TOP, FULL, font="Times-Roman")
        number = 0 if restarts else number
        for line in list(page.lines):
            number += 1
            if number % step == 0:
                page.put(str(number), x - 2.5 * len(str(number)) * size / 5, line.y, size=size)
        words += body
        pages.append(page)
    assert read(tmp_path, pages).split() == words


def test_the_numbers_between_two_columns_go_with_those_of_the_first(tmp_path: Path) -> None:
    words = make_words(560, seed=4)
    page = Page()
    rest = page.put_column(words, LEFT, TOP, 200, num_lines=45, size=9)
    assert not page.put_column(rest, LEFT + 240, TOP, 200, size=9)
    for number, line in enumerate(list(page.lines), start=1):
        if number % 5 == 0:
            page.put(str(number), (LEFT if number <= 45 else LEFT + 240) - 22, line.y, size=5)
    assert read(tmp_path, [page]).split() == words


def test_contents_lists_and_tables_keep_their_numbers(tmp_path: Path) -> None:
    contents, listed, table = Page(), Page(), Page()
    contents.put("Contents", LEFT, TOP, size=16, font=BOLD)
    for number in range(1, 13):
        y = TOP - 20 - 12 * number
        contents.put(str(number), LEFT, y)
        contents.put(f"Chapter of {make_words(1, seed=number)[0]}", LEFT + 20, y)
    y = float(TOP)
    for number in range(1, 13):
        listed.put(str(number), LEFT - 20, y)
        before = len(listed.lines)
        listed.put_column(make_words(15 + 9 * (number % 3), seed=number), LEFT, y, FULL)
        y -= LEADING * 10 * (len(listed.lines) - before) + 6
    for number in range(1990, 2010):
        for column, cell in enumerate((str(number), "gel", f"{number - 1980}.5")):
            table.put(cell, LEFT + 90 * column, TOP - 12 * (number - 1990))
    found = read(tmp_path, [contents, listed, table]).split()
    for number in (*range(1, 13), *range(1990, 2010)):
        assert found.count(str(number)) == (2 if number <= 12 else 1), number
