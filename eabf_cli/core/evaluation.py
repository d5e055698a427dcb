"""What a model does with its window: perplexity, the gain from context, retrieval, the effective length.

The module imports no torch until `evaluate` is called, so that options can read the defaults.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from eabf_cli.core.frequencies import doublings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TASKS = ("perplexity", "context_gain", "passkey", "needles", "repeated_span")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What to measure, at which lengths, on how much.

    Attributes:
        tasks: any of `TASKS`.
        lengths: window lengths in tokens, BOS counted; None takes half the original window, the original
            window and its doublings up to twice the target window.
        num_passkey_trials: passkey prompts per length, spread evenly over the depths.
        depths: where the passkey stands, 0 (beginning) to 1 (end).
        num_needle_prompts: prompts per length that ask for a fact of each held-out template.
        num_span_prompts: prompts per length with four repeated random spans each.
        num_documents: documents for the losses at most, the longest first.
        target_tokens: tokens scored per document and length, at most half the length.
        documents: texts for the losses and for the filler; None takes the held-out part of `demo-long`.
        seed: decides the prompts.
        batch_tokens: tokens in a forward pass, unless one row has more.

    Raises:
        InvalidConfigError: an unknown task or a number that makes no sense.
    """

    tasks: tuple[str, ...] = TASKS
    lengths: tuple[int, ...] | None = None
    num_passkey_trials: int = 50
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    num_needle_prompts: int = 10
    num_span_prompts: int = 10
    num_documents: int = 16
    target_tokens: int = 256
    documents: tuple[str, ...] | None = None
    seed: int = 42
    batch_tokens: int = 4096

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            raise InvalidConfigError(
                f"tasks must be of {', '.join(TASKS)}, got {', '.join(map(repr, unknown)) or 'none'}"
            )
        if self.lengths is not None and (not self.lengths or min(self.lengths) < 4):
            raise InvalidConfigError(f"lengths must be numbers of at least 4 tokens, got {self.lengths}")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise InvalidConfigError(f"depths must be between 0 and 1, got {self.depths}")
        for name in (
            "num_passkey_trials",
            "num_needle_prompts",
            "num_span_prompts",
            "num_documents",
            "target_tokens",
            "batch_tokens",
        ):
            if getattr(self, name) < 1:
                raise InvalidConfigError(f"{name} must be at least 1, got {getattr(self, name)}")

    @classmethod
    def quick(cls, **changes: Any) -> EvalConfig:
        """Sizes for a first answer, as `eabf finetune` wants it before and after training."""
        sizes = {"num_passkey_trials": 15, "num_needle_prompts": 4, "num_span_prompts": 4, "num_documents": 24}
        return cls(**(sizes | changes))

    def replace(self, **changes: Any) -> EvalConfig:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)


Progress = Callable[[int, int], None]
"""Called with (tokens done, tokens in all)."""


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
    return {
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
