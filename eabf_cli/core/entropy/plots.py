"""The picture of a result: entropy by position and slope by head."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eabf_cli.core.entropy.panels import KINDS, Panel, layer_colours, panels_of, visible_bound

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PNG_FILE = "entropy.png"
_DPI = 150
_LINE_STYLES = {"full": "-", "sliding": (0, (4, 2)), "no_rope": (0, (1, 1.5))}
_LONGEST_TITLE = 70


def write_plots(result: dict[str, Any], folder: Path) -> Path:
    """Write `entropy.png` into a folder that exists, and return its path.

    Args:
        result: what `compute_attention_entropy` returns, its arrays in it.
    """
    path = folder / PNG_FILE
    with warnings.catch_warnings():
        # A model's name may have letters that the font lacks; boxes in a title are no news to the user.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        entropy_figure(result).savefig(path, dpi=_DPI)
    return path


def entropy_figure(result: dict[str, Any]) -> Figure:
    """Left: mean over heads against position, a line per layer. Right: layer x head map of the slope.

    With `compare`, a second row shows the other model and a third one the difference.
    """
    from matplotlib.figure import Figure

    panels = panels_of(result)
    figure = Figure(figsize=(12, 4.4 * len(panels)), layout="constrained")
    rows = figure.subfigures(len(panels), 1, squeeze=False)[:, 0]
    top = max(np.nanmax(visible_bound(result)), 1e-3)
    for row, panel in zip(rows, panels, strict=True):
        row.suptitle(_shortened(panel.title), fontsize=11, parse_math=False)
        curves, cells = row.subplots(1, 2, width_ratios=(1.25, 1))
        _draw_curves(curves, panel, result)
        if panel.is_entropy:
            curves.set_ylim(0, 1.04 * top)
        _draw_cells(cells, panel, result["layers"])
    return figure


def _draw_curves(axes: Axes, panel: Panel, result: dict[str, Any]) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.ticker import NullLocator, StrMethodFormatter

    positions, layers = result["positions"], result["layers"]
    colours = layer_colours(len(layers), 0.0, 0.9)
    marker = "o" if len(positions) == 1 else None
    for layer, curve, colour in zip(layers, panel.curves.mean(axis=1), colours, strict=True):
        axes.plot(positions, curve, color=colour, linestyle=_LINE_STYLES[layer["kind"]], linewidth=1.3, marker=marker)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("position n of the query (tokens)")
    axes.set_ylabel(f"{panel.quantity}, mean over heads")
    axes.grid(color="#ececec")
    axes.spines[["top", "right"]].set_visible(False)
    _mark_references(axes, panel, result)
    depth = ScalarMappable(Normalize(-0.5, len(layers) - 0.5), ListedColormap(colours))
    bar = axes.figure.colorbar(depth, ax=axes, aspect=40, pad=0.01)
    bar.ax.set_title("layer", fontsize=8)
    bar.ax.yaxis.set_major_locator(_whole_numbers())
    bar.outline.set_visible(False)


def _mark_references(axes: Axes, panel: Panel, result: dict[str, Any]) -> None:
    """The ln n bound (or zero), the pre-trained window, and what dashes mean."""
    positions, window = np.asarray(result["positions"]), result["original_max_position_embeddings"]
    if panel.is_entropy:
        axes.plot(positions, np.log(positions), color="#8a8a8a", linewidth=1, linestyle="-.", label="ln n, the bound")
    else:
        axes.axhline(0, color="#8a8a8a", linewidth=1)
    axes.axvline(window, color="#b0413e", linewidth=1, linestyle=":", label=f"pre-trained window, {window:,}")
    for kind in sorted({layer["kind"] for layer in result["layers"]} - {"full"}):
        axes.plot([], [], color="#444444", linestyle=_LINE_STYLES[kind], label=f"{KINDS[kind]} layers")
    axes.legend(loc="upper left", fontsize=8, frameon=False)


def _draw_cells(axes: Axes, panel: Panel, layers: list[dict[str, Any]]) -> None:
    axes.set_title(panel.cells_title, fontsize=9)
    others = any(layer["kind"] != "full" for layer in layers)
    axes.set_xlabel("head" + ("   (◂ sliding window or no RoPE)" if others else ""))
    axes.set_ylabel("layer")
    if np.isnan(panel.cells).all():
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "too few positions to tell", transform=axes.transAxes, ha="center", va="center")
        return
    # Symmetric about zero, so that no change is the neutral colour.
    limit = float(np.nanmax(np.abs(panel.cells))) or 1.0
    image = axes.imshow(
        panel.cells, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest", origin="lower"
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(_whole_numbers())
    for layer in layers:
        if layer["kind"] != "full":
            row = layer["index"]
            axes.plot(-0.5, row, marker=4, color="#444444", markersize=4, clip_on=False, label=f"_{layer['kind']}")
    axes.figure.colorbar(image, ax=axes, aspect=40, pad=0.01).outline.set_visible(False)


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True, nbins=8)


def _shortened(title: str) -> str:
    return title if len(title) <= _LONGEST_TITLE else f"…{title[-_LONGEST_TITLE + 1 :]}"
