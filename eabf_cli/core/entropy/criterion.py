"""What the measured entropies say about a model: how fast each layer's rises, and which layers to leave unscaled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from eabf_cli.core.errors import EabfError
from eabf_cli.core.resolution import resolve_scaling
from eabf_cli.core.scaling_config import RopeScalingConfig

RISING_SLOPE = 0.5
"""Nats per unit of ln n above which a layer's entropy counts as rising with context."""
_SLOPE_SPAN = 8
_NUM_STDERR = 2.0


@dataclass(frozen=True, kw_only=True)
class LayerSlope:
    """How the entropy of a layer, averaged over its heads, grows with ln n.

    Attributes:
        kind: "full", "sliding" or "no_rope".
        scaled: the layer's logits are scaled by position.
        slope, slope_stderr: nats per unit of ln n; None where it cannot be told.
        rises: the paper's criterion exempts the layer (`is_rising`).
    """

    index: int
    kind: str
    scaled: bool
    slope: float | None
    slope_stderr: float | None

    @property
    def rises(self) -> bool:
        """Whether the criterion exempts the layer; only those with RoPE and full attention can be scaled at all."""
        return self.kind == "full" and self.slope is not None and is_rising(self.slope, self.slope_stderr)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "index": self.index,
            "kind": self.kind,
            "scaled": self.scaled,
            "slope": _rounded(self.slope),
            "slope_stderr": _rounded(self.slope_stderr),
            "rises": self.rises,
        }


def is_rising(slope: float, stderr: float | None) -> bool:
    """Whether an entropy rises with context, in the sense of the paper's exemption (arXiv 2401.07004, section 3).

    The paper leaves the two layers of Llama-2 unscaled whose entropy rises steadily with context; the others hold
    theirs, and the scale helps them to go on doing so. It gives no number. The slope against ln n tells the two
    apart: it is 1 for attention spread evenly over all n tokens, whose entropy is ln n, and 0 where entropy is held.
    A layer is exempt in the upper half, above 0.5. The slope has to be there by two standard errors, since a layer
    that is exempt by mistake gets nothing from the method, while the published default exempts but two.
    """
    return slope - _NUM_STDERR * (stderr or 0.0) > RISING_SLOPE


def slope_range(window: int, length: int) -> tuple[int, int]:
    """Positions over which slopes are taken: the last three doublings of the pre-trained window, as far as the
    documents reach into it. Nothing is scaled there, and what comes first (few tokens, all of them near) is left out.
    """
    end = min(window, length)
    return math.ceil(end / _SLOPE_SPAN), end


def slope_weights(positions: Sequence[int], window: int, length: int) -> Tensor | None:
    """Weights w such that sum_i w_i H_i is the least-squares slope of H against ln n.

    n is the 1-based position: the number of tokens that a query with full attention sees.

    Returns:
        `(positions,)` float64, 0 outside `slope_range`; None if fewer than two positions lie in it.
    """
    start, end = slope_range(window, length)
    places = torch.tensor(positions)
    inside = (places >= start) & (places <= end)
    if inside.sum() < 2:
        return None
    x = places[inside].double().log()
    x -= x.mean()
    weights = torch.zeros(len(positions), dtype=torch.float64)
    weights[inside] = x / x.square().sum()
    return weights


def suggest(
    layers: Sequence[LayerSlope],
    config: PretrainedConfig,
    *,
    factor: float,
    window: int,
    length: int,
) -> dict[str, Any]:
    """`unscaled_layers` by the paper's criterion, and `rope_theta` by the default rule for a factor.

    Args:
        config: the model's own configuration; a scaling in it is taken off.
        window: the pre-trained window.

    Returns:
        `unscaled_layers` (None if the slopes do not tell), `rope_theta` (None if no method can be applied), `reason`.
    """
    unscaled, reason = _unscaled_layers(layers, window, length)
    if any(layer.slope is not None and layer.slope_stderr is None for layer in layers):
        reason += " (one document, whose noise is not known: measure several)"
    try:
        scaling = RopeScalingConfig(method="eabf", factor=factor, original_max_position_embeddings=window)
        resolution = resolve_scaling(config, scaling, rebase=True)
    except EabfError as error:
        return {"unscaled_layers": unscaled, "rope_theta": None, "reason": f"{reason}; no rope_theta: {error}"}
    return {
        "unscaled_layers": unscaled,
        "rope_theta": resolution.scaling.rope_theta,
        "reason": f"{reason}; rope_theta for factor {factor:g}: {resolution.theta_reason}",
    }


def _unscaled_layers(layers: Sequence[LayerSlope], window: int, length: int) -> tuple[list[int] | None, str]:
    start, end = slope_range(window, length)
    measured = [layer for layer in layers if layer.kind == "full" and layer.slope is not None]
    rising = [layer for layer in measured if layer.rises]
    held = [layer for layer in measured if not layer.rises]
    span = f"from {start:,} to {end:,} tokens"
    if not any(layer.kind == "full" for layer in layers):
        return None, "no layer has RoPE with full attention, so there is none to scale"
    if not measured:
        return None, f"fewer than two of the positions are {span}, so slopes cannot be told"
    if not held:
        return None, (
            f"the entropy of all {len(rising)} layers rises with context ({_slopes(rising)} nats per unit of ln n "
            f"{span}; 1 is uniform attention), so it tells no layer apart to be exempt"
        )
    others = f"the {'other ' if rising else ''}{len(held)} that can be scaled"
    kept = f"{others} ha{'s' if len(held) == 1 else 've'} {_slopes(held)}"
    if not rising:
        return [], (
            f"no entropy rises by surely more than {RISING_SLOPE:g} nats per unit of ln n {span} "
            f"(half of what uniform attention does): {kept}"
        )
    names = f"layer{'s' if len(rising) > 1 else ''} {', '.join(str(layer.index) for layer in rising)}"
    margin = "" if rising[0].slope_stderr is None else f", by {_NUM_STDERR:g} standard errors at least,"
    return [layer.index for layer in rising], (
        f"the entropy of {names} rises by {_slopes(rising)} nats per unit of ln n {span}, which is{margin} more than "
        f"{RISING_SLOPE:g} (half of what uniform attention does), while {kept}"
    )


def _slopes(layers: Sequence[LayerSlope]) -> str:
    lowest = min(layers, key=lambda layer: layer.slope or 0.0)
    highest = max(layers, key=lambda layer: layer.slope or 0.0)
    if lowest is highest:
        error = "" if lowest.slope_stderr is None else f" ± {lowest.slope_stderr:.2f}"
        return f"{lowest.slope:.2f}{error}"
    return f"{lowest.slope:.2f} to {highest.slope:.2f}"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
