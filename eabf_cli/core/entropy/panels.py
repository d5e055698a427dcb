"""What the picture and the page both draw from a result: panels of curves by position, each beside a map of heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

KINDS = {"full": "full attention", "sliding": "sliding window", "no_rope": "no RoPE"}
SLOPE = "slope of entropy against ln n in the pre-trained window"


@dataclass(frozen=True)
class Panel:
    """One row: curves on the left, a map on the right.

    Attributes:
        title: whose numbers these are.
        quantity: what the curves show, with its unit.
        curves: (layers, heads, positions); NaN where nothing was measured.
        stderr: the same shape, or None.
        cells: (layers, heads), the map's values.
        cells_title: what the map shows.
        is_entropy: whether the ln n bound belongs to the curves; it does not to a difference.
    """

    title: str
    quantity: str
    curves: Array
    stderr: Array | None
    cells: Array
    cells_title: str
    is_entropy: bool


def panels_of(result: dict[str, Any]) -> list[Panel]:
    """The measured model; with `compare`, the other model and the difference (other minus measured) too.

    Args:
        result: what `compute_attention_entropy` returns, its arrays in it.
    """
    positions, window = _array(result["positions"]), result["original_max_position_embeddings"]
    panels = [_entropy_panel(result, _array(result["head_slope"]))]
    other = result.get("compare")
    if other is None:
        return panels
    panels.append(_entropy_panel(other, _array(other["head_slope"])))
    difference = _array(other["difference"])
    beyond = positions > window
    where = "beyond the pre-trained window" if beyond.any() else "over all positions"
    panels.append(
        Panel(
            title=f"Difference: {model_name(other)} minus {model_name(result)}",
            quantity="difference in entropy (nats)",
            curves=difference,
            stderr=_optional_array(other.get("difference_stderr")),
            cells=difference[:, :, beyond if beyond.any() else slice(None)].mean(axis=2),
            cells_title=f"mean difference {where} (nats)",
            is_entropy=False,
        )
    )
    return panels


def visible_bound(result: dict[str, Any]) -> Array:
    """(layers, positions): ln of the number of keys that a query sees, which no entropy can exceed."""
    return np.log(_array(result["visible_keys"]))


def model_name(part: dict[str, Any]) -> str:
    """A model and, where one was applied, the method."""
    method = part.get("method")
    return f"{part['model']} ({method})" if method else str(part["model"])


def layer_colours(num_layers: int, first: float, last: float) -> list[str]:
    """Hex colours by depth, from the part [first, last] of a perceptually uniform map."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colour) for colour in colormaps["viridis"](np.linspace(first, last, num_layers))]


def _entropy_panel(part: dict[str, Any], cells: Array) -> Panel:
    return Panel(
        title=model_name(part),
        quantity="entropy (nats)",
        curves=_array(part["entropy"]),
        stderr=_optional_array(part.get("stderr")),
        cells=cells,
        cells_title=SLOPE,
        is_entropy=True,
    )


def _array(values: Any) -> Array:
    return np.asarray(values, dtype=np.float64)


def _optional_array(values: Any) -> Array | None:
    return None if values is None else _array(values)
