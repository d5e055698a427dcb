"""The run file as it is published: without the places of files on the machine that made it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from eabf_cli.core.files import read_json

_ABSOLUTE_PATH = re.compile(
    r"""
    (?<![\w.~/\\])                          # not inside a relative path or a fraction
    (?:file://)?
    (?!//)                                  # a URL
    (?: ~\w*[/] | [A-Za-z]:[/\\] | [/] )
    (?: [^\s/\\'",]+ [/\\] )*
    ( [^\s/\\'",]+ )
    [/\\]?
    """,
    re.VERBOSE,
)


def published_record(path: Path) -> bytes:
    """A run file's contents for the Hub: of every absolute path the last name is left. The file stays as it is.

    Raises:
        CheckpointError: it is damaged.
    """
    record = read_json(path)
    published = without_local_paths(record)
    if published == record:
        return path.read_bytes()
    return (json.dumps(published, indent=2, ensure_ascii=False) + "\n").encode()


def without_local_paths(value: Any) -> Any:
    """A JSON value whose strings, and the names in it, hold no absolute path."""
    if isinstance(value, dict):
        return {without_local_paths(name): without_local_paths(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [without_local_paths(entry) for entry in value]
    return _without_paths(value) if isinstance(value, str) else value


def _without_paths(text: str) -> str:
    # A path with spaces is one only where it is all of the text.
    if text.startswith("/") and Path(text).exists():
        return Path(text).name or text
    return _ABSOLUTE_PATH.sub(r"\1", text.replace(f"{Path.home()}/", "~/"))
