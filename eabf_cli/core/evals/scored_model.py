"""What a comparison keeps of a measured model: its result and its scores by document and trial, also on disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eabf_cli.core.evals.comparisons import UnitScores
from eabf_cli.core.evaluation import Measured


@dataclass(frozen=True)
class ScoredModel:
    """A measured model.

    Attributes:
        result: what `evaluate` returns.
        scores: what it was made from.
        key_tokens: of each document, which of its target tokens long context helps.
    """

    result: dict[str, Any]
    scores: UnitScores
    key_tokens: tuple[tuple[bool, ...], ...] = ()

    @classmethod
    def of(cls, measured: Measured, *, has_key_tokens: bool = True) -> ScoredModel:
        """The scores of a measurement, by the names of its result's keys.

        Args:
            has_key_tokens: key tokens were chosen in a way that is fair to all models.
        """
        values: dict[str, dict[int, Sequence[float]]] = {
            "perplexity": dict(measured.documents),
            "context_gain": dict(measured.context),
            **{task: dict(by_length) for task, by_length in measured.trials.items()},
        }
        clusters: dict[str, dict[int, Sequence[int]]] = {
            task: dict(by_length) for task, by_length in measured.prompts.items()
        }
        if has_key_tokens and any(any(chosen) for chosen in measured.key_tokens):
            found = measured.key_losses
            values["key_tokens"] = {context: [nll for losses in found[context] for nll in losses] for context in found}
            clusters["key_tokens"] = {
                context: [number for number, losses in enumerate(found[context]) for _ in losses] for context in found
            }
        values = {name: by_length for name, by_length in values.items() if by_length}
        return cls(measured.result, UnitScores(values, clusters), measured.key_tokens)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "result": self.result,
            "values": _with_text_keys(self.scores.values),
            "clusters": _with_text_keys(self.scores.clusters),
            "key_tokens": [list(map(int, chosen)) for chosen in self.key_tokens],
        }

    @classmethod
    def from_dict(cls, kept: dict[str, Any]) -> ScoredModel:
        """Read the JSON form."""
        scores = UnitScores(_with_number_keys(kept["values"]), _with_number_keys(kept["clusters"]))
        key_tokens = tuple(tuple(map(bool, chosen)) for chosen in kept["key_tokens"])
        return cls(kept["result"], scores, key_tokens)


def pool_results(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The results of several seeds as one: numbers averaged (perplexities as losses), counts those of one seed.

    Effective lengths are the shortest, which every seed reaches. What one seed lacks is None.
    """
    pooled: dict[str, Any] = _pooled(results)
    pooled["effective_length"] = _shortest([result["effective_length"] for result in results])
    if "effective_lengths" in pooled:
        by_task = [result["effective_lengths"] for result in results]
        pooled["effective_lengths"] = {task: _shortest([found[task] for found in by_task]) for task in by_task[0]}
    return pooled


def _shortest(lengths: Sequence[int | None]) -> int | None:
    known = [length for length in lengths if length is not None]
    return min(known) if len(known) == len(lengths) else None


def _pooled(values: Sequence[Any], name: str = "") -> Any:
    first = values[0]
    if all(value == first for value in values):
        return first
    if None in values:
        return None
    if isinstance(first, dict):
        return {key: _pooled([value[key] for value in values], key) for key in first}
    if isinstance(first, list):
        return [_pooled(group) for group in zip(*values, strict=True)]
    if name == "perplexity":
        return math.exp(sum(map(math.log, values)) / len(values))
    return sum(values) / len(values)


def _with_text_keys(values: Any) -> dict[str, Any]:
    return {
        name: {str(length): list(units) for length, units in by_length.items()} for name, by_length in values.items()
    }


def _with_number_keys(values: Any) -> dict[str, Any]:
    return {name: {int(length): units for length, units in by_length.items()} for name, by_length in values.items()}
