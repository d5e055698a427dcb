"""For tests of other things than the verification of an export."""

from __future__ import annotations

from eabf_cli.core.export.verification import Verification

NOTHING_COMPARED = Verification(
    max_logit_difference=0.0,
    max_logit=1.0,
    tolerance=1e-3,
    compute_dtype="float32",
    lengths=(),
    spread_to=0,
    logit_scale={},
    checks={},
)
