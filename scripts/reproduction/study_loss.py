"""LongCE (arXiv 2410.23771): tokens that the long context makes likelier count more in the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from variants import LONGCE_MAX_WEIGHT

from eabf_cli.core.data.sample_set import IGNORE_INDEX, SampleSet
from eabf_cli.core.data.samples import SampleCollator


@torch.no_grad()
def longce_weights(
    model: PreTrainedModel, samples: SampleSet, *, context: int, stride: int, max_weight: float = LONGCE_MAX_WEIGHT
) -> tuple[Tensor, ...]:
    """Each sample's weights I(x_t) = min(p(x_t | all before) / p(x_t | the last tokens before), gamma).

    Computed once, before training, with the model as it is given (extended, not yet trained); the paper computes them
    in every step, with the model in training. The short context is a sliding window's: at least `context` tokens and
    fewer than `context + stride`. Tokens with no more than that before them have the ratio 1.

    Args:
        samples: rows that are not packed.
        context: K, in tokens.
        stride: tokens that are predicted from one window.

    Returns:
        (tokens,) in float32 for each sample, with a mean of 1 over the tokens that are learned from; the weight of a
        token stands where its label does.
    """
    was_training = model.training
    model.eval()
    weights = [
        _normalised(
            longce_ratios(model, torch.tensor(sample.input_ids), context=context, stride=stride, max_weight=max_weight),
            torch.tensor(sample.labels),
        )
        for sample in samples.samples
    ]
    model.train(was_training)
    return tuple(weights)


def longce_ratios(model: PreTrainedModel, input_ids: Tensor, *, context: int, stride: int, max_weight: float) -> Tensor:
    """The weights of a row (tokens,), not yet normalised (see `longce_weights`)."""
    ratios = torch.ones(len(input_ids), dtype=torch.float32)
    first = context + stride
    num_windows = math.ceil((len(input_ids) - first) / stride)
    if num_windows <= 0:
        return ratios
    # The last window is filled up behind its tokens, where a causal model does not look.
    padded = pad(input_ids, (0, first + num_windows * stride - len(input_ids)))
    windows = padded[stride:].unfold(0, first, stride)  # (windows, context + stride)
    short = _log_probabilities(model, windows)[:, context:].flatten()[: len(input_ids) - first]
    long = _log_probabilities(model, input_ids[None])[0, first:]
    ratios[first:] = (long - short).clamp(max=math.log(max_weight)).exp()
    return ratios


def _log_probabilities(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """ln p of every token after those before it in its row: (rows, tokens), 0 for the first."""
    input_ids = input_ids.to(model.device)
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
    found = logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    return pad(found, (1, 0)).cpu()


def _normalised(ratios: Tensor, labels: Tensor) -> Tensor:
    is_learned = labels != IGNORE_INDEX
    is_learned[0] = False  # nothing predicts it
    return ratios / ratios[is_learned].mean()


@dataclass(frozen=True)
class WeightedCollator(SampleCollator):
    """A batch with `loss_weights`, (batch, longest row), 0 on the padding.

    Attributes:
        weights: of each sample, by its index in the set.
    """

    weights: tuple[Tensor, ...]

    def __call__(self, samples: Sequence[Mapping[str, list[int]]]) -> dict[str, Any]:
        """See `SampleCollator`."""
        batch = super().__call__(samples)
        rows = [self.weights[sample["sample_index"][0]] for sample in samples]
        return batch | {"loss_weights": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)}
