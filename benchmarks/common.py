"""What the benchmarks share: models of known sizes, and how the machine and its memory are described."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path
from typing import Any

_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
    "vocab_size", "tie_word_embeddings",
)  # fmt: skip
# SmolLM2-135M, Llama-3.2-1B, Llama-2-7B.
SHAPES: dict[str, dict[str, Any]] = {
    "135m": dict(zip(_FIELDS, (576, 30, 9, 3, 1536, 49_152, True), strict=True)),
    "1b": dict(zip(_FIELDS, (2048, 16, 32, 8, 8192, 128_256, True), strict=True)),
    "7b": dict(zip(_FIELDS, (4096, 32, 32, 32, 11_008, 32_000, False), strict=True)),
}


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
