"""The paper's second experiment: how few samples do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path

from cells import TARGET_WINDOW, data_efficiency
from estimates import LOSS, RETRIEVAL, Runs, difference, read_runs
from formatting import CHANGED, ORDERED, judgement_text, level_text, paragraph, table
from published_results import BY_SAMPLES
from shared_tables import JUDGED, MEASUREMENTS, missing_note
from verdicts import Claim, Judgement, judgements

_ORDER = ("eabf", "abf", "yarn")
"""The best first, at every number of samples in the paper."""


def samples_section(folder: Path) -> str:
    """32, 100 and 200 samples."""
    by_samples = samples_runs(folder)
    parts = [
        "## Data efficiency (the paper's Table 4)",
        paragraph(
            f"The same recipe with 32, 100 and 200 samples, measured at four windows ({TARGET_WINDOW:,} tokens)."
        ),
        missing_note(data_efficiency(), folder),
        _levels(by_samples, RETRIEVAL, with_paper=True),
        _levels(by_samples, LOSS, with_paper=False),
        paragraph(
            """In the paper, EABF is above ABF and ABF above YaRN at every number of samples. In a cell stand the
            paper's gap in points (it has no column for 200), and by how much the method is ahead here, in points of
            retrieval or in nats:"""
        ),
        *(_ordering_table(judge_samples(by_samples, measurement), measurement) for measurement in JUDGED),
        paragraph("What more samples bring, in points of retrieval and in nats (rising is better in both):"),
        *(_gain_table(by_samples, measurement) for measurement in JUDGED),
    ]
    return "\n\n".join(part for part in parts if part)


def samples_findings(folder: Path) -> str:
    """The orderings in one table."""
    by_samples = samples_runs(folder)
    columns = []
    for measurement in JUDGED:
        found = judge_samples(by_samples, measurement)
        columns += [
            [
                judgement_text(judgement, ORDERED, is_loss=measurement == LOSS)
                for judgement in found
                if judgement.claim.length == size
            ]
            for size in by_samples
        ]
    header = ("At 4x", *(f"{title}, {size} samples" for title in JUDGED.values() for size in by_samples))
    claims = [f"`{better}` above `{worse}`" for better, worse in combinations(_ORDER, 2)]
    return table(header, zip(claims, *columns, strict=True))


def samples_runs(folder: Path) -> dict[int, dict[str, Runs]]:
    """The runs of `data_efficiency` by number of samples and method."""
    cells = data_efficiency()
    sizes = sorted({cell.num_samples for cell in cells})
    return {size: read_runs([cell for cell in cells if cell.num_samples == size], folder) for size in sizes}


def judge_samples(by_samples: Mapping[int, Mapping[str, Runs]], measurement: str) -> list[Judgement]:
    """The order at each number of samples, judged together; the claims' `length` is the number of samples."""
    claims, found = [], []
    for better, worse in combinations(_ORDER, 2):
        for size, runs in by_samples.items():
            here = BY_SAMPLES[better].get(size)
            gap = None if here is None else round(here - BY_SAMPLES[worse][size], 1)
            claims.append(Claim(better=better, worse=worse, length=size, gap=gap))
            found.append(difference(runs[better], runs[worse], measurement, TARGET_WINDOW))
    return judgements(claims, found, measurement)


def _levels(by_samples: Mapping[int, Mapping[str, Runs]], measurement: str, *, with_paper: bool) -> str:
    published = list(BY_SAMPLES["eabf"]) if with_paper else []
    unit = "" if measurement == LOSS else " (%)"
    header = (
        f"{MEASUREMENTS[measurement]}{unit}",
        *(f"{size} samples" for size in by_samples),
        *(f"paper, {size:,}" for size in published),
    )
    rows = [
        (
            f"`{method}`",
            *(level_text(runs[method], measurement, TARGET_WINDOW) for runs in by_samples.values()),
            *(f"{BY_SAMPLES[method][size]:.1f}" for size in published),
        )
        for method in reversed(_ORDER)
    ]
    return table(header, rows)


def _ordering_table(judged: Sequence[Judgement], measurement: str) -> str:
    rows: dict[tuple[str, str], dict[int, str]] = {}
    for judgement in judged:
        claim = judgement.claim
        shown = judgement_text(judgement, ORDERED, is_loss=measurement == LOSS)
        text = shown if claim.gap is None else f"by {claim.gap:.1f}: {shown}"
        rows.setdefault((claim.better, claim.worse), {})[claim.length] = text
    sizes = sorted({judgement.claim.length for judgement in judged})
    return table(
        (f"On {JUDGED[measurement]}", *(f"{size} samples" for size in sizes)),
        ((f"`{better}` above `{worse}`", *(texts[size] for size in sizes)) for (better, worse), texts in rows.items()),
    )


def _gain_table(by_samples: Mapping[int, Mapping[str, Runs]], measurement: str) -> str:
    steps = list(pairwise(by_samples))
    claims, found = [], []
    for method in reversed(_ORDER):
        for fewer, more in steps:
            claims.append(Claim(better=method, worse=method, length=more))
            found.append(difference(by_samples[more][method], by_samples[fewer][method], measurement, TARGET_WINDOW))
    texts = iter(
        judgement_text(judgement, CHANGED, is_loss=measurement == LOSS)
        for judgement in judgements(claims, found, measurement)
    )
    rows = [(f"`{method}`", *(next(texts) for _ in steps)) for method in reversed(_ORDER)]
    return table((f"On {JUDGED[measurement]}", *(f"{fewer} to {more}" for fewer, more in steps)), rows)
