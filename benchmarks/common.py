"""What the benchmarks share: models of known sizes, and how the machine and its memory are described."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
    "vocab_size", "tie_word_embeddings",
)  # fmt: skip
# One to try a script with, SmolLM2-135M, Llama-3.2-1B, Llama-3.2-3B, Llama-2-7B.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": dict(zip(_FIELDS, (128, 4, 4, 2, 256, 1024, True), strict=True)),
    "135m": dict(zip(_FIELDS, (576, 30, 9, 3, 1536, 49_152, True), strict=True)),
    "1b": dict(zip(_FIELDS, (2048, 16, 32, 8, 8192, 128_256, True), strict=True)),
    "3b": dict(zip(_FIELDS, (3072, 28, 24, 8, 8192, 128_256, True), strict=True)),
    "7b": dict(zip(_FIELDS, (4096, 32, 32, 32, 11_008, 32_000, False), strict=True)),
}


def random_llama(shape: str, window: int, dtype: str, device: str) -> Any:
    """A Llama of that shape with random weights, the same ones each time, in evaluation mode."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=window)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=getattr(torch, dtype)).eval()


def random_tokens(model: Any, length: int) -> Any:
    """One row of token ids on the model's device, the same ones each time."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (1, length), generator=generator).to(model.device)


def now() -> float:
    """Seconds on a clock, once the GPU is done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turn(sides: Iterable[str], number: int) -> tuple[str, ...]:
    """The sides of a round, every second time the other way round."""
    return tuple(sides)[:: -1 if number % 2 else 1]


def number_list(text: str) -> list[int]:
    """What an option such as `--lengths 2048,4096` says."""
    return [int(part) for part in text.split(",")]


def run_apart(
    script: str, side: str, arguments: Sequence[str], options: argparse.Namespace, names: Sequence[str]
) -> Any:
    """What a script prints for one side, in a fresh process.

    Args:
        arguments: more words of its command line.
        names: options that are handed on.
    """
    words = [script, "--side", side, *arguments]
    for name in names:
        words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    environment = os.environ | {"TQDM_DISABLE": "1"}
    done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, env=environment, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def publish(report: dict[str, Any], options: argparse.Namespace, table: str) -> None:
    """Keep a report where `--output` says, and print it as `--json` or as a table."""
    text = json.dumps(report, indent=2)
    if options.output:
        options.output.write_text(text + "\n")
    print(text if options.json else table)


def machine_line(machine: dict[str, Any]) -> str:
    """A report's machine in one line."""
    flat: dict[str, Any] = {}
    for name, value in machine.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return ", ".join(f"{name} {value}" for name, value in flat.items() if value is not None)


def machine(device: str) -> dict[str, Any]:
    """The machine and the versions that numbers are from."""
    import torch
    import transformers

    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def cpu_name() -> str:
    """The processor's name, where the system tells it."""
    # Other systems have no such file, other processors no such line.
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor()


def process_memory(name: str) -> int:
    """A field of /proc/self/status, such as VmHWM, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))
