"""From losses to a verdict: does the extended model win, and how sure is that?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from eabf_cli.core.evals.numbers import decimal
from eabf_cli.core.evals.statistics import Estimate, bootstrap_mean
from eabf_cli.core.evals.verdict_rows import Stretch
from eabf_cli.core.evals.verdict_settings import VerdictConfig

EXTENDED, EXTENDED_INSIDE = "extended", "extended_last_window"
LAST_WINDOW, RETRIEVED, YARN = "last_window", "retrieved", "yarn"
ALTERNATIVES = (LAST_WINDOW, RETRIEVED, YARN)

# Fewer clusters than these say too little about others of their kind.
_FEWEST_CLUSTERS = 5


def judge(
    losses: Mapping[str, Sequence[float]],
    stretches: Sequence[Stretch],
    titles: Mapping[str, str],
    config: VerdictConfig,
) -> dict[str, Any]:
    """The verdict on measured losses.

    The extended model wins if it is better than each alternative with the confidence asked for. All have to be
    beaten, so no correction for their number is due (an intersection-union test, Berger 1982).

    Args:
        losses: of each way of reading, the mean loss of every stretch, in nats per token.
        titles: what each way of reading is called.

    Returns:
        `wins`; `confidence` (the least of its chances to be better than each); `required_confidence`; `sentence`;
        `rows` (`name`, `title`, `nll`, `perplexity`, and for alternatives `difference`, an `Estimate` of their loss
        minus the extended model's); `inside` (an `Estimate` of the extended model's loss minus the original's, both
        on the last window: what extending has cost); `resampled` (what the bootstrap draws); `num_documents`,
        `num_pieces`, `num_stretches`, `num_tokens`.
    """
    resampled, clusters = choose_clusters(stretches)

    def difference(name: str, other: str) -> Estimate:
        """Loss of one minus loss of the other."""
        return bootstrap_mean(
            [[mine - theirs for mine, theirs in zip(losses[name], losses[other], strict=True)]],
            clusters=clusters,
            seed=config.run.seed,
            num_resamples=config.num_resamples,
            confidence=config.confidence,
        )

    behind = {name: difference(name, EXTENDED) for name in ALTERNATIVES}
    confidence = min(_chance(found, config.num_resamples) for found in behind.values())
    wins = confidence >= config.confidence
    rows: list[dict[str, Any]] = []
    for name in (EXTENDED, *ALTERNATIVES, EXTENDED_INSIDE):
        nll = fmean(losses[name])
        rows.append({"name": name, "title": titles[name], "nll": nll, "perplexity": math.exp(nll)})
        if name in behind:
            rows[-1]["difference"] = behind[name].to_dict()
    return {
        "wins": wins,
        "confidence": confidence,
        "required_confidence": config.confidence,
        "sentence": _sentence(behind, titles, confidence, config),
        "rows": rows,
        "inside": difference(EXTENDED_INSIDE, LAST_WINDOW).to_dict(),
        "resampled": resampled,
        "num_documents": len({stretch.document for stretch in stretches}),
        "num_pieces": len({(stretch.document, stretch.piece) for stretch in stretches}),
        "num_stretches": len(stretches),
        "num_tokens": sum(stretch.end - stretch.start for stretch in stretches),
    }


def choose_clusters(stretches: Sequence[Stretch]) -> tuple[str, list[Any]]:
    """What the bootstrap draws: documents where there are at least five, else their pieces, else stretches.

    Drawing documents says how sure the verdict is for other documents like these; drawing parts of them says it for
    these alone.

    Returns:
        its name, and the cluster of each stretch.
    """
    by_document = [stretch.document for stretch in stretches]
    by_piece = [(stretch.document, stretch.piece) for stretch in stretches]
    if len(set(by_document)) >= _FEWEST_CLUSTERS:
        return "documents", by_document
    if len(set(by_piece)) >= _FEWEST_CLUSTERS:
        return "pieces", by_piece
    return "stretches", list(range(len(stretches)))


def _chance(behind: Estimate, num_resamples: int) -> float:
    """How sure it is that an alternative is behind; of resamples that all agree, one more might not have."""
    return min(behind.positive_share or 0.0, 1 - 1 / (num_resamples + 1))


def _sentence(
    behind: Mapping[str, Estimate], titles: Mapping[str, str], confidence: float, config: VerdictConfig
) -> str:
    closest = min(behind, key=lambda name: (behind[name].positive_share or 0.0, behind[name].mean))
    found, title = behind[closest], titles[closest]
    if confidence >= config.confidence:
        return (
            f"Yes: on these documents the extended model is better than each alternative, with {_percent(confidence)} "
            f"confidence (the closest, '{title}', is behind by {_amount(found, config)})."
        )
    if found.mean < 0:
        return (
            f"No: on these documents '{title}' is ahead of the extended model by {_amount(found, config)}; "
            f"confidence that the extended model is better: {_percent(confidence)}."
        )
    return (
        f"Not shown: on these documents the extended model is ahead of '{title}' by {_amount(found, config)}, which "
        f"is {_percent(confidence)} confidence where {_percent(config.confidence)} is asked for; "
        "more or longer documents would tell."
    )


def _amount(found: Estimate, config: VerdictConfig) -> str:
    """How far one is ahead, with its interval."""
    sign = -1 if found.mean < 0 else 1
    text = f"{abs(found.mean):.3f} nats a token"
    if found.low is None or found.high is None:
        return text
    low, high = sorted((sign * found.low, sign * found.high))
    return f"{text} ({_percent(config.confidence)} interval {decimal(low, 3)} to {decimal(high, 3)})"


def _percent(share: float) -> str:
    """A share in percent, never rounded up to certainty."""
    return f"{math.floor(1000 * share + 1e-9) / 10:g} %"
