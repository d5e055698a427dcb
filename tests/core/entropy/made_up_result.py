"""A result of `eabf entropy` as the drawing code gets it. Every number is made up, by formulas; no model was run."""

from __future__ import annotations

import math
from typing import Any

WINDOW = 2_048
SLIDING = 512


def made_up_result(
    *,
    num_layers: int = 12,
    num_heads: int = 6,
    num_positions: int = 48,
    num_documents: int = 16,
    length: int = 8_192,
    compare: bool = False,
    scores: bool = False,
    model: str = "example/made-up-llama",
) -> dict[str, Any]:
    """The JSON document, lists and all.

    Layers 0 and 1 rise with ln n, the others hold their entropy up to the window and rise beyond it; every fourth
    layer has a sliding window, the last one no RoPE. With one document there is no standard error.
    """
    positions = sorted({round(math.exp(math.log(length) * i / (num_positions - 1))) for i in range(num_positions)})
    kinds = [
        "no_rope" if index == num_layers - 1 else "sliding" if index % 4 == 3 else "full" for index in range(num_layers)
    ]
    visible = [[min(n, SLIDING) if kind == "sliding" else n for n in positions] for kind in kinds]
    entropy = [
        [[_entropy(layer, head, n, growth=1.0) for n in visible[layer]] for head in range(num_heads)]
        for layer in range(num_layers)
    ]
    head_slope = [[_slope(positions, curve) for curve in heads] for heads in entropy]
    several = num_documents > 1
    stderr = _mapped(entropy, lambda value: (0.01 + 0.02 * value) / math.sqrt(num_documents)) if several else None
    layers = []
    for index, kind in enumerate(kinds):
        slope = sum(head_slope[index]) / num_heads
        layers.append(
            {
                "index": index,
                "kind": kind,
                "scaled": kind == "full" and index > 1,
                "slope": slope,
                "slope_stderr": 0.004 + 0.001 * index if several else None,
                "rises": kind == "full" and slope > 0.5,
            }
        )
    result: dict[str, Any] = {
        "model": model,
        "revision": None,
        "method": "eabf",
        "factor": 4.0,
        "original_max_position_embeddings": WINDOW,
        "max_position_embeddings": 4 * WINDOW,
        "dataset": "bundled held-out documents",
        "notes": ["16 of 19 documents are long enough"],
        "num_documents": num_documents,
        "num_skipped_documents": 3,
        "length": length,
        "positions": positions,
        "entropy": entropy,
        "stderr": stderr,
        "visible_keys": visible,
        "layers": layers,
        "head_slope": head_slope,
        "slope_range": [WINDOW // 8, WINDOW],
        "suggestion": {
            "unscaled_layers": [0, 1],
            "rope_theta": 500_000.0,
            "reason": "the entropy of layers 0, 1 rises by 0.67 to 0.78 nats per unit of ln n from 256 to 2,048 "
            "tokens, while the 6 others that can be scaled have −0.01 to 0.01",
        },
        "wall_s": 41.3,
        "tokens_per_s": 3_170.0,
        "peak_memory_gib": 1.9,
        "output": None,
    }
    if scores:
        result["scores"] = _scores(num_layers, num_heads)
    if compare:
        result["compare"] = _comparison(result, visible, several)
    return result


def _entropy(layer: int, head: int, n: int, growth: float) -> float:
    """Nats: a share of ln n in the first two layers; later steady up to the window, then growing by `growth` ln n."""
    bound = math.log(n)
    if layer < 2:
        return (0.9 - 0.1 * layer - 0.05 * (head % 7)) * bound
    level = 2.4 + 1.4 * math.sin(1.7 * layer) + 0.6 * math.sin(layer + 2.3 * head)
    drift = 0.08 * math.sin(3.1 * layer + head)
    held = level + drift * math.log(n) + growth * (0.5 + drift) * max(0.0, math.log(n / WINDOW))
    return max(0.0, min(held, bound))


def _slope(positions: list[int], curve: list[float]) -> float:
    """Least squares by the textbook sums, over the positions from an eighth of the window to the window."""
    points = [(math.log(n), value) for n, value in zip(positions, curve, strict=True) if WINDOW / 8 <= n <= WINDOW]
    count = len(points)
    sum_x, sum_y = sum(x for x, _ in points), sum(y for _, y in points)
    sum_xx, sum_xy = sum(x * x for x, _ in points), sum(x * y for x, y in points)
    return (count * sum_xy - sum_x * sum_y) / (count * sum_xx - sum_x**2)


def _mapped(nested: Any, function: Any) -> Any:
    return [_mapped(entry, function) for entry in nested] if isinstance(nested, list) else function(nested)


def _scores(num_layers: int, num_heads: int) -> dict[str, Any]:
    sink = [[0.1 + 0.6 * layer / num_layers for _ in range(num_heads)] for layer in range(num_layers)]
    recent = [[0.25 - 0.02 * head for head in range(num_heads)] for _ in range(num_layers)]
    rest = [[1 - s - r for s, r in zip(*heads, strict=True)] for heads in zip(sink, recent, strict=True)]
    by_distance = [
        [[r, 0.25 * left, 0.75 * left + s] for s, r, left in zip(*heads, strict=True)]
        for heads in zip(sink, recent, rest, strict=True)
    ]
    return {"sink": sink, "recent": recent, "distance_edges": [0, 64, 512, 8_192], "by_distance": by_distance}


def _comparison(result: dict[str, Any], visible: list[list[int]], several: bool) -> dict[str, Any]:
    num_heads = len(result["entropy"][0])
    entropy = [
        [[_entropy(layer, head, n, growth=0.2) for n in seen] for head in range(num_heads)]
        for layer, seen in enumerate(visible)
    ]
    difference = [
        [[b - a for a, b in zip(*pair, strict=True)] for pair in zip(*heads, strict=True)]
        for heads in zip(result["entropy"], entropy, strict=True)
    ]
    return {
        "model": "example/made-up-llama-finetuned",
        "method": "eabf",
        "entropy": entropy,
        "stderr": result["stderr"],
        "difference": difference,
        "difference_stderr": _mapped(difference, lambda value: 0.002 + 0.03 * abs(value)) if several else None,
        "head_slope": [[_slope(result["positions"], curve) for curve in heads] for heads in entropy],
    }
