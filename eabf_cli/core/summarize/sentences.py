"""Where sentences end, in a text that is still being written."""

from __future__ import annotations

import re

# A mark with what closes behind it and white space after it, a mark that needs none, or the end of a line.
_END = re.compile(r"""[.!?…]["'”’»)\]*_]*(?=\s)|[。！？]["”’»」』）]*|(?=\n)""")
_ABBREVIATION = re.compile(
    r"(?:\b(?:al|cf|e\.g|i\.e|vs|etc|approx|resp|Fig|Figs|Eq|Eqs|Sec|Tab|Dr|Mr|Mrs|Prof)|^\W*\d+)\.$"
)


def last_sentence_end(text: str, *, is_complete: bool = False) -> int:
    """Index behind the last sentence of a text; 0 if none has ended.

    The number of a list item, and the abbreviations that papers are full of, end no sentence.

    Args:
        is_complete: the text does not go on, so that a mark at its very end counts.
    """
    seen = text + " " if is_complete else text
    for match in reversed(list(_END.finditer(seen))):
        line = seen[seen.rfind("\n", 0, match.end()) + 1 : match.end()]
        if line.strip() and not _ABBREVIATION.search(line):
            return match.end()
    return 0
