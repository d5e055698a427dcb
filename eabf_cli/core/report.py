"""What a method changes on a model, told before or after it is applied."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from eabf_cli.core import architectures
from eabf_cli.core.errors import UnsupportedModelError
from eabf_cli.core.frequencies import doublings
from eabf_cli.core.resolution import Resolution, scaled_config
from eabf_cli.modeling_eabf import logit_scale


@dataclass(frozen=True, kw_only=True)
class PatchReport:
    """The numbers of an applied (or planned) method.

    Attributes:
        logit_scale: factor on the attention logits of a scaled layer at a few 1-based positions; for yarn
            the constant that transformers puts into cos and sin.
        scaled_layers: layers whose logits are scaled by position.
        sliding_layers, nope_layers: layers left alone because they slide, or have no RoPE.
    """

    method: str
    factor: float
    rope_theta: float
    original_rope_theta: float
    theta_reason: str
    original_max_position_embeddings: int
    max_position_embeddings: int
    unscaled_layers: tuple[int, ...]
    scaled_layers: tuple[int, ...]
    sliding_layers: tuple[int, ...]
    nope_layers: tuple[int, ...]
    logit_scale: dict[int, float]
    notes: tuple[str, ...] = ()

    @property
    def num_scaled_layers(self) -> int:
        """How many layers have their logits scaled by position."""
        return len(self.scaled_layers)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, with the keys of docs/api.md."""
        result = asdict(self) | {"num_scaled_layers": self.num_scaled_layers}
        for name in ("unscaled_layers", "scaled_layers", "sliding_layers", "nope_layers", "notes"):
            result[name] = list(result[name])
        result["logit_scale"] = {str(position): t for position, t in self.logit_scale.items()}
        return result


def plan_patch(model: PreTrainedModel, resolution: Resolution) -> PatchReport:
    """Work out what applying a resolved scaling changes on a model (weights are not looked at).

    Raises:
        UnsupportedModelError: every layer slides or has no RoPE, or every other layer is exempt.
    """
    scaling = resolution.scaling
    layers = architectures.attention_layers(model)
    extended = [layer.index for layer in layers if layer.can_scale]
    if not extended:
        sliding = sum(layer.is_sliding for layer in layers)
        raise UnsupportedModelError(
            f"no layer of this {resolution.base_config.model_type!r} model has RoPE with full attention "
            f"({sliding} of {len(layers)} slide, {sum(not layer.uses_rope for layer in layers)} have no RoPE), "
            "so there is no window to extend; a model whose layers all slide can be given full attention by "
            "setting sliding_window to null in its config.json"
        )
    scaled: tuple[int, ...] = ()
    if scaling.entry.logit_scale is not None:
        scaled = tuple(index for index in extended if index not in (scaling.unscaled_layers or ()))
        if not scaled:
            raise UnsupportedModelError(
                f"unscaled_layers exempts every layer that {scaling.method!r} could scale "
                f"({', '.join(map(str, extended))}): leave at least one, or use method 'abf'"
            )
    return PatchReport(
        method=scaling.method,
        factor=scaling.factor,
        rope_theta=scaling.rope_theta,  # type: ignore[arg-type]
        original_rope_theta=scaling.original_rope_theta,  # type: ignore[arg-type]
        theta_reason=resolution.theta_reason,
        original_max_position_embeddings=scaling.original_max_position_embeddings,  # type: ignore[arg-type]
        max_position_embeddings=scaling.max_position_embeddings,
        unscaled_layers=scaling.unscaled_layers or (),
        scaled_layers=scaled,
        sliding_layers=tuple(layer.index for layer in layers if layer.is_sliding),
        nope_layers=tuple(layer.index for layer in layers if not layer.uses_rope),
        logit_scale=_logit_scales(resolution),
        notes=resolution.notes,
    )


def _logit_scales(resolution: Resolution) -> dict[int, float]:
    """t at 1-based positions around the original window and up to twice the target."""
    scaling = resolution.scaling
    window = scaling.original_max_position_embeddings
    assert window is not None
    target = scaling.max_position_embeddings
    positions = sorted({1, window // 2, *doublings(window, target), target, 2 * target})
    if scaling.entry.logit_scale is not None:
        ids = torch.tensor(positions)[None] - 1
        values = logit_scale(scaling.entry.logit_scale, ids, window)[0].tolist()
    else:
        values = [_constant_scale(resolution)] * len(positions)
    return {position: round(value, 6) for position, value in zip(positions, values, strict=True)}


def _constant_scale(resolution: Resolution) -> float:
    """The square of transformers' attention factor: cos and sin carry it for the query and for the key."""
    config = scaled_config(resolution.base_config, resolution.scaling)
    kind = architectures.rope_parameters(config)["rope_type"]
    if kind == "default":
        return 1.0
    layer_type = "full_attention" if architectures.is_nested_rope(config) else None
    _, attention_factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", layer_type=layer_type)
    return float(attention_factor) ** 2
