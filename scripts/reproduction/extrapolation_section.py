"""The paper's first experiment: trained at four windows, evaluated at one to eight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cells import NUM_SAMPLES, TARGET_WINDOW, TWICE_TARGET, WINDOW, extrapolation
from estimates import LOSS, RETRIEVAL, Runs, difference, level, read_runs
from formatting import CHANGED, CLAIMED, ORDERED, counted, judgement_text, level_text, listed, paragraph, plain, table
from published_results import BY_LENGTH
from shared_tables import JUDGED, MEASUREMENTS, comparison_tables, level_table, missing_note
from verdicts import (
    HOLDS,
    HOLDS_HERE,
    MISSING,
    OPEN,
    REVERSED,
    REVERSED_HERE,
    VERDICTS,
    Claim,
    Judgement,
    claims_of,
    judge,
    judgements,
    summarised,
)

_COLUMNS = {length // WINDOW: length for length in TWICE_TARGET}
_OTHERS = ("linear", "ntk-by-parts", "yarn")
_HEADLINES: dict[str, tuple[tuple[str, ...], tuple[str, ...], int]] = {
    "at 4x, EABF is better than ABF": (("eabf",), ("abf",), 4),
    "at 4x, EABF is better than PI, NTK-by-parts and YaRN": (("eabf",), _OTHERS, 4),
    "at 4x, ABF is better than PI, NTK-by-parts and YaRN": (("abf",), _OTHERS, 4),
    "at 8x, EABF is better than ABF": (("eabf",), ("abf",), 8),
    "at 8x, ABF and EABF are better than PI, NTK-by-parts and YaRN": (("abf", "eabf"), _OTHERS, 8),
}
_EABF_VARIANTS = ("eabf", "eabf-released")


def extrapolation_section(folder: Path, picture: str) -> str:
    """The section; `picture` is its address."""
    runs = read_runs(extrapolation(), folder)
    judged = {measurement: judge_orderings(runs, measurement) for measurement in JUDGED}
    parts = [
        "## Extrapolation (the paper's Table 5)",
        paragraph(
            f"""Each method is trained at four windows ({TARGET_WINDOW:,} tokens) with {NUM_SAMPLES} samples and
            measured at one to eight. `original` is the model as it stands, `linear` the paper's PI. `eabf` exempts
            layers 0 and 1, as the paper's text says; `eabf-released` scales every layer, as the published code does;
            which of the two the paper's EABF was cannot be told from it. The paper's columns are its macro averages
            over 12 LongBench tasks at the same multiples of its own window, after training with 3,500 samples."""
        ),
        missing_note(extrapolation(), folder),
        f"![Retrieval and perplexity by length]({picture})",
        _retrieval_table(runs),
        *(
            level_table(runs, measurement, TWICE_TARGET)
            for measurement in ("needles", "repeated_span", "passkey", LOSS)
        ),
        _broken_note(runs),
        "### The paper's orderings",
        paragraph(
            f"""Table 5 orders its five methods in pairs at each multiple: {
                counted(len(judged[RETRIEVAL]), "ordering")
            }, ties left out. Each is judged on retrieval and on the loss, with `eabf` for the paper's
            EABF. In a cell stand the method that the paper puts ahead and by how many points; by how much it is ahead
            here, in points of retrieval or in nats of loss (negative: behind); and the verdict. P-values are
            corrected for all orderings of a measurement."""
        ),
        _verdict_counts(judged),
        *(_ordering_table(judged[measurement], measurement) for measurement in JUDGED),
        "### From four windows to eight",
        paragraph(
            """In the paper, ABF and EABF keep at eight windows what they score at four, or nearly, and the others
            lose. Here, what each gains or loses in points of retrieval and in nats (rising is better in both):"""
        ),
        _change_table(runs),
        "### The paper's variant and the released one",
        paragraph("By how much `eabf-released` is better than `eabf`, in points of retrieval and in nats:"),
        comparison_tables(runs, [("eabf-released", "eabf")], TWICE_TARGET),
    ]
    return "\n\n".join(part for part in parts if part)


def extrapolation_findings(folder: Path) -> str:
    """What the experiment comes to: a sentence for each measurement, and the claims that the paper makes in words."""
    runs = read_runs(extrapolation(), folder)
    sentences = []
    for measurement, title in JUDGED.items():
        found = judge_orderings(runs, measurement)
        counts = Counter(judgement.verdict for judgement in found)
        missing = f"; for {counts[MISSING]}, runs are missing" if counts[MISSING] else ""
        sentences.append(
            f"""- On {title}, of the {len(found)} orderings in Table 5, {counts[HOLDS]} hold, and {counts[HOLDS_HERE]}
            more for the models that were trained here; {counts[REVERSED]} are reversed, and {counts[REVERSED_HERE]}
            more for these models; {counts[OPEN]} are not told apart{missing}."""
        )
    columns = []
    for name in _EABF_VARIANTS:
        for measurement in JUDGED:
            found = judge_orderings(runs, measurement, eabf=name)
            columns.append([_headline(found, *_claim_parts(claim, name)) for claim in _HEADLINES.values()])
    header = ("The paper's claim", *(f"{title}, `{name}`" for name in _EABF_VARIANTS for title in JUDGED.values()))
    rows = [(text, *cells) for text, *cells in zip(_HEADLINES, *columns, strict=True)]
    note = _broken_note(runs)
    return "\n\n".join(["\n".join(map(_item, sentences)), *([note] if note else []), table(header, rows)])


def judge_orderings(runs: Mapping[str, Runs], measurement: str, *, eabf: str = "eabf") -> list[Judgement]:
    """Every ordering of Table 5, with one of our variants for the paper's EABF."""
    claims = [
        replace(claim, better=_named(claim.better, eabf), worse=_named(claim.worse, eabf))
        for claim in claims_of(BY_LENGTH, _COLUMNS)
    ]
    return judge(claims, runs, measurement)


def _item(sentence: str) -> str:
    return paragraph(sentence, indent="  ")


def _named(method: str, eabf: str) -> str:
    return eabf if method == "eabf" else method


def _claim_parts(
    claim: tuple[tuple[str, ...], tuple[str, ...], int], eabf: str
) -> tuple[tuple[str, ...], tuple[str, ...], int]:
    better, worse, multiple = claim
    return tuple(_named(name, eabf) for name in better), worse, multiple


def _headline(found: Sequence[Judgement], better: Sequence[str], worse: Sequence[str], multiple: int) -> str:
    parts = [
        judgement
        for judgement in found
        if judgement.claim.length == multiple * WINDOW
        and judgement.claim.better in better
        and judgement.claim.worse in worse
    ]
    counts = Counter(judgement.verdict for judgement in parts)
    words = CLAIMED[summarised(parts)]
    if len(counts) == 1:
        return words
    return f"{words} ({', '.join(f'{counts[v]} {plain(ORDERED[v])}' for v in VERDICTS if counts[v])})"


def _broken_note(runs: Mapping[str, Runs]) -> str:
    """Which methods lost their retrieval inside the original window, so that orderings say little of them."""
    original = level(runs["original"], RETRIEVAL, WINDOW)
    broken = [
        name
        for name, found in runs.items()
        if original is not None
        and (inside := level(found, RETRIEVAL, WINDOW)) is not None
        and inside.mean < original.mean / 2
    ]
    if not broken:
        return ""
    names = listed([f"`{name}`" for name in broken])
    return paragraph(
        f"""Inside the original window, {names} retrieves less than half of what the untrained model does: so little
        training does not bring the model back under it. Orderings against it say so, and nothing of its reach."""
    )


def _retrieval_table(runs: Mapping[str, Runs]) -> str:
    rows = []
    for name, found in runs.items():
        points = BY_LENGTH.get(name)
        published = ("" if points is None else f"{points[multiple]:.1f}" for multiple in _COLUMNS)
        rows.append((f"`{name}`", *(level_text(found, RETRIEVAL, length) for length in TWICE_TARGET), *published))
    header = (
        f"{MEASUREMENTS[RETRIEVAL]} (%)",
        *(f"{length:,} ({multiple}x)" for multiple, length in _COLUMNS.items()),
        *(f"paper {multiple}x" for multiple in _COLUMNS),
    )
    return table(header, rows)


def _verdict_counts(judged: Mapping[str, Sequence[Judgement]]) -> str:
    rows = []
    for measurement, found in judged.items():
        for length in (*TWICE_TARGET, None):
            counts = Counter(j.verdict for j in found if length in (j.claim.length, None))
            name = "all" if length is None else f"{length // WINDOW}x"
            rows.append((f"{JUDGED[measurement]}, {name}", *(str(counts[verdict]) for verdict in VERDICTS)))
    return table(("Orderings", *(plain(ORDERED[verdict]) for verdict in VERDICTS)), rows)


def _ordering_table(judged: Sequence[Judgement], measurement: str) -> str:
    """Pairs by multiples."""
    pairs: dict[frozenset[str], dict[int, str]] = {}
    for judgement in judged:
        claim = judgement.claim
        shown = judgement_text(judgement, ORDERED, is_loss=measurement == LOSS)
        pair = frozenset((claim.better, claim.worse))
        pairs.setdefault(pair, {})[claim.length] = f"`{claim.better}` by {claim.gap:.1f}: {shown}"
    order = list(BY_LENGTH)
    rows = [
        (
            " and ".join(f"`{name}`" for name in sorted(pair, key=order.index, reverse=True)),
            *(texts.get(length, "a tie") for length in TWICE_TARGET),
        )
        for pair, texts in pairs.items()
    ]
    return table((f"On {JUDGED[measurement]}", *(f"{multiple}x" for multiple in _COLUMNS)), rows)


def _change_table(runs: Mapping[str, Runs]) -> str:
    """What each method gains or loses from four windows to eight."""
    four, eight = _COLUMNS[4], _COLUMNS[8]
    methods = [name for name in runs if name != "original"]
    claims = [Claim(better=name, worse=name, length=eight) for name in methods]
    columns = []
    for measurement in JUDGED:
        found = [difference(runs[name], runs[name], measurement, eight, b_length=four) for name in methods]
        columns.append(
            [
                judgement_text(judgement, CHANGED, is_loss=measurement == LOSS)
                for judgement in judgements(claims, found, measurement)
            ]
        )
    rows = []
    for name, *texts in zip(methods, *columns, strict=True):
        points = BY_LENGTH.get(name)
        rows.append((f"`{name}`", *texts, "" if points is None else f"{points[8] - points[4]:+.1f}"))
    return table(("4x to 8x", *JUDGED.values(), "paper (points)"), rows)
