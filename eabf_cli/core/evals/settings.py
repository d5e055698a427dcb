"""What an evaluation measures, and on how much. Options read this module, so it imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from eabf_cli.core.demo import DEMO_MODEL
from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.method_request import MethodRequest

TASKS = (
    "perplexity",
    "context_gain",
    "perplexity_by_position",
    "passkey",
    "needles",
    "multi_key",
    "variable_tracking",
    "repeated_span",
)
QUICK_TASKS = ("perplexity", "context_gain", "passkey", "needles", "repeated_span")
"""What `eabf finetune` measures before and after training."""

MOST_DEPTHS = 20
"""So many keys there are for the texts of `multi_key`, one for each depth."""

_QUESTIONS_PER_NEEDLE_PROMPT = 5
# What a user of the command line gave.
_OPTIONS = {"num_documents": "--documents (num_documents)", "target_tokens": "--target-tokens (target_tokens)"}
_SPANS_PER_PROMPT = 4


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What to measure, at which lengths, on how much.

    Attributes:
        tasks: any of `TASKS`.
        lengths: window lengths in tokens, BOS counted; None takes half the original window, the original
            window and its doublings up to twice the target window.
        num_passkey_trials: passkey prompts per length, spread evenly over the depths.
        depths: where the passkey, and the keys of `multi_key`, stand: 0 (beginning) to 1 (end).
        num_needle_prompts: prompts per length that ask for a fact of each held-out template.
        num_multi_key_texts: texts per length with a key at every depth, each asked for.
        num_tracking_prompts: prompts per length with chains of variables to follow.
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
    num_multi_key_texts: int = 10
    num_tracking_prompts: int = 10
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
                f"--tasks must be of {', '.join(TASKS)}, got {', '.join(map(repr, unknown)) or 'none'}"
            )
        if self.lengths is not None and (not self.lengths or min(self.lengths) < 4):
            raise InvalidConfigError(f"--lengths must be of at least 4 tokens each, got {listed(self.lengths)}")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise InvalidConfigError(f"--depths must be between 0 and 1, got {listed(self.depths)}")
        if len(set(self.depths)) < len(self.depths):
            raise InvalidConfigError(f"--depths must differ, got {listed(self.depths)}")
        if "multi_key" in self.tasks and len(self.depths) > MOST_DEPTHS:
            raise InvalidConfigError(f"multi_key takes {MOST_DEPTHS} depths at most, got {len(self.depths)}")
        for name in (
            "num_passkey_trials",
            "num_needle_prompts",
            "num_multi_key_texts",
            "num_tracking_prompts",
            "num_span_prompts",
            "num_documents",
            "target_tokens",
            "batch_tokens",
        ):
            if getattr(self, name) < 1:
                told = _OPTIONS.get(name, name)
                raise InvalidConfigError(f"{told} must be at least 1, got {getattr(self, name)}")

    @classmethod
    def quick(cls, **changes: Any) -> EvalConfig:
        """Sizes for a first answer, as `eabf finetune` wants it before and after training."""
        sizes: dict[str, Any] = {
            "tasks": QUICK_TASKS,
            "num_passkey_trials": 15,
            "num_needle_prompts": 4,
            "num_span_prompts": 4,
            "num_documents": 24,
        }
        return cls(**(sizes | changes))

    @classmethod
    def with_trials(cls, num_trials: int, **changes: Any) -> EvalConfig:
        """About so many answers per length and retrieval task; several may be asked for in one prompt.

        Raises:
            InvalidConfigError: fewer than one.
        """
        if num_trials < 1:
            raise InvalidConfigError(f"--trials must be at least 1, got {num_trials}")
        num_depths = len(changes.get("depths", cls.depths))
        sizes: dict[str, Any] = {
            "num_passkey_trials": num_trials,
            "num_needle_prompts": math.ceil(num_trials / _QUESTIONS_PER_NEEDLE_PROMPT),
            "num_multi_key_texts": math.ceil(num_trials / max(1, num_depths)),
            "num_tracking_prompts": math.ceil(num_trials / _QUESTIONS_PER_NEEDLE_PROMPT),
            "num_span_prompts": math.ceil(num_trials / _SPANS_PER_PROMPT),
        }
        return cls(**(sizes | changes))

    def replace(self, **changes: Any) -> EvalConfig:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)


def listed(numbers: Sequence[float]) -> str:
    """Numbers for a message."""
    return ", ".join(f"{number:g}" for number in numbers)


@dataclass(frozen=True, kw_only=True)
class EvalRunConfig:
    """Which model `eabf eval` measures, on which text, and where the result goes.

    Attributes:
        request: a method to apply first; None measures the model as it stands.
        text: files or folders; each file is a document (PDF, HTML, Markdown or plain text).
        dataset: more documents: JSONL or other files, a folder, a Hub dataset, `pg19` or `proof-pile`. With neither
            `text` nor `dataset`, the held-out documents of `demo-long`.
        dataset_split: split of a Hub dataset.
        evaluation: what is measured; its lengths and documents are filled in where they are None.
        output: folder for the result; None writes nothing.
        dry_run: choose the lengths and estimate memory, and stop there.

    Raises:
        InvalidConfigError: documents are given twice.
    """

    model: str = DEMO_MODEL
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 42
    trust_remote_code: bool = False
    request: MethodRequest | None = None
    text: tuple[str | Path, ...] = ()
    dataset: tuple[str | Path, ...] = ()
    dataset_split: str | None = None
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    output: Path | None = None
    overwrite: bool = False
    dry_run: bool = False
    show_progress: bool = False

    def __post_init__(self) -> None:
        if self.evaluation.documents is not None and (self.text or self.dataset):
            raise InvalidConfigError("documents are given as texts and as files: give one of them")
