"""What a record of training data is, and how the common layouts of one are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from eabf_cli.core.errors import DataError

RECORD_KEYS = ("messages", "conversations", "text", "prompt", "completion")
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
# How a turn names who speaks, and what it says.
_TURN_KEYS = (("role", "content"), ("from", "value"))


class EmptyRecordError(DataError):
    """A record is well formed, but there is nothing in it to train on."""


class RefusedChatError(DataError):
    """A chat template refuses a conversation, or does not tell where its answers are."""


@dataclass(frozen=True)
class Record:
    """One document, or one conversation.

    Attributes:
        origin: where it comes from, for error messages ("chats.jsonl, line 12").
        text: the document; None for a conversation.
        messages: the turns as {"role", "content"}, roles system, user, assistant or tool; empty for a document.
    """

    origin: str
    text: str | None = None
    messages: tuple[dict[str, str], ...] = ()


RecordReader = Callable[[], Record]


def parse_record(fields: Any, origin: str) -> Record:
    """Read {"messages"}, {"conversations"}, {"text"}, or {"prompt", "completion"}: the first of these that is there.

    Turns are {"role", "content"} or {"from", "value"}. A prompt and its completion are turns, too, or one text each,
    which stand for a user's turn and the assistant's.

    Raises:
        EmptyRecordError: the text is blank, no turn of the assistant has text, or one is a call of tools, which is no
            text.
        DataError: none of the keys is there, or what they hold is of another form.
    """
    if not isinstance(fields, Mapping):
        raise DataError(f'{origin}: expected an object like {{"text": ...}}, found {type(fields).__name__}')
    for key in ("messages", "conversations"):
        if fields.get(key) is not None:
            return Record(origin, messages=_parse_turns(fields[key], key, origin))
    if fields.get("text") is None and {"prompt", "completion"} <= set(fields):
        if fields["prompt"] is None or fields["completion"] is None:
            raise EmptyRecordError(f"{origin}: 'prompt' or 'completion' is null, so there is nothing to train on")
        turns = [*_as_turns(fields["prompt"], "user"), *_as_turns(fields["completion"], "assistant")]
        return Record(origin, messages=_parse_turns(turns, "prompt + completion", origin))
    if "text" not in fields:
        raise DataError(f"{origin}: {describe_keys(fields)}")
    text = fields["text"]
    message = f"{origin}: 'text' must be a string that is not empty, found {_short(text)}"
    if text is None:
        raise EmptyRecordError(message)
    if not isinstance(text, str):
        raise DataError(message)
    if not text.strip():
        raise EmptyRecordError(message)
    return Record(origin, text=_checked_text(text, origin))


def describe_keys(found: Any) -> str:
    """Which keys are looked for, and which are there instead."""
    keys = ", ".join(map(repr, found)) or "none"
    return f"no key 'text', 'messages' or 'conversations', nor 'prompt' and 'completion'; keys found: {keys}"


def _as_turns(value: Any, role: str) -> list[Any]:
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _parse_turns(turns: Any, key: str, origin: str) -> tuple[dict[str, str], ...]:
    for role_key, content_key in _TURN_KEYS:
        if isinstance(turns, Mapping) and {role_key, content_key} <= set(turns):
            # A table may hold a list of turns as one list a field (the `Sequence` of older datasets).
            pairs = zip(turns[role_key], turns[content_key], strict=True)
            turns = [{role_key: role, content_key: content} for role, content in pairs]
    if not isinstance(turns, list):
        raise DataError(f"{origin}: {key!r} must be a list of turns, found {_short(turns)}")
    messages = []
    for number, turn in enumerate(turns, start=1):
        messages.append(_parse_turn(turn, f"turn {number}", key, origin))
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise EmptyRecordError(f"{origin}: no assistant turn with text, so there is nothing to train on")
    return tuple(messages)


def _parse_turn(turn: Any, name: str, key: str, origin: str) -> dict[str, str]:
    names = next((names for names in _TURN_KEYS if isinstance(turn, Mapping) and set(names) <= set(turn)), None)
    if names is None:
        ways = " or ".join(" and ".join(map(repr, names)) for names in _TURN_KEYS)
        raise DataError(f"{origin}: {name} of {key!r} must be an object with {ways}, found {_short(turn)}")
    speaker, content = (turn[field] for field in names)
    role = ROLES.get(str(speaker).lower())
    if role is None:
        raise DataError(f"{origin}: {name} has the role {speaker!r}; known: {', '.join(ROLES)}")
    if turn.get("tool_calls"):
        raise EmptyRecordError(f"{origin}: {name} calls tools by 'tool_calls', of which no text is made here")
    if _is_text_parts(content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise DataError(f"{origin}: {name} must hold a string, found {_short(content)}")
    return {"role": role, "content": _checked_text(content, origin)}


def _is_text_parts(content: Any) -> bool:
    """Whether it is a list of {"type": "text", "text": ...}, as multimodal models have it."""
    return isinstance(content, list) and all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    )


def _checked_text(text: str, origin: str) -> str:
    r"""Refuse half a surrogate pair, which JSON can spell (`"\ud83d"`) and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{origin}: half a character ({error.object[error.start]!r}): remove it") from None
    return text


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
