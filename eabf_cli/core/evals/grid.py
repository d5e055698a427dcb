"""Retrieval by length and depth: several keys in one text, each asked for, and the grid of all that have a depth."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.evals.retrieval import accuracy_of
from eabf_cli.core.evals.rows import Row, Target
from eabf_cli.core.needles import KEYED_PASSKEY, draw_needles, encode_after

if TYPE_CHECKING:
    from eabf_cli.core.evals.scoring import Scores

LEAST_KEYS = 4
"""Keys in a text at least: one is asked for, the others distract."""
_SENTENCE_END = "."


def multi_key_rows(
    tokenizer: Any, length: int, filler: Sequence[int], depths: Sequence[float], rng: random.Random
) -> list[Row]:
    """One text with a key at every depth, and a row of at most `length` tokens for each that asks for it.

    All rows begin with the same text, so that it is read once. The keys that are not asked for distract, as do more
    of them at random places where there are few depths.

    Raises:
        InvalidConfigError: the keys and the question do not fit.
    """
    needles = draw_needles(rng, KEYED_PASSKEY, max(len(depths), LEAST_KEYS))
    statements = [encode_after(tokenizer, _SENTENCE_END, needle.statement) for needle in needles]
    asked = needles[: len(depths)]
    questions = [encode_after(tokenizer, _SENTENCE_END, needle.question) for needle in asked]
    answers = [encode_after(tokenizer, needle.question, needle.answer) for needle in asked]
    text = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    longest = max(len(question) + len(answer) for question, answer in zip(questions, answers, strict=True))
    num_filler = length - len(text) - sum(map(len, statements)) - longest
    if num_filler < 0:
        raise InvalidConfigError(f"several keys need {length - num_filler} tokens, more than {length}")
    first = rng.randrange(max(1, len(filler) - num_filler))
    around = [filler[(first + index) % len(filler)] for index in range(num_filler)]
    places = [*depths, *(rng.random() for _ in statements[len(depths) :])]
    taken = 0
    for depth, statement in sorted(zip(places, statements, strict=True), key=lambda pair: pair[0]):
        cut = round(depth * num_filler)
        text += [*around[taken:cut], *statement]
        taken = cut
    text += around[taken:]
    rows = []
    for depth, question, answer in zip(depths, questions, answers, strict=True):
        start = len(text) + len(question)
        target = Target(("multi_key", length, depth), start, start + len(answer))
        rows.append(Row((*text, *question, *answer), (target,)))
    return rows


def multi_key_result(scores: Scores, lengths: Sequence[int], depths: Sequence[float]) -> list[dict[str, Any]]:
    """Share of exact answers by length and depth, with 95 % intervals."""
    return [
        {"length": length, "depth": depth} | accuracy_of(scores["multi_key", length, depth])
        for length in lengths
        for depth in depths
        if ("multi_key", length, depth) in scores
    ]


def needle_grid(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells of all tasks that have a length and a depth, each with the name of its task."""
    return [{"task": task, **entry} for task in ("passkey", "multi_key") for entry in result.get(task, ())]
