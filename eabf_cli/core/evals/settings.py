"""What an evaluation measures, and on how much. Options read this module, so it imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from eabf_cli.core.errors import InvalidConfigError

TASKS = ("perplexity", "context_gain", "passkey", "needles", "repeated_span")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What to measure, at which lengths, on how much.

    Attributes:
        tasks: any of `TASKS`.
        lengths: window lengths in tokens, BOS counted; None takes half the original window, the original
            window and its doublings up to twice the target window.
        num_passkey_trials: passkey prompts per length, spread evenly over the depths.
        depths: where the passkey stands, 0 (beginning) to 1 (end).
        num_needle_prompts: prompts per length that ask for a fact of each held-out template.
        num_span_prompts: prompts per length with four repeated random spans each.
        num_documents: documents for the losses at most, the longest first.
        target_tokens: tokens scored per document and length, at most half the length.
        documents: texts for the losses and for the filler; None takes the held-out part of `demo-long`.
        seed: decides the prompts.
        batch_tokens: tokens in a forward pass, unless one row has more.

    Raises:
        InvalidConfigError: an unknown task or a number that makes no sense.
    """

    tasks: tuple[str, ...] = TASKS
    lengths: tuple[int, ...] | None = None
    num_passkey_trials: int = 50
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    num_needle_prompts: int = 10
    num_span_prompts: int = 10
    num_documents: int = 16
    target_tokens: int = 256
    documents: tuple[str, ...] | None = None
    seed: int = 42
    batch_tokens: int = 4096

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            raise InvalidConfigError(
                f"tasks must be of {', '.join(TASKS)}, got {', '.join(map(repr, unknown)) or 'none'}"
            )
        if self.lengths is not None and (not self.lengths or min(self.lengths) < 4):
            raise InvalidConfigError(f"lengths must be numbers of at least 4 tokens, got {self.lengths}")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise InvalidConfigError(f"depths must be between 0 and 1, got {self.depths}")
        for name in (
            "num_passkey_trials",
            "num_needle_prompts",
            "num_span_prompts",
            "num_documents",
            "target_tokens",
            "batch_tokens",
        ):
            if getattr(self, name) < 1:
                raise InvalidConfigError(f"{name} must be at least 1, got {getattr(self, name)}")

    @classmethod
    def quick(cls, **changes: Any) -> EvalConfig:
        """Sizes for a first answer, as `eabf finetune` wants it before and after training."""
        sizes = {"num_passkey_trials": 15, "num_needle_prompts": 4, "num_span_prompts": 4, "num_documents": 24}
        return cls(**(sizes | changes))

    def replace(self, **changes: Any) -> EvalConfig:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)
