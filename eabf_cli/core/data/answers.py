"""Where the assistant's answers lie in a conversation that a chat template rendered as one text.

An answer is what a model would write there: what follows the generation prompt, up to the end of the turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from eabf_cli.core.data.parsing import RefusedChatError

Turns = Sequence[dict[str, str]]
Render = Callable[[Turns, bool], str]
"""Turns, and whether the generation prompt follows them, to text."""

# Private-use characters: no template treats them specially, and no tokenizer is shown them.
_MARK = "\ue0f0\ue0f1"


def answer_spans(render: Render, turns: Turns, text: str, origin: str) -> Iterator[tuple[int, int]]:
    """Where each answer begins and ends in a rendered conversation, in characters, white space behind it included.

    A conversation that opens with the assistant has no span for that turn: nothing asked for it.

    Args:
        text: all the turns, rendered without a generation prompt.
        origin: where the conversation comes from, for messages.

    Raises:
        RefusedChatError: the template renders turns in a way that does not tell where an answer is.
    """
    for index, turn in enumerate(turns):
        if turn["role"] == "assistant" and index > 0:
            span = _span_by_prefixes(render, turns, index, text) or _span_by_content(render, turns, index, text)
            if span is None:
                raise RefusedChatError(
                    f"{origin}: the tokenizer's chat template renders the first {index + 1} turns differently "
                    "once others follow, so the answers cannot be told apart: give the tokenizer a template with "
                    "{% generation %} around the assistant's turns"
                )
            yield span


def _span_by_prefixes(render: Render, turns: Turns, index: int, text: str) -> tuple[int, int] | None:
    """What the turns up to the answer add to those before it, if the text begins with both."""
    prompt, answered = render(turns[:index], True), render(turns[: index + 1], False)
    if not (text.startswith(prompt) and text.startswith(answered)):
        return None
    # An empty answer may be left out, prompt and all.
    return len(prompt), max(len(prompt), len(answered))


def _span_by_content(render: Render, turns: Turns, index: int, text: str) -> tuple[int, int] | None:
    """The answer around its content, where other turns change what the template puts around it.

    Qwen3's template puts an empty thought before the last answer alone. The content is found by rendering the whole
    with another content in its place; the generation prompt in front of it and the end of the turn behind it by
    rendering as many turns as there were when the answer was written.
    """
    content = _content_bounds(render, turns, index, text)
    before = _content_bounds(render, turns, index - 1, text)
    asked, prompted = render(turns[:index], False), render(turns[:index], True)
    answered = turns[: index + 1]
    answered_text = render(answered, False)
    alone = _content_bounds(render, answered, index, answered_text)
    if content is None or before is None or alone is None or not prompted.startswith(asked):
        return None
    prompt, end_of_turn = prompted[len(asked) :], answered_text[alone[1] :]
    at = text.rfind(prompt, before[1], content[0])
    if not prompt or at < 0 or not text.startswith(end_of_turn, content[1]):
        return None
    return at + len(prompt), content[1] + len(end_of_turn)


def _content_bounds(render: Render, turns: Turns, index: int, text: str) -> tuple[int, int] | None:
    """How far a rendering is the same before and behind a turn's content, whatever the content is; in characters.

    None if the content is left out of the text, or changes what is behind it.
    """
    mark = _MARK
    while mark in text:
        mark += _MARK
    changed = [*turns[:index], turns[index] | {"content": mark}, *turns[index + 1 :]]
    before, found, behind = render(changed, False).partition(mark)
    if not found or mark in behind or not text.endswith(behind):
        return None
    same = next((at for at, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), len(before))
    return same, len(text) - len(behind)
