"""A result says how many documents each of its losses is from."""

from __future__ import annotations

from typing import Any

from eabf_cli.core.evals.document_counts import documents_told


def entries(key: str, *counts: tuple[int, int]) -> list[dict[str, Any]]:
    return [{key: length, "num_documents": count} for length, count in counts]


def test_one_number_where_all_are_from_the_same() -> None:
    result = {
        "perplexity": entries("length", (128, 16), (256, 16)),
        "context_gain": entries("context", (128, 16), (256, 16)),
        "perplexity_by_position": entries("end", (128, 16), (256, 16)),
    }
    assert documents_told(result) == "16"


def test_each_measurement_by_itself_where_they_differ() -> None:
    result = {
        "perplexity": entries("length", (1024, 16), (2048, 16), (4096, 1)),
        "context_gain": entries("context", (1024, 1), (4096, 1)),
        "perplexity_by_position": entries("end", (256, 16), (2048, 12), (4096, 1)),
    }
    assert documents_told(result) == (
        "perplexity 16 up to 2,048 tokens, 1 up to 4,096; loss by context 1; "
        "perplexity by position 16 up to 256 tokens, 12 up to 2,048, 1 up to 4,096"
    )


def test_a_length_that_no_document_has_is_no_number() -> None:
    assert documents_told({"perplexity": entries("length", (128, 3), (256, 0))}) == "3"


def test_nothing_is_said_where_no_loss_was_measured() -> None:
    assert documents_told({"passkey": [{"length": 128}]}) == ""
