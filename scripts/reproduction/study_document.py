"""docs/study.md: what frequencies, scale and loss each do, from the factorial on the dev split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cells import TARGET_WINDOW, TWICE_TARGET, WINDOW, WITHIN_TARGET, Cell, study
from confirming import CONFIRMATION_SEEDS, confirmation_cells
from confirming import RULE as CONFIRMATION_RULE
from estimates import LOSS, RETRIEVAL, Runs, read_runs
from formatting import COMPARED, judgement_text, level_text, paragraph, table
from shared_tables import comparison_tables, level_table, missing_note
from variants import FREQUENCIES, LOSSES, SCALES, factor_name, factorial
from verdicts import Claim, judge

from eabf_cli.core.evals.comparisons import UnitScores
from eabf_cli.core.files import write_text

STUDY = Path("docs/study.md")
_FACTORS = {"frequencies": FREQUENCIES, "scale": SCALES, "loss": LOSSES}
_BEYOND = tuple(length for length in WITHIN_TARGET if length > WINDOW)
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
            f"""*Inside* is {WINDOW} tokens; *beyond* are {_BEYOND[0]:,} and {_BEYOND[1]:,}: the loss averaged over
            both, the trials (one key of several, repeated spans) of both side by side. There is one seed: verdicts are
            on the trained models alone, at 95 % with Holm's correction over a column of a table."""
        ),
        "## Main effects",
        paragraph(
            """By how much each level of a factor is better than the factor's first, averaged over all combinations of
            the others; p-values in brackets."""
        ),
        *(_main_effects(factor, runs) for factor in _FACTORS),
        *_additions_section(runs),
        "## Every combination",
        paragraph(
            """Perplexity and retrieval with half the width of their 95 % intervals over documents and trials."""
        ),
        _levels(runs),
        *_confirmation_section(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def study_runs(results: Path) -> dict[str, Runs]:
    """The study's runs by combination, as `spans` makes them."""
    cells: dict[str, Cell] = dict(zip(factorial(), study(), strict=True))
    read = read_runs(cells.values(), results)
    found = {name: read[cell.name] for name, cell in cells.items()}
    return {
        name: Runs(name, {seed: spans(scores) for seed, scores in runs.scores.items()}, runs.num_planned)
        for name, runs in found.items()
    }


def spans(scores: UnitScores) -> UnitScores:
    """A run's scores inside the window (under `WINDOW`) and beyond it (under `TARGET_WINDOW`)."""
    losses = [scores.values[LOSS][length] for length in _BEYOND]
    trials = [value for length in _BEYOND for value in scores.values[RETRIEVAL][length]]
    prompts = [
        10_000 * number + prompt
        for number, length in enumerate(_BEYOND)
        for prompt in scores.clusters[RETRIEVAL][length]
    ]
    beyond = [sum(document) / len(document) for document in zip(*losses, strict=True)]
    return UnitScores(
        {LOSS: {WINDOW: scores.values[LOSS][WINDOW], TARGET_WINDOW: beyond}, RETRIEVAL: {TARGET_WINDOW: trials}},
        {RETRIEVAL: {TARGET_WINDOW: prompts}},
    )


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
    """A row for each level but the first, over the combinations of which every level of the factor is there."""
    levels = _FACTORS[factor]
    rest = [
        combination
        for combination in _combinations_without(factor)
        if all(runs[_named(factor, level, combination)].scores for level in levels)
    ]
    if not rest:
        return ""
    means = {
        level: averaged(level, [runs[_named(factor, level, combination)] for combination in rest]) for level in levels
    }
    title = f"{factor.capitalize()}, over {len(rest)} combinations"
    return _comparison([(level, levels[0]) for level in levels[1:]], means, title)


def _combinations_without(factor: str) -> list[dict[str, str]]:
    (a, firsts), (b, seconds) = ((name, levels) for name, levels in _FACTORS.items() if name != factor)
    return [{a: first, b: second} for first in firsts for second in seconds]


def _named(factor: str, level: str, rest: Mapping[str, str]) -> str:
    return factor_name(**({factor: level} | dict(rest)))


def _additions_section(runs: Mapping[str, Runs]) -> list[str]:
    pairs = [pair for pair in _additions() if all(runs[name].scores for name in pair)]
    if not pairs:
        return []
    return [
        "## Learned scale and LongCE",
        paragraph(
            """A learned gain per head against EABF's scale, from which it starts, and LongCE's weights against the
            plain loss, each with all else equal."""
        ),
        _comparison(pairs, runs),
    ]


def _additions() -> list[tuple[str, str]]:
    """The combinations outside the factorial, with what they are compared with."""
    pairs = []
    for name in factorial():
        frequencies, scale, loss = name.split("+")
        if scale == "learned":
            pairs.append((name, factor_name(frequencies, "eabf", loss)))
        elif loss == "longce":
            pairs.append((name, factor_name(frequencies, scale, "plain")))
    return pairs


def _confirmation_section(results: Path) -> list[str]:
    cells = confirmation_cells(results)
    parts = [
        "## Confirmation",
        paragraph(
            f"""{CONFIRMATION_RULE} They are trained anew on {len(CONFIRMATION_SEEDS)} draws of samples that nothing was
            chosen on (seeds {", ".join(map(str, CONFIRMATION_SEEDS))}), beside EABF as published and the tuned EABF,
            ABF and YaRN, and measured on the test split, whose documents, prompts and wordings the study has not
            seen."""
        ),
    ]
    if not cells:
        return [*parts, "The runs that they are chosen by are not all there yet, or none is a candidate."]
    runs = read_runs(cells, results)
    new = [name for name in runs if name in factorial()]
    pairs = [(name, other) for name in new for other in runs if other not in new]
    return [
        *parts,
        missing_note(cells, results),
        *(level_table(runs, measurement, TWICE_TARGET) for measurement in (RETRIEVAL, LOSS)),
        paragraph("By how much each is better, in points of retrieval and in nats:"),
        comparison_tables(runs, pairs, TWICE_TARGET),
    ]


def _comparison(pairs: Sequence[tuple[str, str]], runs: Mapping[str, Runs], title: str = "Better by") -> str:
    columns = []
    for measurement, length in _OUTCOMES.values():
        claims = [Claim(better=better, worse=worse, length=length) for better, worse in pairs]
        columns.append(
            [
                judgement_text(judgement, COMPARED, is_loss=measurement == LOSS, num_planned=1)
                for judgement in judge(claims, runs, measurement)
            ]
        )
    rows = [(f"`{better}` against `{worse}`", *texts) for (better, worse), *texts in zip(pairs, *columns, strict=True)]
    return table((title, *_OUTCOMES), rows)


def _levels(runs: Mapping[str, Runs]) -> str:
    rows = [
        (f"`{name}`", *(level_text(found, measurement, length) for measurement, length in _OUTCOMES.values()))
        for name, found in runs.items()
        if found.scores
    ]
    return table(("Combination", "perplexity inside", "perplexity beyond", "retrieval beyond (%)"), rows)
