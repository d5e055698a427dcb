"""The JSON document of a measurement, made from what is known of each document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from eabf_cli.core.entropy.averages import Average, to_list
from eabf_cli.core.entropy.criterion import LayerSlope, slope_range, slope_weights, suggest
from eabf_cli.core.entropy.plan import EntropyPlan, suggested_factor
from eabf_cli.core.entropy.recorder import distance_edges
from eabf_cli.core.entropy.store import DocumentStore
from eabf_cli.core.files import read_json
from eabf_cli.core.subject import LayerKind

RESULT_FILE = "entropy.json"
ARRAYS_FILE = "entropy.safetensors"
MAX_JSON_VALUES = 2**20
"""Larger arrays (4 MiB of float32) lie in `entropy.safetensors`."""


def make_result(plan: EntropyPlan, store: DocumentStore, known: dict[str, Any]) -> dict[str, Any]:
    """Average over the documents, take the slopes, and draw the conclusion.

    Args:
        known: what the result says before anything is measured.
    """
    subject, length = plan.subject, plan.documents.length
    weights = slope_weights(plan.positions, subject.window, length)
    entropy, layer_slope = Average(), Average()
    for index in range(len(plan.documents)):
        values = store.get("model", index)["entropy"].double()  # (layers, heads, positions)
        entropy.add(values)
        if weights is not None:
            layer_slope.add((values @ weights).mean(-1))
    layers = [_layer(index, kind, layer_slope) for index, kind in enumerate(subject.layer_kinds())]
    suggestion = suggest(
        layers,
        subject.loaded.config,
        factor=suggested_factor(subject),
        window=subject.window,
        length=length,
    )
    result = known | {
        "entropy": to_list(entropy.mean),
        "stderr": to_list(entropy.stderr),
        "visible_keys": store.get("model", 0)["visible_keys"].tolist(),
        "layers": [layer.to_dict() for layer in layers],
        "head_slope": _head_slope(entropy.mean, weights),
        "slope_range": list(slope_range(subject.window, length)),
        "drift": _drift(entropy.mean, plan),
        "suggestion": suggestion,
    }
    if plan.config.scores:
        result["scores"] = _scores(plan, store)
    if plan.config.compare is not None:
        result["compare"] = _comparison(plan, store, weights)
    return result


def _head_slope(entropy: Tensor, weights: Tensor | None) -> list[list[float | None]]:
    """(layers, heads), nats per unit of ln n; the slope of the documents' mean is the mean of their slopes."""
    if weights is None:
        return [[None] * entropy.shape[1] for _ in entropy]
    slopes: list[list[float | None]] = to_list(entropy @ weights)
    return slopes


def _layer(index: int, kind: LayerKind, slope: Average) -> LayerSlope:
    return LayerSlope(
        index=index,
        kind=kind.kind,
        scaled=kind.scaled,
        slope=float(slope.mean[index]) if slope.count else None,
        slope_stderr=None if slope.stderr is None else float(slope.stderr[index]),
    )


def _scores(plan: EntropyPlan, store: DocumentStore) -> dict[str, Any]:
    totals: dict[str, Tensor] = {}
    for index in range(len(plan.documents)):
        found = store.get("model", index)
        for name in ("sink", "recent", "by_distance", "num_queries"):
            totals[name] = totals.get(name, 0) + found[name]
    counts = totals["num_queries"].clamp(min=1)[:, None]  # (layers, 1)
    return {
        "num_queries": int(totals["num_queries"].max()),
        "sink": to_list(totals["sink"] / counts),
        "recent": to_list(totals["recent"] / counts),
        "distance_edges": distance_edges(plan.documents.length),
        "by_distance": to_list(totals["by_distance"] / counts[..., None]),
    }


def _comparison(plan: EntropyPlan, store: DocumentStore, weights: Tensor | None) -> dict[str, Any]:
    entropy, difference = Average(), Average()
    for index in range(len(plan.documents)):
        ours, theirs = (store.get(side, index)["entropy"].double() for side in ("model", "compare"))
        entropy.add(theirs)
        difference.add(theirs - ours)
    return plan.subjects["compare"].describe() | {
        "entropy": to_list(entropy.mean),
        "stderr": to_list(entropy.stderr),
        "difference": to_list(difference.mean),
        "difference_stderr": to_list(difference.stderr),
        "head_slope": _head_slope(entropy.mean, weights),
        "drift": _drift(entropy.mean, plan),
    }


def _drift(entropy: Tensor, plan: EntropyPlan) -> dict[str, Any] | None:
    """How far entropy is from its level at the pre-trained window's end, at the last position.

    The mean over all heads of the layers with RoPE and full attention, in nats. A scale that does what the paper
    asks of it brings it back towards 0. None where no position lies beyond the window, or none inside.
    """
    positions, window = plan.positions, plan.subject.window
    inside = [index for index, position in enumerate(positions) if position <= window]
    layers = [index for index, kind in enumerate(plan.subject.layer_kinds()) if kind.kind == "full"]
    if not inside or not layers or positions[-1] <= window:
        return None
    change = entropy[layers][:, :, -1] - entropy[layers][:, :, inside[-1]]
    return {"from": positions[inside[-1]], "to": positions[-1], "nats": round(float(change.mean()), 6)}


# ---- Arrays that are too large for JSON ---------------------------------------------------------------

_ARRAYS = ("entropy", "stderr", "compare.entropy", "compare.stderr", "compare.difference", "compare.difference_stderr")


def split_arrays(result: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The document to write, and the arrays that go beside it, by their keys (`compare.entropy`).

    In the document such an array is null, and `arrays` names the file and the keys.
    """
    layers, heads = len(result["entropy"]), len(result["entropy"][0])
    if layers * heads * len(result["positions"]) <= MAX_JSON_VALUES:
        return result, {}
    document = result | ({"compare": dict(result["compare"])} if "compare" in result else {})
    arrays = {}
    for name in _ARRAYS:
        holder, key = _place(document, name)
        if holder is not None and holder[key] is not None:
            arrays[name] = torch.tensor(holder[key], dtype=torch.float32)
            holder[key] = None
    return document | {"arrays": {"file": ARRAYS_FILE, "names": list(arrays)}}, arrays


def read_result(folder: Path) -> dict[str, Any]:
    """The result in a folder, its arrays put back."""
    result = read_json(folder / RESULT_FILE)
    listed = result.pop("arrays", None)
    if listed is not None:
        arrays = load_file(folder / listed["file"])
        for name in listed["names"]:
            holder, key = _place(result, name)
            assert holder is not None
            holder[key] = to_list(arrays[name])
    return result


def _place(document: dict[str, Any], name: str) -> tuple[dict[str, Any] | None, str]:
    holder, _, key = name.rpartition(".")
    return (document.get(holder) if holder else document), key
