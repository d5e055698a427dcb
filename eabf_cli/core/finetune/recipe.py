"""How a model is finetuned: the paper's recipe (arXiv 2401.07004, section 4.1), scaled to the model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.option_names import check_at_least_one

OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw-8bit": "adamw_8bit", "paged-adamw-8bit": "paged_adamw_8bit"}
"""Names of the optimizers and what transformers' Trainer calls them; those in 8 bits need bitsandbytes."""

# The two sizes for which the learning rate is known: the paper's 7B and the demo model (docs/demo.md).
_PAPER = (6.7e9, 2e-5)
_DEMO = (5.4e6, 3e-4)
_DEMO_BATCH_SIZE = 4
_LORA_SCALE = 10


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Optimisation settings; the defaults are the paper's.

    AdamW with a cosine schedule and no warm-up; the last partial batch of each epoch is dropped, so that
    100 samples in batches of 32 are 6 steps in 2 epochs.

    Raises:
        InvalidConfigError: a number that makes no sense.
    """

    learning_rate: float = 2e-5
    epochs: int = 2
    batch_size: int = 32
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < 1:
            raise InvalidConfigError(f"--learning-rate must be between 0 and 1, got {self.learning_rate}; try 2e-5")
        if self.optimizer not in OPTIMIZERS:
            raise InvalidConfigError(f"unknown optimizer {self.optimizer!r}; known: {', '.join(OPTIMIZERS)}")
        check_at_least_one(self, "epochs", "batch_size")

    def num_steps(self, num_samples: int) -> int:
        """Optimizer steps for this many samples."""
        return self.epochs * (num_samples // self.batch_size)


PRESETS: dict[str, Recipe] = {
    "paper": Recipe(),
    "paper-3.5k": Recipe(batch_size=128, warmup_steps=10),
}
"""Recipes by name: what the paper trained 100 and 3,500 samples with, whatever the model."""

PRESET_NAMES = ("auto", *PRESETS)


def recipe_for(
    num_parameters: int,
    num_samples: int,
    *,
    preset: str = "auto",
    lora: bool = False,
    multiple_of: int = 1,
    **given: Any,
) -> Recipe:
    """The recipe for a model of this size; given values win.

    The preset `auto` scales the paper's: its learning rate lies on the line through the two sizes that it is known
    for (in logarithms), 3e-4 at 5.4 million parameters, 2e-5 at 6.7 billion and above, and is ten times that for
    adapters, as is usual. The paper's batch of 32 is kept from 100 million parameters on; below, batches of 4
    give a small model more steps. A batch is never larger than the samples.

    Args:
        lora: adapters are trained, not the weights themselves.
        multiple_of: samples that all devices take in one forward pass; a batch that is not given is a multiple.
        given: fields of `Recipe`; None stands for the preset's value.

    Raises:
        InvalidConfigError: an unknown preset, a value that makes no sense, or a batch larger than the samples.
    """
    if preset not in PRESET_NAMES:
        raise InvalidConfigError(f"unknown preset {preset!r}; known: {', '.join(PRESET_NAMES)}")
    given = {name: value for name, value in given.items() if value is not None}
    if preset == "auto":
        scale = _LORA_SCALE if lora else 1.0
        default_batch = Recipe.batch_size if num_parameters >= 100e6 else _DEMO_BATCH_SIZE
        scaled = {
            "learning_rate": float(f"{scale * scaled_learning_rate(num_parameters):.1e}"),
            "batch_size": max(1, min(default_batch, num_samples) // multiple_of) * multiple_of,
        }
        recipe = Recipe(**(scaled | given))
    else:
        recipe = replace(PRESETS[preset], **given)
    if recipe.batch_size > num_samples:
        raise InvalidConfigError(
            f"batch size {recipe.batch_size} is larger than the {num_samples} samples, so no step would be made: "
            "give a smaller --batch-size or more --samples"
        )
    return recipe


def scaled_learning_rate(num_parameters: int) -> float:
    """The peak learning rate for a model of this size, to two digits (see `recipe_for`)."""
    exponent = math.log(_DEMO[1] / _PAPER[1]) / math.log(_PAPER[0] / _DEMO[0])
    size = min(max(float(num_parameters), _DEMO[0]), _PAPER[0])
    return float(f"{_PAPER[1] * (_PAPER[0] / size) ** exponent:.1e}")
