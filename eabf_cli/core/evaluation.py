"""What a model does with its window: perplexity, the gain from context, retrieval, the effective length.

The module imports no torch until `evaluate` is called, so that options can read the defaults.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eabf_cli.core.data.records import open_records
from eabf_cli.core.data.tokenization import encode_text
from eabf_cli.core.demo import DEMO_DATASET
from eabf_cli.core.errors import DataError, InvalidConfigError
from eabf_cli.core.evals.language_modeling import (
    context_result,
    context_rows,
    perplexity_result,
    perplexity_rows,
)
from eabf_cli.core.evals.retrieval import (
    effective_length,
    needle_row,
    needles_result,
    passkey_result,
    passkey_rows,
    retrieval_result,
    span_result,
    span_row,
)
from eabf_cli.core.evals.rows import Row, merge_rows
from eabf_cli.core.evals.settings import TASKS, EvalConfig
from eabf_cli.core.frequencies import doublings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from eabf_cli.core.evals.scoring import Scores

__all__ = ["TASKS", "EvalConfig", "Measured", "default_lengths", "evaluate", "evaluate_scores"]

Progress = Callable[[int, int], None]
"""Called with (tokens done, tokens in all)."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A result with the scores that it was made from, for comparisons that are paired by document or trial.

    Two models with the same tokenizer, measured under the same config, have their scores in the same order.

    Attributes:
        result: what `evaluate` returns.
        documents: by length, the loss of each document's last tokens in its first so many tokens, in nats.
        context: by visible context, the loss of each document's target tokens, in nats; the same documents and
            tokens at every context.
        trials: by task and length, what each trial came to: 1 or 0, or the share of a span's tokens.
        key_tokens: of each document in `context`, which of its target tokens long context helps.
        key_losses: by visible context, the losses of each document's key tokens, in nats.
    """

    result: dict[str, Any]
    documents: dict[int, list[float]]
    context: dict[int, list[float]]
    trials: dict[str, dict[int, list[float]]]
    key_tokens: tuple[tuple[bool, ...], ...] = ()
    key_losses: dict[int, list[tuple[float, ...]]] = field(default_factory=dict)


def evaluate(
    model: PreTrainedModel, tokenizer: Any, config: EvalConfig | None = None, *, progress: Progress | None = None
) -> dict[str, Any]:
    """Measure a model as it stands, patched or not.

    Every row begins with BOS where the tokenizer has one, has positions from 0, and is run without padding in
    the model's dtype. Answers count if greedy decoding gives them exactly.

    Returns:
        a dictionary ready for JSON (DESIGN.md section 5): `method` (None: not patched),
        `original_max_position_embeddings`, `max_position_embeddings`, `lengths`, `effective_length`;
        `perplexity`, `context_gain`, `passkey`, `needles`, `repeated_span` as far as they are tasks;
        `retrieval` (passkey and needles together, with lower bounds); `notes` on what could not be measured;
        `num_tokens`, `wall_s`.

    Raises:
        DataError: no document to measure on.
    """
    return evaluate_scores(model, tokenizer, config, progress=progress).result


def evaluate_scores(
    model: PreTrainedModel,
    tokenizer: Any,
    config: EvalConfig | None = None,
    *,
    progress: Progress | None = None,
    key_tokens: Sequence[Sequence[bool]] | None = None,
) -> Measured:
    """`evaluate`, with the score of every document and trial.

    Args:
        key_tokens: of each document, which target tokens count as key tokens: `Measured.key_tokens` of a reference
            model that was measured under the same config. None finds them with this model.

    Raises:
        DataError: no document to measure on.
    """
    from eabf_cli.core.architectures import follows_length
    from eabf_cli.core.evals.scoring import score_rows
    from eabf_cli.core.patching import describe_patch

    config = config or EvalConfig()
    started = time.perf_counter()
    scaling = describe_patch(model)
    if scaling is None or scaling.original_max_position_embeddings is None:
        window = target_window = model.config.get_text_config().max_position_embeddings
    else:
        window, target_window = scaling.original_max_position_embeddings, scaling.max_position_embeddings
    lengths = sorted(set(config.lengths or default_lengths(window, target_window)))

    plan = _Plan(config, tokenizer, lengths)
    rows = merge_rows(plan.make_rows(), share_prefixes=not follows_length(model.config.get_text_config()))
    scores = score_rows(model, rows, batch_tokens=config.batch_tokens, progress=progress)

    retrieval = retrieval_result(scores, lengths)
    measured: dict[str, Any] = {
        "perplexity": perplexity_result(scores, lengths),
        "context_gain": context_result(scores, lengths, window),
        "passkey": passkey_result(scores, lengths, config.depths),
        "needles": needles_result(scores, lengths),
        "repeated_span": span_result(scores, lengths),
    }
    result = {
        "method": None if scaling is None else scaling.method,
        "original_max_position_embeddings": window,
        "max_position_embeddings": target_window,
        "lengths": lengths,
        "effective_length": effective_length(retrieval, window),
        **{task: measured[task] for task in TASKS if task in config.tasks},
        "retrieval": retrieval,
        "notes": plan.notes,
        "num_tokens": sum(len(row.input_ids) for row in rows),
        "wall_s": time.perf_counter() - started,
    }
    return Measured(
        result=result,
        documents=_losses(scores, "perplexity"),
        context=_losses(scores, "context"),
        trials={task: found for task, key in _TRIALS.items() if (found := _trials(scores, key))},
    )


# Task -> the first part of its scores' keys; the second is the length.
_TRIALS = {"passkey": "passkey", "needles": "needles", "repeated_span": "span"}


def _losses(scores: Scores, kind: str) -> dict[int, list[float]]:
    return {key[1]: [score.mean_nll for score in found] for key, found in scores.items() if key[0] == kind}


def _trials(scores: Scores, kind: str) -> dict[int, list[float]]:
    trials: dict[int, list[float]] = {}
    for key, found in scores.items():
        if key[0] == kind:
            values = [score.share if kind == "span" else float(score.is_match) for score in found]
            trials.setdefault(key[1], []).extend(values)
    return trials


def default_lengths(original_max_position_embeddings: int, max_position_embeddings: int) -> list[int]:
    """Half the original window, the window and its doublings, the target window and twice it."""
    window, target = original_max_position_embeddings, max_position_embeddings
    return sorted({window // 2, *doublings(window, 2 * target), target, 2 * target})


class _Plan:
    """The rows of a config's tasks, the same for every model with the same tokenizer."""

    def __init__(self, config: EvalConfig, tokenizer: Any, lengths: Sequence[int]) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.lengths = lengths
        self.bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.notes: list[str] = []

    def make_rows(self) -> list[Row]:
        """Every row to score; what has no document, or does not fit a length, becomes a note."""
        tasks, target_tokens = self.config.tasks, self.config.target_tokens
        documents = self._encode_documents() if set(tasks) != {"passkey"} else []
        rows: list[Row] = []
        if "context_gain" in tasks:
            rows += context_rows(documents, self.bos, self.lengths, target_tokens)
        for length in self.lengths:
            if "perplexity" in tasks:
                rows += perplexity_rows(documents, self.bos, length, target_tokens)
                if max(map(len, documents)) + len(self.bos) < length:
                    self.notes.append(f"perplexity at {length:,}: no document is that long")
            for task in ("passkey", "needles", "repeated_span"):
                if task in tasks:
                    try:
                        rows += self._retrieval_rows(task, length, documents)
                    except InvalidConfigError as error:
                        self.notes.append(f"{task} at {length:,}: {error}")
        return rows

    def _retrieval_rows(self, task: str, length: int, documents: Sequence[Sequence[int]]) -> list[Row]:
        config = self.config
        if task == "passkey":
            return passkey_rows(self.tokenizer, length, config.depths, config.num_passkey_trials, config.seed)
        make_row, count = {
            "needles": (needle_row, config.num_needle_prompts),
            "repeated_span": (span_row, config.num_span_prompts),
        }[task]
        return [
            make_row(
                self.tokenizer,
                length,
                documents[index % len(documents)],
                random.Random(f"{task}/{length}/{config.seed}/{index}"),
            )
            for index in range(count)
        ]

    def _encode_documents(self) -> list[list[int]]:
        """Tokens of the chosen documents without BOS: those that fill the longest window come first."""
        texts = self.config.documents
        if texts is None:
            texts = tuple(read().text or "" for read in open_records(DEMO_DATASET, split="heldout"))
        longest = max(self.lengths)
        encoded = [
            encode_text(self.tokenizer, text, max_tokens=longest).input_ids[len(self.bos) : longest] for text in texts
        ]
        encoded = sorted((ids for ids in encoded if ids), key=len, reverse=True)
        if not encoded:
            raise DataError("there is no document to measure on: all are empty")
        return encoded[: self.config.num_documents]
