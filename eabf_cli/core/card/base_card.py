"""What the card of a base model says that its descendants have to carry on: the licence and the languages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

CARD_FILE = "README.md"
# A card is a page of text; what is larger is none.
_MAX_BYTES = 5_000_000


@dataclass(frozen=True, kw_only=True)
class BaseCard:
    """Fields of a model card's metadata, in the words of the Hub.

    Attributes:
        licence: its identifier (`apache-2.0`, `llama2`, `other`); None where the card names none.
        licence_name: what an `other` licence is called.
        licence_link: where its text is.
        language: codes of the languages.
    """

    licence: str | None = None
    licence_name: str | None = None
    licence_link: str | None = None
    language: tuple[str, ...] = ()


def read_base_card(folder: Path) -> BaseCard:
    """The metadata of the README.md in a model's folder.

    Returns:
        an empty one where there is no card, or none that can be read: what is not known is not claimed.
    """
    path = folder / CARD_FILE
    if not path.is_file() or path.stat().st_size > _MAX_BYTES:
        return BaseCard()
    try:
        fields = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (UnicodeDecodeError, ValueError, TypeError, RecursionError, yaml.YAMLError):
        return BaseCard()
    licences = _strings(fields.get("license"))
    return BaseCard(
        licence=licences[0] if len(licences) == 1 else None,
        licence_name=_string(fields.get("license_name")),
        licence_link=_string(fields.get("license_link")),
        language=_strings(fields.get("language")),
    )


def _string(value: Any) -> str | None:
    return value.strip() if isinstance(value, str) and value.strip() else None


def _strings(value: Any) -> tuple[str, ...]:
    """A string, or the strings of a list; other values are left out."""
    values = value if isinstance(value, list) else [value]
    return tuple(text for text in map(_string, values) if text is not None)
