"""Everything that an evaluation asks a model to predict: rows of all tasks, at all lengths."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from eabf_cli.core.data.records import open_records
from eabf_cli.core.data.tokenization import encode_text
from eabf_cli.core.demo import DEMO_DATASET
from eabf_cli.core.errors import DataError, InvalidConfigError
from eabf_cli.core.evals.buckets import position_rows
from eabf_cli.core.evals.grid import multi_key_rows
from eabf_cli.core.evals.language_modeling import context_rows, perplexity_rows
from eabf_cli.core.evals.retrieval import needle_row, passkey_rows, span_row
from eabf_cli.core.evals.rows import Row
from eabf_cli.core.evals.settings import EvalConfig
from eabf_cli.core.evals.tracking import tracking_row

RETRIEVAL_TASKS = ("passkey", "needles", "multi_key", "variable_tracking", "repeated_span")
"""The tasks whose trials are right or wrong; the first part of their scores' keys, the second being the length."""

PromptMaker = Callable[[Any, int, Sequence[int], random.Random], list[Row]]
"""(tokenizer, length, filler, random numbers) -> the rows of one prompt."""

# How the prompts of a task are made, and how many per length.
_PROMPTS: dict[str, Callable[[EvalConfig], tuple[PromptMaker, int]]] = {
    "needles": lambda config: (_one(needle_row), config.num_needle_prompts),
    "multi_key": lambda config: (
        lambda tokenizer, length, filler, rng: multi_key_rows(tokenizer, length, filler, config.depths, rng),
        config.num_multi_key_texts,
    ),
    "variable_tracking": lambda config: (_one(tracking_row), config.num_tracking_prompts),
    "repeated_span": lambda config: (_one(span_row), config.num_span_prompts),
}


def _one(make_row: Callable[..., Row]) -> PromptMaker:
    return lambda *arguments: [make_row(*arguments)]


class EvaluationRows:
    """The rows of a config's tasks, the same for every model with the same tokenizer."""

    def __init__(self, config: EvalConfig, tokenizer: Any, lengths: Sequence[int]) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.lengths = lengths
        self.bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.notes: list[str] = []
        self.documents = self._encode_documents() if set(config.tasks) != {"passkey"} else []

    def make(self) -> list[Row]:
        """Every row to score; what has no document, or does not fit a length, becomes a note."""
        tasks, target_tokens = self.config.tasks, self.config.target_tokens
        documents = self.documents
        rows: list[Row] = []
        if "context_gain" in tasks:
            rows += context_rows(documents, self.bos, self.lengths, target_tokens)
        if "perplexity_by_position" in tasks:
            rows += position_rows(documents, self.bos, self.lengths)
        for length in self.lengths:
            if "perplexity" in tasks:
                rows += perplexity_rows(documents, self.bos, length, target_tokens)
                if max(map(len, documents)) + len(self.bos) < length:
                    self.notes.append(f"perplexity at {length:,}: no document is that long")
            for task in RETRIEVAL_TASKS:
                if task in tasks:
                    try:
                        rows += self._retrieval_rows(task, length)
                    except InvalidConfigError as error:
                        self.notes.append(f"{task} at {length:,}: {error}")
        return rows

    def _retrieval_rows(self, task: str, length: int) -> list[Row]:
        config = self.config
        if task == "passkey":
            return passkey_rows(self.tokenizer, length, config.depths, config.num_passkey_trials, config.seed)
        make_rows, count = _PROMPTS[task](config)
        rows: list[Row] = []
        for index in range(count):
            filler = self.documents[index % len(self.documents)]
            rng = random.Random(f"{task}/{length}/{config.seed}/{index}")
            rows += make_rows(self.tokenizer, length, filler, rng)
        return rows

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
