"""What `eabf eval --compare` is asked for. Options read this module, so it imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from eabf_cli.core.data.samples import NUM_SAMPLES, DataConfig, TooLong
from eabf_cli.core.demo import DEMO_DATASET
from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.evals.settings import EvalRunConfig
from eabf_cli.core.evals.statistics import CONFIDENCE, NUM_RESAMPLES, check_statistics
from eabf_cli.core.methods import get_method

DEFAULT_REFERENCE = "eabf"


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """One model under several methods, measured on the same text and prompts.

    Attributes:
        run: the model (an unscaled one), the text and what is measured. Of `run.request` the numbers count, which all
            methods share: a base is given to the methods whose base is free, unscaled layers to those that scale
            logits. Without factor and maximal length, the target window is the longest of `run.evaluation.lengths`;
            without lengths, these are half the pre-trained window, the window and its doublings up to twice the
            target window.
        methods: names or aliases of the table; each is compared with `reference`.
        reference: the method that the others are tested against; None takes `eabf` if it is among them, else the
            first.
        finetune: finetune the model under each method on the same samples by the same recipe, and beside them the
            two controls without a method.
        num_seeds: how often samples are drawn and all is trained; the seeds are `run.seed`, `run.seed` + 1, ...
        train_dataset, train_dataset_split, samples, too_long: the training samples (`FinetuneConfig`).
        preset, learning_rate, epochs, batch_size, tuning: the recipe (`FinetuneConfig`).
        num_resamples: bootstrap resamples.
        confidence: of the intervals.
        resume: go on with the unfinished comparison in `run.output`.

    Raises:
        InvalidConfigError: no method, an unknown one, or a combination without meaning.
    """

    run: EvalRunConfig = field(default_factory=EvalRunConfig)
    methods: tuple[str, ...]
    reference: str | None = None
    finetune: bool = False
    num_seeds: int = 1
    train_dataset: str | Path | tuple[str, ...] = DEMO_DATASET
    train_dataset_split: str | None = None
    samples: int = NUM_SAMPLES
    too_long: TooLong = DataConfig.too_long
    preset: str = "auto"
    learning_rate: float | None = None
    epochs: int | None = None
    batch_size: int | None = None
    tuning: str = "auto"
    num_resamples: int = NUM_RESAMPLES
    confidence: float = CONFIDENCE
    resume: bool = False

    def __post_init__(self) -> None:
        if not self.methods:
            raise InvalidConfigError("a comparison needs methods: name some, for example yarn,eabf")
        names = tuple(dict.fromkeys(get_method(name).name for name in self.methods))
        object.__setattr__(self, "methods", names)
        if self.reference is not None:
            object.__setattr__(self, "reference", get_method(self.reference).name)
            if self.reference not in names:
                raise InvalidConfigError(
                    f"--reference {self.reference!r} is not among the methods compared: {', '.join(names)}"
                )
        if self.num_seeds < 1:
            raise InvalidConfigError(f"--seeds (num_seeds) must be at least 1, got {self.num_seeds}")
        if self.num_seeds > 1 and not self.finetune:
            raise InvalidConfigError(
                f"{self.num_seeds} seeds draw the training samples anew, and nothing is trained: "
                "give --finetune too, or leave --seeds out (more --trials make an untrained comparison more certain)"
            )
        if self.resume and self.run.output is None:
            raise InvalidConfigError("--resume goes on with a comparison in a folder: name it with -o")
        if self.resume and self.run.overwrite:
            raise InvalidConfigError(
                "--resume keeps what was measured and --overwrite throws it away: give one of them"
            )
        check_statistics(self.num_resamples, self.confidence)

    @property
    def reference_method(self) -> str:
        """The method that the others are tested against."""
        if self.reference is not None:
            return self.reference
        return DEFAULT_REFERENCE if DEFAULT_REFERENCE in self.methods else self.methods[0]

    @property
    def train_source(self) -> str | Path | tuple[str, ...]:
        """The training data; of a list of one, that one."""
        names = self.train_dataset
        return names[0] if isinstance(names, tuple) and len(names) == 1 else names

    @property
    def seeds(self) -> tuple[int, ...]:
        """What the training samples are drawn by."""
        return tuple(range(self.run.seed, self.run.seed + self.num_seeds))
