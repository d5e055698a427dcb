"""The demo model's text: which Debian packages it comes from, and how each becomes plain paragraphs.

Packages are fetched with `apt-get download` and unpacked with `dpkg -x`, so nothing is installed.
"""

import gzip
import hashlib
import html.parser
import json
import os
import re
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class Source:
    """One body of text. `weight` times the square root of its size is its share of the sampled text."""

    name: str
    packages: tuple[str, ...]
    licence: str
    weight: float
    extract: Callable[[Path], Iterator[str]]
    max_bytes: int | None = None


def austen_paragraphs(root: Path) -> Iterator[str]:
    """Jane Austen's six novels from an R lazy-load database: length-prefixed zlib blocks of R strings."""
    data = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    while data:
        block = zlib.decompressobj()
        serialized = block.decompress(data[4:])  # four bytes before each block give its unpacked size
        data = block.unused_data
        yield from _join_lines(_r_strings(serialized))


def bible_paragraphs(root: Path) -> Iterator[str]:
    """The King James Bible, one paragraph a chapter, without verse numbers, from the `bible` program."""
    program = root / "usr/bin/bible"
    printed = subprocess.run(
        [program, "-p", f"{root / 'usr/lib'}/", "-f", "Gen1:1-Rev22:21"],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100000"},
    ).stdout
    chapter, verses = "", []
    for line in printed.splitlines():
        match = re.match(r"(\w+?\d+):\d+ +(.*)", line.strip())
        if not match:
            continue
        if match[1] != chapter and verses:
            yield " ".join(verses)
            verses = []
        chapter = match[1]
        verses.append(match[2])
    if verses:
        yield " ".join(verses)


def html_paragraphs(folder: str) -> Callable[[Path], Iterator[str]]:
    """An extractor for the HTML pages under `folder` of the package, in order of their names."""

    def extract(root: Path) -> Iterator[str]:
        for page in sorted((root / folder).rglob("*.html")):
            parser = _ParagraphParser()
            parser.feed(page.read_text(encoding="utf-8", errors="replace"))
            yield from parser.paragraphs()

    return extract


def dictionary_paragraphs(root: Path) -> Iterator[str]:
    """The entries of a dictd dictionary; its `.dz` file is readable as gzip."""
    with gzip.open(root / "usr/share/dictd/gcide.dict.dz", "rt", encoding="utf-8", errors="replace") as lines:
        yield from _join_lines(line.strip() for line in lines)


SOURCES: tuple[Source, ...] = (
    Source(
        name="austen",
        packages=("r-cran-janeaustenr",),
        licence="public domain (six novels by Jane Austen)",
        weight=6,
        extract=austen_paragraphs,
    ),
    Source(
        name="bible",
        packages=("bible-kjv", "bible-kjv-text"),
        licence="public domain (King James Version)",
        weight=4,
        extract=bible_paragraphs,
    ),
    Source(
        name="anarchism",
        packages=("anarchism",),
        licence="GPL-2",
        weight=1.5,
        extract=html_paragraphs("usr/share/doc/anarchism/html"),
        max_bytes=6_000_000,
    ),
    Source(
        name="handbook",
        packages=("debian-handbook",),
        licence="GPL-2+ or CC-BY-SA-3.0",
        weight=1.5,
        extract=html_paragraphs("usr/share/doc/debian-handbook/html/en-US"),
    ),
    Source(
        name="gcide",
        packages=("dict-gcide",),
        licence="GPL-2+",
        weight=1,
        extract=dictionary_paragraphs,
        max_bytes=8_000_000,
    ),
    Source(
        name="postgresql",
        packages=("postgresql-doc-15",),
        licence="PostgreSQL licence",
        weight=0.7,
        extract=html_paragraphs("usr/share/doc/postgresql-doc-15/html"),
        max_bytes=5_000_000,
    ),
    Source(
        name="sqlite",
        packages=("sqlite3-doc",),
        licence="public domain (SQLite documentation)",
        weight=0.5,
        extract=html_paragraphs("usr/share/doc/sqlite3"),
        max_bytes=3_000_000,
    ),
    Source(
        name="python",
        packages=("python3.11-doc",),
        licence="PSF licence",
        weight=0.6,
        extract=html_paragraphs("usr/share/doc/python3.11/html"),
        max_bytes=4_000_000,
    ),
)


def build_corpus(work_dir: Path) -> None:
    """Write `text/NAME.train.txt`, `text/NAME.heldout.txt` and `text/sources.json` under `work_dir`.

    The last 5 % of each source's paragraphs (by size) are held out. A source whose two files exist is kept.
    """
    text_dir = work_dir / "text"
    text_dir.mkdir(parents=True, exist_ok=True)
    record = {}
    for source in SOURCES:
        root, archives = _unpack(source, work_dir)
        train, held_out = (text_dir / f"{source.name}.{split}.txt" for split in ("train", "heldout"))
        if not (train.exists() and held_out.exists()):
            paragraphs = _clip(source.extract(root), source.max_bytes)
            head, tail = split_held_out(paragraphs)
            _write(held_out, "\n\n".join(tail) + "\n")
            _write(train, "\n\n".join(head) + "\n")
        record[source.name] = {
            "licence": source.licence,
            "weight": source.weight,
            "archives": archives,
            "bytes": {"train": train.stat().st_size, "heldout": held_out.stat().st_size},
        }
    _write(text_dir / "sources.json", json.dumps(record, indent=2) + "\n")


def source_text(name: str, work_dir: Path) -> str:
    """The text of one source, fetched and unpacked under `work_dir` if it is not there yet.

    Raises:
        KeyError: no such source.
    """
    source = {source.name: source for source in SOURCES}[name]
    root, _ = _unpack(source, work_dir)
    return "\n\n".join(_clip(source.extract(root), source.max_bytes))


def split_held_out(paragraphs: list[str], share: float = HELD_OUT_SHARE) -> tuple[list[str], list[str]]:
    """Split so that the second part is the last `share` of the text, cut between two paragraphs."""
    remaining = share * sum(map(len, paragraphs))
    cut = len(paragraphs)
    while cut > 0 and remaining > 0:
        cut -= 1
        remaining -= len(paragraphs[cut])
    return paragraphs[:cut], paragraphs[cut:]


def _unpack(source: Source, work_dir: Path) -> tuple[Path, dict[str, dict[str, str]]]:
    """Where a source's packages are unpacked, and what `_fetch` tells of each."""
    root = work_dir / "unpacked" / source.name
    return root, {package: _fetch(package, work_dir / "debs", root) for package in source.packages}


def _fetch(package: str, archive_dir: Path, root: Path) -> dict[str, str]:
    """Download and unpack one package unless that is done already; its file name and SHA-256."""
    archive_dir.mkdir(parents=True, exist_ok=True)
    if not any(archive_dir.glob(f"{package}_*.deb")):
        command = ["apt-get", "download", package]
        subprocess.run(command, check=True, cwd=archive_dir, stdout=subprocess.DEVNULL)
    archive = next(iter(sorted(archive_dir.glob(f"{package}_*.deb"))))
    marker = root / f".{archive.name}.unpacked"
    if not marker.exists():
        root.mkdir(parents=True, exist_ok=True)
        subprocess.run(["dpkg", "-x", archive, root], check=True)
        marker.touch()
    return {"file": archive.name, "sha256": hashlib.sha256(archive.read_bytes()).hexdigest()}


def _clip(paragraphs: Iterator[str], max_bytes: int | None) -> list[str]:
    kept, size = [], 0
    for paragraph in paragraphs:
        kept.append(paragraph)
        size += len(paragraph.encode())
        if max_bytes is not None and size >= max_bytes:
            break
    return kept


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _r_strings(serialized: bytes) -> Iterator[str]:
    """The strings of one serialized R character vector (XDR format): type word, length, bytes."""
    is_string = 9
    for match in re.finditer(rb"\x00[\x00-\x04][\x00\x40\x80]\x09", serialized):
        (length,) = struct.unpack_from(">i", serialized, match.end())
        if serialized[match.start() + 3] == is_string and 0 <= length < 10_000:
            text = serialized[match.end() + 4 : match.end() + 4 + length]
            yield text.decode("utf-8", errors="replace")


def _join_lines(lines: Iterator[str]) -> Iterator[str]:
    """Paragraphs from lines: an empty line ends one, other line breaks become spaces."""
    pending: list[str] = []
    for line in lines:
        if line.strip():
            pending.append(line.strip())
        elif pending:
            yield " ".join(pending)
            pending = []
    if pending:
        yield " ".join(pending)


class _ParagraphParser(html.parser.HTMLParser):
    """Collects the text of an HTML page, one paragraph for each block element."""

    _BLOCKS = frozenset(
        [
            "p",
            "div",
            "li",
            "ul",
            "ol",
            "dl",
            "dt",
            "dd",
            "table",
            "tr",
            "pre",
            "blockquote",
            "section",
            "br",
            "hr",
            "h1",
            "h2",
            "h3",
            "h4",
            "h5",
            "h6",
        ]
    )
    _SKIPPED = frozenset(("script", "style", "head", "nav", "svg"))

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[str] = []
        self._skipping = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._skipping += tag in self._SKIPPED
        if tag in self._BLOCKS:
            self._parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        self._skipping -= tag in self._SKIPPED and self._skipping > 0
        if tag in self._BLOCKS:
            self._parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self._parts.append(re.sub(r"\s+", " ", data))

    def paragraphs(self) -> Iterator[str]:
        for block in "".join(self._parts).split("\n\n"):
            if text := re.sub(r" +", " ", block).strip():
                yield text
