"""What a record of training data is, and how the common layouts of one are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from eabf_cli.core.errors import DataError

RECORD_KEYS = ("messages", "conversations", "text")
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
}


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
        messages: the turns as {"role", "content"}, roles system, user or assistant; empty for a document.
    """

    origin: str
    text: str | None = None
    messages: tuple[dict[str, str], ...] = ()


RecordReader = Callable[[], Record]


def parse_record(fields: Any, origin: str) -> Record:
    """Read {"messages"}, {"conversations"} or {"text"}; a conversation wins where both are present.

    Raises:
        EmptyRecordError: the text is blank, or no turn of the assistant has text.
        DataError: none of the keys is there, or what they hold is of another form.
    """
    if not isinstance(fields, Mapping):
        raise DataError(f'{origin}: expected an object like {{"text": ...}}, found {type(fields).__name__}')
    for key, role_key, content_key in (("messages", "role", "content"), ("conversations", "from", "value")):
        if fields.get(key) is not None:
            return Record(origin, messages=_parse_turns(fields[key], key, role_key, content_key, origin))
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
    return f"no key 'text', 'messages' or 'conversations'; keys found: {', '.join(map(repr, found)) or 'none'}"


def _parse_turns(turns: Any, key: str, role_key: str, content_key: str, origin: str) -> tuple[dict[str, str], ...]:
    if isinstance(turns, Mapping) and {role_key, content_key} <= set(turns):
        # A table may hold a list of turns as one list a field (the `Sequence` of older datasets).
        pairs = zip(turns[role_key], turns[content_key], strict=True)
        turns = [{role_key: role, content_key: content} for role, content in pairs]
    if not isinstance(turns, list):
        raise DataError(f"{origin}: {key!r} must be a list of turns, found {_short(turns)}")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping) or role_key not in turn or content_key not in turn:
            raise DataError(
                f"{origin}: turn {number} of {key!r} must be an object with {role_key!r} and {content_key!r}"
                f", found {_short(turn)}"
            )
        role, content = ROLES.get(str(turn[role_key])), turn[content_key]
        if role is None:
            known = ", ".join(ROLES)
            raise DataError(f"{origin}: turn {number} has the role {turn[role_key]!r}; known: {known}")
        if not isinstance(content, str):
            raise DataError(f"{origin}: turn {number} must hold a string, found {_short(content)}")
        messages.append({"role": role, "content": _checked_text(content, origin)})
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise EmptyRecordError(f"{origin}: no assistant turn with text, so there is nothing to train on")
    return tuple(messages)


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
