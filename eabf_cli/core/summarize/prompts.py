"""The prompt: the document between two marker lines, and what is asked for.

The document's tokens are made apart from those around it, so that a marker of a chat template that happens to
stand in the document ("<|im_end|>") is read as text, and so that the document can be cut to a number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eabf_cli.core.data.tokenization import has_chat_template, tokenize
from eabf_cli.core.errors import DataError
from eabf_cli.core.summarize.settings import TEXT_FIELD, SummarizeConfig

_MARKER = "====="
# Stands for the document while a chat template is rendered; letters only, so that no template changes it.
_PLACEHOLDER = "QZXJDOCUMENTGOESHEREJXZQ"

_REQUESTS = {
    "bullets": "Summarize the text above in a few bullet points. Begin each with a dash and state one finding in it.",
    "paragraph": "Summarize the text above in one paragraph of a few sentences.",
    "structured": (
        "Summarize the text above under four headings, with a sentence or two for each: "
        "Problem, Method, Results, Limits."
    ),
}
# A small model does not always take the shape that it is asked for, but goes on with one that is begun.
_ANSWER_STARTS = {"bullets": "-", "paragraph": "", "structured": "Problem:"}
_PLAIN_OPENING = "Summary:"
_PARTS_REQUEST = " The text consists of summaries of its consecutive sections; make one summary of them."


@dataclass(frozen=True)
class Frame:
    """Token ids before and behind a document: with its own between them they are the prompt.

    Attributes:
        head: from the begin-of-sequence token to the marker line.
        tail: from the closing marker line to where the model goes on.
        answer_start: how the answer begins, at the end of `tail`; the model writes what follows.
    """

    head: tuple[int, ...]
    tail: tuple[int, ...]
    answer_start: str = ""

    def __len__(self) -> int:
        return len(self.head) + len(self.tail)

    def around(self, document_ids: Sequence[int]) -> list[int]:
        """The prompt's token ids."""
        return [*self.head, *document_ids, *self.tail]


def request_template(config: SummarizeConfig, *, of_parts: bool = False) -> str:
    """The user's words, with `{text}` where the document goes.

    Args:
        of_parts: the text is made of summaries of its sections.
    """
    if config.prompt is not None:
        return config.prompt
    request = _REQUESTS[config.style] + (_PARTS_REQUEST if of_parts else "")
    if config.language is not None:
        request += f" Write in {config.language}."
    return f"Read this text.\n{_MARKER}\n{TEXT_FIELD}\n{_MARKER}\n\n{request}"


def answer_start(config: SummarizeConfig) -> str:
    """How a summary begins, as far as that is settled by its style."""
    if config.prompt is not None or (config.style == "structured" and config.language is not None):
        return ""
    return _ANSWER_STARTS[config.style]


def summary_frame(tokenizer: Any, config: SummarizeConfig, *, of_parts: bool = False) -> Frame:
    """The frame in which a summary is asked for; see `request_template` and `make_frame`."""
    return make_frame(tokenizer, request_template(config, of_parts=of_parts), answer_start=answer_start(config))


def make_frame(tokenizer: Any, template: str, *, answer_start: str = "") -> Frame:
    """A frame in the form that the model was trained on: its chat template, or plain text without one.

    Args:
        template: the user's words, with `{text}` once.
        answer_start: how the model's answer begins, if that is given.

    Raises:
        DataError: the tokenizer's chat template refuses a user's turn or does not show it whole.
    """
    before, after = template.split(TEXT_FIELD)
    if has_chat_template(tokenizer):
        rendered = _render(tokenizer, before + _PLACEHOLDER + after)
        if rendered.count(_PLACEHOLDER) != 1:
            raise DataError(
                "the tokenizer's chat template does not show the user's words exactly once: "
                "give the tokenizer another template, or the model another tokenizer"
            )
        head, tail = rendered.split(_PLACEHOLDER)
        return Frame(tuple(tokenize(tokenizer, head)), tuple(tokenize(tokenizer, tail + answer_start)), answer_start)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    # No space or line at the end: most tokenizers join it to the word that follows.
    opening = f"{_PLAIN_OPENING}\n{answer_start}" if answer_start else _PLAIN_OPENING
    tail_ids = tokenize(tokenizer, f"{after}\n\n{opening}")
    return Frame((*bos, *tokenize(tokenizer, before)), tuple(tail_ids), answer_start)


def document_ids(tokenizer: Any, text: str) -> list[int]:
    """A document's token ids, whatever in it looks like a special token taken as text."""
    return list(
        tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
    )


def _render(tokenizer: Any, content: str) -> str:
    # A refusal by the template's raise_exception() arrives as a TemplateError.
    from jinja2 import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
        )
    except TemplateError as error:
        raise DataError(f"the tokenizer's chat template refuses the user's turn: {error}") from error
