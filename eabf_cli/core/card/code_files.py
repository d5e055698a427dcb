"""The card's list of the code that comes with a checkpoint."""

from __future__ import annotations

import hashlib
from pathlib import Path

from eabf_cli.core.card.markdown import code, table


def code_section(folder: Path) -> str:
    """Every Python file of a checkpoint folder with its size and SHA-256; empty where there is none."""
    files = sorted(folder.glob("*.py"))
    if not files:
        return ""
    rows = [(code(path.name), f"{path.stat().st_size:,}", f"`{_sha256(path)}`") for path in files]
    return "\n\n".join(
        [
            "## Code in this checkpoint",
            "`trust_remote_code=True` runs it. It is a copy of the file of `eabf-cli`, byte for byte.",
            table(("file", "bytes", "sha256"), rows),
        ]
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
