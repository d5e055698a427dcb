"""An export whose upload failed: the folder that it left is published, not written again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eabf_cli.core.errors import CheckpointError
from eabf_cli.core.export.writing import list_files
from eabf_cli.core.run_record import RUN_FILE, read_run_record

# Settings that change nothing in the files.
_FREE_SETTINGS = ("overwrite", "dry_run", "show_progress", "device", "seed", "trust_remote_code")


def kept_export(folder: Path, *, arguments: dict[str, Any], origin: dict[str, Any]) -> dict[str, Any] | None:
    """The record of an earlier export that a folder still holds, if the same command would write the same files.

    Args:
        arguments: of this export, as its record would have them.
        origin: the run and the weights that it is made from, as its record would have them.

    Returns:
        None where there is no such export, or its files have changed.
    """
    try:
        record = read_run_record(folder)
    except CheckpointError:
        return None
    if record is None or record.get("command") != "export" or not isinstance(record.get("arguments"), dict):
        return None
    if any(record.get(name) != value for name, value in origin.items()):
        return None
    if _deciding(record["arguments"]) != _deciding(arguments):
        return None
    found = [file for file in list_files(folder) if file["name"] != RUN_FILE]
    return record if found == record.get("files") else None


def _deciding(arguments: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide what the files hold; of the Hub's that is the repository, which the card names."""
    hub = arguments.get("hub")
    kept = {name: value for name, value in arguments.items() if name not in _FREE_SETTINGS}
    return kept | {"hub": hub.get("repo_id") if isinstance(hub, dict) else None}
