"""The stretches of a user's documents that are predicted, and what each way of reading shows before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eabf_cli.core.errors import DataError, InvalidConfigError
from eabf_cli.core.evals.retrieval_bm25 import rank_chunks
from eabf_cli.core.evals.rows import Row, Target


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Tokens to predict, in the piece of a document that the extended model is shown.

    Attributes:
        document: number of the document.
        piece: number of the piece of it, which begins where the one before ends.
        tokens: the whole document, without BOS.
        piece_start: index of the piece's first token.
        start, end: indices of the first token to predict and behind the last.
    """

    document: int
    piece: int
    tokens: Sequence[int]
    piece_start: int
    start: int
    end: int

    @property
    def targets(self) -> tuple[int, ...]:
        """The tokens to predict."""
        return tuple(self.tokens[self.start : self.end])

    def before(self, num_tokens: int) -> tuple[int, ...]:
        """The last so many tokens before the targets."""
        return tuple(self.tokens[max(0, self.start - num_tokens) : self.start])


def cut_stretches(
    documents: Sequence[Sequence[int]],
    *,
    num_bos: int,
    window: int,
    length: int,
    target_tokens: int,
    num_stretches: int,
    max_pieces: int,
) -> list[Stretch]:
    """Cut documents into pieces of `length` tokens, and take stretches behind the original window from each.

    A piece has up to `num_stretches`, the last at its end and the others evenly before it; the last piece of a
    document may be shorter. Of more than `max_pieces`, first pieces of documents come before second ones.

    Args:
        documents: tokens without BOS.
        num_bos: tokens that begin each row, which count.

    Returns:
        the stretches in the documents' order.

    Raises:
        DataError: no document is long enough for one stretch behind the window.
    """
    shortest, body = window + target_tokens - num_bos, length - num_bos
    pieces = [
        (piece, number, start)
        for number, document in enumerate(documents)
        for piece, start in enumerate(range(0, len(document), body))
        if len(document) - start >= shortest
    ]
    if not pieces:
        longest = max(map(len, documents), default=0)
        raise DataError(
            f"no document is longer than the original window of {window:,} tokens and the {target_tokens:,} that are "
            f"predicted (the longest has {longest:,}): the original model reads such documents as they are"
        )
    stretches = []
    for piece, number, start in sorted(sorted(pieces)[:max_pieces], key=lambda found: (found[1], found[0])):
        beyond = min(body, len(documents[number]) - start) + num_bos - window
        count = min(num_stretches, beyond // target_tokens)
        for index in range(count):
            end = start + window - num_bos + beyond * (index + 1) // count
            stretches.append(
                Stretch(
                    document=number,
                    piece=piece,
                    tokens=documents[number],
                    piece_start=start,
                    start=end - target_tokens,
                    end=end,
                )
            )
    return stretches


def whole_text(stretch: Stretch) -> tuple[int, ...]:
    """All of the piece before the targets."""
    return stretch.before(stretch.start - stretch.piece_start)


def last_window(stretch: Stretch, room: int) -> tuple[int, ...]:
    """The last `room` tokens before the targets."""
    return stretch.before(room)


def retrieved_chunks(
    stretch: Stretch, room: int, tokenizer: Any, *, chunk_tokens: int, query_tokens: int, share: float
) -> tuple[int, ...]:
    """The chunks that BM25 finds for the text just before the targets, in the document's order, then that text.

    Retrieval by the last tokens, and chunks put before the text, is how in-context RALM does it (arXiv 2302.00083,
    which finds short queries best). It looks through the whole document before, not only through the piece.

    Args:
        room: tokens in all.
        chunk_tokens: tokens of a chunk; what is before the last text is cut into them from its end.
        query_tokens: the last tokens before the targets, which are asked with.
        share: part of the room for chunks.

    Raises:
        InvalidConfigError: not even one chunk and the query fit.
    """
    count = int(share * room) // chunk_tokens
    num_recent = room - count * chunk_tokens
    if count < 1 or num_recent < query_tokens:
        raise InvalidConfigError(
            f"chunks of {chunk_tokens} tokens and a query of {query_tokens} do not fit into the {room} tokens that "
            "the original window leaves: give smaller ones"
        )
    end = stretch.start - num_recent
    chunks = [stretch.tokens[start : start + chunk_tokens] for start in range(end % chunk_tokens, end, chunk_tokens)]
    query = tokenizer.decode(stretch.before(query_tokens))
    best = sorted(rank_chunks([tokenizer.decode(chunk) for chunk in chunks], query)[:count])
    return (*(token for number in best for token in chunks[number]), *stretch.before(num_recent))


def stretch_row(key: Any, bos: Sequence[int], context: Sequence[int], stretch: Stretch) -> Row:
    """A row that shows a context and is scored on the stretch's targets."""
    tokens = (*bos, *context, *stretch.targets)
    return Row(tokens, (Target(key, len(tokens) - len(stretch.targets), len(tokens)),))
