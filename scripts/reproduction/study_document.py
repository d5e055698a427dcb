"""docs/study.md: what frequencies, scale and loss each do, from the factorial on the dev split."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cells import TARGET_WINDOW, WINDOW, Cell, study
from confirmation_section import confirmation_section, confirmed
from estimates import LOSS, RETRIEVAL, Runs, read_runs
from formatting import COMPARED, bullets, judgement_text, level_text, listed, paragraph, table
from running import read_cell
from shared_tables import missing_note
from spans import BEYOND, spanned
from study_levels import LEVELS
from variants import FREQUENCIES, LOSSES, SCALES, factor_name, factorial
from verdicts import MISSING, OPEN, Claim, Judgement, judge

from eabf_cli.core.evals.comparisons import UnitScores
from eabf_cli.core.files import write_text

STUDY = Path("docs/study.md")
_FACTORS = {"frequencies": FREQUENCIES, "scale": SCALES, "loss": LOSSES}
# What is reported, by measurement and by the length that it is kept under in `spans`.
_OUTCOMES = {
    "loss inside (nats)": (LOSS, WINDOW),
    "loss beyond (nats)": (LOSS, TARGET_WINDOW),
    "retrieval beyond (points)": (RETRIEVAL, TARGET_WINDOW),
}


def write_study(results: Path, document: Path = STUDY) -> None:
    """Write the document, once there is a run to tell of."""
    if any(found.scores for found in study_runs(results).values()):
        write_text(document, study_text(results))


def study_text(results: Path) -> str:
    """The document. Every number and verdict in it is computed from the results in the folder."""
    runs = study_runs(results)
    parts = [
        "# Frequencies, scale and loss, one by one",
        paragraph(
            """Written by `make study`, which computes every number and verdict from the runs in
            `docs/results/reproduction`. Every combination of frequencies, logit scale (on all layers) and loss is
            trained on one draw of 100 samples, as in [the paper in the small](reproduction.md), and measured on the dev
            split: documents, prompts and wordings that are kept for choices."""
        ),
        missing_note(study(), results),
        paragraph(
            f"""*Inside* is {WINDOW} tokens; *beyond* are {BEYOND[0]:,} and {BEYOND[1]:,}: the loss averaged over
            both, the trials (one key of several, repeated spans) of both side by side. There is one seed: verdicts are
            on the trained models alone, at 95 % with Holm's correction over a column of a table. A loss is over 8
            documents; a p-value just below 0.05 can be above it by another test of the same differences."""
        ),
        "## The levels",
        bullets(f"{level}: {what}" for level, what in LEVELS),
        *_in_short(runs, results),
        "## Main effects",
        paragraph(
            """By how much each level of a factor is better than the factor's first, averaged over all combinations of
            the others; p-values in brackets."""
        ),
        *(_main_effects(factor, runs) for factor in _FACTORS),
        *_additions_section(runs, results),
        "## Every combination",
        paragraph(
            """Perplexity and retrieval with half the width of their 95 % intervals over documents and trials."""
        ),
        _levels(runs),
        *confirmation_section(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _in_short(runs: Mapping[str, Runs], results: Path) -> list[str]:
    """What was told apart, and whether a variant wins."""
    effects, found = list(_effects(runs)), confirmed(results)
    if not effects and not found:
        return []
    parts = ["## In short"]
    if effects:
        parts += ["Effects that are told apart on the models of the study:", bullets(effects)]
    if found:
        parts += ["What became of the best, [trained anew](#confirmation) on other samples:", bullets(found)]
    return parts


def _effects(runs: Mapping[str, Runs]) -> Iterator[str]:
    tables = [(pairs, means) for pairs, means, _ in (_level_means(factor, runs) for factor in _FACTORS)]
    for pairs, means in (*tables, (_additions(runs), runs)):
        judged = _judged(pairs, means)
        for number, (better, worse) in enumerate(pairs):
            told = [
                f"{outcome} {_text(found[number], outcome)}"
                for outcome, found in judged.items()
                if found[number].verdict not in (OPEN, MISSING)
            ]
            if told:
                yield f"`{better}` against `{worse}`: {'; '.join(told)}"


def study_runs(results: Path) -> dict[str, Runs]:
    """The study's runs by combination, as `spans` makes them."""
    cells: dict[str, Cell] = dict(zip(factorial(), study(), strict=True))
    read = read_runs(cells.values(), results)
    return spanned({name: replace(read[cell.name], name=name) for name, cell in cells.items()})


def averaged(name: str, models: Sequence[Runs]) -> Runs:
    """Several variants as one: every document's and trial's mean over them. Without a result if one has none."""
    seeds = set.intersection(*(set(model.scores) for model in models))
    return Runs(name, {seed: _mean([model.scores[seed] for model in models]) for seed in sorted(seeds)}, 1)


def _mean(scores: Sequence[UnitScores]) -> UnitScores:
    first = scores[0]
    if any(other.clusters != first.clusters for other in scores):
        raise ValueError("the variants were asked different questions")
    values = {
        measurement: {
            length: [
                sum(unit) / len(unit) for unit in zip(*(s.values[measurement][length] for s in scores), strict=True)
            ]
            for length in by_length
        }
        for measurement, by_length in first.values.items()
    }
    return UnitScores(values, first.clusters)


def _main_effects(factor: str, runs: Mapping[str, Runs]) -> str:
    """A row for each level but the first; empty while there is nothing to average over."""
    pairs, means, num_combinations = _level_means(factor, runs)
    return _comparison(pairs, means, f"{factor.capitalize()}, over {num_combinations} combinations") if pairs else ""


def _level_means(factor: str, runs: Mapping[str, Runs]) -> tuple[list[tuple[str, str]], dict[str, Runs], int]:
    """Each level with the first, the levels' means, and over how many combinations they are.

    These are the combinations of the other factors of which every level is there.
    """
    levels = _FACTORS[factor]
    rest = [
        combination
        for combination in _combinations_without(factor)
        if all(runs[_named(factor, level, combination)].scores for level in levels)
    ]
    if not rest:
        return [], {}, 0
    means = {
        level: averaged(level, [runs[_named(factor, level, combination)] for combination in rest]) for level in levels
    }
    return [(level, levels[0]) for level in levels[1:]], means, len(rest)


def _combinations_without(factor: str) -> list[dict[str, str]]:
    (a, firsts), (b, seconds) = ((name, levels) for name, levels in _FACTORS.items() if name != factor)
    return [{a: first, b: second} for first in firsts for second in seconds]


def _named(factor: str, level: str, rest: Mapping[str, str]) -> str:
    return factor_name(**({factor: level} | dict(rest)))


def _additions_section(runs: Mapping[str, Runs], results: Path) -> list[str]:
    pairs = _additions(runs)
    if not pairs:
        return []
    return [
        "## Learned scale and LongCE",
        paragraph(
            """A learned gain per head against EABF's scale, from which it starts, and LongCE's weights against the
            plain loss, each with all else equal."""
        ),
        _comparison(pairs, runs),
        *_gains_text(results),
    ]


def _gains_text(results: Path) -> list[str]:
    """How far the learned gains went from where they began."""
    found = [(cell.name, gains) for cell in study() if (gains := (read_cell(results, cell) or {}).get("gains"))]
    if not found:
        return []
    ranges = listed(
        [f"{min(map(min, layers)):.3f} to {max(map(max, layers)):.3f} in `{name}`" for name, layers in found]
    )
    return [paragraph(f"The gains begin at 1 / ln c = {1 / math.log(WINDOW):.3f} and end at {ranges}.")]


def _additions(runs: Mapping[str, Runs]) -> list[tuple[str, str]]:
    """The combinations outside the factorial that are there, with what they are compared with."""
    pairs = []
    for name in factorial():
        frequencies, scale, loss = name.split("+")
        if scale == "learned":
            pairs.append((name, factor_name(frequencies, "eabf", loss)))
        elif loss == "longce":
            pairs.append((name, factor_name(frequencies, scale, "plain")))
    return [pair for pair in pairs if all(runs[name].scores for name in pair)]


def _comparison(pairs: Sequence[tuple[str, str]], runs: Mapping[str, Runs], title: str = "Better by") -> str:
    columns = [[_text(judgement, outcome) for judgement in found] for outcome, found in _judged(pairs, runs).items()]
    rows = [(f"`{better}` against `{worse}`", *texts) for (better, worse), *texts in zip(pairs, *columns, strict=True)]
    return table((title, *_OUTCOMES), rows)


def _judged(pairs: Sequence[tuple[str, str]], runs: Mapping[str, Runs]) -> dict[str, list[Judgement]]:
    """A judgement for each pair, by outcome."""
    return {
        outcome: judge([Claim(better=better, worse=worse, length=length) for better, worse in pairs], runs, measurement)
        for outcome, (measurement, length) in _OUTCOMES.items()
    }


def _text(judgement: Judgement, outcome: str) -> str:
    return judgement_text(judgement, COMPARED, is_loss=_OUTCOMES[outcome][0] == LOSS)


def _levels(runs: Mapping[str, Runs]) -> str:
    rows = [
        (f"`{name}`", *(level_text(found, measurement, length) for measurement, length in _OUTCOMES.values()))
        for name, found in runs.items()
        if found.scores
    ]
    return table(("Combination", "perplexity inside", "perplexity beyond", "retrieval beyond (%)"), rows)
