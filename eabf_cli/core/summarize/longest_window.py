"""How many tokens a model's window can hold at most, by its small files alone: before torch is imported."""

from __future__ import annotations

from typing import Any

from eabf_cli.core.scaling_config import RopeScalingConfig
from eabf_cli.core.summarize.settings import SummarizeConfig

_DEFAULT_MODEL_WINDOW = 8192


def longest_window(config: SummarizeConfig) -> int | None:
    """A bound from above: the model's window as its `config.json` has it, extended as far as the request lets it be.

    None where the model does not tell, or is a GGUF file. A word is a token at least.

    Raises:
        CheckpointError: there is no such model.
    """
    request = config.request
    if request.max_length is not None:
        return request.max_length
    window = request.original_length or _stored_window(config)
    if window is None:
        return None
    return round(window * max(request.factor or RopeScalingConfig.factor, 1.0))


def _stored_window(config: SummarizeConfig) -> int | None:
    if config.model is None:
        return _DEFAULT_MODEL_WINDOW
    from eabf_cli.core.sources import find_model

    source = find_model(config.model, revision=config.revision, with_weights=False)
    if source.gguf_file is not None:
        return None
    raw = source.config()
    fields: dict[str, Any] = raw.get("text_config", raw)
    window = fields.get("max_position_embeddings")
    if not isinstance(window, int) or window < 1:
        return None
    scaling = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    factor = scaling.get("factor", 1.0) if isinstance(scaling, dict) else 1.0
    # Some checkpoints keep the window that was extended there, others the original one.
    return round(window * max(factor, 1.0)) if isinstance(factor, int | float) else window
