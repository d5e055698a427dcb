"""Imported into a process whose exports are not what is tested there: they are taken as verified."""

from __future__ import annotations

from pathlib import Path

from eabf_cli.core.export import exporting
from eabf_cli.core.export.verification import Verification


def _verify(folder: Path, source: object, **settings: object) -> Verification:
    return Verification(
        max_logit_difference=0.0,
        max_logit=1.0,
        tolerance=1e-3,
        compute_dtype="float32",
        lengths=(),
        spread_to=0,
        logit_scale={},
        checks={},
    )


exporting.verify_export = _verify
