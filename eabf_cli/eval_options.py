"""The options of `eabf eval`, and in which of its runs each has an effect."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from eabf_cli import options, output
from eabf_cli.core.demo import DEMO_DATASET
from eabf_cli.core.evals.compare_settings import CompareConfig
from eabf_cli.core.evals.evaluation_rows import RETRIEVAL_TASKS
from eabf_cli.core.evals.settings import TASKS, EvalConfig
from eabf_cli.core.evals.suites import TRUNCATION_SIDES
from eabf_cli.core.evals.verdict_settings import VerdictConfig

_TRIALS = 25
"""Of each retrieval task and length: the least that can prove 90 %."""
_DEPTH_TASKS = ("passkey", "multi_key")
_TARGET_TASKS = ("perplexity", "context_gain")
# A passkey stands in sentences of its own; all other tasks take their text from documents.
_TEXT_TASKS = tuple(task for task in TASKS if task != "passkey")

text_options = options.bundle(
    click.option(
        "--text",
        multiple=True,
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="A document (PDF, HTML, Markdown, text), or a folder of them; repeatable.",
    ),
    click.option(
        "--dataset",
        multiple=True,
        metavar="DATA",
        help="Documents in JSONL or Parquet, a Hub dataset, pg19, or proof-pile; repeatable.  "
        f"[default: held-out documents of {DEMO_DATASET}]",
    ),
    click.option("--dataset-split", metavar="NAME", help="Split of a Hub dataset.  [default: train; test of pg19]"),
    click.option(
        "--documents",
        "num_documents",
        type=int,
        default=EvalConfig.num_documents,
        show_default=True,
        help="How many documents to measure on at most, the longest first.",
    ),
)
measurement_options = options.bundle(
    click.option(
        "--lengths",
        type=options.IntegerList(),
        metavar="LIST",
        help="Lengths in tokens.  [default: 1/4 to 8 pre-trained windows, as memory and time allow]",
    ),
    click.option(
        "--tasks",
        type=options.NameList(),
        metavar="LIST",
        help=f"Of {', '.join(TASKS)}; or of lm-eval (ruler, longbench, ...; paper, short).  [default: all of ours]",
    ),
    click.option(
        "--trials",
        type=int,
        default=_TRIALS,
        show_default=True,
        help="Questions for each retrieval task and length.",
    ),
    click.option(
        "--depths",
        type=options.NumberList(),
        default=",".join(f"{depth:g}" for depth in EvalConfig.depths),
        show_default=True,
        metavar="LIST",
        help="Where needles stand, 0 (beginning) to 1 (end).",
    ),
    click.option(
        "--target-tokens",
        type=int,
        help="Tokens of a document that the loss is taken on at each length, or with --verdict of a stretch.  "
        f"[default: {EvalConfig.target_tokens}; {VerdictConfig.target_tokens} with --verdict]",
    ),
)
verdict_options = options.bundle(
    click.option(
        "--verdict",
        "asks_verdict",
        is_flag=True,
        help="Compare with the original model on its window, on retrieved chunks, and under YaRN.",
    ),
    click.option("--original", metavar="ID_OR_PATH", help="The model before it was extended.  [default: as recorded]"),
)
compare_options = options.bundle(
    click.option("--compare", type=options.NameList(), metavar="LIST", help="Methods to compare on this model."),
    click.option("--reference", metavar="METHOD", help="The method that the others are tested against."),
    click.option("--finetune", is_flag=True, help="With --compare: finetune under each method, and two controls."),
    click.option(
        "--seeds",
        "num_seeds",
        type=int,
        default=CompareConfig.num_seeds,
        show_default=True,
        help="How often the training samples are drawn.",
    ),
    click.option(
        "--samples", type=int, default=CompareConfig.samples, show_default=True, help="Samples to finetune on."
    ),
    click.option(
        "--train-dataset", multiple=True, metavar="DATA", help=f"Where they are from.  [default: {DEMO_DATASET}]"
    ),
    click.option("--train-dataset-split", metavar="NAME", help="Split of a Hub dataset.  [default: train]"),
    options.too_long_option,
    options.preset_option,
    options.learning_rate_option,
    options.epochs_option,
    options.tuning_option,
    click.option("--resume", is_flag=True, help="Go on with the unfinished comparison in -o."),
)
suite_options = options.bundle(
    click.option("--limit", type=int, help="Samples of each task of lm-eval at most.  [default: all]"),
    click.option(
        "--batch-size",
        type=int,
        help="Inputs of lm-eval in a forward pass, or with --finetune samples per step.  "
        "[default: 1, or that of eabf finetune]",
    ),
    click.option("--chat", is_flag=True, help="Ask lm-eval's questions in the form of a chat."),
    click.option(
        "--truncation-side",
        type=click.Choice(TRUNCATION_SIDES),
        help="Where lm-eval's inputs are cut.  [default: the middle for LongBench, the left for all others]",
    ),
    click.option(
        "--task-folder", type=click.Path(path_type=Path), metavar="DIR", help="Task files of lm-eval of one's own."
    ),
)


@dataclass(frozen=True)
class Asked:
    """What a command line asks for.

    Attributes:
        values: of all options.
        own: tasks of ours that are measured; none for a verdict, or where only tasks of lm-eval are named.
        suites: tasks of lm-eval.
    """

    values: Mapping[str, Any]
    own: tuple[str, ...]
    suites: tuple[str, ...]

    @property
    def judges(self) -> bool:
        """A verdict is asked for."""
        return bool(self.values["asks_verdict"])

    @property
    def compares(self) -> bool:
        """A comparison is asked for."""
        return self.values["compare"] is not None

    @property
    def finetunes(self) -> bool:
        """A comparison after training."""
        return self.compares and bool(self.values["finetune"])

    def measures(self, tasks: tuple[str, ...]) -> bool:
        """At least one of these tasks of ours is measured."""
        return not set(self.own).isdisjoint(tasks)

    @property
    def told(self) -> str:
        """The flags that say what is done, for a message."""
        tasks = self.values["tasks"]
        flags = [
            *["--verdict"] * self.judges,
            *["--compare"] * self.compares,
            *["--finetune"] * self.finetunes,
            *([] if tasks is None else [f"--tasks {','.join(tasks)}"]),
        ]
        return f"with {' '.join(flags)}" if flags else "without"


@dataclass(frozen=True)
class Use:
    """What some options belong to. An option that stands in several rows belongs to all of them.

    Attributes:
        owner: what it is, in words.
        names: of the options' values.
        is_asked: whether a command line asks for it.
        sizes_tasks: the options size some tasks of ours; beside others of ours they are idle, but no mistake.
    """

    owner: str
    names: tuple[str, ...]
    is_asked: Callable[[Asked], bool]
    sizes_tasks: bool = False


USES = (
    Use("--verdict", ("original",), lambda asked: asked.judges),
    Use(
        "--compare",
        ("finetune", "reference", "num_seeds", "samples", "train_dataset", "train_dataset_split", "resume"),
        lambda asked: asked.compares,
    ),
    Use(
        "--finetune",
        (
            *("samples", "train_dataset", "train_dataset_split", "too_long"),
            *("preset", "learning_rate", "epochs", "tuning"),
        ),
        lambda asked: asked.finetunes,
    ),
    Use(
        "tasks of lm-eval in --tasks",
        ("limit", "chat", "truncation_side", "task_folder"),
        lambda asked: bool(asked.suites),
    ),
    Use(
        "tasks of lm-eval in --tasks, or --finetune",
        ("batch_size",),
        lambda asked: bool(asked.suites) or asked.finetunes,
    ),
    Use("a measurement or --compare", ("tasks",), lambda asked: not asked.judges),
    # A verdict and a comparison have words of their own for --method.
    Use(
        "a method or --compare",
        tuple(name for name in options.METHOD_FIELDS if name != "method"),
        lambda asked: asked.compares or asked.values["method"] is not None,
    ),
    Use(
        f"retrieval tasks ({', '.join(RETRIEVAL_TASKS)})",
        ("trials",),
        lambda asked: asked.measures(RETRIEVAL_TASKS),
        sizes_tasks=True,
    ),
    Use(" and ".join(_DEPTH_TASKS), ("depths",), lambda asked: asked.measures(_DEPTH_TASKS), sizes_tasks=True),
    Use(
        f"{', '.join(_TARGET_TASKS)}, or --verdict",
        ("target_tokens",),
        lambda asked: asked.judges or asked.measures(_TARGET_TASKS),
        sizes_tasks=True,
    ),
    Use(
        "tasks of ours that read documents (all but passkey), or --verdict",
        ("text", "dataset", "num_documents"),
        lambda asked: asked.judges or asked.measures(_TEXT_TASKS),
        sizes_tasks=True,
    ),
    Use("--dataset", ("dataset_split",), lambda asked: bool(asked.values["dataset"])),
)
"""Options that are in no row have an effect in every run."""


def what_is_asked(values: Mapping[str, Any]) -> Asked:
    """What a command line asks for.

    Raises:
        click.UsageError: a combination that has no meaning, or a task that is nearly one of ours.
    """
    tasks = values["tasks"] or TASKS
    own = tuple(task for task in tasks if task in TASKS)
    suites = tuple(task for task in tasks if task not in TASKS)
    asked = Asked(values, own=() if values["asks_verdict"] else own, suites=suites)
    for task in suites:
        # What is nearly one of ours is not looked for in lm-eval, which may not be installed.
        nearest = difflib.get_close_matches(task, TASKS, n=1, cutoff=0.8)
        if nearest:
            raise click.UsageError(f"unknown task {task!r}: did you mean {nearest[0]}?")
    if asked.compares and asked.judges:
        raise click.UsageError("--compare and --verdict answer different questions: give one of them")
    if asked.compares and values["method"] is not None:
        raise click.UsageError("--compare names the methods: leave --method out")
    if asked.judges and values["method"] is not None:
        raise click.UsageError(
            "--verdict is about an extended model as it stands: leave --method out, or write the extended model first "
            "(eabf patch)"
        )
    if asked.judges and len(values["lengths"] or ()) > 1:
        raise click.UsageError("--verdict takes one length in --lengths")
    if asked.compares and suites:
        raise click.UsageError(
            f"--compare takes tasks of ours only in --tasks ({', '.join(TASKS)}), not {', '.join(suites)}"
        )
    return asked


def check_uses(ctx: click.Context, asked: Asked) -> None:
    """Refuse flags that would have no effect. A settings file may hold more than one run needs.

    Raises:
        click.UsageError: it names them and what they belong to.
    """
    for use in USES:
        given = options.typed_flags(ctx, use.names)
        if not given or use.is_asked(asked):
            continue
        told = f"{', '.join(given)} belongs to {use.owner}: it has no effect {asked.told}"
        if not (use.sizes_tasks and asked.own):
            raise click.UsageError(told)
        output.warn(told)
