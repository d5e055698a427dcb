"""A model that is looked at: found, with the method that it is under, before its weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from eabf_cli.core import architectures
from eabf_cli.core.checkpoint import LoadedConfig, load_model, read_config
from eabf_cli.core.patch_checkpoint import MethodRequest, resolve_request
from eabf_cli.core.patching import apply_resolution, describe_patch, remove_method
from eabf_cli.core.report import plan_patch
from eabf_cli.core.resolution import Resolution, existing_scaling, original_window
from eabf_cli.core.sources import ModelSource, find_model


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """What a layer is: `kind` "full", "sliding" or "no_rope", and whether its logits are scaled by position."""

    kind: str
    scaled: bool


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to measure.

    Attributes:
        loaded: its configuration, and the method that its checkpoint carries.
        resolution: the method that it is measured under; None as a plain model.
        is_requested: the method is one that was asked for, and not the checkpoint's own.
    """

    source: ModelSource
    loaded: LoadedConfig
    resolution: Resolution | None
    is_requested: bool = False

    @property
    def method(self) -> str | None:
        """The method's name; of a model that transformers scales by itself, what it calls that."""
        return existing_scaling(self.loaded.config) if self.resolution is None else self.resolution.scaling.method

    @property
    def factor(self) -> float | None:
        """The method's factor, where there is a method of ours."""
        return None if self.resolution is None else self.resolution.scaling.factor

    @property
    def window(self) -> int:
        """The pre-trained window in tokens; the whole window of a scaled model that does not tell."""
        if self.resolution is not None:
            return self.resolution.base_config.max_position_embeddings
        return original_window(self.loaded.config) or self.loaded.config.max_position_embeddings

    @property
    def target_window(self) -> int:
        """The window that the model stands under, in tokens."""
        if self.resolution is not None:
            return self.resolution.scaling.max_position_embeddings
        return self.loaded.config.max_position_embeddings

    def layer_kinds(self) -> list[LayerKind]:
        """What each layer is, in order."""
        config = self.loaded.config if self.resolution is None else self.resolution.base_config
        model = architectures.meta_model(config)
        scaled = () if self.resolution is None else plan_patch(model, self.resolution).scaled_layers
        return [
            LayerKind(
                kind="sliding" if layer.is_sliding else "full" if layer.uses_rope else "no_rope",
                scaled=layer.index in scaled,
            )
            for layer in architectures.attention_layers(model)
        ]

    def describe(self) -> dict[str, Any]:
        """What a result says about it."""
        return {
            "model": self.source.name,
            "revision": self.source.revision,
            "method": self.method,
            "factor": self.factor,
            "original_max_position_embeddings": self.window,
            "max_position_embeddings": self.target_window,
        }


def find_subject(
    model: str, *, revision: str | None = None, request: MethodRequest | None = None, with_weights: bool = True
) -> Subject:
    """Find a model and work out the method that it is to be measured under.

    Args:
        request: a method to apply; None leaves the model as it stands.
        with_weights: fetch a Hub model's weights, too.

    Raises:
        EabfError: the model, the method or their combination is refused.
    """
    source = find_model(model, revision=revision, with_weights=with_weights)
    loaded = read_config(source)
    architectures.check_supported(loaded.config)
    if request is None:
        return Subject(source=source, loaded=loaded, resolution=loaded.resolution)
    resolution = resolve_request(request, loaded)
    # It refuses a method that would find nothing to scale.
    plan_patch(architectures.meta_model(resolution.base_config), resolution)
    return Subject(source=source, loaded=loaded, resolution=resolution, is_requested=True)


def load_subject(
    subject: Subject,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a subject's weights and put its method on (other arguments as for `load_model`)."""
    model = load_model(
        subject.source.name, revision=revision, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    if subject.is_requested:
        assert subject.resolution is not None
        if describe_patch(model) is not None:
            remove_method(model)
        apply_resolution(model, subject.resolution)
    return model
