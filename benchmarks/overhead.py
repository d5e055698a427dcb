"""What a method costs at run time: patched and plain forward passes and decoding steps, in turns in one process.

    python benchmarks/overhead.py --lengths 2048,4096,8192,16384 --rounds 5 -o benchmarks/results/overhead-cpu.json
    python benchmarks/overhead.py --device cuda --model 1b --lengths 2048,16384

One randomly initialised Llama, whose window is a quarter of the row, so that positions beyond it are scaled. Both
sides have the same weights: the method is put on and taken off between turns, outside of what is timed. `forward`
reads the whole row into a cache and computes the logits of its last token; `decode` is a step with one new token
behind it, in blocks of steps that take turns as well. Turns go A B B A, so that a machine that becomes slower favours
no side. The ratio is that of the medians over rounds, of which the first is not counted; its spread is shown.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import common
import torch
from transformers import DynamicCache, PreTrainedModel

from eabf_cli.core.methods import METHODS
from eabf_cli.core.patching import apply_method, remove_method
from eabf_cli.core.scaling_config import RopeScalingConfig

SIDES = ("plain", "patched")
FACTOR = 4
BLOCK_STEPS = 4


def main() -> None:
    options = parse_arguments()
    results = [measure(length, options) for length in options.lengths]
    settings = {name: getattr(options, name) for name in ("model", "method", "dtype", "rounds", "steps")}
    report = {"machine": common.machine(options.device), **settings, "results": results}
    common.publish(report, options, table(report))


def parse_arguments() -> argparse.Namespace:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], formatter_class=formatter)
    parser.add_argument("--model", choices=common.SHAPES, default="135m")
    parser.add_argument("--method", choices=METHODS, default="eabf")
    parser.add_argument("--lengths", type=common.number_list, default="2048,4096,8192,16384", metavar="LIST")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of both sides")
    parser.add_argument("--steps", type=int, default=32, help=f"decoding steps a round, in blocks of {BLOCK_STEPS}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="(default: float32 on CPU, bfloat16 on CUDA)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("-o", "--output", type=Path, help="write the report as JSON to this file")
    options = parser.parse_args()
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    return options


@torch.inference_mode()
def measure(length: int, options: argparse.Namespace) -> dict[str, Any]:
    """One length: seconds of each side's forward passes and of its decoding steps, and their ratios."""
    model = common.random_llama(options.model, length // FACTOR, options.dtype, options.device)
    tokens = common.random_tokens(model, length)
    forward_s: dict[str, list[float]] = {side: [] for side in SIDES}
    step_s: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(options.rounds + 1):
        gc.collect()
        caches = {}
        forward, decode = {}, dict.fromkeys(SIDES, 0.0)
        for side in common.in_turn(SIDES, number):
            caches[side] = DynamicCache(config=model.config)
            forward[side] = timed(model, side, [tokens], caches[side], options.method)
        num_blocks = max(1, options.steps // BLOCK_STEPS)
        for block in range(num_blocks):
            for side in common.in_turn(SIDES, block):
                steps = [tokens[:, :1]] * BLOCK_STEPS
                decode[side] += timed(model, side, steps, caches[side], options.method)
        for side in SIDES:
            label = f"round {number}" if number else "not counted"
            per_step = decode[side] / (num_blocks * BLOCK_STEPS)
            print(f"length {length}, {label}, {side}: {forward[side]:.3f} s, {per_step:.4f} s a step", file=sys.stderr)
            if number:
                forward_s[side].append(forward[side])
                step_s[side].append(per_step)
    return {"length": length, "forward": compared(forward_s), "decode": compared(step_s)}


def timed(model: PreTrainedModel, side: str, calls: list[torch.Tensor], cache: DynamicCache, method: str) -> float:
    """Seconds that a side takes for these calls one after the other."""
    with applied(model, method) if side == "patched" else contextlib.nullcontext():
        started = common.now()
        for input_ids in calls:
            model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return common.now() - started


@contextlib.contextmanager
def applied(model: PreTrainedModel, method: str) -> Iterator[None]:
    """The method on the model while the block runs."""
    apply_method(model, RopeScalingConfig(method=method, factor=FACTOR))
    try:
        yield
    finally:
        remove_method(model)


def compared(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians of both sides, their ratio, and that of each round."""
    plain, patched = (median(seconds[side]) for side in SIDES)
    ratios = [ours / theirs for theirs, ours in zip(seconds["plain"], seconds["patched"], strict=True)]
    return {"plain_s": plain, "patched_s": patched, "ratio": patched / plain, "ratios": ratios}


def table(report: dict[str, Any]) -> str:
    """The report for a person."""
    lines = [
        common.machine_line(report["machine"]),
        f"{report['model']}, {report['method']}, {report['dtype']}, {report['rounds']} rounds",
        f"{'length':>7} {'':>7} {'plain s':>9} {'patched s':>9} {'ratio':>6}  of single rounds",
    ]
    for result in report["results"]:
        for name in ("forward", "decode"):
            found = result[name]
            lines.append(
                f"{result['length']:>7} {name:>7} {found['plain_s']:>9.4f} {found['patched_s']:>9.4f} "
                f"{found['ratio']:>6.3f}  {min(found['ratios']):.3f} to {max(found['ratios']):.3f}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
