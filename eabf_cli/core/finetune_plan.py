"""What a finetune run will do, worked out before any weight is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from eabf_cli.core import architectures
from eabf_cli.core.checkpoint import load_tokenizer, read_config
from eabf_cli.core.checkpoint_format import check_can_save
from eabf_cli.core.data import NUM_SAMPLES, DataConfig, SampleSet, TooLong, load_samples
from eabf_cli.core.demo import DEMO_DATASET, DEMO_MODEL
from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.evaluation import EvalConfig
from eabf_cli.core.patch_checkpoint import MethodRequest, default_output, resolve_request
from eabf_cli.core.recipe import Recipe, recipe_for
from eabf_cli.core.report import PatchReport, plan_patch
from eabf_cli.core.resolution import Resolution
from eabf_cli.core.sources import ModelSource, find_model


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Arguments of `eabf finetune`.

    Attributes:
        request: the method and its numbers.
        samples: how many samples to train on.
        too_long: what happens to a sample longer than the target window (`DataConfig.too_long`).
        learning_rate, epochs, batch_size: None takes the recipe's value for the model's size.
        dtype: "auto" trains float32 weights, under bfloat16 autocast where the hardware has it.
        evaluation: what is measured before and after; None measures nothing.
        control: also train on the same tokens cut to the original window, without a method.
    """

    model: str = DEMO_MODEL
    revision: str | None = None
    request: MethodRequest = field(default_factory=MethodRequest)
    dataset: str | Path | tuple[str, ...] = DEMO_DATASET
    dataset_split: str | None = None
    samples: int = NUM_SAMPLES
    too_long: TooLong = DataConfig.too_long
    learning_rate: float | None = None
    epochs: int | None = None
    batch_size: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    seed: int = 42
    evaluation: EvalConfig | None = field(default_factory=EvalConfig.quick)
    control: bool = False
    output: Path | None = None
    overwrite: bool = False
    resume: bool = False
    dry_run: bool = False
    show_progress: bool = False


@dataclass(frozen=True, kw_only=True)
class FinetuneTarget:
    """The model that a run extends, and its folder."""

    source: ModelSource
    resolution: Resolution
    report: PatchReport
    num_parameters: int
    folder: Path


@dataclass(frozen=True, kw_only=True)
class FinetunePlan(FinetuneTarget):
    """What a run will do, known before any weight is loaded."""

    samples: SampleSet
    recipe: Recipe
    tokenizer: Any


def find_target(config: FinetuneConfig) -> FinetuneTarget:
    """Find the model and work out its extension and the run's folder.

    Raises:
        EabfError: the model, the method or their combination is refused.
    """
    source = find_model(config.model, revision=config.revision, with_weights=not config.dry_run)
    loaded = read_config(source)
    resolution = resolve_request(config.request, loaded)
    if config.request.rebase and resolution.notes:
        raise InvalidConfigError(
            f"{source.name} is scaled already, and finetune starts from an unscaled model: give -m the original model"
        )
    skeleton = architectures.meta_model(resolution.base_config)
    report = plan_patch(skeleton, resolution)
    check_can_save(resolution.base_config, resolution.scaling)
    return FinetuneTarget(
        source=source,
        resolution=resolution,
        report=report,
        num_parameters=skeleton.num_parameters(),
        folder=config.output or default_output(source.name, resolution.scaling),
    )


def make_plan(config: FinetuneConfig, target: FinetuneTarget) -> FinetunePlan:
    """Draw the samples and choose the recipe.

    Raises:
        EabfError: the data or the recipe makes no sense.
    """
    tokenizer = load_tokenizer(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)
    samples = load_samples(
        DataConfig(
            dataset=config.dataset,
            dataset_split=config.dataset_split,
            num_samples=config.samples,
            max_length=target.resolution.scaling.max_position_embeddings,
            too_long=config.too_long,
            seed=config.seed,
        ),
        tokenizer,
    )
    recipe = recipe_for(
        target.num_parameters,
        len(samples),
        learning_rate=config.learning_rate,
        epochs=config.epochs,
        batch_size=config.batch_size,
    )
    return FinetunePlan(**vars(target), samples=samples, recipe=recipe, tokenizer=tokenizer)


def planned_result(config: FinetuneConfig, plan: FinetunePlan) -> dict[str, Any]:
    """What `--dry-run` shows: the keys of a result that are known before the run."""
    num_steps = plan.recipe.num_steps(len(plan.samples))
    return plan.report.to_dict() | {
        "model": plan.source.name,
        "dataset": str(config.dataset),
        **plan.samples.summary(),
        "num_steps": num_steps,
        "num_tokens": round(num_steps * plan.recipe.batch_size * plan.samples.num_tokens / len(plan.samples)),
        "recipe": asdict(plan.recipe),
        "num_parameters": plan.num_parameters,
        "tuning": "full",
        "output": str(plan.folder),
    }
