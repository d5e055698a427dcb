from __future__ import annotations

import math
import random
from collections import Counter

from eabf_cli.core.evals.retrieval_bm25 import rank_chunks


def lucene_bm25(chunks: list[list[str]], query: list[str], k1: float = 1.5, b: float = 0.75) -> list[float]:
    """The formula, term by term."""
    mean_length = sum(map(len, chunks)) / len(chunks)
    scores = []
    for chunk in chunks:
        counts, score = Counter(chunk), 0.0
        for word in query:
            having = sum(word in other for other in chunks)
            weight = math.log(1 + (len(chunks) - having + 0.5) / (having + 0.5))
            score += weight * counts[word] / (counts[word] + k1 * (1 - b + b * len(chunk) / mean_length))
        scores.append(score)
    return scores


def test_chunks_are_ranked_as_the_formula_says() -> None:
    rng = random.Random(0)
    words = [f"w{number}" for number in range(30)]
    chunks = [rng.choices(words, weights=range(1, 31), k=rng.randint(5, 40)) for _ in range(25)]
    query = rng.sample(words, 6)
    scores = lucene_bm25(chunks, query)
    assert len(set(scores)) > 20
    ranked = rank_chunks([" ".join(chunk) for chunk in chunks], " ".join(query).upper())
    assert sorted(ranked) == list(range(25))
    found = [round(scores[number], 4) for number in ranked]
    assert found == sorted(found, reverse=True)


def test_of_chunks_that_say_nothing_the_latest_come_first() -> None:
    assert rank_chunks(["one two", "three", "four"], "ten") == [2, 1, 0]
    assert rank_chunks(["one", "two"], "?!") == [1, 0]
    assert rank_chunks(["...", "!"], "one") == [1, 0]
    assert rank_chunks([], "one") == []


def test_the_chunk_that_is_asked_about_comes_first() -> None:
    chunks = ["The ship left the harbour.", "Anna keeps the key in a jar.", "The rain went on and on."]
    assert rank_chunks(chunks, "Where does anna keep the KEY?")[0] == 1
