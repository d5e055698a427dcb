"""The page of a result: one HTML file that needs no network, its pictures drawn from the data in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from eabf_cli.core.entropy.panels import KINDS, Array, Panel, layer_colours, model_name, panels_of
from eabf_cli.core.pages import page_environment, page_style, source_hash, template_file, tool_version

_PACKAGE = "eabf_cli.core.entropy"
PAGE_FILE = "report.html"
MAX_POSITIONS = 64
# About 6 bytes each in the page, which stays below 3 MB.
_MAX_NUMBERS = 450_000
_VALUE_DIGITS, _STDERR_DIGITS = 4, 2


def write_page(result: dict[str, Any], folder: Path) -> Path:
    """Write `report.html` into a folder that exists, and return its path.

    Args:
        result: what `compute_attention_entropy` returns, its arrays in it. Its texts (a model's name, say) are
            data from elsewhere: they are escaped, and the page's policy runs no script but its own.
    """
    path = folder / PAGE_FILE
    path.write_text(render_page(result), encoding="utf-8")
    return path


def render_page(result: dict[str, Any]) -> str:
    """The page's HTML; see `write_page`."""
    panels = panels_of(result)
    kept = kept_positions(result["positions"], panels)
    style, script = page_style(_PACKAGE), Markup(template_file(_PACKAGE, "report.js"))
    environment = page_environment(_PACKAGE)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    compare = result.get("compare")
    return environment.get_template("report.html").render(
        policy=_policy(style, script),
        style=style,
        script=script,
        name=str(result["model"]),
        other=model_name(compare) if compare else None,
        version=tool_version(),
        facts=_facts(result),
        notes=result.get("notes") or [],
        slope_range=result["slope_range"],
        suggestion=result.get("suggestion"),
        options=_options(result.get("suggestion")),
        panels=panels,
        kept=len(kept),
        total=len(result["positions"]),
        data=_drawn(result, panels, kept),
        **_layer_table(result),
        masses=_masses(result.get("scores")),
    )


def kept_positions(positions: list[int], panels: list[Panel]) -> list[int]:
    """Indices of the positions that the page keeps: log-spaced, at most 64, fewer where heads are many.

    The first and the last position are among them.
    """
    per_position = sum(panel.curves[..., 0].size * (1 if panel.stderr is None else 2) for panel in panels)
    count = max(2, min(MAX_POSITIONS, _MAX_NUMBERS // per_position))
    if len(positions) <= count:
        return list(range(len(positions)))
    wanted = np.geomspace(positions[0], positions[-1], count)
    nearest = np.abs(np.asarray(positions)[None, :] - wanted[:, None]).argmin(axis=1)
    return [int(index) for index in np.unique(nearest)]


def _policy(style: str, script: str) -> str:
    """A Content-Security-Policy under which nothing is loaded, and nothing runs but the page's own script."""
    return (
        f"default-src 'none'; img-src data:; style-src '{source_hash(style)}'; script-src '{source_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What was measured on what, as terms and values."""
    method, factor, positions = result.get("method"), result.get("factor"), result["positions"]
    if method and factor:
        method = f"{method}, factor {factor:g}"
    skipped = result["num_skipped_documents"]
    facts = [
        ("Method", method or "none: the model as it stands"),
        ("Pre-trained window", f"{result['original_max_position_embeddings']:,} tokens"),
        ("Window", f"{result['max_position_embeddings']:,} tokens"),
        ("Documents", f"{result['num_documents']:,}" + (f" ({skipped:,} shorter ones skipped)" if skipped else "")),
        ("Length", f"{result['length']:,} tokens"),
        ("Positions", f"{len(positions):,}, from {positions[0]:,} to {positions[-1]:,}"),
        ("Data", str(result["dataset"])),
    ]
    if result.get("revision"):
        facts.append(("Revision", str(result["revision"])))
    return facts


def _options(suggestion: dict[str, Any] | None) -> str:
    """The recommendation as command-line options; empty where there is none."""
    found = []
    if suggestion and suggestion["unscaled_layers"] is not None:
        found.append("--unscaled-layers " + (",".join(map(str, suggestion["unscaled_layers"])) or "none"))
    if suggestion and suggestion["rope_theta"] is not None:
        found.append(f"--rope-theta {suggestion['rope_theta']:.12g}")
    return " ".join(found)


def _drawn(result: dict[str, Any], panels: list[Panel], kept: list[int]) -> dict[str, Any]:
    """What the script draws from."""
    layers = result["layers"]
    # A dark line is lost on a dark ground, a light one on white: each scheme leaves out its end of the colour map.
    on_light, on_dark = layer_colours(len(layers), 0.0, 0.85), layer_colours(len(layers), 0.35, 1.0)
    return {
        "positions": [result["positions"][index] for index in kept],
        "window": result["original_max_position_embeddings"],
        "kinds": KINDS,
        "layers": [
            {
                "index": layer["index"],
                "kind": layer["kind"],
                "rises": bool(layer["rises"]),
                "light": light,
                "dark": dark,
                "visible": [visible[index] for index in kept],
            }
            for layer, light, dark, visible in zip(layers, on_light, on_dark, result["visible_keys"], strict=True)
        ],
        "panels": [
            {
                "title": panel.title,
                "quantity": panel.quantity,
                "isEntropy": panel.is_entropy,
                "curves": _rounded(panel.curves[..., kept], _VALUE_DIGITS),
                "stderr": None if panel.stderr is None else _rounded(panel.stderr[..., kept], _STDERR_DIGITS),
                "cells": _rounded(panel.cells, _VALUE_DIGITS),
                "cellsTitle": panel.cells_title,
            }
            for panel in panels
        ],
    }


def _rounded(values: Array, digits: int) -> Any:
    """Nested lists of numbers with so many significant digits; None for NaN."""
    flat = [None if value != value else float(f"{value:.{digits}g}") for value in values.ravel().tolist()]
    return np.array(flat, dtype=object).reshape(values.shape).tolist()


def _layer_table(result: dict[str, Any]) -> dict[str, Any]:
    """The rows of the table of layers, with the positions that head its columns."""
    columns = table_positions(result["positions"], result["original_max_position_embeddings"])
    indices = [result["positions"].index(n) for n in columns]
    entropy = np.asarray(result["entropy"], dtype=float).mean(axis=1)
    compare = result.get("compare")
    rows = []
    for number, layer in enumerate(result["layers"]):
        row = {
            "index": layer["index"],
            "kind": KINDS[layer["kind"]],
            "scaled": layer["scaled"],
            "entropy": [float(entropy[number, index]) for index in indices],
            "slope": layer["slope"],
            "slope_stderr": layer["slope_stderr"],
            "rises": layer["rises"],
        }
        if compare:
            row["other"] = float(np.mean([head[indices[-1]] for head in compare["entropy"][number]]))
            row["difference"] = float(np.mean([head[indices[-1]] for head in compare["difference"][number]]))
        rows.append(row)
    return {
        "columns": columns,
        "rows": rows,
        "has_stderr": any(row["slope_stderr"] is not None for row in rows),
    }


def table_positions(positions: list[int], window: int) -> list[int]:
    """The measured positions nearest to an eighth of the window, to the window, and the last one; no duplicates."""
    nearest = [min(positions, key=lambda n: abs(n - wanted)) for wanted in (window / 8, window)]
    return sorted({*nearest, positions[-1]})


def _masses(scores: dict[str, Any] | None) -> list[list[dict[str, float]]] | None:
    """Sink and recent mass of every layer in percent: mean, least and greatest over heads."""
    if scores is None:
        return None
    rows = []
    for layer in zip(scores["sink"], scores["recent"], strict=True):
        percents = [100 * np.asarray(heads, dtype=float) for heads in layer]
        rows.append([{"mean": float(p.mean()), "low": float(p.min()), "high": float(p.max())} for p in percents])
    return rows
