"""`eabf_settings.json`: what decides a run's result, written when it begins and held against what resumes it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.files import read_json, write_json

SETTINGS_FILE = "eabf_settings.json"
# Hashes are longer, and only that they differ is of interest.
_MOST_CHARACTERS = 40


def in_json_form(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they are read back: tuples as lists, paths as text."""
    found: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return found


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Keep what a run was started with in its folder."""
    write_json(folder / SETTINGS_FILE, in_json_form(settings))


def check_settings(folder: Path, settings: Mapping[str, Any], *, kind: str) -> None:
    """Refuse to go on with a folder's run, finished or not, with other settings than it was started with.

    Args:
        kind: what the run is called in the message.

    Raises:
        InvalidConfigError: some differ; each is named with both values, of a dictionary only the entries that differ.
        CheckpointError: the folder's settings cannot be read.
    """
    refuse_changes(
        read_json(folder / SETTINGS_FILE), in_json_form(settings), name=f"{kind} {folder}", way_out="in another folder"
    )


def refuse_changes(before: Mapping[str, Any], after: Mapping[str, Any], *, name: str, way_out: str) -> None:
    """Refuse settings that are not those of before; what only `before` has is not looked at.

    Args:
        name: of what was started with those of before.
        way_out: how to start anew.

    Raises:
        InvalidConfigError: some differ; each is named with both values.
    """
    changes = list(_changes(before, after))
    if changes:
        raise InvalidConfigError(
            f"{name} was started with other settings: {', '.join(changes)}; give the same ones, or start anew {way_out}"
        )


def _changes(before: Mapping[str, Any], after: Mapping[str, Any], inside: str = "") -> Iterator[str]:
    for name, value in after.items():
        old = before.get(name)
        if isinstance(old, dict) and isinstance(value, dict):
            yield from _changes(old, value, f"{inside}{name}.")
        elif old != value:
            yield f"{inside}{name} {_shown(old)} -> {_shown(value)}"


def _shown(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 3]}..."
