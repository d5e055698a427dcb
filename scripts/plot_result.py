"""Draw what `eabf finetune --control` measured: perplexity and passkey retrieval by length.

    python scripts/plot_result.py docs/results/demo-finetune.json docs/images/result.png

The input is what the command prints with `--json`, or the `eabf_run.json` of its folder.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

# Key in the result, name in the legend, colour (told apart by colour-blind readers too), marker and line. Drawn in
# this order, so that the finetuned model lies on top where lines meet.
MODELS = (
    ("original", "original", "#666666", "o-"),
    ("control", "control: trained on the same tokens in the old window", "#e69f00", "s--"),
    ("before", "patched, untrained", "#56b4e9", "^-"),
    ("after", "patched and finetuned", "#0072b2", "D-"),
)
Series = dict[int, float]


def perplexity_by_length(evaluation: dict[str, Any]) -> Series:
    """Window length in tokens -> perplexity of the window's last tokens."""
    return {entry["length"]: entry["perplexity"] for entry in evaluation["perplexity"]}


def passkey_by_length(evaluation: dict[str, Any]) -> Series:
    """Prompt length in tokens -> share of passkeys found, in percent, over all depths."""
    found: Series = {}
    asked: Series = {}
    for entry in evaluation["passkey"]:
        length, num_trials = entry["length"], entry["num_trials"]
        found[length] = found.get(length, 0) + entry["accuracy"] * num_trials
        asked[length] = asked.get(length, 0) + num_trials
    return {length: 100 * found[length] / asked[length] for length in found}


def plot_result(result: dict[str, Any]) -> Figure:
    """Two panels side by side, a line per model that was measured."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    perplexity, passkey = figure.subplots(1, 2)
    for key, label, colour, style in MODELS:
        if result.get(key) is None:
            continue
        for axes, series in (
            (perplexity, perplexity_by_length(result[key])),
            (passkey, passkey_by_length(result[key])),
        ):
            lengths = sorted(series)
            axes.plot(lengths, [series[length] for length in lengths], style, color=colour, label=label)
    perplexity.set_yscale("log")
    perplexity.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    perplexity.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    perplexity.yaxis.set_minor_locator(NullLocator())
    perplexity.margins(y=0.12)
    perplexity.set_title("Perplexity of the window's last tokens (lower is better)", fontsize=10)
    passkey.set_ylim(-4, 112)
    passkey.set_title("Passkeys found, % (higher is better)", fontsize=10)
    for axes in (perplexity, passkey):
        _label_lengths(axes, result)
    handles, labels = passkey.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _label_lengths(axes: Axes, result: dict[str, Any]) -> None:
    """Lengths doubling along the axis, with the old and the new window marked."""
    axes.set_xscale("log", base=2)
    lengths = sorted({int(x) for line in axes.lines for x in line.get_xdata()})
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("length in tokens")
    axes.grid(color="#e6e6e6")
    axes.spines[["top", "right"]].set_visible(False)
    for name, key in (("old window", "original_max_position_embeddings"), ("new window", "max_position_embeddings")):
        axes.axvline(result[key], color="#999999", linestyle=":", zorder=0)
        axes.text(
            result[key], 1.0, f" {name}", transform=axes.get_xaxis_transform(), fontsize=8, color="#777777", va="top"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="JSON of eabf finetune")
    parser.add_argument("image", type=Path, help="PNG to write")
    arguments = parser.parse_args()
    figure = plot_result(json.loads(arguments.result.read_text(encoding="utf-8")))
    arguments.image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.image, dpi=110)


if __name__ == "__main__":
    main()
