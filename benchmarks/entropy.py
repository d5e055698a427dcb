"""Speed and peak memory of measuring attention entropy: ours and others, side by side.

    python benchmarks/entropy.py --lengths 2048,4096 --rounds 3 -o benchmarks/results/entropy-cpu.json
    python benchmarks/entropy.py --lengths 16384 --sides plain,chosen,all --rounds 1

Sides: `plain` is the model's forward pass up to its last layer, nothing measured; `chosen` the same with the entropy of
every layer and head at 64 positions, `all` at every position; `eager` what the official script means to do, done
correctly: a forward under the eager kernel with output_attentions, softmax once, -sum p ln p of every row, every layer
and head. Time: all sides in one process, in turns (A B A B ...), median of the rounds after one that is not counted.
Memory: each side in a process of its own, the highest resident memory (Linux) or allocated GPU memory of one pass
beyond what is held once the model is loaded. The sides' entropies are held against each other, too.

The model is a randomly initialised Llama of a known one's size, or, with --model PATH, a real one; tokens are random.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import common
import torch
from common import SHAPES, now, random_tokens
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from eabf_cli.core.architectures import decoder
from eabf_cli.core.device_memory import available_memory
from eabf_cli.core.entropy.measurement import measure_document
from eabf_cli.core.entropy.positions import choose_positions, log_positions

GIB = 2**30


def plain(model: PreTrainedModel, tokens: Tensor, positions: tuple[int, ...]) -> None:
    with torch.inference_mode():
        decoder(model)(input_ids=tokens, use_cache=False)


def chosen(model: PreTrainedModel, tokens: Tensor, positions: tuple[int, ...]) -> Tensor:
    return measure_document(model, tokens, positions).entropy[0]


def everywhere(model: PreTrainedModel, tokens: Tensor, positions: tuple[int, ...]) -> Tensor:
    entropy = measure_document(model, tokens, choose_positions("all", tokens.shape[1])).entropy[0]
    return entropy[..., torch.tensor(positions) - 1]


def eager(model: PreTrainedModel, tokens: Tensor, positions: tuple[int, ...]) -> Tensor:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            attentions = decoder(model)(input_ids=tokens, use_cache=False, output_attentions=True).attentions
            entropy = torch.stack([torch.special.entr(weights[0]).sum(-1) for weights in attentions])
    finally:
        model.set_attn_implementation(before)
    return entropy[..., torch.tensor(positions, device=entropy.device) - 1].cpu()


SIDES: dict[str, Callable[..., Tensor | None]] = {
    "plain": plain,
    "chosen": chosen,
    "all": everywhere,
    "eager": eager,
}


def main() -> None:
    options = parse_arguments()
    if options.memory_of is not None:
        print(json.dumps(measure_memory(options)))
        return
    results = []
    for length in options.lengths:
        sides = [side for side in options.sides if not is_too_large(side, length, options)]
        entropies, seconds = run_in_turns(sides, length, options)
        summaries = {
            side: {
                "seconds": median(seconds[side]),
                "rounds_s": seconds[side],
                **memory_in_process(side, length, options),
            }
            for side in sides
        }
        results.append({"length": length, "sides": summaries, "max_difference": max_differences(entropies)})
    settings = {name: getattr(options, name) for name in ("model", "dtype", "num_positions", "rounds")}
    report = {"machine": common.machine(options.device), **settings, "results": results}
    common.publish(report, options, table(report))


def parse_arguments() -> argparse.Namespace:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], formatter_class=formatter)
    parser.add_argument("--model", default="135m", help=f"{', '.join(SHAPES)}, or a model that load_model takes")
    parser.add_argument("--lengths", type=common.number_list, default="2048,4096", metavar="LIST")
    parser.add_argument("--sides", type=lambda text: text.split(","), default=",".join(SIDES), metavar="LIST")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each side, in turns")
    parser.add_argument("--num-positions", type=int, default=64, help="of the side `chosen`")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("-o", "--output", type=Path, help="write the report as JSON to this file")
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def is_too_large(side: str, length: int, options: argparse.Namespace) -> bool:
    """Whether the attention matrices of all layers, which `eager` keeps, would not fit; that is said."""
    if side != "eager":
        return False
    config = load_config(options.model)
    needed = 4 * config.num_hidden_layers * config.num_attention_heads * length**2
    available = available_memory(torch.device(options.device))
    if needed < 0.9 * available:
        return False
    sizes = f"{needed / GIB:.1f} GiB of attention matrices, {available / GIB:.1f} GiB available"
    print(f"length {length}: eager is left out ({sizes})", file=sys.stderr)
    return True


def load_config(name: str) -> Any:
    if name in SHAPES:
        return LlamaConfig(**SHAPES[name])
    from eabf_cli.core.checkpoint import read_config
    from eabf_cli.core.sources import find_model

    return read_config(find_model(name, with_weights=False)).config


def build_model(length: int, options: argparse.Namespace) -> PreTrainedModel:
    if options.model not in SHAPES:
        from eabf_cli.core.checkpoint import load_model

        return load_model(options.model, dtype=options.dtype, device=options.device)
    model: PreTrainedModel = common.random_llama(options.model, length, options.dtype, options.device)
    return model


# ---- Time ----------------------------------------------------------------------------------------


def run_in_turns(
    sides: list[str], length: int, options: argparse.Namespace
) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """Entropies of each side that measures any, and the seconds of its rounds."""
    model = build_model(length, options)
    tokens = random_tokens(model, length)
    positions = log_positions(length, options.num_positions)
    entropies: dict[str, Tensor] = {}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(options.rounds + 1):
        for side in sides:
            gc.collect()
            started = now()
            entropy = SIDES[side](model, tokens, positions)
            took = now() - started
            if entropy is not None:
                entropies[side] = entropy
            if number > 0:
                seconds[side].append(took)
            label = f"round {number}" if number else "not counted"
            print(f"length {length}, {label}, {side}: {took:.2f} s", file=sys.stderr)
    return entropies, seconds


def max_differences(entropies: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of each pair of sides, in nats."""
    names = list(entropies)
    return {
        f"{first}-{second}": float((entropies[first].double() - entropies[second].double()).abs().max())
        for index, first in enumerate(names)
        for second in names[index + 1 :]
    }


# ---- Memory --------------------------------------------------------------------------------------


def memory_in_process(side: str, length: int, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--memory-of", side, "--lengths", str(length), "--model", options.model]
    command += ["--dtype", options.dtype, "--device", options.device, "--num-positions", str(options.num_positions)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{side} at {length} tokens failed: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout))


def measure_memory(options: argparse.Namespace) -> dict[str, float | None]:
    """Of one pass of one side, in GiB: the peak, and what of it is beyond the loaded model."""
    length = options.lengths[0]
    model = build_model(length, options)
    tokens, positions = random_tokens(model, length), log_positions(length, options.num_positions)
    # A short pass first, so that what libraries set up once is not counted.
    SIDES[options.memory_of](model, tokens[:, :32], log_positions(32, 8))
    held = reset_peak_memory(options.device)
    SIDES[options.memory_of](model, tokens, positions)
    peak = peak_memory(options.device)
    beyond = None if peak is None or held is None else (peak - held) / GIB
    return {"peak_memory_gib": None if peak is None else peak / GIB, "beyond_model_gib": beyond}


def reset_peak_memory(device: str) -> int | None:
    """Forget the peak so far; returns the bytes that are held now."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if sys.platform != "linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return common.process_memory("VmRSS")


def peak_memory(device: str) -> int | None:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return common.process_memory("VmHWM") if sys.platform == "linux" else None


# ---- Report --------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    """The report for a person: ratios are to `plain`; of `eager`, how much ours are faster and smaller."""
    lines = [
        common.machine_line(report["machine"]),
        f"{report['model']}, {report['dtype']}, {report['num_positions']} chosen positions",
        f"{'length':>7} {'side':>7} {'seconds':>8} {'to plain':>8} {'to eager':>8} "
        f"{'peak GiB':>8} {'beyond model':>12} {'to eager':>8}",
    ]
    for result in report["results"]:
        sides = result["sides"]
        for name, side in sides.items():
            lines.append(
                f"{result['length']:>7} {name:>7} {side['seconds']:>8.2f} {_ratio(side, sides, 'plain', 'seconds')} "
                f"{_ratio(side, sides, 'eager', 'seconds')} {_gib(side['peak_memory_gib'], 8)} "
                f"{_gib(side['beyond_model_gib'], 12)} {_ratio(side, sides, 'eager', 'beyond_model_gib')}"
            )
        differences = ", ".join(f"{pair} {value:.1e}" for pair, value in result["max_difference"].items())
        lines.append(f"{result['length']:>7} largest differences in nats: {differences or '-'}")
    return "\n".join(lines)


def _ratio(side: dict[str, Any], sides: dict[str, Any], to: str, key: str) -> str:
    if to not in sides or not side[key] or not sides[to][key]:
        return f"{'-':>8}"
    return f"{side[key] / sides[to][key]:>8.3f}"


def _gib(value: float | None, width: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.3f}"


if __name__ == "__main__":
    main()
