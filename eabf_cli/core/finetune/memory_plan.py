"""What fits: the tuning to choose for the memory that a device has, and what people read about both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from eabf_cli.core.device_memory import (
    USABLE_SHARE,
    InsufficientMemoryError,
    available_memory,
    out_of_memory_explained,
)
from eabf_cli.core.devices import peak_memory_gib
from eabf_cli.core.finetune.memory import GIB, PARTS, MemoryEstimate
from eabf_cli.core.finetune.settings import TUNINGS

# --- What fits ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TuningChoice:
    """The tuning of a run, and why it is that one."""

    tuning: str
    reason: str


def fits(estimate: MemoryEstimate, available_bytes: int) -> bool:
    """Whether a run fits into the usable share of the available memory."""
    return estimate.total <= USABLE_SHARE * available_bytes


def fits_on(estimates: Mapping[str, MemoryEstimate], available_bytes: int) -> tuple[str, ...]:
    """The tunings that fit, strongest first."""
    return tuple(name for name in TUNINGS if name in estimates and fits(estimates[name], available_bytes))


def choose_tuning(estimates: Mapping[str, MemoryEstimate], available_bytes: int, *, can_quantize: bool) -> TuningChoice:
    """What `--tuning auto` means: the strongest of full, lora and qlora that fits.

    Args:
        estimates: by tuning, those that the model can have.
        can_quantize: qlora can run there (`check_tuning`).

    Raises:
        InsufficientMemoryError: none fits; the message says what would help.
    """
    candidates = {name: estimates[name] for name in TUNINGS if name in estimates}
    if not can_quantize:
        candidates.pop("qlora", None)
    too_large: list[str] = []
    for name, estimate in candidates.items():
        if fits(estimate, available_bytes):
            reason = f"{name} needs {_gib(estimate.total)} of {_gib(available_bytes)} available"
            if too_large:
                reason += f"; {' and '.join(too_large)} would not fit"
            return TuningChoice(tuning=name, reason=reason)
        too_large.append(f"{name} ({_gib(estimate.total)})")
    smallest = min(candidates.values(), key=lambda estimate: estimate.total)
    install = "" if can_quantize or "qlora" not in estimates else ", --tuning qlora (pip install bitsandbytes)"
    raise InsufficientMemoryError(
        f"no tuning fits into {USABLE_SHARE:.0%} of the {_gib(available_bytes)} available: {', '.join(too_large)} "
        f"at {smallest.seq_len:,} tokens\n"
        f"what would help: {'--micro-batch-size 1, ' if smallest.micro_batch > 1 else ''}a shorter --max-length, "
        f"--pose{install}, more devices (accelerate launch with FSDP)"
    )


# --- What people read -----------------------------------------------------------------------------------


def plan_to_dict(estimates: Mapping[str, MemoryEstimate], available_bytes: int, *, device: str) -> dict[str, Any]:
    """What a dry run tells of memory, for JSON."""
    return {
        "device": device,
        "available_gib": round(available_bytes / GIB, 3),
        "usable_share": USABLE_SHARE,
        "seq_len": max(estimate.seq_len for estimate in estimates.values()),
        "fits": list(fits_on(estimates, available_bytes)),
        "tunings": {name: estimate.to_dict() for name, estimate in estimates.items()},
    }


def format_plan(plan: Mapping[str, Any]) -> str:
    """`plan_to_dict` as a table: a row for each part, a column for each tuning, in GiB, and what fits."""
    tunings = plan["tunings"]
    rows = [("", *tunings)]
    for part, title in [*PARTS.items(), ("total", "total")]:
        rows.append((title, *(f"{tunings[name][f'{part}_gib']:.2f}" for name in tunings)))
    rows.append(("highest at", *(tunings[name]["moment"] for name in tunings)))
    rows.append(("fits", *("yes" if name in plan["fits"] else "no" for name in tunings)))
    title = (
        f"Peak memory in GiB at {plan['seq_len']:,} tokens, the longest row; {plan['device']} has "
        f"{plan['available_gib']:.1f} GiB available"
    )
    return "\n".join([title, *_aligned(rows)])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB"


# --- Out of memory --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """The settings of a run that decide about its memory."""

    tuning: str
    checkpointing: bool
    micro_batch: int
    seq_len: int
    uses_pose: bool = False


def explain_out_of_memory(settings: MemorySettings, *, peak_bytes: int, device: str, device_bytes: int) -> str:
    """What happened, and the options that would help and are not in use, the most harmless first.

    Args:
        peak_bytes: the most that the process held.
        device_bytes: what the process could come to hold (`available_memory`).
    """
    options = [
        (not settings.checkpointing, "--activation-checkpointing"),
        (settings.micro_batch > 1, "--micro-batch-size 1"),
        (settings.tuning == "full", "--tuning lora"),
        (settings.tuning != "qlora", "--tuning qlora"),
        (not settings.uses_pose, "--pose"),
        (True, f"a --max-length below {settings.seq_len:,}"),
        (True, "more devices (accelerate launch with FSDP)"),
    ]
    return (
        f"out of memory on {device}: the run held {_gib(peak_bytes)} of {_gib(device_bytes)} "
        f"({settings.tuning}, {settings.micro_batch} x {settings.seq_len:,} tokens)\n"
        f"what would help, in this order: {', '.join(option for helps, option in options if helps)}"
    )


def run_memory_explained(settings: MemorySettings, device: torch.device) -> AbstractContextManager[None]:
    """`out_of_memory_explained` for a training run: what its settings could do about it."""
    return out_of_memory_explained(
        lambda: explain_out_of_memory(
            settings,
            peak_bytes=round(peak_memory_gib(device) * GIB),
            device=str(device),
            device_bytes=available_memory(device),
        )
    )
