from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from eabf_cli.core.data.parsing import EmptyRecordError
from eabf_cli.core.data.pdf import check_pdf, read_pdf
from eabf_cli.core.errors import DataError
from tests.core.data.pdf_files import make_pdf

PAGES = [["It is an exam-", "ple of two-way", "traffic."], [], ["The second page."]]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_pages_follow_each_other_and_words_broken_at_a_line_end_are_joined(tmp_path: Path) -> None:
    path = write(tmp_path / "paper.pdf", make_pdf(PAGES))
    check_pdf(path)
    assert read_pdf(path) == "It is an example of two-way traffic.\n\nThe second page."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (make_pdf(PAGES, is_encrypted=True), "is encrypted: save a copy without a password"),
        (make_pdf(PAGES)[:300], "damaged"),
        (b"", "damaged|is empty"),
        (b"%PDF-1.7 but no more", "damaged"),
        (make_pdf([]), "has no page"),
    ],
    ids=["encrypted", "cut off", "empty", "other", "no page"],
)
@pytest.mark.parametrize("read", [check_pdf, read_pdf])
def test_a_pdf_that_cannot_be_read_says_why(tmp_path: Path, read: object, content: bytes, message: str) -> None:
    path = write(tmp_path / "paper.pdf", content)
    with pytest.raises(DataError, match=message) as refused:
        read(path)  # type: ignore[operator]
    assert str(path) in str(refused.value)


def test_why_a_pdf_is_refused_does_not_depend_on_the_one_before(tmp_path: Path) -> None:
    locked = write(tmp_path / "locked.pdf", make_pdf(PAGES, is_encrypted=True))
    no_page = write(tmp_path / "none.pdf", make_pdf([]))
    for path, message in ((locked, "encrypted"), (no_page, "no page"), (locked, "encrypted")):
        with pytest.raises(DataError, match=message):
            check_pdf(path)


@pytest.mark.parametrize("read", [check_pdf, read_pdf])
def test_a_scan_has_no_text_layer(tmp_path: Path, read: object) -> None:
    path = write(tmp_path / "scan.pdf", make_pdf([[], []]))
    with pytest.raises(EmptyRecordError, match="no text layer"):
        read(path)  # type: ignore[operator]


def test_threads_read_one_after_another(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{number}.pdf", make_pdf([[f"Number {number}."]] * 5)) for number in range(8)]
    with ThreadPoolExecutor(8) as threads:
        texts = list(threads.map(read_pdf, paths))
    assert texts == ["\n\n".join([f"Number {number}."] * 5) for number in range(8)]
