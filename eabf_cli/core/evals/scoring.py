"""Run rows through a model, keeping logits only where a target is predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from eabf_cli.core.evals.rows import Row, Score

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# 2**25 float32 logits are 128 MiB: what a batch may need for its predictions.
_MAX_LOGITS = 2**25

Scores = dict[Any, list[Score]]


@torch.inference_mode()
def score_rows(
    model: PreTrainedModel,
    rows: Sequence[Row],
    *,
    batch_tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Score every target of every row, in the dtype that the model has.

    Args:
        rows: sorted by length; rows of one length share a batch, so nothing is padded.
        batch_tokens: tokens in a forward pass, unless a single row has more.
        progress: called after each batch with (tokens done, tokens in all).

    Returns:
        the scores of each key, in the order of the rows.
    """
    device = next(model.parameters()).device
    vocab_size = model.config.get_text_config().vocab_size
    num_tokens, done = sum(len(row.input_ids) for row in rows), 0
    scores: Scores = {}
    was_training = model.training
    model.eval()
    try:
        _forget_longer_calls(model, rows, device)
        for batch in _batches(rows, batch_tokens, vocab_size):
            _score_batch(model, batch, device, scores)
            done += sum(len(row.input_ids) for row in batch)
            if progress is not None:
                progress(done, num_tokens)
    finally:
        model.train(was_training)
    return scores


def _score_batch(model: PreTrainedModel, batch: Sequence[Row], device: torch.device, scores: Scores) -> None:
    input_ids = torch.tensor([row.input_ids for row in batch], device=device)  # (batch, length)
    positions = _predicting_positions(batch[0])
    logits = model(
        input_ids=input_ids, use_cache=False, logits_to_keep=torch.tensor(positions, device=device)
    ).logits  # (batch, positions, vocabulary)
    index_of = {position: index for index, position in enumerate(positions)}
    for index, row in enumerate(batch):
        for target in row.targets:
            # Position p predicts token p + 1; the positions of a target lie side by side.
            first = index_of[target.start - 1]
            predictions = logits[index, first : first + target.end - target.start].float()
            tokens = input_ids[index, target.start : target.end]
            nll = cross_entropy(predictions, tokens, reduction="none")
            is_argmax = predictions.argmax(-1) == tokens
            scores.setdefault(target.key, []).append(Score(tuple(nll.tolist()), tuple(is_argmax.tolist())))


def _batches(rows: Sequence[Row], batch_tokens: int, vocab_size: int) -> Iterator[list[Row]]:
    """Consecutive rows of one length that need logits at the same positions, so far as they fit together."""
    for (length, positions), group in groupby(rows, key=lambda row: (len(row.input_ids), _predicting_positions(row))):
        members = list(group)
        size = max(1, min(batch_tokens // length, _MAX_LOGITS // (len(positions) * vocab_size)))
        for start in range(0, len(members), size):
            yield members[start : start + size]


def _predicting_positions(row: Row) -> tuple[int, ...]:
    """The positions whose logits predict a token of a target, in order."""
    return tuple(sorted({position for target in row.targets for position in range(target.start - 1, target.end - 1)}))


def _forget_longer_calls(model: PreTrainedModel, rows: Sequence[Row], device: torch.device) -> None:
    """Make the result independent of what the model was run on before.

    transformers' `dynamic` RoPE keeps the frequencies of its longest call until one comes that is shorter
    than the original window.
    """
    if rows:
        model(input_ids=torch.tensor([rows[0].input_ids[:1]], device=device), use_cache=False)
