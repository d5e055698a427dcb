"""What a file is, by its first bytes; and its bytes as text."""

from __future__ import annotations

import codecs
import io
import re
import zipfile
from pathlib import PurePath
from shlex import quote

from eabf_cli.core.documents.document import DocumentError, NoTextError
from eabf_cli.core.documents.encodings import guess_encoding

HEAD_BYTES = 4096
STDIN_NAME = "standard input"

_PDF_WAY_OUT = "save it as PDF or text first"
_IMAGE_WAY_OUT = "there is no text in it to read, and OCR is out of scope"
_ARCHIVE_WAY_OUT = "unpack it first"
# First bytes, what they are a sign of, the way out.
_SIGNATURES = (
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a document of an old Microsoft Office", _PDF_WAY_OUT),
    (b"{\\rtf", "an RTF document", _PDF_WAY_OUT),
    (b"%!PS", "a PostScript file", "convert it with ps2pdf first"),
    (b"AT&TFORM", "a DjVu file", _PDF_WAY_OUT),
    (b"\x89PNG", "a PNG picture", _IMAGE_WAY_OUT),
    (b"\xff\xd8\xff", "a JPEG picture", _IMAGE_WAY_OUT),
    (b"GIF8", "a GIF picture", _IMAGE_WAY_OUT),
    (b"II*\x00", "a TIFF picture", _IMAGE_WAY_OUT),
    (b"MM\x00*", "a TIFF picture", _IMAGE_WAY_OUT),
    (b"\x1f\x8b", "a gzip archive", _ARCHIVE_WAY_OUT),
    (b"BZh", "a bzip2 archive", _ARCHIVE_WAY_OUT),
    (b"\xfd7zXZ\x00", "an xz archive", _ARCHIVE_WAY_OUT),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", _ARCHIVE_WAY_OUT),
    (b"7z\xbc\xaf", "a 7z archive", _ARCHIVE_WAY_OUT),
    (b"Rar!", "a RAR archive", _ARCHIVE_WAY_OUT),
    (b"\x7fELF", "a program", "give a document"),
    (b"GGUF", "a GGUF model", "models are given with -m"),
    (b"SQLite format 3\x00", "an SQLite database", "give a document"),
)
# A member of a zip archive that tells what the archive is.
_ZIP_KINDS = (
    ("word/", "a Word document (.docx)"),
    ("ppt/", "a PowerPoint presentation (.pptx)"),
    ("xl/", "an Excel workbook (.xlsx)"),
    ("META-INF/container.xml", "an e-book (.epub)"),
    ("content.xml", "an OpenDocument file"),
)
# Other bytes may stand before it, but no words of a line that speaks of it.
_PDF = re.compile(rb"(?<![ -~])%PDF-")
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    # The mark of UTF-32 begins with that of UTF-16.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_HTML = re.compile(
    rb"\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body)[\s>]", re.IGNORECASE | re.DOTALL
)
_CHARSET = re.compile(rb"""<(?:meta|\?xml)[^>]*?(?:charset|encoding)\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE)
_SUFFIXES = {".html": "html", ".htm": "html", ".xhtml": "html", ".md": "markdown", ".markdown": "markdown"}


def find_kind(head: bytes, suffix: str, name: str) -> str:
    """What a document is: "pdf", "html", "markdown" or "text"; its bytes count for more than its name.

    Args:
        head: the first `HEAD_BYTES` bytes, or all of a shorter document.
        suffix: of the file's name, with its dot, in lower case.

    Raises:
        NoTextError: nothing is in it.
        DocumentError: another kind of file.
    """
    if not head.strip():
        raise NoTextError(f"{name} is empty: no text in it")
    if _PDF.search(head[:1024]):
        return "pdf"
    if head.startswith(b"PK\x03\x04"):
        raise DocumentError(f"{name} is a zip archive, or a document in one, whatever its name says: {_PDF_WAY_OUT}")
    for signature, kind, way_out in _SIGNATURES:
        if head.startswith(signature):
            raise DocumentError(f"{name} is {kind}: {way_out}")
    is_html = _HTML.match(head) is not None
    if suffix == ".pdf":
        found = "an HTML page" if is_html else "a binary file" if _is_binary(head) else "plain text"
        way_out = "get the file again" if is_html or _is_binary(head) else "rename it to .txt to have it read as text"
        raise DocumentError(f"{name} is no PDF but {found}: {way_out}")
    if _is_binary(head):
        raise DocumentError(f"{name} is a binary file of an unknown kind: give a PDF, HTML, Markdown or text file")
    return "html" if is_html else _SUFFIXES.get(suffix, "text")


def describe_zip(data: bytes) -> str | None:
    """What document a zip archive is; None for an archive of something else."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.namelist()
    except zipfile.BadZipFile:
        return None
    return next((kind for part, kind in _ZIP_KINDS if any(member.startswith(part) for member in members)), None)


def decode_text(data: bytes, name: str) -> str:
    """A text file's text.

    Raises:
        DocumentError: it is not UTF-8; the message names the encoding that it seems to have.
    """
    try:
        if _looks_like_utf16(data[:HEAD_BYTES]):
            # Without its mark, UTF-16 of English text is UTF-8 with zeros.
            raise UnicodeDecodeError("utf-8", data, data.index(0), data.index(0) + 1, "zero")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DocumentError(_describe_encoding(data, name, error)) from None


def decode_html(data: bytes, name: str) -> str:
    """An HTML page's text, in the encoding that its mark or its head gives, UTF-8 without either.

    Raises:
        DocumentError: it is not of that encoding.
    """
    encoding = _marked_encoding(data)
    if encoding is None:
        declared = _CHARSET.search(data[:HEAD_BYTES])
        encoding = declared[1].decode("ascii") if declared else "utf-8"
        # A head that can be read as ASCII is not UTF-16, whatever it says; browsers take latin-1 for cp1252.
        encoding = {"utf-16": "utf-8", "iso-8859-1": "cp1252", "latin1": "cp1252", "us-ascii": "cp1252"}.get(
            encoding.lower(), encoding
        )
    try:
        return data.decode(encoding)
    except LookupError:
        return decode_text(data, name)
    except UnicodeDecodeError as error:
        if encoding in ("cp1252", "windows-1252"):
            return data.decode("cp1252", "replace")
        raise DocumentError(_describe_encoding(data, name, error)) from None


def _is_binary(head: bytes) -> bool:
    if _marked_encoding(head):
        return False
    # Zeros in every second place are UTF-16 without a mark.
    if head.count(0) and not _looks_like_utf16(head):
        return True
    controls = sum(byte < 9 or 13 < byte < 27 for byte in head if byte)
    return controls > 0.05 * len(head)


def _looks_like_utf16(head: bytes) -> bool:
    num_zeros = sorted((head[::2].count(0), head[1::2].count(0)))
    # A file of zeros is what a copy leaves that failed.
    return num_zeros[1] > 0.3 * len(head) and num_zeros[0] < 0.05 * len(head)


def _marked_encoding(data: bytes) -> str | None:
    return next((encoding for mark, encoding in _MARKS if data.startswith(mark)), None)


def _describe_encoding(data: bytes, name: str, error: UnicodeDecodeError) -> str:
    # utf-8-sig counts from behind the mark that it takes off.
    start = len(data) - len(error.object) + error.start
    found = f"{name} is not {error.encoding.upper()} text (byte 0x{data[start]:02x} at {start:,})"
    guessed = _guess_encoding(data)
    if guessed is None:
        return f"{found}, nor of an encoding that can be guessed: save it as UTF-8"
    if name == STDIN_NAME:
        return f"{found}, it seems to be {guessed}; pipe it through: iconv -f {guessed} -t utf-8"
    command = f"iconv -f {guessed} -t utf-8 {quote(name)} > {quote(PurePath(name).stem + '-utf8.txt')}"
    return f"{found}, it seems to be {guessed}; convert it:\n{command}"


def _guess_encoding(data: bytes) -> str | None:
    """The encoding as iconv calls it."""
    marked = _marked_encoding(data)
    if marked not in (None, "utf-8-sig"):
        return str(marked).upper()
    if _looks_like_utf16(data[:HEAD_BYTES]):
        return "UTF-16BE" if data[::2].count(0) > data[1::2].count(0) else "UTF-16LE"
    return guess_encoding(data)
