"""Estimated against measured peak memory of training, on this machine's CPU or GPU.

    OMP_NUM_THREADS=1 python benchmarks/memory.py
    OMP_NUM_THREADS=1 python benchmarks/memory.py --only 135M
    OMP_NUM_THREADS=1 python benchmarks/memory.py --refresh
    python benchmarks/memory.py --device cuda

Every row loads a model as `eabf finetune` does, trains two optimizer steps with the chunked loss, and reports the most
that was held. On a CPU a row is a process of its own, and that is its resident memory (VmHWM). On a GPU the rows follow
each other in one process, and it is what PyTorch's allocator had taken from the device, and what the device holds
beside it (the CUDA context and its libraries): nothing else may run there. Results go to
`benchmarks/results/memory-cpu.json` or `memory-cuda.json`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from common import SHAPES as LLAMA_SHAPES
from common import cpu_name
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from eabf_cli.core.allocator import keep_freed_memory
from eabf_cli.core.checkpoint import load_tokenizer, read_config
from eabf_cli.core.data.sample_set import Sample, SampleSet
from eabf_cli.core.data.samples import SampleCollator
from eabf_cli.core.devices import peak_memory_gib
from eabf_cli.core.finetune.memory import MemoryEstimate, estimate_memory
from eabf_cli.core.finetune.recipe import Recipe
from eabf_cli.core.finetune.settings import TrainSettings
from eabf_cli.core.finetune.training import train
from eabf_cli.core.finetune.tuning import load_for_tuning, make_trainable
from eabf_cli.core.patching import apply_method
from eabf_cli.core.sources import find_model

MIB = 2**20
RESULTS = Path(__file__).parent / "results"

# SmolLM2's, Llama-3.2's and Llama-2's; the demo model has weights of its own.
SHAPES: dict[str, dict[str, Any]] = {
    "135M": LLAMA_SHAPES["135m"],
    "360M": {
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "vocab_size": 49_152,
        "tie_word_embeddings": True,
    },
    "1B": LLAMA_SHAPES["1b"],
    "7B": LLAMA_SHAPES["7b"],
}
DEMO = "eabf-tiny"
WINDOW = 512


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement: what is trained, and how."""

    model: str
    seq_len: int
    tuning: str
    mixed_precision: bool
    checkpointing: bool
    batch_size: int = 1
    optimizer: str = "adamw"
    chunk_tokens: int | None = None


def _rows(device: str) -> list[Row]:
    return _gpu_rows() if device == "cuda" else _cpu_rows()


def _gpu_rows() -> list[Row]:
    shapes = (
        ("135M", 16_384, "full", True, "adamw"),
        ("1B", 4096, "full", True, "adamw"),
        ("1B", 16_384, "full", True, "adamw"),
        ("1B", 32_768, "full", True, "adamw"),
        ("1B", 16_384, "full", True, "adamw-8bit"),
        ("1B", 16_384, "lora", True, "adamw"),
        ("1B", 16_384, "qlora", True, "adamw"),
        ("1B", 4096, "full", False, "adamw"),
        ("1B", 4096, "lora", False, "adamw"),
        ("7B", 16_384, "lora", True, "adamw"),
        ("7B", 16_384, "qlora", True, "adamw"),
    )
    return [
        Row(
            model=model,
            seq_len=seq_len,
            tuning=tuning,
            mixed_precision=True,
            checkpointing=checkpointing,
            batch_size=2,
            optimizer=optimizer,
            chunk_tokens=1024,
        )
        for model, seq_len, tuning, checkpointing, optimizer in shapes
    ]


def _cpu_rows() -> list[Row]:
    demo = [
        Row(model=DEMO, seq_len=2048, tuning=tuning, mixed_precision=mixed, checkpointing=False, batch_size=4)
        for tuning in ("full", "lora", "qlora")
        for mixed in (False, True)
    ]
    random_ones = [
        Row(model=model, seq_len=seq_len, tuning=tuning, mixed_precision=mixed, checkpointing=True, batch_size=batch)
        for model, seq_len, tuning, mixed, batch in (
            ("135M", 2048, "full", True, 1),
            ("135M", 2048, "full", True, 2),
            ("135M", 2048, "full", False, 1),
            ("135M", 2048, "lora", True, 1),
            ("135M", 2048, "qlora", True, 1),
            ("135M", 4096, "full", True, 1),
            ("135M", 4096, "lora", True, 1),
            ("360M", 2048, "lora", True, 1),
            ("360M", 2048, "full", True, 1),
            ("360M", 2048, "qlora", True, 1),
            ("360M", 4096, "lora", True, 1),
            ("360M", 2048, "full", False, 1),
            ("360M", 4096, "full", True, 1),
        )
    ]
    whole_layers = [
        Row(model="135M", seq_len=seq_len, tuning=tuning, mixed_precision=mixed, checkpointing=False)
        for seq_len, mixed in ((2048, True), (1024, False))
        for tuning in ("lora", "full")
    ]
    return demo + random_ones + whole_layers


def random_config(name: str) -> PretrainedConfig:
    """The configuration of a random model."""
    return LlamaConfig(
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        **SHAPES[name],
    )


def write_random_model(folder: Path, name: str, device: str) -> None:
    """A checkpoint of a random model in bfloat16."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(random_config(name), dtype=torch.bfloat16)
    model.save_pretrained(folder)


def estimate(row: Row, device: str) -> MemoryEstimate:
    """The estimate for a row, from the configuration alone."""
    config = random_config(row.model) if row.model in SHAPES else read_config(find_model(row.model)).config
    return estimate_memory(
        config,
        tuning=row.tuning,
        seq_len=row.seq_len,
        device_type=device,
        mixed_precision=row.mixed_precision,
        checkpointing=row.checkpointing,
        optimizer=row.optimizer,
        chunk_tokens=row.chunk_tokens,
        accumulates=row.batch_size > 1,
    )


def compared(row: Row, device: str, measured_mib: float, seconds_per_step: float) -> dict[str, Any]:
    """A row of the result: what was estimated beside what was measured."""
    found = estimate(row, device)
    return asdict(row) | {
        "estimate_mib": round(found.total / MIB),
        "measured_mib": round(measured_mib),
        "ratio": round(found.total / MIB / measured_mib, 3),
        "moment": found.moment,
        "parts_mib": {name: round(num_bytes / MIB) for name, num_bytes in found.parts.items()},
        "seconds_per_step": seconds_per_step,
    }


def measure(row: Row, model: str, device: str) -> dict[str, Any]:
    """Train two steps in this process."""
    load_tokenizer(DEMO)
    base = load_for_tuning(model, tuning=row.tuning, device=device, mixed_precision=row.mixed_precision)
    apply_method(
        base,
        {"rope_type": "eabf", "factor": row.seq_len / WINDOW, "original_max_position_embeddings": WINDOW},
    )
    trained = make_trainable(base, row.tuning, source=find_model(model))
    rng = random.Random(0)
    rows = [rng.choices(range(3, base.config.vocab_size), k=row.seq_len) for _ in range(2 * row.batch_size)]
    rows_of_ids = tuple(Sample(ids, list(ids)) for ids in rows)
    samples = SampleSet(samples=rows_of_ids, num_available=len(rows), data_hash="")
    with tempfile.TemporaryDirectory() as folder:
        result = train(
            trained,
            samples,
            Recipe(learning_rate=1e-4, epochs=1, batch_size=row.batch_size, optimizer=row.optimizer),
            TrainSettings(
                mixed_precision=row.mixed_precision,
                activation_checkpointing=row.checkpointing,
                chunk_tokens=row.chunk_tokens,
            ),
            folder=Path(folder),
            collator=SampleCollator(2),
        )
    return compared(row, device, peak_mib(device), round(result.wall_s / 2, 1))


def peak_mib(device: str) -> float:
    """The most memory that was held: of this process on a CPU, of the device on a GPU."""
    if device == "cpu":
        return 1024 * peak_memory_gib(torch.device("cpu"))
    free, total = torch.cuda.mem_get_info()
    beside = total - free - torch.cuda.memory_reserved()
    return (torch.cuda.max_memory_reserved() + beside) / MIB


def model_path(name: str, folder: Path, device: str) -> str:
    """Where a row's model is, written first if need be."""
    if name not in SHAPES:
        return name
    path = folder / name
    if not path.exists():
        write_random_model(path, name, device)
    return str(path)


def run_here(row: Row, folder: Path) -> dict[str, Any]:
    """`measure` on the GPU, after what earlier rows held was given back."""
    path = model_path(row.model, folder, "cuda")
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return measure(row, path, "cuda")


def run_apart(row: Row, folder: Path) -> dict[str, Any]:
    """`measure` on the CPU in a fresh process."""
    model = model_path(row.model, folder, "cpu")
    command = [sys.executable, __file__, "--row", json.dumps(asdict(row)), "--model", model]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{row} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def machine(device: str) -> dict[str, Any]:
    """The machine and the versions that the numbers are from."""
    from importlib.metadata import version

    names = ("torch", "transformers", "accelerate", "peft", "bitsandbytes")
    return {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", "0")) or os.cpu_count(),
        "system": platform.platform(),
        "allocator": {name: value for name, value in os.environ.items() if name.startswith(("MALLOC_", "GLIBC_"))},
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="rows whose description contains this, like 135M or 'seq_len=4096'")
    parser.add_argument("--refresh", action="store_true", help="new estimates for what was measured before")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, help="(default: benchmarks/results/memory-DEVICE.json)")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        keep_freed_memory()
        print(json.dumps(measure(Row(**json.loads(given.row)), given.model, "cpu")))
        return
    output = given.output or RESULTS / f"memory-{given.device}.json"
    # Rows that are not measured again stay.
    results = json.loads(output.read_text())["rows"] if output.exists() else []
    if given.refresh:
        refreshed = [
            compared(row_of(old), given.device, old["measured_mib"], old["seconds_per_step"]) for old in results
        ]
        write(output, json.loads(output.read_text())["machine"], refreshed)
        return
    run = run_here if given.device == "cuda" else run_apart
    with tempfile.TemporaryDirectory() as folder:
        for row in _rows(given.device):
            if given.only and given.only not in str(row):
                continue
            result = run(row, Path(folder))
            results = [other for other in results if row_of(other) != row]
            results.append(result)
            print(describe(result), flush=True)
            write(output, machine(given.device), results)


def row_of(result: dict[str, Any]) -> Row:
    """What a result measured; what it does not say is a row's default."""
    return Row(**{field.name: result[field.name] for field in fields(Row) if field.name in result})


def describe(result: dict[str, Any]) -> str:
    """A row as one line."""
    precision = "bf16" if result["mixed_precision"] else "fp32"
    return (
        f"{result['model']:>9} {result['seq_len']:>5} {result['tuning']:>5} {precision} batch {result['batch_size']}: "
        f"estimate {result['estimate_mib']:>6,} MiB, measured {result['measured_mib']:>6,} MiB, "
        f"ratio {result['ratio']:.2f}, {result['seconds_per_step']} s a step"
    )


def write(output: Path, machine: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write the result file."""
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
