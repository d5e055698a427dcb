"""What the numbers say to a claim that one variant is better than another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from estimates import LOSS, POSITIONS, Judged, Runs, difference

from eabf_cli.core.evals.statistics import Estimate, holm

LEVEL = 0.05
HOLDS, HOLDS_HERE = "holds", "holds here"
REVERSED, REVERSED_HERE = "reversed", "reversed here"
OPEN, MISSING = "open", "missing"
VERDICTS = (HOLDS, HOLDS_HERE, OPEN, REVERSED_HERE, REVERSED, MISSING)
"""`HOLDS` and `REVERSED` are told for other draws of samples, too; with "here", only for the models that were trained.
`OPEN`: not told apart. All at a confidence of 95 % for the whole family of claims that is judged together."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """`better` is better than `worse` at a length.

    Attributes:
        gap: by how much the paper's points say so; None where the paper has no such point.
    """

    better: str
    worse: str
    length: int
    gap: float | None = None


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A claim with what was measured.

    Attributes:
        advantage: of the one that should be better, positive where it is: points of retrieval, or nats. None where
            runs are missing.
        p_value: adjusted, over the seeds and trials if there are several seeds.
        p_value_here: adjusted, over the trials alone.
        num_seeds: that both variants have.
        num_planned: that both are to have.
    """

    claim: Claim
    advantage: float | None
    p_value: float | None
    p_value_here: float | None
    num_seeds: int
    num_planned: int

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`."""
        if self.advantage is None:
            return MISSING
        if self.p_value is not None and self.p_value <= LEVEL:
            return HOLDS if self.advantage > 0 else REVERSED
        if self.p_value_here is not None and self.p_value_here <= LEVEL:
            return HOLDS_HERE if self.advantage > 0 else REVERSED_HERE
        return OPEN


def claims_of(scores: Mapping[str, Mapping[int, float]], lengths: Mapping[int, int]) -> list[Claim]:
    """Every ordering of a table of the paper's; ties claim nothing.

    Args:
        scores: by method and column, in points.
        lengths: column of the paper to the length that stands for it here.
    """
    claims = []
    for a, b in combinations(scores, 2):
        for column, length in lengths.items():
            gap = scores[a][column] - scores[b][column]
            if gap:
                better, worse = (a, b) if gap > 0 else (b, a)
                claims.append(Claim(better=better, worse=worse, length=length, gap=round(abs(gap), 1)))
    return claims


def judge(claims: Sequence[Claim], runs: Mapping[str, Runs], measurement: str) -> list[Judgement]:
    """Judge claims together: Holm's correction is over all of them.

    Args:
        runs: by the names in the claims.
    """
    found = [difference(runs[claim.better], runs[claim.worse], measurement, claim.length) for claim in claims]
    return judgements(claims, found, measurement)


def judgements(claims: Sequence[Claim], found: Sequence[Judged | None], measurement: str) -> list[Judgement]:
    """Judge differences, better minus worse, together."""
    everywhere = adjusted({number: judged.seeds for number, judged in enumerate(found) if judged is not None})
    here = adjusted({number: judged.trials for number, judged in enumerate(found) if judged is not None})
    sign = -1 if measurement in (LOSS, POSITIONS) else 1
    return [
        Judgement(
            claim=claim,
            advantage=None if judged is None else sign * judged.mean,
            p_value=everywhere.get(number),
            p_value_here=here.get(number),
            num_seeds=0 if judged is None else judged.num_seeds,
            num_planned=0 if judged is None else judged.num_planned,
        )
        for number, (claim, judged) in enumerate(zip(claims, found, strict=True))
    ]


def adjusted(estimates: Mapping[int, Estimate | None]) -> dict[int, float]:
    """The adjusted p-values of the estimates that have one."""
    p_values = {number: estimate.p_value for number, estimate in estimates.items() if estimate is not None}
    return holm({number: p_value for number, p_value in p_values.items() if p_value is not None})


def summarised(judged: Sequence[Judgement]) -> str:
    """The verdict on claims that are made in one breath.

    They hold if each of them does, and are reversed if any is; the weaker kind where one is of the weaker kind.
    """
    verdicts = {judgement.verdict for judgement in judged}
    for verdict in (REVERSED, REVERSED_HERE, MISSING, OPEN, HOLDS_HERE):
        if verdict in verdicts:
            return verdict
    return HOLDS
