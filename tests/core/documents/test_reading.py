"""Which documents are read, which are refused, and how."""

from __future__ import annotations

import io
import os
import re
import sys
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reportlab.lib.utils import ImageReader
from reportlab.pdfgen.canvas import Canvas

from eabf_cli.core.documents import (
    DocumentError,
    DocumentTooLongError,
    LockedDocumentError,
    NoTextError,
    read_document,
)
from eabf_cli.core.errors import EabfError, InvalidConfigError
from tests.core.documents.pdf_builder import UNICODE_FONT, Page, build_pdf, make_words

PAGE = Page()
PAGE.put("Words of murnep.", 72, 700)
PDF = build_pdf([PAGE])
RUSSIAN = (
    "В этой статье мы рассматриваем способ, которым языковая модель читает длинные тексты. Сначала описан"
    "ы данные, затем приведены опыты и, наконец, сделаны выводы. Каждый опыт повторён трижды, чтобы оцени"
    "ть разброс."
)
HTML = b"<!DOCTYPE html><html><head><title>Gel</title></head><body><p>Words of murnep.</p></body></html>"


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def zip_of(*members: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for member in members:
            archive.writestr(member, "x")
    return buffer.getvalue()


def picture_pdf(num_pages: int, *, stamps: Sequence[str] = (), written: Sequence[int] = ()) -> bytes:
    """Pictures as large as the page, with a few words of text on each; `{}` is the page's number, `{word}` its word.

    Args:
        written: pages (from 1) of text instead.
    """
    from PIL import Image

    buffer = io.BytesIO()
    canvas = Canvas(buffer, invariant=True)
    for number in range(1, num_pages + 1):
        if number in written:
            canvas.drawString(72, 500, f"Words of page {number} of murnep.")
        else:
            canvas.drawImage(ImageReader(Image.new("RGB", (40, 40), "gray")), 0, 0, 595, 842)
        for row, stamp in enumerate(stamps):
            canvas.drawString(290, 20 + 14 * row, stamp.format(number + 6, word=make_words(1, seed=number)[0]))
        canvas.showPage()
    canvas.save()
    return buffer.getvalue()


def test_what_a_server_adds_behind_a_pdf_is_no_damage(tmp_path: Path) -> None:
    added = PDF + b"\n" + b"<!-- cached -->\n" * 1000
    assert read_document(write(tmp_path / "a.pdf", added)).text == read_document(write(tmp_path / "b.pdf", PDF)).text
    # Unlike the beginning of a file that is made for the web, whose objects go on behind the mark.
    cut = PDF + b"\n7 0 obj\n<< /Length 9 >>\nstream\n" + b"x" * 900
    with pytest.raises(DocumentError, match="cut off"):
        read_document(write(tmp_path / "c.pdf", cut))


@pytest.mark.parametrize("separator", ["\x0b", "\x0c", "\n\x0c", "\x1c", "\x85"])
def test_words_that_a_control_character_parts_stay_apart(tmp_path: Path, separator: str) -> None:
    document = read_document(write(tmp_path / "a.txt", f"One{separator}two.".encode()))
    assert document.text.split() == ["One", "two."]
    assert not set(document.text) - set("One two.\n")


@pytest.mark.parametrize("num_pages", [1, 2, 8])
@pytest.mark.parametrize("stamps", [["{}"], ["Digitized by Gel", "- {} -"]], ids=["page numbers", "stamps"])
def test_a_scan_with_page_numbers_has_no_text_layer(tmp_path: Path, num_pages: int, stamps: list[str]) -> None:
    if num_pages == 1 and len(stamps) > 1:
        # Of one page it cannot be told from a caption.
        assert read_document(write(tmp_path / "a.pdf", picture_pdf(1, stamps=stamps))).text
        return
    path = write(tmp_path / "a.pdf", picture_pdf(num_pages, stamps=stamps))
    with pytest.raises(NoTextError, match="no text layer"):
        read_document(path)


def test_scanned_pages_with_page_numbers_among_others_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pdf", picture_pdf(4, stamps=["{}"], written=(1, 3)))
    document = read_document(path)
    assert document.text.split("\n\n") == ["Words of page 1 of murnep.", "Words of page 3 of murnep."]
    assert "2 of 4 pages have no text (pages 2, 4)" in document.warnings[0]


def test_words_on_a_picture_that_differ_are_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pdf", picture_pdf(3, stamps=["{}", "Picture of {word}"]))
    assert read_document(path).text.count("Picture of") == 3


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.pdf", PDF, "pdf"),
        ("a.txt", PDF, "pdf"),
        ("a", PDF, "pdf"),
        ("a.html", HTML, "html"),
        ("a.txt", HTML, "html"),
        ("a.HTM", b"<p>Words of murnep.</p>", "html"),
        ("a.md", b"Words of murnep.", "markdown"),
        ("a.txt", b"Words of murnep.\r\n", "text"),
        ("a.txt", b"\0HTTP/1.1 200 OK\r\n\r\n" + PDF, "pdf"),
        ("a.rst", b"\xef\xbb\xbfWords of murnep.", "text"),
        ("K\u00e4se und \u8336 (2).pdf", PDF, "pdf"),
    ],
)
def test_bytes_tell_the_kind_before_the_name(tmp_path: Path, name: str, content: bytes, kind: str) -> None:
    document = read_document(write(tmp_path / name, content))
    assert (document.kind, document.text) == (kind, "Words of murnep.")
    assert (document.num_pages is None) == (kind != "pdf")


@pytest.mark.parametrize(("content", "kind"), [(PDF, "pdf"), (HTML, "html"), (b"Words of murnep.", "text")])
def test_standard_input_is_read_by_its_bytes(monkeypatch: pytest.MonkeyPatch, content: bytes, kind: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    document = read_document("-")
    assert (document.kind, document.text) == (kind, "Words of murnep.")


def test_standard_input_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(DocumentError, match="standard input is closed"):
        read_document("-")
    only_written = os.open(tmp_path / "a", os.O_WRONLY | os.O_CREAT)
    with os.fdopen(only_written, "rb") as file:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
        with pytest.raises(DocumentError, match="standard input cannot be read: Bad file descriptor"):
            read_document("-")


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(PDF,))
    writer.start()
    assert read_document(pipe).text == "Words of murnep."
    writer.join()


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        (
            "a.pdf",
            build_pdf([PAGE], password="key"),
            LockedDocumentError,
            "encrypted: give its password with --password",
        ),
        ("a.pdf", picture_pdf(1), NoTextError, r"no text layer .* OCR is out of scope"),
        ("a.pdf", picture_pdf(3), NoTextError, r"its 3 pages are pictures"),
        ("a.pdf", PDF[:-200], DocumentError, "cut off"),
        ("a.pdf", PDF[: len(PDF) // 2], DocumentError, "cut off|damaged"),
        ("a.pdf", b"%PDF-1.7", DocumentError, "damaged"),
        ("a.pdf", b"plain words", DocumentError, "no PDF but plain text: rename it to .txt"),
        ("a.pdf", HTML, DocumentError, "no PDF but an HTML page: get the file again"),
        ("a.pdf", bytes(range(256)), DocumentError, "no PDF but a binary file"),
        ("a.pdf", zip_of("word/document.xml"), DocumentError, r"a Word document \(.docx\).* save it as PDF or text"),
        ("a.txt", zip_of("ppt/slides.xml"), DocumentError, r"PowerPoint"),
        ("a.txt", zip_of("something"), DocumentError, "zip archive"),
        ("a.doc", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), DocumentError, "old Microsoft Office"),
        ("a.txt", b"{\\rtf1 words}", DocumentError, "RTF"),
        ("a.png", b"\x89PNG\r\n\x1a\n" + bytes(99), DocumentError, "PNG picture"),
        ("a.bin", bytes(range(256)) * 9, DocumentError, "binary file"),
        # A copy that failed.
        ("a.txt", bytes(5000), DocumentError, "binary file"),
        ("a.pdf", bytes(5000), DocumentError, "no PDF but a binary file"),
        ("a.txt", b"", NoTextError, "is empty"),
        ("a.pdf", b"", NoTextError, "is empty"),
        ("a.txt", b" \n\t", NoTextError, "is empty"),
        ("a.html", b"<html><script>x</script></html>", NoTextError, "is empty"),
    ],
)
def test_what_cannot_be_read_says_why_and_the_way_out(
    tmp_path: Path, name: str, content: bytes, error: type[EabfError], message: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(error, match=message) as refused:
        read_document(path)
    assert str(path) in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 3


def test_a_pdf_without_pages_is_refused(tmp_path: Path) -> None:
    from tests.core.data.pdf_files import make_pdf

    with pytest.raises(DocumentError, match="has no page"):
        read_document(write(tmp_path / "a.pdf", make_pdf([])))


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"missing\.pdf does not exist"):
        read_document(tmp_path / "missing.pdf")
    with pytest.raises(DocumentError, match=r"https://a\.example/b\.pdf is an address, .* download it first"):
        read_document("https://a.example/b.pdf")
    with pytest.raises(DocumentError, match="name of a file is empty"):
        read_document("")
    with pytest.raises(DocumentError, match="is a folder"):
        read_document(tmp_path)
    with pytest.raises(DocumentError, match="cannot be read"):
        read_document("a\0b")


@pytest.mark.parametrize(
    ("text", "encoding", "guess"),
    [
        ("Der K\u00e4se schmeckt \u00fcberall gut, wei\u00df man in K\u00f6ln und anderswo. " * 9, "cp1252", "CP1252"),
        (
            RUSSIAN,
            "koi8-r",
            "KOI8-R",
        ),
        ("Words of murnep. " * 9, "utf-16", "UTF-16"),
        ("Words of murnep. " * 9, "utf-16-le", "UTF-16LE"),
    ],
)
def test_text_in_another_encoding_names_it(tmp_path: Path, text: str, encoding: str, guess: str) -> None:
    path = write(tmp_path / "my notes.txt", text.encode(encoding))
    with pytest.raises(DocumentError, match=rf"not UTF-8 text .*seems to be {guess}") as refused:
        read_document(path)
    command = re.search(r"iconv -f (\S+) -t utf-8 '(.*)' > 'my notes-utf8.txt'", str(refused.value))
    assert command is not None
    assert command[2] == str(path)
    assert text.encode(encoding).decode(command[1]) == text


def test_a_text_that_speaks_of_pdf_is_text(tmp_path: Path) -> None:
    text = "A file of this kind begins with %PDF-1.7 and ends with %%EOF."
    assert read_document(write(tmp_path / "a.txt", text.encode())).text == text


def test_an_html_page_says_its_encoding(tmp_path: Path) -> None:
    page = '<html><head><meta charset="{}"></head><body>K\u00e4se</body></html>'
    for encoding in ("utf-8", "iso-8859-1", "windows-1252", "shift_jis"):
        text = page.format(encoding).replace("K\u00e4se", "\u8336" if encoding == "shift_jis" else "K\u00e4se")
        path = write(tmp_path / "a.html", text.encode(encoding))
        assert read_document(path).text in ("K\u00e4se", "\u8336")
    assert read_document(write(tmp_path / "a.html", page.format("x").encode("utf-16"))).text == "K\u00e4se"


def test_a_password_opens_what_is_encrypted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pdf", build_pdf([PAGE], password="schl\u00fcssel"))
    assert read_document(path, password="schl\u00fcssel").text == "Words of murnep."
    with pytest.raises(LockedDocumentError, match="password is wrong"):
        read_document(path, password="other")


def test_pages_are_chosen(tmp_path: Path) -> None:
    pages = []
    for number in range(1, 7):
        page = Page()
        page.put(f"This is page {'abcdef'[number - 1]}.", 72, 400)
        pages.append(page)
    path = write(tmp_path / "a.pdf", build_pdf(pages))
    document = read_document(path, pages="2-3,6")
    assert document.text.split("\n\n") == ["This is page b.", "This is page c.", "This is page f."]
    assert (document.num_pages, document.num_pages_in_file) == (3, 6)
    with pytest.raises(InvalidConfigError, match="has 6 pages"):
        read_document(path, pages="7")
    with pytest.raises(InvalidConfigError, match="has no pages, only PDF files have"):
        read_document(write(tmp_path / "a.txt", b"words"), pages="1")


def test_a_title_is_what_the_file_says(tmp_path: Path) -> None:
    assert read_document(write(tmp_path / "a.pdf", build_pdf([PAGE], title="On Gel"))).title == "On Gel"
    assert read_document(write(tmp_path / "a.pdf", PDF)).title is None
    assert read_document(write(tmp_path / "a.html", HTML)).title == "Gel"


def test_a_long_book_is_refused_by_five_of_its_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eabf_cli.core.documents import words

    page = Page()
    page.put_column(make_words(150, seed=1), 72, 700, 468)
    path = write(tmp_path / "book.pdf", build_pdf([page] * 300))
    opened = []
    real = words.read_words
    monkeypatch.setattr(words, "read_words", lambda document, index: opened.append(index) or real(document, index))
    with pytest.raises(DocumentTooLongError, match="300 pages with about 45,000 words, at most 10,000") as refused:
        read_document(path, max_words=10_000)
    assert (refused.value.num_pages, refused.value.num_words, refused.value.is_estimate) == (300, 45_000, True)
    assert opened == [30, 90, 150, 210, 270]
    assert read_document(path, max_words=10_000, pages="100-110").num_pages == 11


def test_the_exact_number_of_words_decides_where_the_estimate_does_not(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"one two three")
    assert read_document(path, max_words=3).num_words == 3
    with pytest.raises(DocumentTooLongError, match="has 3 words, at most 2") as refused:
        read_document(path, max_words=2)
    assert not refused.value.is_estimate


def test_no_control_character_is_left_and_lines_end_in_one_way(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"one\r\ntwo\x00\x1b[0m\rthree\x7f\n\n\n  \nfour\tfive\x0c")
    # A zero in text is a sign of a binary file, unless there is one alone.
    with pytest.raises(DocumentError, match="binary"):
        read_document(path)
    path = write(tmp_path / "a.txt", b"one\r\ntwo\x1b[0m\rthree\x7f\n\n\n  \nfour\tfive\x0c")
    assert read_document(path).text == "one\ntwo[0m\nthree\n\nfour\tfive"


# What the font has, but signs that combine with others or are taken for invisible.
LETTERS = st.characters(
    codec="utf-8",
    max_codepoint=0x2BFF,
    categories=("L", "N", "P", "Sm", "So"),
    exclude_characters="\u00ad-\u2010\u2011",
).filter(lambda character: ord(character) < 0x530 or ord(character) >= 0x2000)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(st.text(LETTERS, min_size=1, max_size=9), min_size=1, max_size=120))
def test_any_text_in_a_column_comes_back_in_order(tmp_path: Path, words: list[str]) -> None:
    from reportlab.pdfbase import pdfmetrics

    known = pdfmetrics.getFont(UNICODE_FONT).face.charToGlyph
    words = [word for word in ("".join(c for c in word if ord(c) in known) for word in words) if word]
    page = Page()
    if not words:
        return
    page.put_column(words, 72, 600, 300, font=UNICODE_FONT)
    path = write(tmp_path / "a.pdf", build_pdf([page]))
    found = read_document(path, references="keep").text
    assert "".join(found.split()) == "".join(words)
