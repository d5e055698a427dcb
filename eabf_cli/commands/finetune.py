"""`eabf finetune`: extend a model on a few long samples and prove it."""

from __future__ import annotations

from typing import Any, get_args

import click

from eabf_cli import options, output
from eabf_cli.core.data import NUM_SAMPLES, DataConfig, TooLong
from eabf_cli.core.demo import DEMO_DATASET
from eabf_cli.core.recipe import Recipe


@click.command()
@options.model_options
@options.method_options
@click.option(
    "--dataset",
    multiple=True,
    metavar="DATA",
    help="JSONL (text, messages or conversations), text files, a folder of them, or a Hub dataset; repeatable.  "
    f"[default: {DEMO_DATASET}]",
)
@click.option("--dataset-split", metavar="NAME", help="Split of a Hub dataset.  [default: train]")
@click.option("--samples", type=int, default=NUM_SAMPLES, show_default=True, help="How many samples to train on.")
@click.option(
    "--too-long",
    type=click.Choice(get_args(TooLong)),
    default=DataConfig.too_long,
    show_default=True,
    help="What to do with samples longer than the target window.",
)
@click.option("--learning-rate", type=float, help="Peak learning rate.  [default: by the model's size]")
@click.option("--epochs", type=int, help=f"Passes over the samples.  [default: {Recipe.epochs}]")
@click.option("--batch-size", type=int, help="Samples per step.  [default: 32; 4 below 100M parameters]")
@click.option("--eval/--no-eval", "evaluated", default=True, show_default=True, help="Measure before and after.")
@click.option("--lengths", type=options.IntegerList(), metavar="LIST", help="Lengths to measure at, in tokens.")
@click.option(
    "--control/--no-control",
    default=False,
    show_default=True,
    help="Also train on the same samples cut to the original window.",
)
@click.option("--resume", is_flag=True, help="Go on with the unfinished run in -o.")
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
    """
    output.quiet_libraries()
    from eabf_cli.core.evaluation import EvalConfig
    from eabf_cli.core.finetuning import FinetuneConfig, comparison_table
    from eabf_cli.core.finetuning import finetune as run

    request = options.method_request(values)
    lengths, evaluated, dataset = values.pop("lengths"), values.pop("evaluated"), values.pop("dataset")
    evaluation = EvalConfig.quick(lengths=lengths, seed=values["seed"]) if evaluated else None
    config = FinetuneConfig(
        model=options.model_or_demo(model),
        request=request,
        dataset=(dataset if len(dataset) > 1 else dataset[0]) if dataset else DEMO_DATASET,
        evaluation=evaluation,
        show_progress=output.is_interactive(),
        **values,
    )
    if not dataset:
        output.status(f"No --dataset given: using the demo data {DEMO_DATASET}. Name your own with --dataset FILE.")
    result = run(config)
    for message in result["notes"]:
        output.warn(message)
    output.result(result, _text(result, comparison_table(result), config.dry_run), as_json=as_json)


def _text(result: dict[str, Any], table: str, dry_run: bool) -> str:
    tokens = result["tokens_per_sample"]
    lines = [
        f"{result['model']}: {result['method']}, window {result['original_max_position_embeddings']:,} -> "
        f"{result['max_position_embeddings']:,} tokens, rope_theta {result['rope_theta']:,.0f} "
        f"({result['theta_reason']})",
        f"{result['num_samples']} samples of {tokens['min']:,} to {tokens['max']:,} tokens "
        f"(median {tokens['median']:,}) from {result['dataset']}, {result['num_steps']} steps",
    ]
    if dry_run:
        return "\n".join([*lines, f"Would be written to {result['output']} (--dry-run)."])
    lines.append(
        f"loss {result['train_loss'][0]:.3f} -> {result['train_loss'][-1]:.3f}, "
        f"{result['tokens_per_s']:,.0f} tokens/s, {result['wall_s']:.0f} s in all, "
        f"{result['peak_memory_gib']:.1f} GiB"
    )
    if table:
        lines += ["", table, ""]
    return "\n".join([*lines, f"Written to {result['output']}"])
