"""A checkpoint in a form that stock software runs, and what leaving out the scale costs, measured."""

from __future__ import annotations

from typing import Any

from eabf_cli.core.evaluation import Progress
from eabf_cli.core.scaling_config import RopeScalingConfig
from eabf_cli.core.sources import ModelSource


def compat_scaling(scaling: RopeScalingConfig, method: str, model_type: str) -> RopeScalingConfig:
    """The scaling of the compatible form: the same base frequency and window under another method.

    Args:
        scaling: what the source carries, resolved.
        method: "abf" (the scale is left out) or "native" (the stepwise scale of stock software).
        model_type: of the plain model.

    Raises:
        InvalidConfigError: the source has no scale to leave out, or has that form already.
        UnsupportedModelError: no stock form of this family has a scale.
    """
    raise NotImplementedError


def measure_compat(
    source: ModelSource,
    scaling: RopeScalingConfig,
    *,
    device: str = "auto",
    seed: int = 42,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Perplexity and retrieval of a source as it was trained and in its compatible form.

    No folder is needed: `verify_export` holds the folder to the same weights and method.

    Args:
        source: the model, as `find_model` gives it.
        scaling: of the compatible form (`compat_scaling`).

    Returns:
        `method`, `as_trained`, `compat` (each the lengths' perplexity and retrieval), `differences` (by length),
        `summary` (one line).

    Raises:
        DataError: no tokenizer, or nothing to measure on.
    """
    raise NotImplementedError
