"""Tables that several sections have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from cells import Cell
from estimates import LOSS, POSITIONS, RETRIEVAL, Runs
from formatting import COMPARED, counted, judgement_text, level_text, paragraph, table
from running import read_cell
from verdicts import Claim, judge

from eabf_cli.core.evals.comparisons import TITLES

MEASUREMENTS = {
    RETRIEVAL: "Retrieval",
    "needles": "Unseen needles",
    "repeated_span": "Repeated span",
    "passkey": "Passkey",
    LOSS: "Perplexity",
    POSITIONS: "Perplexity",
    "multi_key": TITLES["multi_key"].capitalize(),
}
"""What the columns are called; losses are shown as perplexities."""

JUDGED = {RETRIEVAL: "retrieval", LOSS: "loss"}
"""What verdicts are given on."""


def missing_note(cells: Iterable[Cell], folder: Path) -> str:
    """How many of a section's runs are missing, and of which variants; empty where all are there."""
    cells = list({cell.key: cell for cell in cells}.values())
    missing = [cell for cell in cells if read_cell(folder, cell) is None]
    if not missing:
        return ""
    names = ", ".join(f"`{name}`" for name in dict.fromkeys(cell.name for cell in missing))
    return paragraph(f"Still missing: {len(missing)} of this section's {counted(len(cells), 'run')}, of {names}.")


def level_table(runs: Mapping[str, Runs], measurement: str, lengths: Sequence[int]) -> str:
    """A row for each variant that has a run, a column for each length."""
    unit = "" if measurement in (LOSS, POSITIONS) else " (%)"
    return table(
        (f"{MEASUREMENTS[measurement]}{unit}", *(f"{length:,}" for length in lengths)),
        (
            (f"`{name}`", *(level_text(found, measurement, length) for length in lengths))
            for name, found in runs.items()
            if found.scores
        ),
    )


def comparison_table(
    runs: Mapping[str, Runs],
    pairs: Sequence[tuple[str, str]],
    measurement: str,
    lengths: Sequence[int],
    title: str,
    *,
    shown: Sequence[int] | None = None,
) -> str:
    """By how much the first of each pair is better than the second; all cells are judged together.

    Args:
        pairs: names among `runs`; those without a run are left out.
        lengths: what is judged together.
        shown: the lengths that have a column; None: all.
    """
    shown = lengths if shown is None else shown
    pairs = [pair for pair in pairs if all(runs[name].scores for name in pair)]
    claims = [Claim(better=better, worse=worse, length=length) for better, worse in pairs for length in lengths]
    texts = {
        judgement.claim: judgement_text(judgement, COMPARED, is_loss=measurement in (LOSS, POSITIONS))
        for judgement in judge(claims, runs, measurement)
    }
    rows = [
        (
            f"`{better}` against `{worse}`",
            *(texts[Claim(better=better, worse=worse, length=length)] for length in shown),
        )
        for better, worse in pairs
    ]
    return table((title, *(f"{length:,}" for length in shown)), rows)


def comparison_tables(
    runs: Mapping[str, Runs],
    pairs: Sequence[tuple[str, str]],
    lengths: Sequence[int],
    *,
    shown: Sequence[int] | None = None,
) -> str:
    """`comparison_table` on retrieval (in points) and on the loss (in nats)."""
    return "\n\n".join(
        comparison_table(runs, pairs, measurement, lengths, f"On {title}", shown=shown)
        for measurement, title in JUDGED.items()
    )
