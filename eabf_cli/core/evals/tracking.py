"""Variable tracking: chains of assignments spread over a long text (RULER, arXiv 2404.06654, section 3)."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from eabf_cli.core.evals.retrieval import mean_share_of, start_row
from eabf_cli.core.evals.rows import Row, Target
from eabf_cli.core.needles import encode_after

if TYPE_CHECKING:
    from eabf_cli.core.evals.scoring import Scores

NUM_CHAINS = 2
"""One is asked for, the other distracts: without it every variable of the text would be an answer."""
CHAIN_LENGTH = 4
_NAME_LETTERS = 5
_SENTENCE_END = "."


def tracking_row(tokenizer: Any, length: int, filler: Sequence[int], rng: random.Random) -> Row:
    """`length` tokens of text with two chains of variables in it; the variables of one are asked for by their value.

    `VAR ABCDE = 12345.` opens a chain, `VAR FGHIJ = VAR ABCDE.` goes on with it; the sentences of both chains are
    mixed, in the order of each. The answer names a chain's variables in that order, each behind the right ones
    before it.

    Raises:
        InvalidConfigError: chains and question do not fit.
    """
    names = _draw_names(rng, NUM_CHAINS * CHAIN_LENGTH)
    chains = [names[start : start + CHAIN_LENGTH] for start in range(0, len(names), CHAIN_LENGTH)]
    values = [str(number) for number in rng.sample(range(10_000, 100_000), NUM_CHAINS)]
    sentences = [_sentences(chain, value) for chain, value in zip(chains, values, strict=True)]
    statements = [encode_after(tokenizer, _SENTENCE_END, sentence) for sentence in _mixed(sentences, rng)]
    question = f" Which variables have the value {values[0]}? The variables with the value {values[0]} are"
    question_ids = encode_after(tokenizer, _SENTENCE_END, question)
    answers = []
    before = question
    for name in chains[0]:
        answers.append(encode_after(tokenizer, before, f" {name}"))
        before = f" {name}"
    num_fixed = sum(map(len, (*statements, question_ids, *answers)))
    row = start_row(
        tokenizer, length, num_fixed, "chains of variables", statements, filler, rng, spread_over=1.0
    ) + list(question_ids)
    targets = []
    for answer in answers:
        targets.append(Target(("variable_tracking", length), len(row), len(row) + len(answer)))
        row += answer
    return Row(tuple(row), tuple(targets))


def tracking_shares(scores: Scores, length: int) -> list[float]:
    """Of each prompt, the share of its variables that are named."""
    matches = [score.is_match for score in scores.get(("variable_tracking", length), [])]
    prompts = [matches[start : start + CHAIN_LENGTH] for start in range(0, len(matches), CHAIN_LENGTH)]
    return [sum(prompt) / len(prompt) for prompt in prompts]


def tracking_result(scores: Scores, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Share of a chain's variables that are named, by length; errors over prompts."""
    found = {length: tracking_shares(scores, length) for length in lengths}
    return [{"length": length} | mean_share_of(shares) for length, shares in found.items() if shares]


def _draw_names(rng: random.Random, count: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choices(string.ascii_uppercase, k=_NAME_LETTERS))] = None
    return list(names)


def _sentences(chain: Sequence[str], value: str) -> list[str]:
    opening = f" VAR {chain[0]} = {value}."
    return [opening, *(f" VAR {name} = VAR {before}." for before, name in pairwise(chain))]


def _mixed(chains: Sequence[Sequence[str]], rng: random.Random) -> list[str]:
    """The sentences of all chains in a random order that keeps that of each."""
    order = [index for index, chain in enumerate(chains) for _ in chain]
    rng.shuffle(order)
    following = [iter(chain) for chain in chains]
    return [next(following[index]) for index in order]
