"""`eabf entropy`: measure a model's attention entropy, and see which layers the method should leave alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from eabf_cli import options, output
from eabf_cli.core.demo import DEMO_DATASET
from eabf_cli.core.entropy.positions import NUM_POSITIONS
from eabf_cli.core.entropy.settings import SUGGESTION_FILE, EntropyConfig


class Positions(click.ParamType):
    """The text form of a rule for positions; a settings file may give a list of numbers."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


document_options = options.bundle(
    click.option(
        "--text",
        multiple=True,
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="A text or PDF file (.txt, .md, .pdf), one document; repeatable.",
    ),
    click.option(
        "--dataset",
        multiple=True,
        metavar="DATA",
        help="JSONL or other files, a folder of them, or a Hub dataset; repeatable.  "
        f"[default: held-out documents of {DEMO_DATASET}]",
    ),
    click.option("--dataset-split", metavar="NAME", help="Split of a Hub dataset.  [default: train]"),
    click.option(
        "--documents",
        "num_documents",
        type=int,
        default=EntropyConfig.num_documents,
        show_default=True,
        help="How many documents to measure at most.",
    ),
    click.option(
        "--length",
        type=int,
        metavar="TOKENS",
        help="Tokens of each document; shorter ones are skipped.  "
        "[default: up to 4 times the pre-trained window, as far as the documents reach]",
    ),
)
measurement_options = options.bundle(
    click.option(
        "--positions",
        type=Positions(),
        default=EntropyConfig.positions,
        show_default=True,
        metavar="LIST|log[:N]|linear[:N]|all",
        help=f"Query positions, counted from 1; log and linear space {NUM_POSITIONS} of them, or N.",
    ),
    click.option(
        "--scores", is_flag=True, help="Also measure where attention goes: first tokens, last ones, distance."
    ),
    click.option("--rows", is_flag=True, help="Also keep the first document's attention rows (rows.safetensors)."),
    click.option("--compare", metavar="ID_OR_PATH", help="A second model to measure on the same documents."),
    click.option(
        "--suggest",
        is_flag=True,
        help="Also search for better settings than the default for --factor, and confirm them on other text.",
    ),
    click.option("--resume", is_flag=True, help="Go on with the unfinished measurement for -o."),
)


@click.command()
@options.model_options
@options.optional_method_options
@document_options
@measurement_options
@options.compute_options
@options.output_options
@options.common_options
def entropy(model: str | None, as_json: bool, **values: Any) -> None:
    """Measure a model's attention entropy, and find the layers to leave unscaled.

    The entropy of every layer's and head's attention distribution is averaged over documents. Layers in which it
    keeps rising with the context are those that the paper exempts from the logit scale. With -o, the numbers,
    pictures and a report are written to a folder.

    \b
    Examples:
      eabf entropy
      eabf entropy --length 2048 --positions linear:32 -o diagnosis
      eabf entropy -m HuggingFaceTB/SmolLM2-135M --text book.pdf --length 16384 -o smollm2
      eabf entropy --suggest --factor 4 -o diagnosis
      eabf entropy -m extended --compare HuggingFaceTB/SmolLM2-135M --text book.pdf
    """
    output.quiet_libraries()
    options.prepare_process(values["device"])
    from eabf_cli.core.entropy.run import compute_attention_entropy

    suggest = options.wanted_extension(values) if values.pop("suggest") else None
    # A factor alone says what to search for, and the model is measured as it stands.
    request = None if suggest is not None and values["method"] is None else options.method_request(values)
    config = EntropyConfig(
        model=options.model_or_demo(model),
        request=request,
        suggest=suggest,
        show_progress=output.is_interactive(),
        **{name: value for name, value in values.items() if name not in options.METHOD_FIELDS},
    )
    result = compute_attention_entropy(config)
    output.result(result, _text(result), as_json=as_json)


def _text(result: dict[str, Any]) -> str:
    from eabf_cli.core.entropy.documents import count_documents

    lines = [
        f"{_model_text(result)}; {count_documents(result['num_documents'])} of {result['length']:,} tokens "
        f"from {result['dataset']}"
    ]
    if "memory" in result:
        memory = result["memory"]
        return "\n".join(
            [
                *lines,
                *result["notes"],
                f"{len(result['positions']):,} positions, about {memory['total_gib']:.1f} GiB on {result['device']} "
                f"({memory['available_gib']:.1f} GiB available)",
                "Nothing was measured (--dry-run).",
            ]
        )
    lines += ["", *_table(result), ""]
    if result["drift"] is not None:
        lines.append(_drift(result))
    if "compare" in result:
        lines.append(
            f"Compared with {_model_text(result['compare'])}: difference = that model's entropy minus this one's"
        )
        if result["compare"]["drift"] is not None:
            lines.append(_drift(result["compare"]))
    lines += _suggestion(result)
    lines.append(
        f"{result['wall_s']:.1f} s"
        + (f", {result['tokens_per_s']:,.0f} tokens/s" if result["tokens_per_s"] else "")
        + f", {result['peak_memory_gib']:.1f} GiB"
    )
    if result["output"] is not None:
        lines.append(f"Written to {result['output']}")
    return "\n".join(lines)


def _model_text(result: dict[str, Any]) -> str:
    window = f"pre-trained window {result['original_max_position_embeddings']:,}"
    if result["method"] is None:
        return f"{result['model']} as it stands, {window}"
    factor = "" if result["factor"] is None else f" x {result['factor']:g}"
    return f"{result['model']} under {result['method']}{factor}, {window}"


def _table(result: dict[str, Any]) -> list[str]:
    """A row for each layer: its entropy averaged over heads at three positions, its slope, whether it is exempt."""
    shown = _shown_positions(result)
    positions = [result["positions"][index] for index in shown]
    header = ["layer", "attention", *(f"H at {position:,}" for position in positions), "slope in ln n", "exempt"]
    if "compare" in result:
        header.append(f"difference at {positions[-1]:,}")
    rows = [header]
    for layer, heads in zip(result["layers"], result["entropy"], strict=True):
        kind = layer["kind"].replace("_", " ").replace("rope", "RoPE") + (", scaled" if layer["scaled"] else "")
        row = [str(layer["index"]), kind, *(f"{_mean(heads, index):.2f}" for index in shown)]
        row += [_slope(layer), "yes" if layer["rises"] else "-"]
        if "compare" in result:
            row.append(f"{_mean(result['compare']['difference'][layer['index']], shown[-1]):+.2f}")
        rows.append(row)
    bounds = [f"{math.log(position):.2f}" for position in positions]
    rows.append(["ln n", "", *bounds, "1.00", *[""] * (len(header) - len(bounds) - 3)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _shown_positions(result: dict[str, Any]) -> list[int]:
    """Indices of three positions, fewer if no more were measured: where the slope begins and ends, and the last."""
    start, end = result["slope_range"]
    last = result["length"]
    wanted = (start, end, last) if last > end else (start, round((start * end) ** 0.5), end)
    positions = result["positions"]
    return sorted({min(range(len(positions)), key=lambda index: abs(positions[index] - place)) for place in wanted})


def _slope(layer: dict[str, Any]) -> str:
    if layer["slope"] is None:
        return "-"
    return f"{layer['slope']:.2f}" + ("" if layer["slope_stderr"] is None else f" ± {layer['slope_stderr']:.2f}")


def _drift(part: dict[str, Any]) -> str:
    drift = part["drift"]
    return (
        f"Beyond the pre-trained window, from {drift['from']:,} to {drift['to']:,} tokens, mean entropy changes by "
        f"{drift['nats']:+.2f} nats"
    )


def _suggestion(result: dict[str, Any]) -> list[str]:
    suggestion = result["suggestion"]
    flags = []
    if suggestion["unscaled_layers"] is not None:
        flags.append(f"--unscaled-layers {','.join(map(str, suggestion['unscaled_layers'])) or 'none'}")
    if suggestion["rope_theta"] is not None:
        flags.append(f"--rope-theta {suggestion['rope_theta']:.0f}")
    lines = [f"Suggestion: {' '.join(flags) or 'none'}", f"  {suggestion['reason']}"]
    if "search" in suggestion and result["output"] is not None:
        path = Path(result["output"]) / SUGGESTION_FILE
        lines.append(f"  To use it: eabf finetune -m {result['model']} --config {path}")
    return lines


def _mean(heads: list[list[float]], index: int) -> float:
    return sum(head[index] for head in heads) / len(heads)
