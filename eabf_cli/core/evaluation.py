"""What a model does with its window: perplexity, the gain from context, retrieval, the effective length.

The module imports no torch until `evaluate` is called, so that options can read the defaults.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eabf_cli.core.evals.buckets import position_result
from eabf_cli.core.evals.evaluation_rows import RETRIEVAL_TASKS, EvaluationRows
from eabf_cli.core.evals.grid import multi_key_result, needle_grid
from eabf_cli.core.evals.key_tokens import (
    KeyTokens,
    choosing_contexts,
    find_key_tokens,
    key_losses,
    with_key_tokens,
)
from eabf_cli.core.evals.language_modeling import (
    context_result,
    perplexity_result,
)
from eabf_cli.core.evals.retrieval import (
    SPANS_PER_PROMPT,
    effective_length,
    needles_result,
    num_questions,
    passkey_result,
    retrieval_result,
    span_result,
)
from eabf_cli.core.evals.settings import TASKS, EvalConfig
from eabf_cli.core.evals.tracking import tracking_result, tracking_shares
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
        a dictionary ready for JSON (docs/api.md): `method` (None: not patched),
        `original_max_position_embeddings`, `max_position_embeddings`, `lengths`, `effective_length` and
        `effective_lengths` (by task); each of `TASKS` as far as it is measured, a list of entries by length (and depth,
        template or positions), with standard errors or the ends of 95 % intervals; `key_tokens` (how they were chosen);
        `retrieval` (passkey and needles together, with one-sided lower bounds); `grid` (the entries that have a depth,
        with their task); `num_documents`; `notes` on what could not be measured; `num_tokens` that the model was run
        on, `wall_s`.

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

    rows = EvaluationRows(config, tokenizer, lengths)
    reading = plan_for(model, rows.make(), batch_tokens=config.batch_tokens)
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
        "num_documents": len(rows.documents),
        "notes": rows.notes,
        "num_tokens": reading.num_tokens,
        "wall_s": time.perf_counter() - started,
    }
    trials = {task: _trials(scores, task) for task in RETRIEVAL_TASKS}
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
    how: dict[str, Any]
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
