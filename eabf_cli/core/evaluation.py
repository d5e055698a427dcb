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
from eabf_cli.core.evals.buckets import position_result, position_rows
from eabf_cli.core.evals.grid import multi_key_result, multi_key_rows, needle_grid
from eabf_cli.core.evals.key_tokens import (
    KeyTokens,
    choosing_contexts,
    find_key_tokens,
    key_losses,
    with_key_tokens,
)
from eabf_cli.core.evals.language_modeling import (
    context_result,
    context_rows,
    perplexity_result,
    perplexity_rows,
)
from eabf_cli.core.evals.retrieval import (
    SPANS_PER_PROMPT,
    effective_length,
    needle_row,
    needles_result,
    num_questions,
    passkey_result,
    passkey_rows,
    retrieval_result,
    span_result,
    span_row,
)
from eabf_cli.core.evals.rows import Row
from eabf_cli.core.evals.settings import TASKS, EvalConfig
from eabf_cli.core.evals.tracking import tracking_result, tracking_row, tracking_shares
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
        trials: by task and length, what each trial came to: 1 or 0, or the share of a span's tokens or a chain's
            variables.
        prompts: by task and length, the number of the prompt that each trial belongs to.
        key_tokens: of each document in `context`, which of its target tokens long context helps.
        key_losses: by visible context, the losses of each document's key tokens, in nats.
        positions: by stretch of positions (first index, index behind the last), each document's loss in it, in nats.
    """

    result: dict[str, Any]
    documents: dict[int, list[float]]
    context: dict[int, list[float]]
    trials: dict[str, dict[int, list[float]]]
    prompts: dict[str, dict[int, list[int]]]
    key_tokens: tuple[tuple[bool, ...], ...] = ()
    key_losses: dict[int, list[tuple[float, ...]]] = field(default_factory=dict)
    positions: dict[tuple[int, int], list[float]] = field(default_factory=dict)


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
    from eabf_cli.core.evals.scoring import plan_for, score_plan

    config = config or EvalConfig()
    started = time.perf_counter()
    method, window, target_window = _windows(model)
    lengths = sorted(set(config.lengths or default_lengths(window, target_window)))

    plan = _Plan(config, tokenizer, lengths)
    reading = plan_for(model, plan.make_rows(), batch_tokens=config.batch_tokens)
    scores = score_plan(model, reading, progress=progress)

    chosen, how, losses = _key_tokens(scores, window, key_tokens)
    context_gain = context_result(scores, lengths, window)
    results: dict[str, Any] = {
        "perplexity": perplexity_result(scores, lengths),
        "context_gain": with_key_tokens(context_gain, losses) if losses else context_gain,
        "perplexity_by_position": position_result(scores),
        "passkey": passkey_result(scores, lengths, config.depths),
        "needles": needles_result(scores, lengths),
        "multi_key": multi_key_result(scores, lengths, config.depths),
        "variable_tracking": tracking_result(scores, lengths),
        "repeated_span": span_result(scores, lengths),
    }
    retrieval = retrieval_result(scores, lengths)
    result = {
        "method": method,
        "original_max_position_embeddings": window,
        "max_position_embeddings": target_window,
        "lengths": lengths,
        "effective_length": effective_length(retrieval, window),
        "effective_lengths": {
            task: effective_length(retrieval_result(scores, lengths, (task,)), window)
            for task in ("passkey", "needles", "multi_key")
            if task in config.tasks
        },
        **{task: results[task] for task in TASKS if task in config.tasks},
        **({"key_tokens": how} if how else {}),
        "retrieval": retrieval,
        "num_documents": len(plan.documents),
        "notes": plan.notes,
        "num_tokens": reading.num_tokens,
        "wall_s": time.perf_counter() - started,
    }
    trials = {task: _trials(scores, task) for task in _TRIALS}
    return Measured(
        result=result | {"grid": needle_grid(result)},
        documents=_losses(scores, "perplexity"),
        context=_losses(scores, "context"),
        positions={
            key[1:]: [score.mean_nll for score in found] for key, found in scores.items() if key[0] == "position"
        },
        trials={task: found for task, (found, _) in trials.items() if found},
        prompts={task: numbers for task, (found, numbers) in trials.items() if found},
        key_tokens=chosen,
        key_losses=losses,
    )


# The retrieval tasks, by the first part of their scores' keys; the second is the length.
_TRIALS = ("passkey", "needles", "multi_key", "variable_tracking", "repeated_span")


def _windows(model: PreTrainedModel) -> tuple[str | None, int, int]:
    """The method that a model is under, the window it was pre-trained with, and the one that it stands under."""
    from eabf_cli.core.patching import describe_patch
    from eabf_cli.core.resolution import existing_scaling, original_window

    scaling = describe_patch(model)
    if scaling is not None and scaling.original_max_position_embeddings is not None:
        return scaling.method, scaling.original_max_position_embeddings, scaling.max_position_embeddings
    config = model.config.get_text_config()
    window = config.max_position_embeddings
    # A scaling that transformers applies by itself.
    return existing_scaling(config), original_window(config) or window, window


def _key_tokens(
    scores: Scores, window: int, given: Sequence[Sequence[bool]] | None
) -> tuple[KeyTokens, dict[str, Any], dict[int, list[tuple[float, ...]]]]:
    """Which target tokens are key tokens, how they were chosen, and their losses by context."""
    contexts = sorted(key[1] for key in scores if key[0] == "context")
    choosing = choosing_contexts(contexts, window)
    if given is not None:
        chosen, how = tuple(map(tuple, given)), {"chosen_by": "a reference model"}
    elif choosing is not None:
        short, long = choosing
        chosen = find_key_tokens(scores["context", short], scores["context", long])
        how = {"chosen_by": "this model", "short_context": short, "long_context": long}
    else:
        return (), {}, {}
    counts = {"num_tokens": sum(map(sum, chosen)), "num_target_tokens": sum(map(len, chosen))}
    return chosen, how | counts, key_losses(scores, chosen)


def _losses(scores: Scores, kind: str) -> dict[int, list[float]]:
    return {key[1]: [score.mean_nll for score in found] for key, found in scores.items() if key[0] == kind}


def _trials(scores: Scores, task: str) -> tuple[dict[int, list[float]], dict[int, list[int]]]:
    """A task's trials by length, and the numbers of their prompts."""
    lengths = sorted({key[1] for key in scores if key[0] == task})
    if task == "variable_tracking":
        shares = {length: tracking_shares(scores, length) for length in lengths}
        return shares, {length: list(range(len(found))) for length, found in shares.items()}
    trials: dict[int, list[float]] = {length: [] for length in lengths}
    prompts: dict[int, list[int]] = {length: [] for length in lengths}
    for key, found in scores.items():
        if key[0] != task:
            continue
        length = key[1]
        trials[length] += [score.share if task == "repeated_span" else float(score.is_match) for score in found]
        # A passkey prompt asks for one thing; one key of all others comes from every prompt, so many times.
        per_prompt = {"needles": num_questions(key[-1]), "repeated_span": SPANS_PER_PROMPT}.get(task, 1)
        first = len(prompts[length]) if task == "passkey" else 0
        prompts[length] += [first + index // per_prompt for index in range(len(found))]
    return trials, prompts


def default_lengths(original_max_position_embeddings: int, max_position_embeddings: int) -> list[int]:
    """Half the original window, the window and its doublings, the target window and twice it."""
    window, target = original_max_position_embeddings, max_position_embeddings
    return sorted({window // 2, *doublings(window, 2 * target), target, 2 * target})


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


class _Plan:
    """The rows of a config's tasks, the same for every model with the same tokenizer."""

    def __init__(self, config: EvalConfig, tokenizer: Any, lengths: Sequence[int]) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.lengths = lengths
        self.bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.notes: list[str] = []
        self.documents = self._encode_documents() if set(config.tasks) != {"passkey"} else []

    def make_rows(self) -> list[Row]:
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
            for task in _TRIALS:
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
