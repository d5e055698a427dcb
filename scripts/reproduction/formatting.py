"""Numbers, tables and sentences as Markdown."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence

from estimates import LOSS, POSITIONS, Judged, Runs, level
from verdicts import HOLDS, HOLDS_HERE, MISSING, OPEN, REVERSED, REVERSED_HERE, Judgement

from eabf_cli.core.evals.statistics import Estimate

_WIDTH = 118
COMPARED = {
    HOLDS: "**better**",
    HOLDS_HERE: "better here",
    OPEN: "open",
    REVERSED_HERE: "worse here",
    REVERSED: "**worse**",
    MISSING: "missing",
}
ORDERED = {
    HOLDS: "**holds**",
    HOLDS_HERE: "holds here",
    OPEN: "open",
    REVERSED_HERE: "reversed here",
    REVERSED: "**reversed**",
    MISSING: "missing",
}
CLAIMED = {
    HOLDS: "**holds**",
    HOLDS_HERE: "holds here",
    OPEN: "open",
    REVERSED_HERE: "does not hold here",
    REVERSED: "**does not hold**",
    MISSING: "missing",
}
CHANGED = {
    HOLDS: "**rises**",
    HOLDS_HERE: "rises here",
    OPEN: "open",
    REVERSED_HERE: "falls here",
    REVERSED: "**falls**",
    MISSING: "missing",
}
"""Verdicts in the words of a comparison, of an ordering of the paper's, of a claim that several orderings make up, and
of a change."""


def paragraph(text: str, *, indent: str = "") -> str:
    """Broken into lines, those behind the first with an indent."""
    return textwrap.fill(
        " ".join(text.split()), _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def bullets(texts: Iterable[str]) -> str:
    """A list."""
    return "\n".join(paragraph(f"- {text}", indent="  ") for text in texts)


def plain(words: str) -> str:
    """A verdict without its markup."""
    return words.strip("*")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; numbers stand to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def listed(names: Sequence[str]) -> str:
    """Names in a sentence."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def counted(count: int, noun: str) -> str:
    """A number with its noun."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def level_text(runs: Runs, measurement: str, length: int) -> str:
    """A mean, half the width of its interval over the trials and, in brackets, of that over seeds and trials."""
    found = level(runs, measurement, length)
    if found is None:
        return "missing"
    is_loss = measurement in (LOSS, POSITIONS)
    mean = f"{math.exp(found.mean):.2f}" if is_loss else f"{100 * found.mean:.1f}"
    text = f"{mean} ± {_width_text(found.trials, is_loss)}"
    if found.seeds is not None:
        text += f" ({_width_text(found.seeds, is_loss)})"
    num_seeds = sum(length in scores.values.get(measurement, ()) for scores in runs.scores.values())
    if num_seeds < runs.num_planned:
        text += f", {num_seeds} of {runs.num_planned} seeds"
    return text


def half_width(found: Judged) -> float | None:
    """Half the width of the interval over the trials."""
    return None if found.trials.low is None or found.trials.high is None else (found.trials.high - found.trials.low) / 2


def judgement_text(judgement: Judgement, words: dict[str, str], *, is_loss: bool) -> str:
    """The advantage (points, or nats), the verdict and the p-value that it rests on; where seeds lack, how many are."""
    if judgement.advantage is None:
        return "missing"
    size = f"{judgement.advantage:+.3f}" if is_loss else f"{100 * judgement.advantage:+.1f}"
    is_general = judgement.verdict in (HOLDS, REVERSED)
    p_value = judgement.p_value if is_general else judgement.p_value_here
    shown = "" if p_value is None else f" (p {_p_text(p_value)})"
    seeds = "" if judgement.num_seeds == judgement.num_planned else f", {counted(judgement.num_seeds, 'seed')}"
    return f"{size} {words[judgement.verdict]}{shown}{seeds}"


def _width_text(estimate: Estimate, is_loss: bool) -> str:
    if estimate.low is None or estimate.high is None:
        return "?"
    if is_loss:
        return f"{(math.exp(estimate.high) - math.exp(estimate.low)) / 2:.2f}"
    return f"{50 * (estimate.high - estimate.low):.1f}"


def _p_text(p_value: float) -> str:
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}" if p_value < 0.1 else f"{p_value:.2f}"
