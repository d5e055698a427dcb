"""Speed and peak memory of a training step: ours, and the plain transformers Trainer's, side by side.

    python benchmarks/finetune.py --lengths 2048,4096 --rounds 3 -o benchmarks/results/finetune-cpu.json
    python benchmarks/finetune.py --model 1b --lengths 16384 --device cuda

Every side trains the same randomly initialised Llama on the same random tokens, one row a step, in one process, in
turns (A B A B ...), with the same dtype and activation checkpointing. `plain` is the Trainer alone, `eabf` the Trainer
as `eabf finetune` sets it up: with the chunked loss, and on CUDA, if they are installed, with Liger's kernels for norms
and MLPs. `liger` is the Trainer with all of Liger's kernels, its loss among them. tokens/s comes from the median step
after each run's warm-up; peak memory is that of the process (VmHWM, Linux) or of the GPU's tensors.

On CUDA the model FLOPs utilisation is given: tokens/s x (6 N + 6 L H S) / peak FLOP/s, with N the parameters that
multiply every token (an embedding that is not the head as well is only looked up), L layers, H heads x head width, and
S tokens in a row, of which a causal query sees half. What checkpointing computes again does not count.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.util
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import common
import torch
from common import SHAPES
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer_callback import PrinterCallback

from eabf_cli.core.finetune.chunked_loss import chunked_loss
from eabf_cli.core.finetune.fused_kernels import fused_kernels, has_fused_kernels

# Dense bfloat16 peaks from the vendor's data sheets; the first name that fits counts.
PEAK_TFLOPS = {"H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0, "A100": 312.0}
WARMUP_STEPS = 1


def main() -> None:
    options = parse_arguments()
    has_liger = options.device == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    results = []
    for length in options.lengths:
        sides: dict[str, list[dict[str, Any]]] = {name: [] for name in ("plain", "eabf", *["liger"] * has_liger)}
        for round_number in range(options.rounds):
            for name, runs in sides.items():
                runs.append(run(name, length, options))
                step_s = ", ".join(f"{seconds:.2f}" for seconds in runs[-1]["step_s"])
                print(f"length {length}, round {round_number + 1}, {name}: {step_s} s a step", file=sys.stderr)
        summaries = {name: summary(runs, length) for name, runs in sides.items()}
        for found in summaries.values():
            found["mfu"] = mfu(found["tokens_per_s"], length, options)
        results.append({"length": length, "sides": summaries})
    settings = {name: getattr(options, name) for name in ("model", "dtype", "checkpointing", "chunk_tokens", "rounds")}
    report = {"machine": common.machine(options.device), **settings, "results": results}
    common.publish(report, options, table(report))


def parse_arguments() -> argparse.Namespace:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], formatter_class=formatter)
    parser.add_argument("--model", choices=SHAPES, default="135m")
    parser.add_argument("--lengths", type=common.number_list, default="2048,4096,8192")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side, in turns")
    parser.add_argument("--steps", type=int, default=2, help=f"timed steps of a run, after {WARMUP_STEPS} for warm-up")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype",
        choices=["float32", "mixed", "bfloat16"],
        help="of the weights; mixed: float32 under bfloat16 autocast (default: float32 on CPU, bfloat16 on CUDA)",
    )
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--chunk-tokens", type=int, help="(default: as eabf finetune)")
    parser.add_argument("--peak-tflops", type=float, help="bfloat16 peak of the GPU (default: known for some)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("-o", "--output", type=Path, help="write the report as JSON to this file")
    options = parser.parse_args()
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    return options


class StepTimes(TrainerCallback):
    """Seconds of each step: forward, backward and optimizer."""

    def __init__(self) -> None:
        self.step_s: list[float] = []
        self.started = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = self._now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.step_s.append(self._now() - self.started)

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def run(side: str, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train a fresh model a few steps: seconds of the timed ones, peak memory, last loss."""
    set_seed(0)
    model = build_model(options.model, length, options)
    generator = torch.Generator().manual_seed(0)
    num_steps = WARMUP_STEPS + options.steps
    tokens = torch.randint(model.config.vocab_size, (num_steps, length), generator=generator)
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder, _side(side, model, options):
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=1,
            max_steps=num_steps,
            learning_rate=1e-5,
            bf16=options.dtype == "mixed",
            use_cpu=options.device == "cpu",
            activation_checkpointing=options.checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False},
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        rows = [{"input_ids": row, "labels": row} for row in tokens]
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[times])
        trainer.remove_callback(PrinterCallback)
        reset_peak_memory(options.device)
        trainer.train()
        peak = peak_memory_gib(options.device)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"step_s": times.step_s[WARMUP_STEPS:], "peak_memory_gib": peak, "loss": losses[-1]}


@contextlib.contextmanager
def _side(side: str, model: LlamaForCausalLM, options: argparse.Namespace) -> Iterator[None]:
    """What a side has of its own, and nothing of it afterwards."""
    with contextlib.ExitStack() as stack:
        if side == "eabf":
            if has_fused_kernels(model.config, options.device):
                stack.enter_context(fused_kernels(model))
            stack.enter_context(chunked_loss(model, options.chunk_tokens))
        if side == "liger":
            source = vars(sys.modules[type(model).__module__])
            stack.callback(source.update, dict(source))
            # As Trainer does for use_liger_kernel; it replaces classes and functions for every model.
            apply_liger_kernel(model, None)
        yield


def build_model(name: str, length: int, options: argparse.Namespace) -> LlamaForCausalLM:
    dtype = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
    with torch.device(options.device):
        return LlamaForCausalLM._from_config(LlamaConfig(**SHAPES[name], max_position_embeddings=length), dtype=dtype)


def reset_peak_memory(device: str) -> None:
    """Forget what earlier runs needed, and give their memory back to the system."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gib(device: str) -> float | None:
    """Since the reset; None where the system does not tell."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform != "linux":
        return None
    return common.process_memory("VmHWM") / 2**30


def summary(runs: list[dict[str, Any]], length: int) -> dict[str, Any]:
    """One side's steps of all rounds together."""
    step_s = [seconds for one in runs for seconds in one["step_s"]]
    peaks = [one["peak_memory_gib"] for one in runs]
    return {
        "tokens_per_s": length / median(step_s),
        "peak_memory_gib": None if None in peaks else max(peaks),
        "step_s": step_s,
        "loss": runs[-1]["loss"],
    }


def mfu(tokens_per_s: float, length: int, options: argparse.Namespace) -> float | None:
    """Share of the GPU's peak (see the top of this file); None where that is not known."""
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else ""
    peak = options.peak_tflops or next((tflops for name, tflops in PEAK_TFLOPS.items() if name in gpu), None)
    return tokens_per_s * flops_per_token(options.model, length) / peak / 1e12 if gpu and peak else None


def flops_per_token(name: str, length: int) -> float:
    """6 N + 6 L H S (see the top of this file)."""
    hidden, layers, heads, kv_heads, mlp, vocabulary, _ = SHAPES[name].values()
    layer = 2 * hidden * hidden * (1 + kv_heads / heads) + 3 * hidden * mlp
    return 6 * (layers * layer + vocabulary * hidden) + 6 * layers * hidden * length


def table(report: dict[str, Any]) -> str:
    """The report for a person."""
    lines = [
        common.machine_line(report["machine"]),
        f"{report['model']}, {report['dtype']}, checkpointing {report['checkpointing']}",
        f"{'length':>7} {'side':>6} {'tokens/s':>9} {'ratio':>6} {'peak GiB':>9} {'ratio':>6} {'loss':>8}  MFU",
    ]
    for result in report["results"]:
        plain = result["sides"]["plain"]
        for name, side in result["sides"].items():
            memory, of_plain = side["peak_memory_gib"], plain["peak_memory_gib"]
            peaks = f"{memory:>9.2f} {memory / of_plain:>6.3f}" if memory is not None else f"{'-':>9} {'-':>6}"
            used = f"{side['mfu']:.1%}" if side["mfu"] is not None else "-"
            lines.append(
                f"{result['length']:>7} {name:>6} {side['tokens_per_s']:>9.1f} "
                f"{side['tokens_per_s'] / plain['tokens_per_s']:>6.3f} {peaks} {side['loss']:>8.4f}  {used}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
