"""Restoration loss: inside the original window the trained model keeps the original model's predictions.

After LongReD (arXiv 2502.07365), which distils the original model's hidden states on short texts of its own. Here
it is the predictions that are kept, KL(original || trained), on short slices of the samples that are trained on.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from eabf_cli.core.architectures import decoder, logits_transform
from eabf_cli.core.data.sample_set import IGNORE_INDEX
from eabf_cli.core.finetune.settings import RESTORATION_CHUNK_TOKENS, RestorationConfig
from eabf_cli.core.finetune.tuning import put_method
from eabf_cli.core.resolution import Resolution

Head = Callable[[Tensor], Tensor]
"""Hidden states (tokens, hidden) to logits (tokens, vocabulary)."""


def restoration_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student_head: Head,
    teacher_head: Head,
    *,
    chunk_tokens: int = RESTORATION_CHUNK_TOKENS,
) -> Tensor:
    """Mean over tokens of KL(teacher || student) = sum_v p_v (ln p_v - ln q_v), in nats and float32.

    Logits of both exist for `chunk_tokens` tokens at a time, in the backward pass as well, where they are computed
    a second time.

    Args:
        student_hidden, teacher_hidden: (..., tokens, hidden) before the heads; the widths may differ.
        student_head, teacher_head: to logits over the same vocabulary. No gradient flows into the teacher's.
    """
    student_hidden, teacher_hidden = student_hidden.flatten(0, -2), teacher_hidden.detach().flatten(0, -2)
    total = student_hidden.new_zeros((), dtype=torch.float32)
    for student, teacher in zip(student_hidden.split(chunk_tokens), teacher_hidden.split(chunk_tokens), strict=True):
        total = total + checkpoint(
            _divergence, student, teacher, student_head, teacher_head, use_reentrant=False, preserve_rng_state=False
        )
    return total / len(student_hidden)


def _divergence(student: Tensor, teacher: Tensor, student_head: Head, teacher_head: Head) -> Tensor:
    with torch.no_grad():
        log_p = teacher_head(teacher).float().log_softmax(-1)  # (tokens, vocabulary)
    log_q = student_head(student).float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


def head_logits(model: PreTrainedModel, hidden: Tensor, head: nn.Module | None = None) -> Tensor:
    """What a causal language model's forward makes of its decoder's last hidden states.

    Args:
        head: used in place of the model's own output embeddings.
    """
    logits = (model.get_output_embeddings() if head is None else head)(hidden)
    transform = logits_transform(decoder(model).config)
    logits = logits * transform.scale
    return logits if transform.soft_cap is None else transform.soft_cap * torch.tanh(logits / transform.soft_cap)


# --- The original model ----------------------------------------------------------------------------------


class Teacher(Protocol):
    """The original model: what it predicts inside its window."""

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """Last hidden states (batch, tokens, hidden), without gradient; every row is full."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Predictions from hidden states."""


class FrozenTeacher:
    """A copy of the weights, for full tuning.

    Args:
        model: the loaded model before a method is applied; it is left alone.
        dtype: of the copy's weights. The stored dtype loses nothing and needs the least memory; where the hardware
            has no bfloat16 products, float32 is faster.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        # Casting the model would round its rotary frequencies as well.
        for weight in self.model.parameters():
            weight.data = weight.data.to(dtype)

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """See `Teacher`."""
        return _last_hidden_states(self.model, input_ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Teacher`."""
        return head_logits(self.model, hidden)


class AdapterTeacher:
    """The trained model itself with adapters and method off, for LoRA: no second copy of the weights.

    Args:
        model: the PEFT model; everything that is trained must belong to an adapter (`modules_to_save` does).
        resolution: the method that its base model carries.
        stored: the one that it was loaded with, where another was put in its place.
    """

    def __init__(self, model: Any, resolution: Resolution, stored: Resolution | None = None) -> None:
        self.model = model
        self.resolution = resolution
        self.stored = stored

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """See `Teacher`."""
        with self._original_model() as base:
            return _last_hidden_states(base, input_ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Teacher`."""
        base = self.model.get_base_model()
        head = base.get_output_embeddings()
        # A head that is trained: whole (modules_to_save), or by an adapter.
        head = getattr(head, "original_module", head)
        head = head.get_base_layer() if hasattr(head, "get_base_layer") else head
        return head_logits(base, hidden, head)

    @contextlib.contextmanager
    def _original_model(self) -> Iterator[PreTrainedModel]:
        base, was_training = self.model.get_base_model(), self.model.training
        self.model.eval()
        put_method(base, self.stored)
        try:
            with self.model.disable_adapter():
                yield base
        finally:
            put_method(base, self.resolution)
            self.model.train(was_training)


@torch.no_grad()
def _last_hidden_states(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    return decoder(model)(input_ids=input_ids, use_cache=False).last_hidden_state


# --- In training -----------------------------------------------------------------------------------------


class Restoration:
    """The restoration loss of a training run.

    Which micro-batches have it, and which slices of their rows are taken, depends on `seed` and the number of the
    micro-batch alone: a resumed run adds what it would have added.

    Args:
        model: the transformers model in training, patched; for LoRA the one inside PEFT's.
        teacher: the original model.
        window: the original window; slices are never longer.
        bos_token_id: put at the start of a slice of a row that begins with it.
        seed: decides the slices.
    """

    def __init__(
        self,
        config: RestorationConfig,
        *,
        model: PreTrainedModel,
        teacher: Teacher,
        window: int,
        bos_token_id: int | None,
        seed: int,
    ) -> None:
        self.config = config
        self.model = model
        self.teacher = teacher
        self.length = min(config.length or window, window)
        self.bos_token_id = bos_token_id
        self.seed = seed
        self._recorded: list[Tensor] = []

    @contextlib.contextmanager
    def attached(self, first_micro_batch: int = 0) -> Iterator[None]:
        """Add the loss to that of the model's forward, for as long as the context lasts.

        Forwards in training mode with labels count as micro-batches. The loss is computed inside the forward: a
        sharded model has its head together only there, and a data-parallel wrapper waits for the gradients of
        what comes out of its own forward. It is weighted as the model's own loss is: with `num_items_in_batch`,
        by the part of these that the micro-batch has, so that accumulation and averaging over processes need
        nothing more.

        Args:
            first_micro_batch: micro-batches of this process before; a resumed run's steps times its accumulation.
        """
        model, before = self.model, vars(self.model).get("forward")
        inner, numbers = model.forward, itertools.count(first_micro_batch)

        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            outputs = inner(*args, **kwargs)
            if not model.training or kwargs.get("labels") is None:
                return outputs
            number = next(numbers)
            if self.config.has_loss(number):
                lengths = row_lengths(kwargs["labels"], kwargs.get("attention_mask"))
                divergence = self.divergence(self.slices(kwargs["input_ids"], lengths, number))
                self._recorded.append(divergence.detach())
                part = _part_of_batch(kwargs["labels"], kwargs.get("num_items_in_batch"))
                outputs.loss = outputs.loss + self.config.weight * part * divergence
            return outputs

        vars(model)["forward"] = forward
        try:
            yield
        finally:
            vars(model).pop("forward", None)
            if before is not None:
                vars(model)["forward"] = before

    def divergence(self, input_ids: Tensor) -> Tensor:
        """Mean KL(original || trained) per token over rows (batch, tokens), positions from 0."""
        hidden = decoder(self.model)(input_ids=input_ids, use_cache=False).last_hidden_state
        return restoration_loss(
            hidden,
            self.teacher.hidden_states(input_ids),
            functools.partial(head_logits, self.model),
            self.teacher.logits,
        )

    def slices(self, input_ids: Tensor, lengths: Sequence[int], micro_batch: int) -> Tensor:
        """One slice of every row, all equally long: (batch, at most `length`) token ids.

        Where a row is made of several texts a slice may hold parts of two: both models are shown the same.

        Args:
            input_ids: (batch, tokens), padded on the right if at all.
            lengths: of each row, without its pads.
            micro_batch: the micro-batch's number.
        """
        length = min(self.length, *lengths)
        slices = []
        for index, (row, row_length) in enumerate(zip(input_ids, lengths, strict=True)):
            rng = random.Random(f"restoration/{self.seed}/{micro_batch}/{index}")
            start = rng.randint(0, row_length - length)
            taken = row[start : start + length].clone()
            if row[0] == self.bos_token_id:
                taken[0] = row[0]
            slices.append(taken)
        return torch.stack(slices)

    def take_mean(self) -> float | None:
        """Mean divergence (nats per token) since the last call, or None if there was none."""
        recorded, self._recorded = self._recorded, []
        return torch.stack(recorded).mean().item() if recorded else None


def row_lengths(labels: Tensor, attention_mask: Tensor | None) -> list[int]:
    """Tokens of each row of a batch (batch, tokens), without the pads on its right.

    Packed rows have no mask: theirs end with the last token that is predicted.
    """
    if attention_mask is not None:
        return [int(length) for length in attention_mask.sum(dim=1)]
    places = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    return [int(length) for length in (places * (labels != IGNORE_INDEX)).amax(dim=1)]


def _part_of_batch(labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | float:
    """The part of an optimizer step's predicted tokens that these labels have."""
    if num_items_in_batch is None:
        return 1.0
    return (labels[:, 1:] != IGNORE_INDEX).sum() / num_items_in_batch
