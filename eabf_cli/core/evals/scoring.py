"""Run rows through a model: in chunks, with a cache for what they share, and logits where a target is predicted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from eabf_cli.core import architectures
from eabf_cli.core.caches import forget_after, make_cache
from eabf_cli.core.evals.prefixes import Reading, ReadingPlan, plan_reading
from eabf_cli.core.evals.rows import Row, Score
from eabf_cli.core.reading_kernel import reading_kernel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# 2**24 float32 logits are 64 MiB; their softmax takes as much again.
MAX_LOGITS = 2**24
_MAX_CHUNK_TOKENS = 2048
# What the mask, and the probabilities of the eager kernel, may take of one layer.
_MAX_SQUARE_BYTES = 2**28
# A boolean mask with its float32 copy.
_MASK_BYTES = 5
# Logits, float32 probabilities and their copy, for each head.
_EAGER_BYTES = 12

Scores = dict[Any, list[Score]]
"""The scores of each key, in the order of the rows that were given."""

Progress = Callable[[int, int], None]
"""Called with (tokens done, tokens in all)."""

_Predictions = dict[int, tuple[float, bool]]
"""Position -> the loss of the token behind it in nats, and whether that is the most likely one."""


def score_rows(
    model: PreTrainedModel, rows: Sequence[Row], *, batch_tokens: int, progress: Progress | None = None
) -> Scores:
    """Score every target of every row, in the dtype that the model has.

    What rows begin with alike is read once; the result is that of separate forward passes, but for rounding.

    Args:
        batch_tokens: tokens in a forward pass of several rows; longer rows are read in chunks.
        progress: called after each forward pass with (tokens done, tokens in all).
    """
    return score_plan(model, plan_for(model, rows, batch_tokens=batch_tokens), progress=progress)


def plan_for(model: PreTrainedModel, rows: Sequence[Row], *, batch_tokens: int) -> ReadingPlan:
    """In which order a model reads rows."""
    config = architectures.decoder(model).config
    shares_prefixes = not architectures.follows_length(config)
    if shares_prefixes and config._attn_implementation == "eager":
        batch_tokens = min(batch_tokens, max_chunk_tokens(config, batch_tokens))
    return plan_reading(rows, shares_prefixes=shares_prefixes, batch_tokens=batch_tokens)


def max_chunk_tokens(config: Any, length: int) -> int:
    """Tokens of one forward pass at the end of so many: the mask, and the eager kernel, grow with the product."""
    per_pair = _MASK_BYTES
    if config._attn_implementation == "eager":
        per_pair += _EAGER_BYTES * config.num_attention_heads
    return max(1, min(_MAX_CHUNK_TOKENS, _MAX_SQUARE_BYTES // (per_pair * length)))


@torch.inference_mode()
def score_plan(model: PreTrainedModel, plan: ReadingPlan, *, progress: Progress | None = None) -> Scores:
    """Read what a plan says, and score its targets (see `score_rows`)."""
    was_training = model.training
    model.eval()
    try:
        reader = _Reader(model, plan.num_tokens, progress)
        reader.forget_longer_calls()
        for batch in plan.batches:
            reader.read_batch(batch)
        if plan.chain:
            with reading_kernel(model):
                reader.read_chain(plan.chain)
    finally:
        model.train(was_training)
    return reader.scores()


class _Reader:
    """A model that reads, and what it predicted so far."""

    def __init__(self, model: PreTrainedModel, num_tokens: int, progress: Progress | None) -> None:
        self.model = model
        self.decoder = architectures.decoder(model)
        self.device = self.decoder.get_input_embeddings().weight.device
        self.transform = architectures.logits_transform(self.decoder.config)
        self.num_tokens = num_tokens
        self.progress = progress
        self._num_done = 0
        self._scored: list[tuple[int, Any, Score]] = []

    def scores(self) -> Scores:
        """All scores so far by key."""
        scores: Scores = {}
        for _, key, score in sorted(self._scored, key=lambda entry: entry[0]):
            scores.setdefault(key, []).append(score)
        return scores

    def forget_longer_calls(self) -> None:
        """Make the result independent of what the model was run on before.

        transformers' `dynamic` RoPE keeps the frequencies of its longest call until one comes that is shorter
        than the original window.
        """
        self.decoder(input_ids=torch.zeros((1, 1), dtype=torch.long, device=self.device), use_cache=False)

    def read_batch(self, batch: Sequence[Reading]) -> None:
        """Score rows of one length whose targets lie at the same places, in one forward pass."""
        rows = torch.tensor([reading.input_ids for reading in batch], device=self.device)  # (batch, length)
        hidden = self.decoder(input_ids=rows, use_cache=False).last_hidden_state  # (batch, length, hidden_size)
        positions = list(batch[0].positions())
        behind = [position + 1 for position in positions]
        found = self._predict(hidden[:, positions].flatten(0, 1), rows[:, behind].flatten())
        for index, reading in enumerate(batch):
            mine = found[index * len(positions) : (index + 1) * len(positions)]
            self._keep(reading, dict(zip(positions, mine, strict=True)))
        self._count(rows.numel())

    def read_chain(self, chain: Sequence[Reading]) -> None:
        """Score rows one after the other, each behind the tokens that it shares with the one before it."""
        length = max(reading.end for reading in chain)
        size = max_chunk_tokens(self.decoder.config, length)
        cache = make_cache(self.model, length, rewinds=True)
        for reading in chain:
            forget_after(cache, reading.num_shared)
            row = torch.tensor(reading.input_ids, device=self.device)
            positions = reading.positions()
            found: _Predictions = {}
            for start in range(reading.num_shared, reading.end, size):
                end = min(start + size, reading.end)
                hidden = self.decoder(
                    input_ids=row[None, start:end],
                    position_ids=torch.arange(start, end, device=self.device)[None],
                    past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state[0]  # (chunk, hidden_size)
                here = [position for position in positions if start <= position < end]
                behind = [position + 1 for position in here]
                predicted = self._predict(hidden[[position - start for position in here]], row[behind])
                found |= zip(here, predicted, strict=True)
                self._count(end - start)
            self._keep(reading, found)

    def _predict(self, hidden: Tensor, tokens: Tensor) -> list[tuple[float, bool]]:
        """The loss of each token given the hidden state (tokens, hidden_size) before it; whether it is likeliest."""
        head: nn.Module = self.model.get_output_embeddings()
        size = max(1, MAX_LOGITS // self.decoder.config.vocab_size)
        found: list[tuple[float, bool]] = []
        for part, wanted in zip(hidden.split(size), tokens.split(size), strict=True):
            logits = self.transform.apply(head(part).float())  # (part, vocabulary)
            nll = cross_entropy(logits, wanted.to(logits.device), reduction="none")
            found += zip(nll.tolist(), (logits.argmax(-1) == wanted.to(logits.device)).tolist(), strict=True)
        return found

    def _keep(self, reading: Reading, found: _Predictions) -> None:
        for rank, target in reading.targets:
            nll, is_argmax = zip(
                *(found[position] for position in range(target.start - 1, target.end - 1)), strict=True
            )
            self._scored.append((rank, target.key, Score(nll, is_argmax)))

    def _count(self, num_tokens: int) -> None:
        self._num_done += num_tokens
        if self.progress is not None:
            self.progress(self._num_done, self.num_tokens)
