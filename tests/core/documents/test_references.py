"""A paper's list of references: cut, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from eabf_cli.core.documents import Document, read_document
from tests.core.documents.pdf_builder import BOLD, FONT, LEADING, Page, build_pdf, make_words

ENTRIES = [
    "[1] G. Homint and K. Murnep. On gel and its uses. In Proceedings of Lo, pages 3-14, 2019.",
    "[2] N. Ostper. Quarin, a study. arXiv:1901.00001, 2021.",
    "[3] S. Tolnev, U. Vel and W. Wex. A longer title that needs more than one line of the page to be "
    "set in full, as some do. Journal of Fu, 12(3):1-20, 2018.",
    "[4] The Gel Project. https://gel.example/docs, 2020.",
]


def make_paper(heading: str, behind: list[tuple[str, str]]) -> bytes:
    page, y = Page(), 720.0

    def put(text: str, font: str = FONT) -> None:
        nonlocal y
        before = len(page.lines)
        page.put_column(text.split(), 72, y, 468, font=font)
        y -= LEADING * 10 * (len(page.lines) - before) + 8

    put("1 Introduction", BOLD)
    put(" ".join(make_words(80, seed=1)))
    put(heading, BOLD)
    for entry in ENTRIES:
        put(entry)
    for title, text in behind:
        put(title, BOLD)
        put(text)
    return build_pdf([page])


def read(tmp_path: Path, name: str, content: bytes, **options: str) -> Document:
    path = tmp_path / name
    path.write_bytes(content)
    return read_document(path, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "heading",
    [
        "References",
        "7 References",
        "REFERENCES",
        "Bibliography",
        "Literature Cited",
        "Literaturverzeichnis",
        "Refer\u00eancias",
        "7 R\u00e9f\u00e9rences",
        "List of References",
        "7. References and Further Reading",
        "Selected Bibliography",
    ],
)
@pytest.mark.parametrize("title", [None, "A Proofs", "Appendix", "Supplementary Material", "A.1 Details of the Gel"])
def test_the_list_goes_and_the_appendix_stays(tmp_path: Path, heading: str, title: str | None) -> None:
    appendix = " ".join(make_words(90, seed=2))
    content = make_paper(heading, [(title, appendix)] if title else [])
    document = read(tmp_path, "a.pdf", content)
    intro = " ".join(make_words(80, seed=1))
    expected = ["1 Introduction", intro] + ([title, appendix] if title else [])
    assert document.text.split("\n\n") == expected
    assert document.num_reference_words == len(f"{heading} {' '.join(ENTRIES)}".split())
    kept = read(tmp_path, "a.pdf", content, references="keep")
    assert kept.num_reference_words == 0
    assert all(entry in kept.text.replace("\n", " ") for entry in ENTRIES)


def test_a_section_of_that_name_without_citations_stays(tmp_path: Path) -> None:
    words = " ".join(make_words(200, seed=4))
    text = f"Introduction\n\n{words}\n\nReferences\n\n{words}\n\nEnd."
    document = read(tmp_path, "a.txt", text.encode())
    assert document.text == text
    assert document.num_reference_words == 0


@pytest.mark.parametrize(
    ("name", "heading", "appendix"),
    [
        ("a.txt", "References", "Appendix A"),
        ("a.md", "## References", "## A closing word"),
        ("a.md", "## 5. References", "## Appendix"),
        (
            "a.md",
            "## \u0421\u043f\u0438\u0441\u043e\u043a \u043b\u0438\u0442\u0435\u0440\u0430\u0442\u0443\u0440\u044b",
            "## \u041f\u0440\u0438\u043b\u043e\u0436\u0435\u043d\u0438\u0435",
        ),
        ("a.html", "<h2>References</h2>", "<h2>A closing word</h2>"),
    ],
)
def test_text_and_pages_of_the_web_too(tmp_path: Path, name: str, heading: str, appendix: str) -> None:
    entries = "".join(f"<p>{entry}</p>" for entry in ENTRIES) if "html" in name else "\n".join(ENTRIES)
    text = f"Words come first.\n{heading}\n{entries}\n\n{appendix}\n\nMore words follow here."
    if "html" in name:
        text = f"<html><body>{text}</body></html>"
    document = read(tmp_path, name, text.encode())
    assert "Homint" not in document.text
    assert document.text.startswith("Words come first.")
    assert document.text.endswith("More words follow here.")
    assert document.num_reference_words > 40


def test_a_text_without_a_list_is_left_as_it_is(tmp_path: Path) -> None:
    text = "Words come first.\n\n```python\ndef f(x):\n    # References\n    return x\n```\n\nMore words."
    assert read(tmp_path, "a.md", text.encode()).text == text


MORE = [
    "[5] Q. Rinsol, S. Lo and K. Fugel, Phys. Rev. D 47, 777 (1935).",
    "[6] P. Ostnep and H. Com, eds., The Mur of Bako (Lo Press, Fu, 1987).",
    "[7] R. Kar, cond-mat/0506123 (2005).",
]
PROSE = " ".join(make_words(80, seed=1))
APPENDIX = " ".join(make_words(60, seed=3))


def numbered(form: str) -> list[str]:
    return [form.format(entry[1]) + entry[4:] for entry in [*ENTRIES, *MORE]]


@pytest.mark.parametrize("form", ["[{}] ", "{}. ", "{} ", "{}"])
@pytest.mark.parametrize("behind", [[], ["Appendix A: Proofs", APPENDIX]], ids=["at the end", "before an appendix"])
def test_a_list_without_a_heading_is_known_by_its_numbers_authors_and_years(
    tmp_path: Path, form: str, behind: list[str]
) -> None:
    entries = numbered(form)
    parts = ["1 Introduction", PROSE, *entries, *behind]
    document = read(tmp_path, "a.txt", "\n\n".join(parts).encode())
    assert document.text.split("\n\n") == ["1 Introduction", PROSE, *behind]
    assert document.num_reference_words == len(" ".join(entries).split())
    # Not a line of its own for each.
    text = "\n\n".join(["1 Introduction", PROSE, "\n".join(entries), *behind])
    assert read(tmp_path, "a.txt", text.encode()).text.split("\n\n") == ["1 Introduction", PROSE, *behind]


def test_in_a_pdf_what_a_page_parts_goes_and_a_table_between_entries_stays(tmp_path: Path) -> None:
    page, y = Page(), 720.0
    for text in (PROSE, *numbered("[{}] ")[:4]):
        before = len(page.lines)
        page.put_column(text.split(), 72, y, 468)
        y -= LEADING * 10 * (len(page.lines) - before) + 8
    second, y = Page(), 720.0
    for row in ("gel 1.5 2.5", "hom 3.5 4.5"):
        for column, cell in enumerate(row.split()):
            second.put(cell, 72 + 120 * column, y)
        y -= 12
    y -= 20
    for text in (*numbered("[{}] ")[4:], "Appendix", APPENDIX):
        before = len(second.lines)
        second.put_column(text.split(), 72, y, 468)
        y -= LEADING * 10 * (len(second.lines) - before) + 8
    document = read(tmp_path, "a.pdf", build_pdf([page, second]))
    assert document.text.split() == f"{PROSE} gel 1.5 2.5 hom 3.5 4.5 Appendix {APPENDIX}".split()


@pytest.mark.parametrize(
    "items",
    [
        [f"{number}. {' '.join(make_words(20, seed=number))}" for number in range(1, 9)],
        [f"{number}. In {1990 + number} the gel of homint was found to be {number} murnep." for number in range(1, 9)],
        [f"({number}) N. Ostper asked for more gel, and so did K. Murnep." for number in range(1, 9)],
        # Too few, and one that does not begin with the first.
        [f"[{number}] N. Ostper. A book of gel. 2019." for number in range(1, 4)],
        [f"[{number}] N. Ostper. A book of gel. 2019." for number in range(7, 16)],
    ],
    ids=["prose", "years", "names", "few", "not from the first"],
)
def test_other_numbered_lists_stay(tmp_path: Path, items: list[str]) -> None:
    text = "\n\n".join(["1 Introduction", PROSE, *items])
    assert read(tmp_path, "a.txt", text.encode()).text == text
