"""`RopeScalingConfig`: which method extends a model's window, by how much, and from what."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.methods import METHODS, Method, get_method

FORMAT = 1
MAX_FACTOR = 1024.0
# Far more than any model has, and exact in every float.
MAX_WINDOW = 2**40
THETA_RULES = ("paper", "auto")


@dataclass(frozen=True, kw_only=True)
class RopeScalingConfig:
    """A method of the table with its numbers.

    A field that is None is filled in from the model when the method is applied (`resolve_scaling`).

    Attributes:
        method: name (or alias) of an entry of `METHODS`.
        factor: target window divided by the pre-trained window; greater than 1.
        original_max_position_embeddings: the pre-trained window c, in tokens.
        rope_theta: the base frequency: a number, "paper" (500,000) or "auto" (critical-dimension rule).
        original_rope_theta: the base frequency before the method.
        unscaled_layers: layers whose attention logits keep their scale (0 and 1 in the paper).

    Raises:
        InvalidConfigError: an unknown method, a factor that extends nothing, or a malformed field.
    """

    method: str = "eabf"
    factor: float = 4.0
    original_max_position_embeddings: int | None = None
    rope_theta: float | str | None = None
    original_rope_theta: float | None = None
    unscaled_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        # A frozen dataclass: normalised values go in through object.__setattr__.
        object.__setattr__(self, "method", get_method(self.method).name)
        object.__setattr__(self, "factor", _checked_factor(self.factor))
        original = self.original_max_position_embeddings
        if original is not None:
            object.__setattr__(self, "original_max_position_embeddings", _checked_window(original))
            _checked_window(round(self.factor * self.original_max_position_embeddings))  # type: ignore[operator]
        object.__setattr__(self, "rope_theta", _checked_theta(self.rope_theta, self.method))
        if self.original_rope_theta is not None:
            object.__setattr__(
                self, "original_rope_theta", _checked_number("original_rope_theta", self.original_rope_theta)
            )
        if self.unscaled_layers is not None:
            object.__setattr__(self, "unscaled_layers", _checked_layers(self.unscaled_layers))

    @property
    def entry(self) -> Method:
        """The method's entry in the table."""
        return METHODS[self.method]

    @property
    def max_position_embeddings(self) -> int:
        """The extended window in tokens: factor x the original window, rounded."""
        if self.original_max_position_embeddings is None:
            raise InvalidConfigError("the original window is not known yet: resolve the config against a model")
        return round(self.factor * self.original_max_position_embeddings)

    def to_dict(self) -> dict[str, Any]:
        """The Hugging Face `rope_scaling` form of this config (docs/method.md)."""
        scaling: dict[str, Any] = {"rope_type": self.method, "type": self.method, "factor": self.factor}
        for name in ("original_max_position_embeddings", "original_rope_theta", "rope_theta"):
            if getattr(self, name) is not None:
                scaling[name] = getattr(self, name)
        if self.unscaled_layers is not None:
            scaling["unscaled_layers"] = list(self.unscaled_layers)
        return scaling | {"format": FORMAT}

    @classmethod
    def from_dict(cls, scaling: Mapping[str, Any]) -> RopeScalingConfig:
        """Read the Hugging Face form, `{"type": "eabf", "factor": 4}` at the least.

        Raises:
            InvalidConfigError: no type, no factor, a newer format, or a key that is not known.
        """
        if not isinstance(scaling, Mapping):
            raise InvalidConfigError(f"rope_scaling must be a dictionary, got {scaling!r}")
        known = {field.name for field in fields(cls)} - {"method"}
        values = {name: value for name, value in scaling.items() if name in known}
        unknown = sorted(set(scaling) - known - {"rope_type", "type", "format"})
        if unknown:
            raise InvalidConfigError(f"rope_scaling has unknown keys: {', '.join(unknown)}")
        if scaling.get("format", FORMAT) != FORMAT:
            raise InvalidConfigError(
                f"rope_scaling is of format {scaling['format']!r}, this version of eabf reads {FORMAT}: upgrade eabf"
            )
        kinds = [scaling[key] for key in ("rope_type", "type") if key in scaling]
        if not kinds or kinds[0] != kinds[-1]:
            raise InvalidConfigError(
                f"rope_scaling must name one type, got {kinds or 'none'}; known: {', '.join(METHODS)}"
            )
        if "factor" not in scaling:
            raise InvalidConfigError('rope_scaling has no factor; expected e.g. {"type": "eabf", "factor": 4}')
        return cls(method=kinds[0], **values)

    def replace(self, **changes: Any) -> RopeScalingConfig:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)

    def __str__(self) -> str:
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return ", ".join(f"{name}={value}" for name, value in given.items())


def choose_factor(factor: float | None, max_length: int | None, original_max_position_embeddings: int) -> float:
    """The factor meant by `--factor` and `--max-length` (either gives the other; neither: the default).

    Raises:
        InvalidConfigError: a factor or length that extends nothing, or both given and at odds with the window.
    """
    if factor is not None:
        factor = _checked_factor(factor)
    if max_length is None:
        return RopeScalingConfig.factor if factor is None else factor
    if max_length <= original_max_position_embeddings:
        raise InvalidConfigError(
            f"max length {max_length:,} does not extend the model's window of "
            f"{original_max_position_embeddings:,} tokens: give a larger --max-length"
        )
    if factor is not None and round(factor * original_max_position_embeddings) != max_length:
        raise InvalidConfigError(
            f"factor {factor:g} x the model's window {original_max_position_embeddings:,} = "
            f"{round(factor * original_max_position_embeddings):,} tokens, but max length says {max_length:,}: "
            "give one of --factor and --max-length, or correct the window with --original-length"
        )
    return _checked_factor(max_length / original_max_position_embeddings)


def _is_real(value: Any) -> bool:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    # Not isfinite: it fails on an integer that no float holds.
    return is_number and bool(abs(value) <= sys.float_info.max)


def _checked_number(name: str, value: Any) -> float:
    if not _is_real(value) or value <= 1:
        raise InvalidConfigError(f"{name} must be a number greater than 1, got {value!r}")
    return float(value)


def _checked_factor(factor: Any) -> float:
    if not _is_real(factor):
        raise InvalidConfigError(f"factor must be a number, got {factor!r}; for example 4")
    if factor <= 1:
        raise InvalidConfigError(f"factor must be greater than 1 to extend the window, got {factor:g}; for example 4")
    if factor > MAX_FACTOR:
        raise InvalidConfigError(f"factor {factor:g} is beyond {MAX_FACTOR:g}, the largest accepted; for example 4")
    return float(factor)


def _checked_window(window: Any) -> int:
    is_whole = isinstance(window, Integral) and not isinstance(window, bool)
    if not is_whole or window < 2:
        raise InvalidConfigError(
            f"original_max_position_embeddings must be a whole number of at least 2 tokens, got {window!r}"
        )
    if window > MAX_WINDOW:
        raise InvalidConfigError(
            f"original_max_position_embeddings is at most {MAX_WINDOW:,} tokens, "
            f"got a number of {len(str(window))} digits"
        )
    return int(window)


def _checked_theta(theta: Any, method: str) -> float | str | None:
    if theta is None:
        return None
    if isinstance(theta, str):
        if theta not in THETA_RULES:
            raise InvalidConfigError(f"rope_theta must be a number, 'paper' or 'auto', got {theta!r}")
        if not METHODS[method].raises_theta:
            raise InvalidConfigError(
                f"method {method!r} sets rope_theta by its own rule, so rope_theta={theta!r} has no meaning; "
                f"methods with a free rope_theta: {', '.join(m.name for m in METHODS.values() if m.raises_theta)}"
            )
        return theta
    return _checked_number("rope_theta", theta)


def _checked_layers(layers: Any) -> tuple[int, ...]:
    if not isinstance(layers, Iterable):
        raise InvalidConfigError(f"unscaled_layers must be a list of layer numbers, got {layers!r}")
    for layer in layers:
        if not isinstance(layer, Integral) or isinstance(layer, bool) or layer < 0:
            raise InvalidConfigError(f"unscaled_layers must be layer numbers from 0, got {layer!r}")
    return tuple(sorted({int(layer) for layer in layers}))
