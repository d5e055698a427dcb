"""Retrieval at a distance: the passkey prompt, facts in wordings no training row has, repeated random spans.

One prompt of needles or spans asks for several things: reading a long text is what costs, not asking.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.evals.language_modeling import mean_and_stderr
from eabf_cli.core.evals.rows import Row, Score, Target
from eabf_cli.core.needles import (
    KEYED_PASSKEY,
    Needle,
    NeedleTemplate,
    draw_needles,
    encode_after,
    passkey_prompt,
    plain_token_ids,
    templates_of,
)

if TYPE_CHECKING:
    from eabf_cli.core.evals.scoring import Scores

SPANS_PER_PROMPT = 4
SPAN_LENGTH = 24
EFFECTIVE_SHARE = 0.9
"""Share of its in-window score that retrieval has to keep, with confidence, at an effective length."""

# One-sided 95 %: the question is how low the true score may be, not how high.
_Z = 1.645
_Z_TWO_SIDED = 1.959964
_SENTENCE_END = "."


def eval_templates() -> tuple[NeedleTemplate, ...]:
    """What a needle prompt asks for: each held-out wording once, and the keyed passkey with two keys."""
    return (*templates_of("heldout"), KEYED_PASSKEY, KEYED_PASSKEY)


def num_questions(template: str | float) -> int:
    """How often a needle prompt asks for a fact of a template, by its name."""
    return sum(asked.name == template for asked in eval_templates())


def passkey_rows(tokenizer: Any, length: int, depths: Sequence[float], num_trials: int, seed: int) -> list[Row]:
    """The field's passkey prompt in `length` tokens; trial after trial takes the next depth.

    Raises:
        InvalidConfigError: the prompt does not fit.
    """
    rows = []
    for trial in range(num_trials):
        depth = depths[trial % len(depths)]
        prompt = passkey_prompt(tokenizer, length, depth, seed=seed * 1_000_003 + trial)
        target = Target(("passkey", length, depth), len(prompt.input_ids), length)
        rows.append(Row((*prompt.input_ids, *prompt.answer_ids), (target,)))
    return rows


def needle_row(tokenizer: Any, length: int, filler: Sequence[int], rng: random.Random) -> Row:
    """`length` tokens of text with a fact of every template in it, all asked for at the end.

    The facts stand in random order, one in each of as many equal parts of the text; they are asked for in
    another order, each behind the right answers to the questions before it.

    Raises:
        InvalidConfigError: the facts and questions do not fit.
    """
    needles: list[Needle] = []
    for template in dict.fromkeys(eval_templates()):
        needles += draw_needles(rng, template, eval_templates().count(template))
    rng.shuffle(needles)
    statements = [encode_after(tokenizer, _SENTENCE_END, needle.statement) for needle in needles]
    questions: list[tuple[Needle, list[int], list[int]]] = []
    text = _SENTENCE_END
    for needle in rng.sample(needles, len(needles)):
        opening = needle.question if not questions else _SENTENCE_END + needle.question
        question_ids = encode_after(tokenizer, text, opening)
        questions.append((needle, question_ids, encode_after(tokenizer, needle.question, needle.answer)))
        text = needle.answer
    num_fixed = sum(map(len, statements)) + sum(len(ask) + len(answer) for _, ask, answer in questions)
    row = start_row(tokenizer, length, num_fixed, "needles", statements, filler, rng, spread_over=1.0)
    targets = []
    for needle, question_ids, answer_ids in questions:
        row += question_ids
        targets.append(Target(("needles", length, needle.template.name), len(row), len(row) + len(answer_ids)))
        row += answer_ids
    return Row(tuple(row), tuple(targets))


def span_row(tokenizer: Any, length: int, filler: Sequence[int], rng: random.Random) -> Row:
    """Spans of random tokens in the first quarter of `length` tokens of text; their halves again at the end.

    Retrieval without any wording: of each span the first half is given again, the second is to be predicted.

    Raises:
        InvalidConfigError: the spans do not fit.
    """
    plain = plain_token_ids(tokenizer)
    spans = [rng.choices(plain, k=SPAN_LENGTH) for _ in range(SPANS_PER_PROMPT)]
    num_fixed = 2 * SPANS_PER_PROMPT * SPAN_LENGTH
    row = start_row(tokenizer, length, num_fixed, "repeated spans", spans, filler, rng, spread_over=0.25)
    targets = []
    for span in rng.sample(spans, len(spans)):
        middle = len(row) + SPAN_LENGTH // 2
        row += span
        targets.append(Target(("repeated_span", length), middle, len(row)))
    return Row(tuple(row), tuple(targets))


def passkey_result(scores: Scores, lengths: Sequence[int], depths: Sequence[float]) -> list[dict[str, Any]]:
    """Share of exact answers by length and depth."""
    return [
        {"length": length, "depth": depth} | accuracy_of(scores["passkey", length, depth])
        for length in lengths
        for depth in depths
        if ("passkey", length, depth) in scores
    ]


def needles_result(scores: Scores, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Share of exact answers by template and length."""
    return [
        {"template": template.name, "length": length} | accuracy_of(scores["needles", length, template.name])
        for template in dict.fromkeys(eval_templates())
        for length in lengths
        if ("needles", length, template.name) in scores
    ]


def span_result(scores: Scores, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Share of the second halves' tokens that are predicted, by length; errors over the spans."""
    return [
        {"length": length} | mean_share_of([score.share for score in scores["repeated_span", length]])
        for length in lengths
        if ("repeated_span", length) in scores
    ]


def retrieval_result(
    scores: Scores, lengths: Sequence[int], tasks: Sequence[str] = ("passkey", "needles")
) -> list[dict[str, Any]]:
    """The answers to some tasks at each length together, with the lower bound of a one-sided Wilson interval."""
    results = []
    for length in lengths:
        matches = [
            score.is_match for key, found in scores.items() if key[0] in tasks and key[1] == length for score in found
        ]
        if matches:
            results.append(
                {
                    "length": length,
                    "accuracy": sum(matches) / len(matches),
                    "lower_bound": wilson_lower_bound(sum(matches), len(matches)),
                    "num_trials": len(matches),
                }
            )
    return results


def effective_length(retrieval: Sequence[dict[str, Any]], original_max_position_embeddings: int) -> int | None:
    """The longest length whose lower bound is at least 90 % of the score inside the original window.

    The lengths inside the window are the yardstick, as far as they have all trials, and qualify as they are; beyond
    it the trials have to prove it, and few cannot (25 right answers out of 25 are the least that prove 90 %). None
    where retrieval was not measured inside the window, or never worked there.
    """
    inside = [entry for entry in retrieval if entry["length"] <= original_max_position_embeddings]
    # A length that is too short for some of the tasks has an easier or harder mixture of the others.
    most = max((entry["num_trials"] for entry in inside), default=0)
    yardstick = [entry for entry in inside if entry["num_trials"] == most]
    num_trials = most * len(yardstick)
    num_right = sum(entry["accuracy"] * most for entry in yardstick)
    if num_right == 0:
        return None
    threshold = EFFECTIVE_SHARE * num_right / num_trials
    proven = [entry for entry in retrieval if entry["lower_bound"] >= threshold]
    return max(entry["length"] for entry in [*inside, *proven])


def wilson_lower_bound(num_successes: float, num_trials: int, z: float = _Z) -> float:
    """Lower end of the Wilson score interval for a share, by default one-sided at 95 % (Wilson 1927)."""
    share = num_successes / num_trials
    spread = z * math.sqrt(share * (1 - share) / num_trials + z**2 / (4 * num_trials**2))
    return max(0.0, (share + z**2 / (2 * num_trials) - spread) / (1 + z**2 / num_trials))


def wilson_interval(num_successes: float, num_trials: int, z: float = _Z_TWO_SIDED) -> tuple[float, float]:
    """Both ends of the Wilson score interval for a share, by default at 95 %."""
    lower = wilson_lower_bound(num_successes, num_trials, z)
    return lower, 1 - wilson_lower_bound(num_trials - num_successes, num_trials, z)


def start_row(
    tokenizer: Any,
    length: int,
    num_fixed: int,
    name: str,
    blocks: Sequence[list[int]],
    filler: Sequence[int],
    rng: random.Random,
    *,
    spread_over: float,
) -> list[int]:
    """BOS and filler, the blocks put in one in each of as many parts of its first `spread_over`.

    Together with `num_fixed` tokens, those of the blocks among them, a row has `length`.

    Raises:
        InvalidConfigError: they do not fit.
    """
    row = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    num_filler = length - len(row) - num_fixed
    if num_filler < 0:
        raise InvalidConfigError(f"{name} need {length - num_filler} tokens, more than {length}")
    first = rng.randrange(max(1, len(filler) - num_filler))
    text = [filler[(first + index) % len(filler)] for index in range(num_filler)]
    part, taken = spread_over * num_filler / len(blocks), 0
    for index, block in enumerate(blocks):
        cut = round(part * (index + rng.random()))
        row += [*text[taken:cut], *block]
        taken = cut
    return row + text[taken:]


def accuracy_of(found: Sequence[Score]) -> dict[str, Any]:
    """Share of exact answers with the ends of its 95 % Wilson interval."""
    num_right = sum(score.is_match for score in found)
    lower, upper = wilson_interval(num_right, len(found))
    return {"accuracy": num_right / len(found), "lower_bound": lower, "upper_bound": upper, "num_trials": len(found)}


def mean_share_of(shares: Sequence[float]) -> dict[str, Any]:
    """Mean of shares from 0 to 1, its standard error, and the ends of a 95 % interval that holds for few of them, too.

    A share varies at most as an answer that is right or wrong does, so the Wilson interval for as many of those is
    wide enough. The standard error would be 0 where all of them are equal.
    """
    accuracy, stderr = mean_and_stderr(shares)
    lower, upper = wilson_interval(sum(shares), len(shares))
    return {
        "accuracy": accuracy,
        "stderr": stderr,
        "lower_bound": lower,
        "upper_bound": upper,
        "num_trials": len(shares),
    }
