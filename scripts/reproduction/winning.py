"""Which of the confirmed variants beats its rivals beyond the window and loses nothing inside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cells import TARGET_WINDOW, WINDOW
from confirming import CONFIRMATION_SEEDS
from estimates import LOSS, RETRIEVAL, Runs
from formatting import COMPARED, judgement_text, listed
from verdicts import HOLDS, HOLDS_HERE, MISSING, OPEN, REVERSED, REVERSED_HERE, Claim, Judgement, judge

RULE = """A variant beats a rival if it is better beyond the window on retrieval or on the loss, and worse on neither
of them, beyond the window or inside. It wins if it beats EABF as published, the tuned ABF and the tuned YaRN. Beyond
the window ends at the target that they are trained for; the tables of the lengths go further."""

_MEASUREMENTS = {RETRIEVAL: "retrieval", LOSS: "loss"}
_SPANS = {WINDOW: "inside", TARGET_WINDOW: "beyond"}
_NOT_NEEDED = "eabf-tuned"


@dataclass(frozen=True)
class Duel:
    """A variant against one rival: a judgement for each measurement and span, which are the lengths of `spans`."""

    name: str
    rival: str
    judgements: Mapping[tuple[str, int], Judgement]

    @property
    def verdict(self) -> str:
        """`HOLDS` or `HOLDS_HERE` if the rival is beaten (see `RULE`); `MISSING` while a seed is; else the worst."""
        if any(judgement.num_seeds < len(CONFIRMATION_SEEDS) for judgement in self.judgements.values()):
            return MISSING
        verdicts = {key: judgement.verdict for key, judgement in self.judgements.items()}
        for bad in (REVERSED, REVERSED_HERE):
            if bad in verdicts.values():
                return bad
        beyond = {verdicts[measurement, TARGET_WINDOW] for measurement in _MEASUREMENTS}
        return next((good for good in (HOLDS, HOLDS_HERE) if good in beyond), OPEN)


def duels(names: Iterable[str], rivals: Sequence[str], runs: Mapping[str, Runs]) -> list[Duel]:
    """Every variant against every rival; all claims on a measurement are judged together.

    Args:
        runs: of variants and rivals, as `spans` makes them.
    """
    pairs = [(name, rival) for name in names for rival in rivals]
    claims = [Claim(better=name, worse=rival, length=length) for name, rival in pairs for length in _SPANS]
    found: dict[tuple[str, str], dict[tuple[str, int], Judgement]] = {pair: {} for pair in pairs}
    for measurement in _MEASUREMENTS:
        for judgement in judge(claims, runs, measurement):
            claim = judgement.claim
            found[claim.better, claim.worse][measurement, claim.length] = judgement
    return [Duel(name, rival, judgements) for (name, rival), judgements in found.items()]


def conclusions(fought: Sequence[Duel]) -> list[str]:
    """A sentence for each variant: what it beats, how surely, and what keeps it from winning; last, if none wins."""
    by_name: dict[str, list[Duel]] = {}
    for duel in fought:
        if duel.rival != _NOT_NEEDED:
            by_name.setdefault(duel.name, []).append(duel)
    found = [_conclusion(name, own) for name, own in by_name.items()]
    verdicts = [{duel.verdict for duel in own} for own in by_name.values()]
    if verdicts and all(MISSING not in those and not those <= {HOLDS, HOLDS_HERE} for those in verdicts):
        found.append("**No variant wins**, so the table of methods gets no new one.")
    return found


def duel_rows(fought: Sequence[Duel]) -> list[tuple[str, ...]]:
    """A row for each duel: the names, retrieval inside and beyond, the loss inside and beyond, and the verdict."""
    words = {HOLDS: "**beaten**", HOLDS_HERE: "beaten here", MISSING: "missing"}
    return [
        (
            f"`{duel.name}` against `{duel.rival}`",
            *(judgement_text(duel.judgements[key], COMPARED, is_loss=key[0] == LOSS) for key in duel_keys()),
            words.get(duel.verdict, "not beaten"),
        )
        for duel in fought
    ]


def duel_keys() -> list[tuple[str, int]]:
    """Measurement and length of the columns of `duel_rows`."""
    return [(measurement, length) for measurement in _MEASUREMENTS for length in _SPANS]


def duel_titles() -> list[str]:
    """The names of these columns."""
    return [f"{_MEASUREMENTS[measurement]} {_SPANS[length]}" for measurement, length in duel_keys()]


def _conclusion(name: str, needed: Sequence[Duel]) -> str:
    verdicts = {duel.verdict for duel in needed}
    if MISSING in verdicts:
        return f"Of `{name}` or of what it has to beat, runs are missing."
    if verdicts <= {HOLDS}:
        return f"**`{name}` wins**, for other draws of samples, too."
    if verdicts <= {HOLDS, HOLDS_HERE}:
        return f"`{name}` wins for the models that were trained here; so few seeds cannot tell it of others."
    kept = [f"`{duel.rival}` ({_reason(duel)})" for duel in needed if duel.verdict not in (HOLDS, HOLDS_HERE)]
    beaten = [f"`{duel.rival}`" for duel in needed if duel.verdict in (HOLDS, HOLDS_HERE)]
    if not beaten:
        return f"`{name}` beats none of them: not {listed(kept)}."
    return f"`{name}` beats {listed(beaten)}, but not {listed(kept)}."


def _reason(duel: Duel) -> str:
    worse = [
        f"{_MEASUREMENTS[measurement]} {_SPANS[length]} is worse"
        for (measurement, length), judgement in duel.judgements.items()
        if judgement.verdict in (REVERSED, REVERSED_HERE)
    ]
    return listed(worse) if worse else "not told apart beyond the window"
