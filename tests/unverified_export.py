"""Imported into a process whose exports are not what is tested there: they are taken as verified."""

from __future__ import annotations

from pathlib import Path

from eabf_cli.core.export import exporting
from eabf_cli.core.export.verification import Verification
from tests.unverified import NOTHING_COMPARED


def _verify(folder: Path, source: object, **settings: object) -> Verification:
    return NOTHING_COMPARED


exporting.verify_export = _verify
