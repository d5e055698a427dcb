"""Methods of the study that the product's table does not have: other scales on raised or interpolated frequencies."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from transformers import PreTrainedModel
from variants import GAIN_LEARNING_RATE

from eabf_cli.core import architectures, attention_scale, frequencies, report
from eabf_cli.core.attention_scale import LayerScale
from eabf_cli.core.finetune.training import SampleTrainer
from eabf_cli.core.methods import METHODS, Method
from eabf_cli.core.patching import apply_method
from eabf_cli.core.report import PatchReport
from eabf_cli.core.scaling_config import RopeScalingConfig
from eabf_cli.modeling_eabf import logit_scale

GAIN_NAME = "eabf_gain"

_FREQUENCIES: dict[str, dict[str, Any]] = {
    "abf": {"rope_parameters": frequencies.default, "raises_theta": True},
    "parts": {"rope_parameters": frequencies.ntk_by_parts, "theta": frequencies.keep_theta},
}
_COMBINATIONS = (
    ("abf", "positional"),
    ("abf", "unbounded"),
    ("abf", "learned"),
    ("parts", "eabf"),
    ("parts", "positional"),
    ("parts", "learned"),
)
STUDY_METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name=f"{frequency}+{scale}",
            summary=f"Frequencies of {frequency!r} with the {scale} logit scale.",
            reference="scripts/reproduction",
            logit_scale=scale,
            **_FREQUENCIES[frequency],
        )
        for frequency, scale in _COMBINATIONS
    )
}
"""The study's own entries by their names, each with its scale on all layers unless told otherwise."""


def study_scale(rule: str, position_ids: Tensor, original_max_position_embeddings: int) -> Tensor:
    """`modeling_eabf.logit_scale` with the study's rules.

    With i the position from 1 and c the window: `positional` gives (1 + 0.1 ln max(1, i / c))^2, which is 1 inside and
    YaRN's constant (arXiv 2309.00071) at i = factor x c; `unbounded` gives ln i / ln c everywhere; `learned` gives what
    the gains begin with, EABF's scale.

    Returns:
        float32 of the shape of `position_ids`.
    """
    window = original_max_position_embeddings
    if rule == "positional":
        return (1.0 + 0.1 * _log_beyond(position_ids, window)).square()
    if rule == "unbounded":
        return (position_ids + 1).float().log() / math.log(window)
    return logit_scale("eabf" if rule == "learned" else rule, position_ids, window)


def _log_beyond(position_ids: Tensor, window: int) -> Tensor:
    """ln max(1, i / c) in float32, with no rounding at or below c."""
    return torch.where(position_ids < window, 0.0, ((position_ids + 1).float() / window).log())


@dataclass(frozen=True, kw_only=True)
class LearnedScale(LayerScale):
    """t of a layer whose heads learn it: t_h(i) = 1 + softplus(a_h) ln max(1, i / c).

    It does not go through `pass_scale`, which would give every layer the values of the first.

    Attributes:
        gain: a, (heads,), a float32 parameter of the attention module.
    """

    gain: nn.Parameter

    def factors(self, position_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """t of each query, (batch or 1, heads, queries, 1), computed in float32 and cast last."""
        log_beyond = _log_beyond(position_ids, self.original_max_position_embeddings)
        t = 1.0 + softplus(self.gain)[:, None] * log_beyond[:, None, :]  # (batch or 1, heads, queries)
        return t[..., None].to(dtype)


@contextlib.contextmanager
def study_methods() -> Iterator[None]:
    """Within the context, the table has the study's methods and models run and train under them.

    The rule is looked up in every forward pass, so a model is measured inside the context as well.
    """
    modules: tuple[Any, ...] = (attention_scale, report)
    create_optimizer = SampleTrainer.create_optimizer

    def create_with_gains(trainer: Any, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = create_optimizer(trainer, *args, **kwargs)
        _give_gains_their_rate(optimizer, trainer.model)
        return optimizer

    METHODS.update(STUDY_METHODS)
    for module in modules:
        module.logit_scale = study_scale
    SampleTrainer.create_optimizer = create_with_gains
    try:
        yield
    finally:
        # It is inherited from the Trainer, so that taking the study's off brings it back.
        del SampleTrainer.create_optimizer
        for module in modules:
            module.logit_scale = logit_scale
        for name in STUDY_METHODS:
            del METHODS[name]


def apply_study_method(model: PreTrainedModel, scaling: RopeScalingConfig) -> PatchReport:
    """`apply_method`; a learned scale gets its parameters, which start at EABF's scale.

    They are in the model's state and stay float32, whatever the dtype of its weights.

    Raises:
        UnsupportedModelError, AlreadyScaledError, InvalidConfigError: as `apply_method`.
    """
    applied = apply_method(model, scaling)
    if scaling.entry.logit_scale != "learned":
        return applied
    window = applied.original_max_position_embeddings
    # softplus(a) = 1 / ln c.
    start = math.log(math.expm1(1 / math.log(window)))
    num_heads = architectures.decoder(model).config.num_attention_heads
    for layer in architectures.attention_layers(model):
        if layer.index in applied.scaled_layers:
            module = layer.module
            gain = nn.Parameter(torch.full((num_heads,), start, dtype=torch.float32, device=model.device))
            module.register_parameter(GAIN_NAME, gain)
            given = {field.name: getattr(module.eabf_scale, field.name) for field in fields(LayerScale)}
            module.eabf_scale = LearnedScale(**given, gain=gain)
    return applied


def _give_gains_their_rate(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Move the gains to a group of their own, with `GAIN_LEARNING_RATE` and without weight decay."""
    gains = [weight for name, weight in model.named_parameters() if name.endswith(GAIN_NAME)]
    if not gains:
        return
    ids = {id(gain) for gain in gains}
    for group in optimizer.param_groups:
        group["params"] = [weight for weight in group["params"] if id(weight) not in ids]
    optimizer.add_param_group({"params": gains, "lr": GAIN_LEARNING_RATE, "weight_decay": 0.0})
