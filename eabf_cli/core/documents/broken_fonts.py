"""Signs of a font whose codes do not tell the letters: "di!culties", private characters inside words."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Punctuation within a lower-case word; what is common there (apostrophes, slashes, dots, colons, ...) is not listed.
_PUNCTUATION = re.compile(r"[A-Za-z][a-z]*[!\"#$%][a-z]{2,}[.,;:)]?")
_FOREIGN = "[\ufffd\ue000-\uf8ff]"
# In formulas such signs stand beside single letters.
_FOREIGN_IN_WORD = re.compile(
    rf"[a-z]{{2}}{_FOREIGN}[a-z]|[A-Za-z]{_FOREIGN}[a-z]{{2}}|^{_FOREIGN}[a-z]{{3}}|[a-z]{{3}}{_FOREIGN}$"
)
# An accent of its own between letters, which belongs on one of them; hats and tildes stand so in formulas.
_LOOSE_ACCENT = re.compile(r"[a-z][\u00b4\u00a8\u00b8\u02c7\u02d8\u02da\u02dd][a-z\u0131]", re.IGNORECASE)
_BULLETS = dict.fromkeys((0xF0A7, 0xF0B7), "\u2022")
# One such word may be meant.
_MIN_WORDS = 2


def describe_broken_fonts(pages: Sequence[tuple[int, str]]) -> list[str]:
    """Warnings about words that a font's map has spoiled.

    Args:
        pages: each page's number (from 1) and its text.
    """
    spoiled = [(word, number) for number, text in pages for word in text.split() if _is_spoiled(word)]
    if len(spoiled) < _MIN_WORDS:
        return []
    word, number = spoiled[0]
    on_pages = len({number for _, number in spoiled})
    return [
        f"{len(spoiled):,} words on {on_pages:,} page{'s' * (on_pages > 1)} have wrong letters, the first is {word!r} "
        f"on page {number}: a font of this PDF does not say what its signs mean; another copy of the document may"
    ]


def _is_spoiled(word: str) -> bool:
    if _FOREIGN_IN_WORD.search(word) is not None or _LOOSE_ACCENT.search(word) is not None:
        return True
    return _PUNCTUATION.fullmatch(word) is not None


def without_foreign_signs(word: str) -> str:
    """A word without signs that have no meaning outside their font, such as the parts of large brackets.

    In a word of letters they stay: the reader sees that something is missing. The bullets of two common fonts become
    bullets.
    """
    if word.isascii():
        return word
    word = word.translate(_BULLETS)
    return word if _FOREIGN_IN_WORD.search(word) else re.sub(_FOREIGN, "", word)
