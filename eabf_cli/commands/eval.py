"""`eabf eval`: does a model use its long window, and is it better than what one would do otherwise?"""

from __future__ import annotations

from typing import Any

import click

from eabf_cli import eval_options, options, output
from eabf_cli.core.demo import DEMO_DATASET
from eabf_cli.core.evals.compare_settings import CompareConfig
from eabf_cli.core.evals.settings import EvalConfig, EvalRunConfig
from eabf_cli.eval_options import Asked

# Options that `EvalRunConfig` has under the same name.
_RUN_FIELDS = (
    *("revision", "dtype", "device", "seed", "trust_remote_code"),
    *("text", "dataset", "dataset_split", "output", "overwrite", "dry_run"),
)


@click.command(name="eval")
@options.model_options
@options.optional_method_options
@eval_options.text_options
@eval_options.measurement_options
@eval_options.verdict_options
@eval_options.compare_options
@eval_options.suite_options
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
    asked = eval_options.what_is_asked(values)
    eval_options.check_uses(ctx, asked)
    request = options.wanted_extension(values) if asked.compares else options.method_request(dict(values))
    output.quiet_libraries()
    options.prepare_process(values["device"])
    run = EvalRunConfig(
        model=options.model_or_demo(model),
        request=request,
        evaluation=_evaluation(asked),
        show_progress=output.is_interactive(),
        **{name: values[name] for name in _RUN_FIELDS},
    )
    if asked.compares:
        _compare(run, values, as_json=as_json)
    elif asked.judges:
        ctx.exit(_judge(run, values, as_json=as_json))
    else:
        _measure(run, asked, as_json=as_json)


def _evaluation(asked: Asked) -> EvalConfig:
    values, target_tokens = asked.values, asked.values["target_tokens"]
    if asked.judges:
        return EvalConfig(num_documents=values["num_documents"], seed=values["seed"])
    if not asked.own:
        return EvalConfig(lengths=values["lengths"])
    return EvalConfig.with_trials(
        values["trials"],
        tasks=asked.own,
        lengths=values["lengths"],
        depths=values["depths"],
        num_documents=values["num_documents"],
        target_tokens=EvalConfig.target_tokens if target_tokens is None else target_tokens,
        seed=values["seed"],
    )


def _measure(run: EvalRunConfig, asked: Asked, *, as_json: bool) -> None:
    from eabf_cli.core.evals.run import run_evaluation
    from eabf_cli.core.evals.suites import SuiteConfig

    values = asked.values
    suites = None
    if asked.suites:
        suites = SuiteConfig(
            tasks=asked.suites,
            lengths=values["lengths"],
            limit=values["limit"],
            batch_size=1 if values["batch_size"] is None else values["batch_size"],
            apply_chat_template=values["chat"],
            truncation_side=values["truncation_side"],
            include_path=values["task_folder"],
            show_progress=output.is_interactive(),
        )
    result = run_evaluation(run, suites=suites, has_own_tasks=bool(asked.own))
    output.result(result, _text(result, is_dry_run=run.dry_run), as_json=as_json)


def _compare(run: EvalRunConfig, values: dict[str, Any], *, as_json: bool) -> None:
    # What training imports prints where results go.
    with output.prints_on_stderr():
        result = _compared(run, values)
    from eabf_cli.core.evals.report import result_text

    output.result(result, result_text(result), as_json=as_json)


def _compared(run: EvalRunConfig, values: dict[str, Any]) -> dict[str, Any]:
    from eabf_cli.core.evals.compare import compare

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
    return compare(config)


def _judge(run: EvalRunConfig, values: dict[str, Any], *, as_json: bool) -> int:
    from eabf_cli.core.evals.report import result_text
    from eabf_cli.core.evals.verdict import verdict
    from eabf_cli.core.evals.verdict_settings import VerdictConfig

    (length,) = values["lengths"] or (None,)
    target_tokens = values["target_tokens"]
    config = VerdictConfig(
        run=run,
        original=values["original"],
        length=length,
        target_tokens=VerdictConfig.target_tokens if target_tokens is None else target_tokens,
    )
    result = verdict(config)
    output.result(result, result_text(result), as_json=as_json)
    return 0 if run.dry_run or result["verdict"]["wins"] else 1


def _text(result: dict[str, Any], *, is_dry_run: bool) -> str:
    from eabf_cli.core.evals.run import result_table

    lines = [_model_text(result)]
    if is_dry_run:
        from eabf_cli.core.evals.report import needs_text

        lengths = ", ".join(f"{length:,}" for length in result["lengths"])
        return "\n".join(
            [
                *lines,
                *result["notes"],
                f"Tasks {', '.join(result['tasks'])}",
                f"Lengths {lengths}; {needs_text(result)}",
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
