"""Text and conversations to token ids, with the tokens that carry loss marked.

A text of ten million tokens from which a few thousand are wanted is cut by characters first: a prefix that
turns out long enough is tokenised, never the whole.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from eabf_cli.core.data.answers import Turns, answer_spans
from eabf_cli.core.data.parsing import RefusedChatError

# Vicuna's layout, for tokenizers that come without a chat template (base models): the system text, then
# "USER: ..." and "ASSISTANT: ..." with the end-of-sequence token after each answer.
PLAIN_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] + '\\n' }}"
    "{% elif message['role'] == 'tool' %}{{ raise_exception('it has no place for turns of tools') }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + eos_token + '\\n' }}{% endif %}"
    "{% endfor %}"
    # No space at the end: most tokenizers join it to the word that follows.
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_CHARACTERS_PER_TOKEN = 8
# The last tokens of a cut text may differ from those of the whole text: a cut word is spelled otherwise.
_CUT_MARGIN = 64
_BLOCK_CHARACTERS = 250_000


@dataclass(frozen=True)
class TokenizedText:
    """Token ids with loss marks, both of one length.

    Attributes:
        input_ids: the tokens, begin-of-sequence first where the tokenizer (or its chat template) has one.
        has_loss: whether the token is one to be predicted.
        is_whole: False if the text goes on after these tokens.
    """

    input_ids: list[int]
    has_loss: list[bool]
    is_whole: bool = True


def encode_text(tokenizer: Any, text: str, *, max_tokens: int | None = None) -> TokenizedText:
    """The tokens of a document, with loss on every one; BOS first if the tokenizer has one.

    Args:
        max_tokens: the tokens beyond it are not needed: a longer text comes back with more than `max_tokens`
            tokens, but not all of them, and `is_whole` False.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids, _, num_read = _tokenize_start(tokenizer, text, max_tokens, has_offsets=False)
    return TokenizedText(bos + ids, [True] * (len(bos) + len(ids)), num_read == len(text))


def encode_chat(
    tokenizer: Any, messages: Sequence[dict[str, str]], origin: str, *, max_tokens: int | None = None
) -> TokenizedText:
    """The tokens of a conversation, with loss on the assistant's turns only.

    The tokenizer's chat template is used; without one, `PLAIN_CHAT_TEMPLATE`. A template with
    `{% generation %}` marks the assistant's text itself. With any other, an answer is what follows the generation
    prompt (`eabf_cli.core.data.answers`): the token that ends the turn is part of it, white space behind that token
    is not. A conversation that opens with the assistant has no loss on
    that turn: nothing asked for it. A token across an answer's beginning counts as the answer's.

    Args:
        origin: where the conversation comes from, for messages.
        max_tokens: as in `encode_text`.

    Raises:
        RefusedChatError: the template refuses the conversation, or its rendering does not tell where the answers are.
    """
    template = tokenizer.chat_template if has_chat_template(tokenizer) else PLAIN_CHAT_TEMPLATE
    if isinstance(template, dict):
        template = template.get("default") or next(iter(template.values()))
    return _Chat(tokenizer, list(messages), template, origin).encode(max_tokens)


def has_chat_template(tokenizer: Any) -> bool:
    """Whether a tokenizer comes with a chat template; without one, `PLAIN_CHAT_TEMPLATE` is used."""
    return bool(getattr(tokenizer, "chat_template", None))


def tokenize(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text as it stands: no special token added, and no warning about its length."""
    return list(tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"])


@dataclass(frozen=True)
class _Chat:
    tokenizer: Any
    messages: list[dict[str, str]]
    template: str
    origin: str

    def encode(self, max_tokens: int | None) -> TokenizedText:
        marks_answers = _GENERATION_TAG.search(self.template) is not None
        text, marked = self._render_marked() if marks_answers else (self._render(self.messages, False), None)
        has_offsets = bool(getattr(self.tokenizer, "is_fast", False))
        ids, ends, num_read = _tokenize_start(self.tokenizer, text, max_tokens, has_offsets=has_offsets)
        has_loss = [False] * len(ids)
        for answer_start, answer_end in self._answers(text) if marked is None else marked:
            start = self._count_tokens(text, answer_start, ids, ends)
            # What a cut left out is not looked at: rendering it turn by turn takes long.
            if start == len(ids):
                break
            end = self._count_tokens(text, min(answer_end, num_read), ids, ends)
            has_loss[start:end] = [True] * (end - start)
        return TokenizedText(ids, has_loss, num_read == len(text))

    def _answers(self, text: str) -> Iterator[tuple[int, int]]:
        """Where each answer begins and ends in the rendered text, in characters."""
        special = tuple(str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        for start, end in answer_spans(self._render, self.messages, text, self.origin):
            stripped = text[start:end].rstrip()
            yield start, start + len(stripped) if stripped.endswith(special) else end

    def _render_marked(self) -> tuple[str, list[tuple[int, int]]]:
        """The text, and where the template's own marks lie in it, in characters."""
        from transformers.utils.chat_template_utils import render_jinja_template

        with self._refusals_explained():
            texts, marks = render_jinja_template(
                [self.messages],
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        return texts[0], marks[0]

    def _count_tokens(self, text: str, end: int, ids: list[int], ends: list[int] | None) -> int:
        """How many of the tokens lie wholly before a character of the text."""
        if ends is not None:
            return bisect_right(ends, end)
        prefix_ids = tokenize(self.tokenizer, text[:end])
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, prefix_ids, strict=False)))

    def _render(self, turns: Turns, add_generation_prompt: bool) -> str:
        with self._refusals_explained():
            return str(
                self.tokenizer.apply_chat_template(
                    list(turns),
                    chat_template=self.template,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            )

    @contextmanager
    def _refusals_explained(self) -> Iterator[None]:
        # A refusal by the template's raise_exception() arrives as a TemplateError.
        from jinja2 import TemplateError

        try:
            yield
        except TemplateError as error:
            raise RefusedChatError(
                f"{self.origin}: the tokenizer's chat template refuses the conversation: {error}"
            ) from error


def _tokenize_start(
    tokenizer: Any, text: str, max_tokens: int | None, *, has_offsets: bool
) -> tuple[list[int], list[int] | None, int]:
    """Tokens from a text's start, the character behind each (if asked for), how many characters were read."""
    for length in _prefix_lengths(len(text), max_tokens):
        ids, ends = _tokenize_blocks(tokenizer, text[:length], has_offsets=has_offsets)
        is_whole = length == len(text)
        num_kept = len(ids) if is_whole else len(ids) - _CUT_MARGIN
        if is_whole or (max_tokens is not None and num_kept > max_tokens):
            break
    return ids[:num_kept], ends and ends[:num_kept], length


def _tokenize_blocks(tokenizer: Any, text: str, *, has_offsets: bool) -> tuple[list[int], list[int] | None]:
    """Tokens of a text and the character behind each, in blocks: a tokenizer's own record of ten million
    tokens takes gigabytes."""
    ids: list[int] = []
    ends: list[int] = []
    for start, end in _blocks(text):
        encoded = tokenizer(
            text[start:end],
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=has_offsets,
            verbose=False,
        )
        ids += encoded["input_ids"]
        if has_offsets:
            ends += [start + token_end for _, token_end in encoded["offset_mapping"]]
    return ids, ends if has_offsets else None


def _blocks(text: str) -> Iterator[tuple[int, int]]:
    """Consecutive pieces of a text, as (start, end), each but the first beginning with white space.

    Most tokenizers never join what stands on the two sides of such a cut. In a text without white space a token
    at a cut may differ from that of the whole text.
    """
    start = 0
    while len(text) - start > _BLOCK_CHARACTERS:
        latest = start + _BLOCK_CHARACTERS
        breaks = (i for i in range(latest, start, -1) if text[i].isspace() and not text[i - 1].isspace())
        end = next(breaks, latest)
        yield start, end
        start = end
    yield start, len(text)


def _prefix_lengths(num_characters: int, max_tokens: int | None) -> Iterator[int]:
    """Ever longer prefixes of a text, in characters; the last one is the whole."""
    if max_tokens is not None:
        length = _CHARACTERS_PER_TOKEN * (max_tokens + _CUT_MARGIN)
        while length < num_characters:
            yield length
            length *= 4
    yield num_characters
