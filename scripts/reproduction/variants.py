"""What a model is trained under: a method with its numbers, and the training's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

FACTOR = 4.0


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to extend and train the model.

    Attributes:
        method: an entry of the table of methods, or of the study's own (`study_methods`).
        factor: target window over the original one, as the method is told; the samples stay as long as they are.
        rope_theta: the base frequency, or the rule that chooses it; None takes the method's own.
        unscaled_layers: layers whose logits are not scaled; None takes the method's own.
        learning_rate: None takes the recipe's.
        loss: "plain", "restoration" (`RestorationConfig`, on every micro-batch) or "longce" (`longce`).
    """

    method: str
    factor: float = FACTOR
    rope_theta: float | str | None = None
    unscaled_layers: tuple[int, ...] | None = None
    learning_rate: float | None = None
    loss: str = "plain"


PUBLISHED: dict[str, Variant] = {
    "linear": Variant(method="linear"),
    "ntk-by-parts": Variant(method="ntk-by-parts"),
    "yarn": Variant(method="yarn"),
    "abf": Variant(method="abf"),
    "eabf": Variant(method="eabf"),
    "eabf-released": Variant(method="eabf", unscaled_layers=()),
}
"""The methods that the paper compares, with the numbers of their papers; EABF also as its code runs it."""

TUNED: dict[str, dict[str, tuple[float, ...]]] = {
    "linear": {"learning_rate": (1e-4, 1e-3), "factor": (6.0, 8.0)},
    "ntk-by-parts": {"learning_rate": (1e-4, 1e-3), "factor": (6.0, 8.0)},
    "yarn": {"learning_rate": (1e-4, 1e-3), "factor": (6.0, 8.0)},
    # The critical-dimension rule's base for the target window, and the double of the paper's.
    "abf": {"learning_rate": (1e-4, 1e-3), "rope_theta": (182_000.0, 1_000_000.0)},
    "eabf": {"learning_rate": (1e-4, 1e-3), "rope_theta": (182_000.0, 1_000_000.0)},
}
"""What each method may change, and to what: two numbers beside the published one, for the learning rate and for the
method's own number, so that every method has the same budget of four runs. The chosen numbers are then put together."""


def tuning_variants(method: str) -> dict[str, Variant]:
    """The published variant and those with one number changed, by their names."""
    published = PUBLISHED[method]
    changed: dict[str, Any] = {
        f"{method}-{field}-{value:g}": replace(published, **{field: value})
        for field, values in TUNED[method].items()
        for value in values
    }
    return {method: published} | changed


ABLATIONS: dict[str, Variant] = {
    "eabf": PUBLISHED["eabf"],
    "eabf-released": PUBLISHED["eabf-released"],
    "eabf-first-exempt": Variant(method="eabf", unscaled_layers=(0,)),
    "eabf-last-two-exempt": Variant(method="eabf", unscaled_layers=(4, 5)),
    "eabf-last-two-alone": Variant(method="eabf", unscaled_layers=(0, 1, 2, 3)),
    "eabf-unbounded": Variant(method="abf+unbounded", unscaled_layers=(0, 1)),
}
"""Which of the six layers are exempt, and t(i) = ln i / ln c without the lower bound of 1."""

GAIN_LEARNING_RATE = 1e-2
"""Of the learned gains: a few steps of the weights' own rate would not move them."""

LONGCE_MAX_WEIGHT = 5.0
"""gamma, the bound of LongCE's paper (arXiv 2410.23771)."""

MEASURED_THETA = 125_000.0
"""What `eabf entropy --suggest` finds for the demo model (docs/entropy.md)."""

FREQUENCIES = ("abf", "abf-measured", "parts")
SCALES = ("none", "eabf", "positional")
LOSSES = ("plain", "restoration")
_METHODS = {("abf", "none"): "abf", ("abf", "eabf"): "eabf", ("parts", "none"): "ntk-by-parts"}


def factor_name(frequencies: str, scale: str, loss: str) -> str:
    """The name of a variant of the study."""
    return f"{frequencies}+{scale}+{loss}"


def study_variant(frequencies: str, scale: str, loss: str) -> Variant:
    """A combination of frequencies, scale (on all layers) and loss."""
    pair = (frequencies.removesuffix("-measured"), scale)
    return Variant(
        method=_METHODS.get(pair, "+".join(pair)),
        rope_theta=MEASURED_THETA if frequencies == "abf-measured" else None,
        unscaled_layers=None if scale == "none" else (),
        loss=loss,
    )


def factorial() -> dict[str, Variant]:
    """Every frequency with every scale and every loss; a learned scale and LongCE where they may add to the others."""
    combinations = [(f, s, loss) for f in FREQUENCIES for s in SCALES for loss in LOSSES]
    combinations += [(f, "learned", "plain") for f in ("abf-measured", "parts")]
    combinations += [(f, "eabf" if f == "abf-measured" else "positional", "longce") for f in ("abf-measured", "parts")]
    return {factor_name(*combination): study_variant(*combination) for combination in combinations}
