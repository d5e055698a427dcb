"""`eabf eval`: does a model use its long window, and is it better than what one would do otherwise?"""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from eabf_cli import options, output
from eabf_cli.core.demo import DEMO_DATASET
from eabf_cli.core.evals.compare_settings import CompareConfig
from eabf_cli.core.evals.settings import TASKS, EvalConfig, EvalRunConfig
from eabf_cli.core.evals.suites import TRUNCATION_SIDES

_TRIALS = 25
"""Of each retrieval task and length: the least that can prove 90 %."""
# Options that `EvalRunConfig` has under the same name.
_RUN_FIELDS = (
    *("revision", "dtype", "device", "seed", "trust_remote_code"),
    *("text", "dataset", "dataset_split", "output", "overwrite", "dry_run"),
)

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
        default=EvalConfig.target_tokens,
        show_default=True,
        help="Tokens of a document that the loss is taken on at each length.",
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


@click.command(name="eval")
@options.model_options
@options.optional_method_options
@text_options
@measurement_options
@verdict_options
@compare_options
@suite_options
@options.compute_options
@options.output_options
@options.common_options
@click.pass_context
def evaluate(ctx: click.Context, model: str | None, as_json: bool, **values: Any) -> None:
    """Measure what a model does with a long window.

    The loss on the same tokens with ever more context before them, perplexity by length and position, needles by
    length and depth, and the effective length; everything with its error. With --verdict, whether an extended model
    is worth it for your documents; with --compare, several methods side by side.

    \b
    Examples:
      eabf eval
      eabf eval -m extended --text mydocs/ -o measured
      eabf eval --method yarn --factor 4 --lengths 512,2048 --tasks passkey,context_gain
      eabf eval --verdict -m extended --text mydocs/
      eabf eval --compare linear,dynamic,yarn,abf,eabf --lengths 512,2048 -o compared
      eabf eval --compare yarn,eabf --finetune --seeds 3 -o compared
      eabf eval -m extended --tasks ruler --lengths 4096,16384
    """
    _check_combination(ctx, values)
    output.quiet_libraries()
    options.prepare_process(values["device"])
    run = _run_config(options.model_or_demo(model), values)
    if values["compare"] is not None:
        _compare(run, values, as_json=as_json)
    elif values["asks_verdict"]:
        ctx.exit(_judge(run, values, as_json=as_json))
    else:
        _measure(run, values, as_json=as_json)


def _run_config(model: str, values: dict[str, Any]) -> EvalRunConfig:
    comparing = values["compare"] is not None
    request = options.wanted_extension(values) if comparing else options.method_request(values)
    ours = tuple(task for task in values["tasks"] or TASKS if task in TASKS)
    evaluation = EvalConfig.with_trials(
        values["trials"],
        tasks=ours or TASKS,
        lengths=values["lengths"],
        depths=values["depths"],
        num_documents=values["num_documents"],
        target_tokens=values["target_tokens"],
        seed=values["seed"],
    )
    return EvalRunConfig(
        model=model,
        request=request,
        evaluation=evaluation,
        show_progress=output.is_interactive(),
        **{name: values[name] for name in _RUN_FIELDS},
    )


def _measure(run: EvalRunConfig, values: dict[str, Any], *, as_json: bool) -> None:
    from eabf_cli.core.evals.run import run_evaluation
    from eabf_cli.core.evals.suites import SuiteConfig

    tasks = values["tasks"] or TASKS
    others = tuple(task for task in tasks if task not in TASKS)
    suites = None
    if others:
        suites = SuiteConfig(
            tasks=others,
            lengths=values["lengths"],
            limit=values["limit"],
            batch_size=1 if values["batch_size"] is None else values["batch_size"],
            apply_chat_template=values["chat"],
            truncation_side=values["truncation_side"],
            include_path=values["task_folder"],
            show_progress=output.is_interactive(),
        )
    result = run_evaluation(run, suites=suites, has_own_tasks=len(others) < len(tasks))
    output.result(result, _text(result, is_dry_run=run.dry_run), as_json=as_json)


def _compare(run: EvalRunConfig, values: dict[str, Any], *, as_json: bool) -> None:
    from eabf_cli.core.evals.compare import compare
    from eabf_cli.core.evals.report import result_text

    datasets = values["train_dataset"]
    config = CompareConfig(
        run=run,
        methods=values["compare"],
        reference=values["reference"],
        finetune=values["finetune"],
        num_seeds=values["num_seeds"],
        samples=values["samples"],
        train_dataset=datasets or DEMO_DATASET,
        train_dataset_split=values["train_dataset_split"],
        too_long=values["too_long"],
        preset=values["preset"],
        learning_rate=values["learning_rate"],
        epochs=values["epochs"],
        batch_size=values["batch_size"],
        tuning=values["tuning"],
        resume=values["resume"],
    )
    result = compare(config)
    output.result(result, result_text(result), as_json=as_json)


def _judge(run: EvalRunConfig, values: dict[str, Any], *, as_json: bool) -> int:
    from eabf_cli.core.evals.report import result_text
    from eabf_cli.core.evals.verdict import verdict
    from eabf_cli.core.evals.verdict_settings import VerdictConfig

    lengths = values["lengths"] or (None,)
    if len(lengths) > 1:
        raise click.UsageError("--verdict takes one length in --lengths")
    result = verdict(VerdictConfig(run=run, original=values["original"], length=lengths[0]))
    output.result(result, result_text(result), as_json=as_json)
    return 0 if run.dry_run or result["verdict"]["wins"] else 1


def _check_combination(ctx: click.Context, values: dict[str, Any]) -> None:
    """Refuse flags that would have no effect."""
    comparing, judging = values["compare"] is not None, values["asks_verdict"]
    others = [task for task in values["tasks"] or () if task not in TASKS]
    for task in others:
        # What is nearly one of ours is not looked for in lm-eval, which may not be installed.
        nearest = difflib.get_close_matches(task, TASKS, n=1, cutoff=0.8)
        if nearest:
            raise click.UsageError(f"unknown task {task!r}: did you mean {nearest[0]}?")
    if comparing and judging:
        raise click.UsageError("--compare and --verdict answer different questions: give one of them")
    if comparing and values["method"] is not None:
        raise click.UsageError("--compare names the methods: leave --method out")
    if others and (comparing or judging):
        raise click.UsageError(
            f"--compare and --verdict take tasks of ours only ({', '.join(TASKS)}), not {', '.join(others)}"
        )
    belongs = {
        "--verdict": (judging, ("original",)),
        "--compare": (
            comparing,
            ("finetune", "reference", "num_seeds", "samples", "train_dataset", "train_dataset_split", "resume"),
        ),
        "--finetune": (
            values["finetune"],
            (
                "samples",
                "train_dataset",
                "train_dataset_split",
                "too_long",
                "preset",
                "learning_rate",
                "epochs",
                "tuning",
            ),
        ),
        "tasks of lm-eval in --tasks": (bool(others), ("limit", "chat", "truncation_side", "task_folder")),
        "tasks of lm-eval in --tasks, or --finetune": (bool(others) or values["finetune"], ("batch_size",)),
    }
    flags = {option.name: max(option.opts, key=len) for option in ctx.command.params}
    for owner, (is_there, names) in belongs.items():
        given = [flags[name] for name in names if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
        if given and not is_there:
            raise click.UsageError(f"{', '.join(given)} belongs to {owner}, which is not given")


def _text(result: dict[str, Any], *, is_dry_run: bool) -> str:
    from eabf_cli.core.evals.run import result_table

    lines = [_model_text(result)]
    if is_dry_run:
        memory = result["memory"]
        lengths = ", ".join(f"{length:,}" for length in result["lengths"])
        time = "" if result["expected_s"] is None else f", roughly {math.ceil(result['expected_s'] / 60):,} min"
        return "\n".join(
            [
                *lines,
                *result["notes"],
                f"Lengths {lengths}; about {memory['total_gib']:.1f} GiB on {result['device']} "
                f"({result['available_gib']:.1f} GiB available){time}",
                "Nothing was measured (--dry-run).",
            ]
        )
    lines += ["", result_table(result), ""]
    speed = f", {result['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in result else ""
    lines.append(f"{result['wall_s']:.1f} s{speed}, {result['peak_memory_gib']:.1f} GiB")
    if result["output"] is not None:
        lines.append(f"Written to {result['output']}")
    return "\n".join(lines)


def _model_text(result: dict[str, Any]) -> str:
    if result["method"] is None:
        how = "as it stands"
    else:
        factor = "" if result["factor"] is None else f" x {result['factor']:g}"
        how = f"under {result['method']}{factor}"
    window = f"pre-trained window {result['original_max_position_embeddings']:,}"
    if result["max_position_embeddings"] != result["original_max_position_embeddings"]:
        window += f", window {result['max_position_embeddings']:,}"
    dataset = "" if result["dataset"] is None else f"; {result['dataset']}"
    return f"{result['model']} {how}, {window}{dataset}"
