"""How many tokens a model's window can hold at most, by its small files alone: before torch is imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eabf_cli.core.demo import DEMO_MODEL, demo_model_path
from eabf_cli.core.scaling_config import RopeScalingConfig
from eabf_cli.core.summarize.settings import SummarizeConfig

_DEFAULT_MODEL_WINDOW = 8192


def longest_window(config: SummarizeConfig) -> int | None:
    """A bound from above: the model's window as its `config.json` has it, extended as far as the request lets it be.

    None where the model is not in a folder here, or does not tell. A word is a token at least.
    """
    request = config.request
    if request.max_length is not None:
        return request.max_length
    window = request.original_length or _stored_window(config.model)
    if window is None:
        return None
    return round(window * max(request.factor or RopeScalingConfig.factor, 1.0))


def _stored_window(model: str | None) -> int | None:
    if model is None:
        return _DEFAULT_MODEL_WINDOW
    folder = demo_model_path() if str(model) == DEMO_MODEL else Path(model).expanduser()
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    fields: dict[str, Any] = raw.get("text_config", raw) if isinstance(raw, dict) else {}
    window = fields.get("max_position_embeddings")
    if not isinstance(window, int) or window < 1:
        return None
    scaling = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    factor = scaling.get("factor", 1.0) if isinstance(scaling, dict) else 1.0
    # Some checkpoints keep the window that was extended there, others the original one.
    return round(window * max(factor, 1.0)) if isinstance(factor, int | float) else window
