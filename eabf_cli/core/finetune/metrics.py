"""`metrics.jsonl`, a line a step, and `loss.png`, the picture of it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "loss.png"


def append_metrics(folder: Path, line: dict[str, Any]) -> None:
    """Add one step's line."""
    with (folder / METRICS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run in order; a line that a killed process left unfinished is passed over."""
    path = folder / METRICS_FILE
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def drop_metrics_after(folder: Path, step: int) -> None:
    """Forget what a run wrote after the step that it goes on from (0: everything)."""
    kept = [json.dumps(line) + "\n" for line in read_metrics(folder) if line["step"] <= step]
    (folder / METRICS_FILE).write_text("".join(kept), encoding="utf-8")


def plot_loss(folder: Path) -> None:
    """Draw the training loss (nats per token) and the learning rate against the step."""
    from matplotlib.figure import Figure

    lines = read_metrics(folder)
    steps = [line["step"] for line in lines]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, [line["loss"] for line in lines], marker=".", color="tab:blue")
    axes.set(xlabel="step", ylabel="training loss (nats per token)")
    rates = axes.twinx()
    rates.plot(steps, [line["learning_rate"] for line in lines], color="tab:gray", linewidth=1, linestyle="--")
    rates.set_ylabel("learning rate (dashed)", color="tab:gray")
    axes.grid(alpha=0.3)
    figure.savefig(folder / PLOT_FILE, dpi=120)
