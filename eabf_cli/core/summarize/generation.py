"""Writing a summary behind a prompt: read, decode, and a second try where the text goes round in circles."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    Cache,
    DynamicCache,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from eabf_cli.core.caches import fixed_cache, forget_after, make_cache
from eabf_cli.core.summarize import compiling
from eabf_cli.core.summarize.reading import read_tokens
from eabf_cli.core.summarize.repetition import looping_from, number_tokens
from eabf_cli.core.summarize.settings import CHUNK_TOKENS, Sampling
from eabf_cli.core.summarize.writer import SummaryWriter

REPETITION_PENALTY = 1.3
"""Of the second try, on tokens of the summary alone: a summary should use the words of its document."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """A text that the model wrote.

    Attributes:
        text: the text, an unfinished last sentence left off.
        num_tokens: tokens that the model made for it, those that were dropped among them.
        is_cut: it had not ended when the limit of tokens was reached.
        is_looping: it goes round in circles, with the repetition penalty, too.
    """

    text: str
    num_tokens: int
    is_cut: bool
    is_looping: bool


@dataclass(kw_only=True)
class Generator:
    """A model with the settings under which it reads and writes, and how long it has taken.

    Attributes:
        compiles: the step that writes a token is compiled, at the first token of each length of cache (caches.py).
        num_read, read_s: tokens of prompts, and seconds over them.
        num_written, write_s: tokens made, and seconds over them.
    """

    model: PreTrainedModel
    tokenizer: Any
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 42
    chunk_tokens: int = CHUNK_TOKENS
    show_progress: bool = False
    compiles: bool = False
    num_read: int = 0
    read_s: float = 0.0
    num_written: int = 0
    write_s: float = 0.0

    def __post_init__(self) -> None:
        self._numbers = number_tokens(self.tokenizer)

    def read(self, ids: Sequence[int], cache: DynamicCache, description: str = "Reading") -> Tensor:
        """Run the model over tokens into a cache; returns the logits after the last (vocabulary)."""
        started = time.perf_counter()
        with tqdm(total=len(ids), desc=description, unit="tok", leave=False, disable=not self.show_progress) as bar:
            logits = read_tokens(self.model, ids, cache, chunk_tokens=self.chunk_tokens, progress=bar.update)
        self._synchronize()
        self.num_read += len(ids)
        self.read_s += time.perf_counter() - started
        return logits

    def write(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        *,
        start: str = "",
        on_text: Callable[[str], None] | None = None,
        description: str = "Reading",
    ) -> Written:
        """Continue a prompt by at most so many tokens.

        A loop (repetition.py) is stopped; the text up to its second round is kept and continued once with a
        repetition penalty.

        Args:
            start: the end of the prompt that belongs to the text.
            on_text: gets the text in pieces as they are finished; joined they are the result's text.
        """
        cache: Cache = make_cache(self.model, len(prompt_ids) + max_new_tokens)
        # The last token is left to `generate`, which needs one to begin with.
        if len(prompt_ids) > 1:
            self.read(prompt_ids[:-1], cache, description)
        self.num_read += 1
        if self.compiles:
            cache = fixed_cache(self.model, cache, len(prompt_ids) - 1, len(prompt_ids) + max_new_tokens)
        else:
            # Sliding layers, too, must be able to go back to where a loop began.
            cache.activate_past_recording()
        writer = SummaryWriter(self.tokenizer, on_text, start=start, numbers=self._numbers)
        torch.manual_seed(self.seed)
        num_made = 0
        started = time.perf_counter()
        for penalty in (None, REPETITION_PENALTY):
            num_kept = len(writer.ids)
            loop = self._continue(prompt_ids, writer, cache, max_new_tokens, penalty)
            num_made += len(writer.ids) - num_kept
            if loop is None:
                break
            writer.keep(loop)
            if penalty is not None or len(writer.ids) >= max_new_tokens:
                break
            num_known = len(prompt_ids) + len(writer.ids) - 1
            if self.compiles:
                cache = fixed_cache(self.model, cache, num_known, len(prompt_ids) + max_new_tokens)
            else:
                forget_after(cache, num_known)
        self.num_written += num_made
        self.write_s += time.perf_counter() - started
        has_ended = bool(writer.ids) and writer.ids[-1] in self._end_ids()
        if has_ended:
            # Not every tokenizer counts it among its special tokens, which are not shown.
            writer.ids.pop()
        return Written(
            text=writer.finish(is_cut=not has_ended),
            num_tokens=num_made,
            is_cut=not has_ended and loop is None,
            is_looping=loop is not None,
        )

    def _continue(
        self,
        prompt_ids: Sequence[int],
        writer: SummaryWriter,
        cache: Cache,
        max_new_tokens: int,
        penalty: float | None,
    ) -> int | None:
        """Go on until the text ends or loops; returns where a loop begins its second round, in tokens."""
        row = torch.tensor([[*prompt_ids, *writer.ids]], device=self.model.device)
        watch = LoopWatch(len(prompt_ids), self._numbers)
        processors = LogitsProcessorList()
        if penalty is not None:
            processors.append(RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=len(prompt_ids)))
        writer.expect_prompt()
        options = self.sampling.generate_options()
        if self.compiles:
            options["compile_config"] = compiling.compile_config()
        with compiling.failures_told() if self.compiles else nullcontext():
            self.model.generate(
                input_ids=row,
                attention_mask=torch.ones_like(row),
                past_key_values=cache,
                max_new_tokens=max_new_tokens - len(writer.ids),
                eos_token_id=sorted(self._end_ids()) or None,
                pad_token_id=self.pad_id(),
                repetition_penalty=1.0,
                logits_processor=processors,
                stopping_criteria=StoppingCriteriaList([watch]),
                streamer=writer,
                **options,
            )
        return watch.second_round

    def _end_ids(self) -> set[int]:
        """The tokens that end a text: those of the model's generation settings, and the tokenizer's."""
        stated = self.model.generation_config.eos_token_id
        stated = [] if stated is None else stated if isinstance(stated, list) else [stated]
        own = self.tokenizer.eos_token_id
        return {*stated, *([] if own is None else [own])}

    def pad_id(self) -> int:
        """Never used for one row; `generate` warns without any."""
        stated = self.model.generation_config.pad_token_id
        return int(stated) if isinstance(stated, int) else min(self._end_ids(), default=0)

    def _synchronize(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)


class LoopWatch(StoppingCriteria):
    """Stops when the text behind the prompt ends with a block that stands there again and again, numbers aside.

    Attributes:
        second_round: where that block begins for the second time, in tokens of the text; None: no loop.
    """

    def __init__(self, num_prompt_tokens: int, numbers: Collection[int]) -> None:
        self.num_prompt_tokens = num_prompt_tokens
        self.numbers = numbers
        self.second_round: int | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # (1, tokens) -> (1,)
        self.second_round = looping_from(input_ids[0, self.num_prompt_tokens :].tolist(), self.numbers)
        return torch.full((1,), self.second_round is not None, device=input_ids.device)
