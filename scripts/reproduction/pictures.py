"""The picture of docs/reproduction.md: every method by length."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from cells import TARGET_WINDOW, TWICE_TARGET, WINDOW
from estimates import LOSS, RETRIEVAL, Runs, level
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, PercentFormatter, StrMethodFormatter

_DPI = 110
# Colours that colour-blind readers tell apart, with markers beside them.
_STYLES = {
    "original": ("#666666", "o"),
    "linear": ("#e69f00", "s"),
    "ntk-by-parts": ("#56b4e9", "^"),
    "yarn": ("#009e73", "v"),
    "abf": ("#d55e00", "D"),
    "eabf": ("#0072b2", "P"),
    "eabf-released": ("#cc79a7", "X"),
}


def write_picture(runs: Mapping[str, Runs], file: Path) -> None:
    """Retrieval and perplexity by length, with intervals over the trials, as PNG."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    retrieval, perplexity = figure.subplots(1, 2)
    for name, found in runs.items():
        _draw(retrieval, name, found, RETRIEVAL)
        _draw(perplexity, name, found, LOSS)
    retrieval.set_title("Unseen needles and repeated spans found (higher is better)", fontsize=10)
    retrieval.set_ylim(-0.04, 1.12)
    retrieval.set_yticks([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    retrieval.yaxis.set_major_formatter(PercentFormatter(1.0))
    perplexity.set_title("Perplexity (lower is better)", fontsize=10)
    perplexity.set_yscale("log")
    perplexity.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    perplexity.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    perplexity.yaxis.set_minor_formatter(NullFormatter())
    perplexity.margins(y=0.12)
    for axes in (retrieval, perplexity):
        _label_lengths(axes)
    handles, labels = retrieval.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=_DPI, metadata={"Software": None})


def _draw(axes: Axes, name: str, runs: Runs, measurement: str) -> None:
    found = {length: judged for length in TWICE_TARGET if (judged := level(runs, measurement, length)) is not None}
    if not found:
        return
    shown = math.exp if measurement == LOSS else float
    colour, marker = _STYLES[name]
    axes.plot(
        list(found), [shown(judged.mean) for judged in found.values()],
        color=colour, marker=marker, markersize=5, linewidth=1.4, label=name,
    )  # fmt: skip
    for length, judged in found.items():
        low, high = judged.trials.low, judged.trials.high
        if low is not None and high is not None and measurement != LOSS:
            axes.plot([length, length], [low, high], color=colour, linewidth=1, alpha=0.6)


def _label_lengths(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(TWICE_TARGET, [f"{length:,}" for length in TWICE_TARGET])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("length in tokens", fontsize=9)
    axes.grid(color="#ececec")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    for length, name in ((WINDOW, " original window"), (TARGET_WINDOW, " trained window")):
        axes.axvline(length, color="#999999", linestyle=":", zorder=0)
        axes.text(length, 1.0, name, transform=axes.get_xaxis_transform(), fontsize=8, color="#777777", va="top")
