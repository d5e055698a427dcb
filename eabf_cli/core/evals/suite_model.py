"""A loaded model as lm-eval takes it, which counts the inputs that it has to cut."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs, truncate_tokens
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from eabf_cli.core.errors import InvalidConfigError


@dataclass
class InputCount:
    """The inputs of one task.

    Attributes:
        num_inputs: inputs; a multiple-choice question has one for each choice.
        num_cut: those that do not fit: tokens were left out, or a text was scored in pieces.
        max_tokens: length of the longest before it was cut, with the answer where that is scored.
    """

    num_inputs: int = 0
    num_cut: int = 0
    max_tokens: int = 0

    def add(self, num_tokens: int, room: int) -> None:
        """Count an input of `num_tokens` where `room` tokens fit."""
        self.num_inputs += 1
        self.num_cut += num_tokens > room
        self.max_tokens = max(self.max_tokens, num_tokens)


class SuiteModel(HFLM):
    """lm-eval's `HFLM` around a model that is loaded and patched already.

    HFLM cuts too long inputs from the left, to `max_length` tokens less those to be generated. Here they can lose
    their middle instead.

    Attributes:
        input_counts: by task name, filled as requests are answered.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        batch_size: int,
        truncation_side: str,
        show_progress: bool,
    ) -> None:
        super().__init__(
            pretrained=model,
            # HFLM gives a tokenizer without a padding token one.
            tokenizer=copy.deepcopy(tokenizer),
            backend="causal",
            max_length=max_length,
            batch_size=batch_size,
        )
        self.truncation_side = truncation_side
        self.show_progress = show_progress
        self.input_counts: dict[str, InputCount] = defaultdict(InputCount)
        self._scored_tasks: list[str] = []

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context greedily, or as its task says.

        Raises:
            InvalidConfigError: the answer alone may fill `max_length`.
        """
        for request in requests:
            context, options = request.args
            num_new = normalize_gen_kwargs(options, self.max_gen_toks)["max_gen_toks"]
            if num_new >= self.max_length:
                raise InvalidConfigError(
                    f"answers may have {num_new:,} tokens, which leaves no room for an input in {self.max_length:,}"
                )
            self.input_counts[request.task_name].add(len(self.tok_encode(context)), self.max_length - num_new)
        return super().generate_until(requests, disable_tqdm=not self.show_progress)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask of a batch, each (batch, length), cut to `left_truncate_len` and padded on the left."""
        input_ids, mask = super().tok_batch_encode(strings, padding_side, truncation=truncation)
        if left_truncate_len is None or input_ids.shape[1] <= left_truncate_len:
            return input_ids, mask
        rows = [
            self._cut(row[kept].tolist(), left_truncate_len) for row, kept in zip(input_ids, mask.bool(), strict=True)
        ]
        padded = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        return padded["input_ids"], padded["attention_mask"]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each continuation, and whether greedy decoding gives it."""
        self._scored_tasks = [request.task_name for request in requests]
        return super().loglikelihood(requests, disable_tqdm=not self.show_progress)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each whole text; one that is too long is scored in pieces."""
        for request in requests:
            self.input_counts[request.task_name].add(len(self.tok_encode(request.args[0])), self.max_length)
        return super().loglikelihood_rolling(requests, disable_tqdm=not self.show_progress)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        # Pieces of a longer text come without their strings.
        if requests and requests[0][0] is not None:
            requests = [self._fit(task, *request) for task, request in zip(self._scored_tasks, requests, strict=True)]
        return super()._loglikelihood_tokens(requests, disable_tqdm=not self.show_progress, override_bs=override_bs)

    def _fit(
        self, task: str, strings: tuple[str, str] | None, context: list[int], continuation: list[int]
    ) -> tuple[tuple[str, str] | None, list[int], list[int]]:
        # The last token is predicted and not read.
        room = self.max_length + 1
        if len(continuation) >= room:
            raise InvalidConfigError(
                f"an answer of {len(continuation):,} tokens leaves no room for its question in {self.max_length:,}"
            )
        self.input_counts[task].add(len(context) + len(continuation), room)
        return strings, self._cut(context, room - len(continuation)), continuation

    def _cut(self, tokens: list[int], room: int) -> list[int]:
        # Of fewer tokens than there is room for, truncate_tokens would keep some twice.
        return truncate_tokens(tokens, room, side=self.truncation_side) if len(tokens) > room else tokens
