from __future__ import annotations

from typing import Any

import pytest

from eabf_cli.core.errors import DataError, InvalidConfigError
from eabf_cli.core.evals.verdict_rows import (
    Stretch,
    cut_stretches,
    last_window,
    retrieved_chunks,
    stretch_row,
    whole_text,
)

WINDOW, TARGETS = 32, 4


def stretches(lengths: list[int], **changes: Any) -> list[Stretch]:
    """Of documents whose tokens are 1000 x number + index."""
    documents = [[1000 * number + index for index in range(length)] for number, length in enumerate(lengths)]
    settings = {
        "num_bos": 1,
        "window": WINDOW,
        "length": 129,
        "target_tokens": TARGETS,
        "num_stretches": 3,
        "max_pieces": 100,
    }
    return cut_stretches(documents, **(settings | changes))


@pytest.mark.parametrize("num_bos", [0, 1])
@pytest.mark.parametrize("num_stretches", [1, 3, 50])
def test_stretches_lie_beyond_the_window_apart_from_each_other_and_end_with_their_piece(
    num_bos: int, num_stretches: int
) -> None:
    found = stretches([128 - num_bos, 300, 36 - num_bos], num_bos=num_bos, num_stretches=num_stretches, length=128)
    covered: set[int] = set()
    for stretch in found:
        assert stretch.start - stretch.piece_start >= WINDOW - num_bos
        assert len(stretch.targets) == TARGETS
        tokens = set(stretch.targets)
        assert not covered & tokens
        covered |= tokens
    pieces = {(stretch.document, stretch.piece): stretch.end for stretch in found}
    body = 128 - num_bos
    assert pieces == {(0, 0): body, (1, 0): body, (1, 1): 2 * body, (1, 2): 300, (2, 0): 36 - num_bos}
    # As many as are asked for, fewer where they would overlap.
    assert sum(stretch.document == 2 for stretch in found) == 1
    assert sum(stretch.document == 0 for stretch in found) == min(num_stretches, (128 - WINDOW) // TARGETS)


def test_first_pieces_of_documents_come_before_second_ones() -> None:
    found = stretches([500, 500, 100], max_pieces=4)
    assert {(stretch.document, stretch.piece) for stretch in found} == {(0, 0), (1, 0), (2, 0), (0, 1)}
    assert [stretch.document for stretch in found] == sorted(stretch.document for stretch in found)


def test_documents_that_the_original_holds_are_refused() -> None:
    assert stretches([35])[0].end == 35
    with pytest.raises(DataError, match=r"longer than the original window of 32 .*the longest has 34"):
        stretches([34, 20])


def test_contexts_end_where_the_targets_begin() -> None:
    stretch = stretches([300])[4]
    assert (stretch.piece, stretch.piece_start) == (1, 128)
    assert whole_text(stretch) == tuple(range(128, stretch.start))
    assert last_window(stretch, 10) == tuple(range(stretch.start - 10, stretch.start))
    row = stretch_row("key", [7], last_window(stretch, 10), stretch)
    assert row.input_ids == (7, *range(stretch.start - 10, stretch.end))
    (target,) = row.targets
    assert row.input_ids[target.start : target.end] == stretch.targets


class Words:
    """A tokenizer whose token 5 is the word w5."""

    def decode(self, tokens: Any) -> str:
        return " ".join(f"w{token}" for token in tokens)


def test_chunks_with_the_querys_words_are_found_in_the_whole_document_and_put_in_its_order() -> None:
    tokens = list(range(200))
    # The query is what stands before the targets; its words also stood at 20 to 23 and at 61.
    tokens[20:24], tokens[61] = [900, 901, 902, 903], 902
    tokens[146:150] = [900, 901, 902, 903]
    stretch = Stretch(document=0, piece=1, tokens=tokens, piece_start=100, start=150, end=154)
    context = retrieved_chunks(stretch, 40, Words(), chunk_tokens=10, query_tokens=4, share=0.5)
    # Two chunks of ten and the last twenty; chunks are cut from where those begin: ..., 20-29, ..., 60-69, ...
    assert context == (*tokens[20:30], *tokens[60:70], *tokens[130:150])


def test_nothing_behind_the_stretch_is_retrieved_and_all_room_is_used() -> None:
    for stretch in stretches([200, 90], num_stretches=5):
        context = retrieved_chunks(stretch, 27, Words(), chunk_tokens=6, query_tokens=5, share=0.5)
        assert len(context) == 27
        assert len(set(context)) == 27
        assert max(context) < stretch.targets[0]
        assert context[-15:] == stretch.before(15)


def test_chunks_that_do_not_fit_are_refused() -> None:
    stretch = stretches([200])[0]
    for sizes in ({"chunk_tokens": 20, "query_tokens": 4}, {"chunk_tokens": 4, "query_tokens": 20}):
        with pytest.raises(InvalidConfigError, match="do not fit into the 27 tokens"):
            retrieved_chunks(stretch, 27, Words(), share=0.5, **sizes)
