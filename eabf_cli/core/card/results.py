"""The card's tables of what was measured, and the same as `model-index` metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from eabf_cli.core.card.markdown import code, table
from eabf_cli.core.errors import CheckpointError
from eabf_cli.core.evals.table import Column, measured_columns, measured_models
from eabf_cli.core.run_record import RUN_FILE

NOT_MEASURED = "No evaluation was run on this checkpoint."
_EXPLANATION = (
    "The same prompts and texts for every row: perplexity of the end of held-out documents; the loss of the same "
    "tokens with more and more of the text before them visible; and the share of prompts whose answer, decoded "
    "greedily, is exactly right. *Patched* is the method without training."
)
_CONTROL = "*Control* is the same training on the same tokens cut to the old window, without the method."
_TRAINING_KEYS = {"dataset", "num_samples", "num_tokens", "num_steps", "tuning", "seed", "train_loss"}
_COMPAT_MODELS = {"as_trained": "as trained", "compat": "this checkpoint"}
# Metric of the Hub and title in the table; the loss by context has no metric there.
_METRICS = {
    "perplexity": "perplexity",
    "passkey": "accuracy",
    "unseen needles": "accuracy",
    "repeated span": "accuracy",
}


@dataclass(frozen=True, kw_only=True)
class RunResults:
    """What a run's record tells.

    Attributes:
        training: what the model was trained on, in a sentence; empty where it was not.
        columns: the measurements of all its models.
        finetuned: those of the model that the checkpoint holds.
    """

    training: str = ""
    columns: tuple[Column, ...] = ()
    finetuned: tuple[Column, ...] = ()


def read_run(run: Mapping[str, Any] | None) -> RunResults:
    """Read the record of what made a checkpoint.

    Args:
        run: result of `finetune`, as `eabf_run.json` has it; another command's record, or None, tells nothing.

    Raises:
        CheckpointError: a finetune's record that cannot be read.
    """
    if run is None or not run.keys() >= _TRAINING_KEYS:
        return RunResults()
    try:
        models = measured_models(run)
        finetuned = {name: result for name, result in models.items() if name == "finetuned"}
        return RunResults(
            training=_training_text(run),
            columns=tuple(measured_columns(models)),
            finetuned=tuple(measured_columns(finetuned)),
        )
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"the results of the finetune in {RUN_FILE} cannot be read ({type(error).__name__}: {error}): the file was "
            "damaged; without it the model card says nothing of the training"
        ) from error


def results_section(results: RunResults, *, left_out: bool = False) -> str:
    """What a run measured; empty for another form of a model that was not trained.

    Args:
        left_out: the checkpoint has another form than the models that were measured (`compat_section` has its own).
    """
    parts = ["## Evaluation", *([results.training] if results.training else [])]
    if not results.columns:
        parts += [] if left_out else [NOT_MEASURED]
        return "\n\n".join(parts) if len(parts) > 1 else ""
    explanation = f"{_EXPLANATION} {_CONTROL}" if "control" in results.columns[0].cells else _EXPLANATION
    if left_out:
        explanation += " These are figures of the model as it was trained, not of this form of it."
    return "\n\n".join([*parts, explanation, *map(_markdown, results.columns)])


def compat_section(compat: Mapping[str, Any]) -> str:
    """What the form for other software costs against the model as it was trained.

    Args:
        compat: result of `measure_compat`.
    """
    return "\n\n".join(
        [
            "## What this form costs",
            f"The model has a scale on its attention logits that this form, `{compat['method']}`, "
            f"{'follows in steps' if compat['method'] == 'native' else 'does not have'}. {compat['summary']}",
            *map(_markdown, measured_columns({shown: compat[name] for name, shown in _COMPAT_MODELS.items()})),
        ]
    )


def checkpoint_columns(results: RunResults, compat: Mapping[str, Any] | None) -> tuple[Column, ...]:
    """The measurements of the very checkpoint that the card is of."""
    return results.finetuned if compat is None else tuple(measured_columns({"this checkpoint": compat["compat"]}))


def eval_results(columns: Sequence[Column]) -> list[EvalResult]:
    """One model's measurements as entries of the card's `model-index`."""
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type="eabf-cli",
            dataset_name="eabf-cli: held-out documents and retrieval prompts",
            metric_type=_METRICS[column.title],
            metric_name=f"{column.title} at {length:,} tokens",
            metric_value=round(value, 4),
        )
        for column in columns
        if column.title in _METRICS
        for values in column.values.values()
        for length, value in sorted(values.items())
        if value is not None
    ]


def _training_text(run: Mapping[str, Any]) -> str:
    shown = [code(_shown_dataset(name)) for name in trained_datasets(run)]
    return (
        f"Finetuned on {run['num_samples']} samples of {', '.join(shown)} "
        f"({run['num_tokens']:,} tokens, {run['num_steps']} steps, {run['tuning']}, seed {run['seed']})."
    )


def trained_datasets(run: Mapping[str, Any]) -> list[str]:
    """The names of what a model was trained on, one or several."""
    names = run["dataset"]
    return list(map(str, names)) if isinstance(names, list) else [str(names)]


def _shown_dataset(name: str) -> str:
    # A path on the machine that trained it means nothing to a reader.
    return Path(name).name if Path(name).is_absolute() or name.startswith((".", "~")) else name


def _markdown(column: Column) -> str:
    rows = [(name, *cells) for name, cells in column.cells.items()]
    return table((column.title, *column.headers), rows)
