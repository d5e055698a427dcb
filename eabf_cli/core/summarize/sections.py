"""Making a document smaller than it is: leaving out its middle, or reading it in sections."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from eabf_cli.core.summarize.prompts import document_ids

# What comes first is the better place to part a text.
_BREAKS = ("\n\n", "\n", ". ", " ")
_HEADING = re.compile(r"(?:#{1,6} |\d+(?:\.\d+)*\.? +[A-Z]|[A-Z][A-Z ]{3,})[^\n]{0,80}")


def cut_middle(tokenizer: Any, text: str, max_tokens: int) -> str:
    """A text of at most so many tokens, its beginning and its end kept in equal parts.

    The place is marked by a line that tells how many tokens were left out.
    """
    ids = document_ids(tokenizer, text)
    if len(ids) <= max_tokens:
        return text
    half = max_tokens // 2
    # The marker line takes tokens itself, and a cut word is spelled otherwise: a few turns settle it.
    while half > 0:
        first = _decode(tokenizer, ids[:half]).rstrip("\ufffd")
        last = _decode(tokenizer, ids[-half:]).lstrip("\ufffd")
        shorter = f"{first}\n\n[{len(ids) - 2 * half:,} tokens left out here]\n\n{last}"
        excess = len(document_ids(tokenizer, shorter)) - max_tokens
        if excess <= 0:
            return shorter
        half -= (excess + 1) // 2
    return ""


def split_sections(tokenizer: Any, text: str, max_tokens: int) -> list[str]:
    """Consecutive parts of a text with at most so many tokens each, as equal as its paragraphs allow.

    Parts begin at headings or paragraphs; a paragraph that is too long itself is parted at lines, sentences,
    words, and between any two tokens in the end.
    """
    pieces = [(piece, len(document_ids(tokenizer, piece))) for piece in _pieces(tokenizer, text, max_tokens)]
    num_tokens = sum(size for _, size in pieces)
    # With this aim the parts come out about equal instead of full ones and a small rest.
    aim = num_tokens / -(-num_tokens // max_tokens)
    sections: list[str] = []
    current, size = "", 0
    for piece, piece_size in pieces:
        is_full = size >= 0.9 * aim or (size >= 0.6 * aim and _HEADING.match(piece.lstrip()) is not None)
        if current.strip() and (is_full or size + piece_size > max_tokens):
            sections.append(current.strip("\n"))
            current, size = "", 0
        current, size = current + piece, size + piece_size
    return [*sections, current.strip("\n")] if current.strip() else sections


def _pieces(tokenizer: Any, text: str, max_tokens: int, breaks: Sequence[str] = _BREAKS) -> Iterator[str]:
    """Paragraphs, or smaller parts of those that are too long; joined they are the text."""
    if not breaks:
        ids = document_ids(tokenizer, text)
        yield from (_decode(tokenizer, ids[start : start + max_tokens]) for start in range(0, len(ids), max_tokens))
        return
    for part in re.findall(rf"(?s).*?{re.escape(breaks[0])}|.+\Z", text):
        # Far fewer characters than tokens allowed: not worth counting.
        if len(part) <= max_tokens or len(document_ids(tokenizer, part)) <= max_tokens:
            yield part
        else:
            yield from _pieces(tokenizer, part, max_tokens, breaks[1:])


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
