"""The methods of the table, as the property tests apply them."""

from __future__ import annotations

from typing import Any

from eabf_cli.core.methods import METHODS
from eabf_cli.core.scaling_config import RopeScalingConfig

FACTOR = 4.0
SCALED_METHODS = [name for name, method in METHODS.items() if method.logit_scale is not None]
"""Methods that scale the attention logits by position."""


def scaling_for(method: str, **fields: Any) -> RopeScalingConfig:
    """The method at factor 4, with the published base where it has one to choose."""
    if METHODS[method].raises_theta:
        fields = {"rope_theta": "paper"} | fields
    return RopeScalingConfig(**({"method": method, "factor": FACTOR} | fields))
