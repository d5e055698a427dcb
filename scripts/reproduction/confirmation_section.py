"""The section of docs/study.md on the confirmed variants: do they win?"""

from __future__ import annotations

from pathlib import Path

from cells import TWICE_TARGET
from confirming import CONFIRMATION_SEEDS, confirmation_cells
from confirming import RULE as CONFIRMATION_RULE
from estimates import LOSS, RETRIEVAL, Runs, read_runs
from formatting import bullets, paragraph, table
from shared_tables import comparison_tables, level_table, missing_note
from spans import spanned
from variants import factorial
from winning import RULE, Duel, conclusions, duel_rows, duel_titles, duels


def confirmed(results: Path) -> list[str]:
    """What became of each variant; empty while no run is there."""
    return conclusions(_fought(read_runs(confirmation_cells(results), results)))


def confirmation_section(results: Path) -> list[str]:
    """The section's parts."""
    cells = confirmation_cells(results)
    parts = [
        "## Confirmation",
        paragraph(
            f"""{CONFIRMATION_RULE} They are trained anew on {len(CONFIRMATION_SEEDS)} draws of samples that nothing was
            chosen on (seeds {", ".join(map(str, CONFIRMATION_SEEDS))}), beside EABF as published and the tuned EABF,
            ABF and YaRN, and measured on the test split, whose documents, prompts and wordings the study has not
            seen. Each draw is new, but not all of its samples: any two draws of 100 share [many of
            them](reproduction.md#what-was-run), so that verdicts over seeds say less about other samples than
            independent draws would."""
        ),
    ]
    if not cells:
        return [*parts, "The runs that they are chosen by are not all there yet, or none is a candidate."]
    parts.append(missing_note(cells, results))
    runs = read_runs(cells, results)
    fought = _fought(runs)
    if not fought:
        return parts
    pairs = [(duel.name, duel.rival) for duel in fought]
    return [
        *parts,
        paragraph(RULE),
        table(("Better by", *duel_titles(), ""), duel_rows(fought)),
        bullets(conclusions(fought)),
        *(level_table(runs, measurement, TWICE_TARGET) for measurement in (RETRIEVAL, LOSS)),
        paragraph("By how much each is better at each length, in points of retrieval and in nats:"),
        comparison_tables(runs, pairs, TWICE_TARGET),
    ]


def _fought(runs: dict[str, Runs]) -> list[Duel]:
    """The duels of the confirmed variants with all others; none while a variant has no run."""
    new = [name for name in runs if name in factorial() and runs[name].scores]
    return duels(new, [name for name in runs if name not in factorial()], spanned(runs))
