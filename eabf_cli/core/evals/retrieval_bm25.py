"""What a user without a long window does: look up the parts of the text that a question is about (BM25)."""

from __future__ import annotations

import re
from collections.abc import Sequence

_WORD = re.compile(r"\w+")


def rank_chunks(chunks: Sequence[str], query: str) -> list[int]:
    """Indices of all chunks by BM25 score for a query, the best first; of equal ones the later first.

    Robertson and Zaragoza 2009 in Lucene's form (k1 1.5, b 0.75), over lower-case words. Stop words are left to the
    weights, which give little to a word that most chunks have; so the language does not matter.
    """
    import bm25s

    words = [_words(chunk) for chunk in chunks]
    asked = _words(query)
    scores = [0.0] * len(chunks)
    if asked and any(words):
        index = bm25s.BM25()
        index.index(words, show_progress=False)
        scores = index.get_scores(asked).tolist()
    return sorted(range(len(chunks)), key=lambda number: (-scores[number], -number))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
