"""The summary while it is written: what can be shown already, and what is kept of it in the end."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from eabf_cli.core.summarize.repetition import repeating_from, without_numbers
from eabf_cli.core.summarize.sentences import last_sentence_end


class SummaryWriter(BaseStreamer):
    """A streamer for transformers' `generate` that hands on finished sentences only.

    What was shown cannot be taken back, but the last sentence may be cut by the limit of tokens, and what goes
    round in circles is dropped. So text is handed on sentence by sentence, and what repeats the text right before
    it waits until the two differ. The pieces joined are exactly the final text, which begins with `start`.
    """

    def __init__(
        self,
        tokenizer: Any,
        on_text: Callable[[str], None] | None = None,
        *,
        start: str = "",
        numbers: Collection[int] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.numbers = numbers
        self.on_text = on_text
        self.start = start
        self.ids: list[int] = []
        self._shown = ""
        self._expects_prompt = True

    def expect_prompt(self) -> None:
        """A new call of `generate` begins, which hands over its prompt first."""
        self._expects_prompt = True

    def put(self, value: Tensor) -> None:
        """Take the prompt, or the next token."""
        if self._expects_prompt:
            self._expects_prompt = False
            return
        self.ids += value.flatten().tolist()
        # It may be the beginning of a loop.
        start = repeating_from(without_numbers(self.ids, self.numbers))
        text = self._decode(self.ids)
        limit = len(text) if start is None else len(self._decode(self.ids[:start]))
        # White space at the end of a line may turn out to be that of the text, which goes.
        self._show(text[: min(last_sentence_end(text), limit)].rstrip())

    def end(self) -> None:
        """Called by `generate`; what becomes of the rest is decided in `finish`."""

    def num_shown_tokens(self) -> int:
        """How many tokens it takes to spell what was handed on."""
        return next(
            count for count in range(len(self.ids) + 1) if len(self._decode(self.ids[:count])) >= len(self._shown)
        )

    def keep(self, num_tokens: int) -> None:
        """Forget the tokens behind the first so many; those handed on stay."""
        del self.ids[max(num_tokens, self.num_shown_tokens()) :]

    def finish(self, *, is_cut: bool) -> str:
        """Hand on the rest; returns the whole text.

        Args:
            is_cut: the model had not ended the text, so that an unfinished last sentence goes, unless it is the
                only one.
        """
        text = self._decode(self.ids).rstrip()
        if is_cut:
            # Behind what was shown, an end may have turned out to be none.
            text = text[: max(last_sentence_end(text, is_complete=True), len(self._shown)) or None]
        self._show(text)
        return self._shown.lstrip()

    def _show(self, text: str) -> None:
        """Hand on what a beginning of the text has beyond what was handed on."""
        piece = text[len(self._shown) :]
        if not piece or not text.strip():
            return
        if self.on_text is not None:
            self.on_text(piece if self._shown else piece.lstrip())
        self._shown = text

    def _decode(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return f"{self.start}{text}"
