"""The runs of every experiment. A cell is one model, trained on one draw of samples, and measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from variants import ABLATIONS, PUBLISHED, TUNED, Variant, factorial, tuning_variants

from eabf_cli.core.methods import METHODS

WINDOW = 512
TARGET_WINDOW = 2_048
WITHIN_TARGET = (512, 1_024, 2_048)
TWICE_TARGET = (*WITHIN_TARGET, 4_096)
NUM_SAMPLES = 100
FIRST_SEEDS = (42, 43, 44)
SEEDS = (*FIRST_SEEDS, 48, 49)
"""The results of the first were read before the others were run. 45 to 47 are those of the study's confirmation."""

DEV_SEED = 142

WANTED_HALF_WIDTH = 0.05
"""Of the 95 % interval of a share, over the trials of all seeds."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run.

    Attributes:
        name: the variant's name.
        variant: what is trained; None measures the model as it stands.
        num_samples: training samples; 0 applies the method and trains nothing.
        seed: draws the samples, their order and the prompts.
        lengths: window lengths that are measured, in tokens.
        split: the held-out documents that are measured: "test", or "dev" for every choice that is made; "books" are
            the larger model's texts.
    """

    name: str
    variant: Variant | None
    num_samples: int = NUM_SAMPLES
    seed: int
    lengths: tuple[int, ...] = TWICE_TARGET
    split: str = "test"

    @property
    def key(self) -> str:
        """Its file's name. Two experiments that need the same cell share it."""
        return f"{self.name}-{self.num_samples}-{self.split}-{self.seed}"


def extrapolation(seeds: Iterable[int] = SEEDS) -> list[Cell]:
    """Trained at four windows with 100 samples, evaluated at one to eight (the paper's Table 5)."""
    cells = [Cell(name="original", variant=None, num_samples=0, seed=seed) for seed in seeds]
    return cells + [
        Cell(name=name, variant=variant, seed=seed) for seed in seeds for name, variant in PUBLISHED.items()
    ]


def data_efficiency(seeds: Iterable[int] = SEEDS) -> list[Cell]:
    """32, 100 and 200 samples (the paper's Table 4); the runs with 100 are those of `extrapolation`."""
    return [
        Cell(name=name, variant=PUBLISHED[name], num_samples=num_samples, seed=seed, lengths=lengths)
        for seed in seeds
        for num_samples, lengths in ((32, WITHIN_TARGET), (NUM_SAMPLES, TWICE_TARGET), (200, WITHIN_TARGET))
        for name in ("yarn", "abf", "eabf")
    ]


def tuning() -> list[Cell]:
    """What each method's numbers are chosen by: one draw of samples, and documents that nothing else is measured on."""
    return [
        Cell(name=name, variant=variant, seed=DEV_SEED, split="dev")
        for method in TUNED
        for name, variant in tuning_variants(method).items()
    ]


def ablations(seeds: Iterable[int] = SEEDS) -> list[Cell]:
    """What the paper does not ablate: the exempt layers and the lower bound of the scale."""
    return [Cell(name=name, variant=variant, seed=seed) for seed in seeds for name, variant in ABLATIONS.items()]


def study() -> list[Cell]:
    """The factorial beyond the paper, on the dev split; what is a published variant shares its run."""
    published = {variant: name for name, variant in PUBLISHED.items()}
    return [
        Cell(name=published.get(variant, name), variant=variant, seed=DEV_SEED, split="dev")
        for name, variant in factorial().items()
    ]


def larger_model(seeds: Iterable[int] = FIRST_SEEDS) -> list[Cell]:
    """SmolLM2-135M-Instruct at twice its window under every method of the table, without training."""
    variants = {name: Variant(method=name, factor=2.0) for name in METHODS}
    return [
        Cell(
            name=f"smollm2-{name}",
            variant=variant,
            num_samples=0,
            seed=seed,
            lengths=(8_192, 16_384),
            split="books",
        )
        for seed in seeds
        for name, variant in ({"original": None} | variants).items()
    ]


EXPERIMENTS = {
    "extrapolation": extrapolation,
    "data-efficiency": data_efficiency,
    "tuning": tuning,
    "ablations": ablations,
    "larger-model": larger_model,
    "study": study,
}
