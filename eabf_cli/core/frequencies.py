"""Base frequencies, and the parameters with which transformers' own RoPE functions are called.

Symbols: c is the original window, L the target window (both in tokens), d the rotary dimension.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from eabf_cli.core.errors import InvalidConfigError

if TYPE_CHECKING:
    from eabf_cli.core.scaling_config import RopeScalingConfig

PAPER_THETA = 500_000.0


def doublings(window: int, limit: int) -> list[int]:
    """The window and its doublings up to the limit, in tokens."""
    lengths = [window]
    while lengths[-1] * 2 <= limit:
        lengths.append(lengths[-1] * 2)
    return lengths


def keep_theta(factor: float, original_rope_theta: float, rotary_dim: int) -> float:
    """The base frequency unchanged."""
    return original_rope_theta


def ntk_theta(factor: float, original_rope_theta: float, rotary_dim: int) -> float:
    """NTK-aware base, theta x factor^(d / (d - 2)): the lowest frequency is divided by the factor."""
    return original_rope_theta * factor ** (rotary_dim / (rotary_dim - 2))


def critical_theta(original_rope_theta: float, original_max_position_embeddings: int, target_length: int) -> float:
    """The base whose critical dimension still turns once within the target window (arXiv 2310.05209).

    A model trained with theta on c tokens has seen full periods up to one rotary dimension; the base
    (L / 2 pi)^(ln theta / ln(c / 2 pi)) moves that dimension's period from c to L.

    Raises:
        InvalidConfigError: the original window is below 2 pi, where no dimension turns once.
    """
    if original_max_position_embeddings <= 2 * math.pi:
        raise InvalidConfigError(
            f"rope_theta 'auto' needs a window above 2 pi tokens, got {original_max_position_embeddings}: "
            "give rope_theta as a number"
        )
    exponent = math.log(original_rope_theta) / math.log(original_max_position_embeddings / (2 * math.pi))
    return (target_length / (2 * math.pi)) ** exponent


def choose_theta(
    rule: float | str | None,
    original_rope_theta: float,
    original_max_position_embeddings: int,
    target_length: int,
) -> tuple[float, str]:
    """The base frequency of a method whose base is free, and the reason for it in words.

    Args:
        rule: a number (taken as it is), "paper", "auto", or None for the larger of the two rules.

    Returns:
        (rope_theta, reason); a rule never goes below the model's own base, a number may.
    """
    if isinstance(rule, (int, float)):
        below = ", BELOW the model's own" if rule < original_rope_theta else ""
        return float(rule), f"as given{below} (the model's own: {original_rope_theta:,.0f})"
    candidates = {"the model's own base": original_rope_theta}
    if rule in ("paper", None):
        candidates["the paper's value"] = PAPER_THETA
    if rule == "auto" or (rule is None and original_max_position_embeddings > 2 * math.pi):
        auto = critical_theta(original_rope_theta, original_max_position_embeddings, target_length)
        # Four digits: the rule is a guide, and a round number is easier to compare and to type.
        candidates[f"critical-dimension rule for {target_length:,} tokens"] = float(f"{auto:.4g}")
    reason, theta = max(candidates.items(), key=lambda item: item[1])
    others = ", ".join(f"{name} {value:,.0f}" for name, value in candidates.items() if name != reason)
    return theta, f"{reason} (the larger; {others})" if others else reason


def default(scaling: RopeScalingConfig) -> dict[str, Any]:
    """Plain RoPE with the config's base."""
    return {"rope_type": "default", "rope_theta": scaling.rope_theta}


def linear(scaling: RopeScalingConfig) -> dict[str, Any]:
    """transformers' `linear`: inverse frequencies divided by the factor."""
    return {"rope_type": "linear", "rope_theta": scaling.rope_theta, "factor": scaling.factor}


def dynamic(scaling: RopeScalingConfig) -> dict[str, Any]:
    """transformers' `dynamic`: the base follows the length of the call."""
    return {"rope_type": "dynamic", "rope_theta": scaling.rope_theta, "factor": scaling.factor}


def yarn(scaling: RopeScalingConfig) -> dict[str, Any]:
    """transformers' `yarn`, which puts the temperature into cos and sin itself."""
    return {
        "rope_type": "yarn",
        "rope_theta": scaling.rope_theta,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }


def ntk_by_parts(scaling: RopeScalingConfig) -> dict[str, Any]:
    """transformers' `yarn` with its temperature switched off."""
    return yarn(scaling) | {"attention_factor": 1.0}
