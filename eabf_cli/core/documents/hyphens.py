"""Words broken at a line's end, made whole."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from eabf_cli.core.documents.words import LINE_END_HYPHEN

_WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")
_BROKEN_END = re.compile(rf"((?:[^\W_]+-)*[^\W_]+)[-{LINE_END_HYPHEN}]$")
_BEGINNING = re.compile(r"[^\W_]+")


class Hyphenation:
    """Decides by the document's own words whether a hyphen at a line's end belongs to the word.

    Args:
        lines: all lines of the document.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self._counts: Counter[str] = Counter()
        for line in lines:
            # Words that a line's end breaks are what is in question.
            words = _WORD.findall(line.lower())
            if line.endswith(("-", LINE_END_HYPHEN)):
                words = words[:-1]
            self._counts.update(words)

    def join(self, lines: Sequence[str]) -> str:
        """One text from a paragraph's lines."""
        text = lines[0]
        for line in lines[1:]:
            text = self._join(text, line)
        return text.replace(LINE_END_HYPHEN, "-")

    def _join(self, text: str, line: str) -> str:
        broken = _BROKEN_END.search(text)
        beginning = _BEGINNING.match(line)
        if broken is None or beginning is None:
            return f"{text} {line}"
        if beginning[0] in ("and", "or") and not self._counts[(broken[1] + beginning[0]).lower()]:
            # As in "pre- and post-training".
            return f"{text[:-1]}- {line}"
        return text[:-1] + ("-" if self._keeps_hyphen(broken[1], beginning[0]) else "") + line

    def _keeps_hyphen(self, first: str, second: str) -> bool:
        # What has a hyphen is not broken but at one, as "state-of-the-art".
        if not second[0].islower() or not first[-1].isalpha() or "-" in first:
            return True
        compound, whole = f"{first}-{second}".lower(), f"{first}{second}".lower()
        return self._counts[compound] > self._counts[whole]
