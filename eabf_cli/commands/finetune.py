"""`eabf finetune`: extend a model on a few long samples and prove it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import click

from eabf_cli import options, output
from eabf_cli.core.data.samples import NUM_SAMPLES, DataConfig, TooShort
from eabf_cli.core.demo import DEMO_DATASET
from eabf_cli.core.errors import EabfError
from eabf_cli.core.finetune.recipe import OPTIMIZERS
from eabf_cli.core.finetune.settings import LoraSettings, RestorationConfig, TrainSettings
from eabf_cli.core.processes import is_main_process, is_to_tell

data_options = options.bundle(
    click.option(
        "--dataset",
        multiple=True,
        metavar="DATA",
        help="JSONL or Parquet (text, messages or conversations), text or PDF files, a folder of them, or a Hub "
        f"dataset; repeatable.  [default: {DEMO_DATASET}]",
    ),
    click.option("--dataset-split", metavar="NAME", help="Split of a Hub dataset.  [default: train]"),
    click.option("--samples", type=int, default=NUM_SAMPLES, show_default=True, help="How many samples to train on."),
    options.too_long_option,
    click.option(
        "--too-short",
        type=click.Choice(get_args(TooShort)),
        default=DataConfig.too_short,
        show_default=True,
        help="What to do with samples that the original window holds.",
    ),
    click.option("--pack", is_flag=True, help="Several short samples in one row, without attention across them."),
    click.option(
        "--pose", is_flag=True, help="Rows of the original window, with positions of the target window (PoSE)."
    ),
)
recipe_options = options.bundle(
    options.preset_option,
    options.learning_rate_option,
    options.epochs_option,
    click.option(
        "--batch-size", type=int, help="Samples per step, over all devices.  [default: 32; 4 below 100M parameters]"
    ),
    click.option(
        "--micro-batch-size",
        type=int,
        default=TrainSettings.micro_batch_size,
        show_default=True,
        help="Samples per forward pass and device.",
    ),
    click.option("--optimizer", type=click.Choice(list(OPTIMIZERS)), help="[default: adamw]"),
    click.option("--restore-weight", type=float, help="Weight of a loss that keeps short answers as they were."),
    click.option(
        "--restore-share",
        type=float,
        default=RestorationConfig.share,
        show_default=True,
        help="Part of the forward passes that have it.",
    ),
)
tuning_options = options.bundle(
    options.tuning_option,
    click.option("--lora-rank", type=int, default=LoraSettings.rank, show_default=True, help="Rank of the adapters."),
    click.option("--lora-alpha", type=float, help="Scale of the adapters.  [default: twice the rank]"),
    click.option("--train-embeddings", is_flag=True, help="Train the embeddings beside adapters and norms."),
    click.option(
        "--merge/--no-merge", default=True, show_default=True, help="Write merged weights, or only the adapter."
    ),
    click.option(
        "--activation-checkpointing/--no-activation-checkpointing",
        default=None,
        help="Compute layers twice to save memory.  [default: for rows above 4,096 tokens or 50M parameters]",
    ),
    click.option(
        "--fused-kernels/--no-fused-kernels",
        default=None,
        help="Norms and MLPs by Liger's kernels.  [default: on a GPU that has them, for rows above 4,096 tokens]",
    ),
)
run_options = options.bundle(
    click.option("--eval/--no-eval", "evaluated", default=True, show_default=True, help="Measure before and after."),
    click.option("--lengths", type=options.IntegerList(), metavar="LIST", help="Lengths to measure at, in tokens."),
    click.option(
        "--control/--no-control",
        default=False,
        show_default=True,
        help="Also train on the same samples cut to the original window.",
    ),
    click.option("--save-steps", type=int, help="A checkpoint every so many steps.  [default: five in a run]"),
    click.option("--resume", is_flag=True, help="Go on with the unfinished run in -o."),
    click.option("--report-to", multiple=True, metavar="NAME", help="tensorboard, wandb, trackio, ...; repeatable."),
    click.option("--probe", is_flag=True, help="With --dry-run: make two real steps, and measure memory and time."),
)


@click.command()
@options.model_options
@options.method_options
@data_options
@recipe_options
@tuning_options
@run_options
@options.compute_options
@options.output_options
@options.common_options
def finetune(model: str | None, as_json: bool, **values: Any) -> None:
    """Extend a model's window and finetune it on a few long samples.

    Measures perplexity and retrieval before and after, at and beyond the original window, and writes a
    checkpoint that carries its scaling.

    \b
    Examples:
      eabf finetune --samples 100 --factor 4
      eabf finetune --samples 100 --factor 4 --control --json > result.json
      eabf finetune -m HuggingFaceTB/SmolLM2-135M --dataset chats.jsonl --factor 2 -o smollm2-16k
      eabf finetune -m meta-llama/Llama-2-7b-chat-hf --dataset chats.jsonl --preset paper --dry-run
      torchrun --nproc-per-node 8 -m eabf_cli finetune -m MODEL --dataset chats.jsonl -o extended
    """
    _refuse_without_effect(values)
    # Libraries print where results go: trackers when they begin and end, DeepSpeed with the compilers that it starts.
    with output.prints_on_stderr():
        result = _run(model, values)
    if not is_main_process():
        return
    from eabf_cli.core.finetune.run import comparison_table

    for message in (*result["notes"], *result["data_notes"]):
        output.warn(message)
    output.result(result, _text(result, comparison_table(result), values["dry_run"]), as_json=as_json)


def _run(model: str | None, values: dict[str, Any]) -> dict[str, Any]:
    """The result of `finetune` with the options as they were given; exits where another process tells the error."""
    output.quiet_libraries()
    options.prepare_process(values["device"])
    from eabf_cli.core.evaluation import EvalConfig
    from eabf_cli.core.finetune.run import FinetuneConfig
    from eabf_cli.core.finetune.run import finetune as run

    request = options.method_request(values)
    lengths, evaluated, dataset = values.pop("lengths"), values.pop("evaluated"), values.pop("dataset")
    config = FinetuneConfig(
        model=options.model_or_demo(model),
        request=request,
        dataset=(dataset if len(dataset) > 1 else dataset[0]) if dataset else DEMO_DATASET,
        evaluation=EvalConfig.quick(lengths=lengths, seed=values["seed"]) if evaluated else None,
        lora=_lora_settings(values),
        restoration=_restoration(values),
        show_progress=output.is_interactive(),
        **values,
    )
    if not dataset:
        output.status(f"No --dataset given: using the demo data {DEMO_DATASET}. Name your own with --dataset FILE.")
    try:
        return run(config)
    except EabfError as error:
        if is_to_tell(str(error)):
            raise
        click.get_current_context().exit(1)


def _refuse_without_effect(values: Mapping[str, Any]) -> None:
    """Refuse options that would change nothing beside the others.

    Raises:
        click.UsageError: one is given.
    """
    context = click.get_current_context()
    if options.typed_flags(context, ["restore_share"]) and not values["restore_weight"]:
        raise click.UsageError("--restore-share belongs to --restore-weight, which is not given")
    adapters = options.typed_flags(context, ["lora_rank", "lora_alpha", "train_embeddings", "merge"])
    if adapters and values["tuning"] == "full":
        raise click.UsageError(f"{', '.join(adapters)} belongs to --tuning lora and qlora: full trains every weight")
    if options.typed_flags(context, ["lengths"]) and not values["evaluated"]:
        raise click.UsageError("--lengths says where to measure, and --no-eval measures nothing: leave one out")
    rows = options.typed_flags(context, ["pack", "pose"])
    if options.typed_flags(context, ["too_short"]) and rows:
        raise click.UsageError(f"--too-short has no effect with {rows[0]}, which takes samples of any length")


def _lora_settings(values: dict[str, Any]) -> LoraSettings:
    rank, alpha = values.pop("lora_rank"), values.pop("lora_alpha")
    return LoraSettings(
        rank=rank,
        alpha=2.0 * rank if alpha is None else alpha,
        train_embeddings=values.pop("train_embeddings"),
    )


def _restoration(values: dict[str, Any]) -> RestorationConfig | None:
    weight, share = values.pop("restore_weight"), values.pop("restore_share")
    return None if weight is None else RestorationConfig(weight=weight, share=share)


def _text(result: dict[str, Any], table: str, dry_run: bool) -> str:
    lines = [
        f"{result['model']}: {result['method']}, window {result['original_max_position_embeddings']:,} -> "
        f"{result['max_position_embeddings']:,} tokens, rope_theta {result['rope_theta']:,.0f} "
        f"({result['theta_reason']})",
        _data_text(result),
        f"tuning {result['tuning']} ({result['tuning_reason']})",
    ]
    if dry_run:
        return "\n".join([*lines, *_plan_text(result)])
    lines.append(
        f"loss {result['train_loss'][0]:.3f} -> {result['train_loss'][-1]:.3f}, "
        f"{result['tokens_per_s']:,.0f} tokens/s, {result['wall_s']:.0f} s in all, "
        f"{result['peak_memory_gib']:.1f} GiB"
    )
    if table:
        lines += ["", table, ""]
    return "\n".join([*lines, f"Written to {result['output']}", *_next_commands(result)])


def _data_text(result: dict[str, Any]) -> str:
    tokens = result["tokens_per_sample"]
    dataset = result["dataset"] if isinstance(result["dataset"], str) else ", ".join(result["dataset"])
    rows = f" in {result['num_rows']} rows" if result["num_rows"] != result["num_samples"] else ""
    return (
        f"{result['num_samples']} samples of {tokens['min']:,} to {tokens['max']:,} tokens "
        f"(median {tokens['median']:,}) from {dataset}{rows}, {result['num_steps']} steps"
    )


def _plan_text(result: dict[str, Any]) -> list[str]:
    """The lines that only a dry run has."""
    from eabf_cli.core.finetune.memory_plan import format_plan

    recipe = result["recipe"]
    lines = [
        f"{result['num_tokens']:,} tokens, learning rate {recipe['learning_rate']:g}, batches of "
        f"{recipe['batch_size']}, {recipe['optimizer']}, "
        f"layers {'computed twice' if result['settings']['activation_checkpointing'] else 'kept'}"
        f"{', fused kernels' if result['settings']['fused_kernels'] else ''}",
        "",
        "Tokens in a sample",
        *(f"{bin['from']:>9,} to {bin['to']:>9,}  {bin['count']:>5}" for bin in result["length_histogram"]),
        "",
        format_plan(result["memory"]),
        "",
    ]
    if "probe" in result:
        probe = result["probe"]
        lines.append(
            f"Measured in two steps at {probe['seq_len']:,} tokens: {probe['peak_memory_gib']:.2f} GiB, "
            f"{probe['seconds_per_step']:.1f} s a step; training would take about {probe['expected_s']:,.0f} s"
        )
        of_lengths = result["memory"]["tunings"][result["tuning"]]["lengths_gib"]
        if of_lengths >= 0.01:
            lines.append(f"Rows of different lengths take up to {of_lengths:.2f} GiB more, which this did not see.")
        lines.append("")
    return [*lines, f"Would be written to {result['output']} (--dry-run)."]


def _next_commands(result: dict[str, Any]) -> list[str]:
    """What to do with the result, as far as there are commands for it."""
    known = click.get_current_context().find_root().command
    commands = {
        "eval": f"eabf eval -m {result['output']}",
        "summarize": f"eabf summarize -m {result['output']} paper.pdf",
        "export": f"eabf export {result['output']} --to-hub OWNER/NAME",
    }
    return [f"Next: {line}" for name, line in commands.items() if name in getattr(known, "commands", {})]
