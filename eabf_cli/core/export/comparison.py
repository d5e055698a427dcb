"""What a reloaded checkpoint must share with the model it was made from, check by check."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from eabf_cli.core.errors import VerificationError
from eabf_cli.core.scaling_config import RopeScalingConfig

# Largest differences that pass, as parts of the largest value: the two sides round in the same order, but for what
# the two forms of the attention's code do differently.
_LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
_SCALE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
_FREQUENCY_TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What was seen of one model; the reference has no `logit_scale`, which is held to the formula.

    Attributes:
        logits: by row, (places, vocabulary).
        frequencies: inverse frequencies by the name of their buffer.
        weights: SHA-256 by name.
        max_position_embeddings: in the configuration.
        tokenizer: as `clean_reload.describe_tokenizer` tells it; None for a model without one.
        logit_scale: (layers, positions).
    """

    logits: Mapping[str, torch.Tensor]
    frequencies: Mapping[str, torch.Tensor]
    weights: Mapping[str, str]
    max_position_embeddings: int
    tokenizer: Mapping[str, Any] | None = None
    logit_scale: torch.Tensor | None = None


def check_scaling(found: RopeScalingConfig | None, expected: RopeScalingConfig | None) -> str:
    """The method and its numbers, as this package reads them from the two.

    Raises:
        VerificationError: they differ; the message has the first field that does.
    """
    if found is None or expected is None:
        if found is not expected:
            raise VerificationError(f"it carries {_method(found)}, its source {_method(expected)}")
        return "none, as its source"
    for name in ("method", "rope_theta", "original_max_position_embeddings", "factor", "unscaled_layers"):
        if getattr(found, name) != getattr(expected, name):
            raise VerificationError(
                f"its {name} is {_shown(getattr(found, name))}, its source has {_shown(getattr(expected, name))}"
            )
    return f"{found.method}, rope_theta {_shown(found.rope_theta)}, factor {found.factor:g}"


def _method(scaling: RopeScalingConfig | None) -> str:
    return "no method" if scaling is None else f"the method {scaling.method!r}"


def _shown(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,.10g}"
    return repr(list(value)) if isinstance(value, tuple) else repr(value)


def check_window(found: int, expected: int) -> str:
    """`max_position_embeddings`.

    Raises:
        VerificationError: another one.
    """
    if found != expected:
        raise VerificationError(f"its max_position_embeddings is {_shown(found)}, {_shown(expected)} is right")
    return f"{found:,} tokens"


def check_weights(found: Mapping[str, str], expected: Mapping[str, str]) -> str:
    """Every weight, bit by bit.

    Raises:
        VerificationError: one is missing, is not the source's, or has no counterpart.
    """
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise VerificationError(
            f"{len(wrong)} of its {len(expected)} weights are not those of its source (first: {wrong[0]})"
        )
    return f"{len(found)} tensors, bit by bit"


def check_frequencies(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> str:
    """The inverse frequencies of the rotary embeddings.

    Raises:
        VerificationError: other ones.
    """
    if found.keys() != expected.keys():
        raise VerificationError(f"it has the rotary embeddings {sorted(found)}, its source {sorted(expected)}")
    for name, values in expected.items():
        if found[name].shape != values.shape:
            raise VerificationError(f"it rotates {2 * len(found[name])} dimensions, its source {2 * len(values)}")
        difference = float(((found[name] - values).abs() / values.abs()).max())
        if not difference <= _FREQUENCY_TOLERANCE:
            raise VerificationError(
                f"its rotary frequencies differ from its source's by up to {difference:.1%} ({name}): "
                "rope_theta or rope_scaling is not read as it is meant"
            )
    return f"{sum(map(len, expected.values()))} values"


def expected_logit_scale(rule: str | None, position: int, window: int) -> float:
    """t at a 1-based position in a scaled layer, straight from METHOD.md sections 1 and 2."""
    if rule in ("eabf", "logn"):
        return max(1.0, math.log(position) / math.log(window))
    if rule == "native":
        return 1.0 + math.log(1 + (position - 1) // window) / math.log(window)
    return 1.0


def check_logit_scale(
    measured: torch.Tensor,
    positions: list[int],
    scaled_layers: tuple[int, ...],
    *,
    rule: str | None,
    window: int,
    dtype: torch.dtype,
) -> str:
    """The measured factor on the attention logits, layer by layer, against the formula.

    Args:
        measured: (layers, positions).
        positions: 1-based.
        scaled_layers: those that the method scales; all others have 1.
        dtype: in which it was measured.

    Raises:
        VerificationError: a layer has another factor than it should have.
    """
    for layer, row in enumerate(measured.tolist()):
        for position, found in zip(positions, row, strict=True):
            expected = expected_logit_scale(rule, position, window) if layer in scaled_layers else 1.0
            if not abs(found - expected) <= _SCALE_TOLERANCE[dtype] * expected:
                raise VerificationError(
                    f"its layer {layer} multiplies the attention logits at position {position:,} by {found:.4f}, "
                    f"{expected:.4f} is right"
                )
    kinds = f"{len(scaled_layers)} layers scaled, {len(measured) - len(scaled_layers)} not"
    return f"{kinds}, measured at positions {', '.join(f'{position:,}' for position in positions)}"


def check_tokenizer(found: Mapping[str, Any] | None, expected: Mapping[str, Any] | None) -> str:
    """Vocabulary, special tokens, chat template, the token ids of a long text, and the window.

    Raises:
        VerificationError: one of them differs, or only one side has a tokenizer.
    """
    if found is None or expected is None:
        if found is not expected:
            raise VerificationError(f"it has {'no' if found is None else 'a'} tokenizer, unlike its source")
        return "none, as its source"
    for name, value in expected.items():
        if found[name] != value:
            shown = f": {_shown(found[name])} instead of {_shown(value)}" if name == "model_max_length" else ""
            raise VerificationError(f"the {name} of its tokenizer is not that of its source{shown}")
    return "vocabulary, special tokens, chat template, the ids of a text, model_max_length"


def logit_tolerance(expected: Mapping[str, torch.Tensor], dtype: torch.dtype) -> tuple[float, float]:
    """(largest logit by absolute value, largest difference that passes)."""
    largest = max(float(logits.abs().max()) for logits in expected.values())
    return largest, _LOGIT_TOLERANCE[dtype] * largest


def check_logits(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], *, tolerance: float
) -> tuple[float, str]:
    """The largest difference of a logit.

    Returns:
        that difference, and what was compared.

    Raises:
        VerificationError: it is above the tolerance, or no number.
    """
    differences = {}
    for name, logits in expected.items():
        if found[name].shape != logits.shape:
            raise VerificationError(
                f"its vocabulary is {_shown(found[name].shape[-1])}, that of its source {_shown(logits.shape[-1])}"
            )
        differences[name] = float((found[name] - logits).abs().max())
        if not differences[name] <= tolerance:
            raise VerificationError(
                f"its logits differ from its source's by up to {differences[name]:.3g} "
                f"({name.removesuffix('.logits')}), {tolerance:.3g} would pass"
            )
    num_places = sum(len(logits) for logits in expected.values())
    return max(differences.values()), f"{num_places} positions in {len(expected)} rows"
