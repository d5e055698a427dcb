"""Command-line names of dtypes and devices. Options read this module, so torch is imported when it is needed."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.processes import local_rank

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "bfloat16", "float16", "float32")
_DEVICE_NAME = re.compile(r"cpu|mps|cuda(:\d{1,3})?")


def torch_dtype(dtype: str) -> torch.dtype | str:
    """The torch dtype of a command-line name; "auto" stays as it is.

    Raises:
        InvalidConfigError: an unknown name.
    """
    import torch

    if dtype not in DTYPES:
        raise InvalidConfigError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    return dtype if dtype == "auto" else getattr(torch, dtype)


def choose_device(device: str) -> torch.device:
    """The torch device of a command-line name.

    Raises:
        InvalidConfigError: an unknown name, or a device that this machine does not have.
    """
    import torch

    if device == "auto":
        # Of several processes on one machine each takes its own GPU.
        device = (
            f"cuda:{local_rank()}"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    if not _DEVICE_NAME.fullmatch(device):
        raise InvalidConfigError(f"unknown device {device!r}; known: auto, cpu, cuda, cuda:N, mps")
    present = present_devices()
    if device not in present and not (device == "cuda" and "cuda:0" in present):
        raise InvalidConfigError(f"device {device!r} is not on this machine, which has {', '.join(present)}")
    return torch.device(device)


def present_devices() -> list[str]:
    """The devices of this machine, as the command line names them."""
    import torch

    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products are done in hardware there; elsewhere they are slower than float32."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        with contextlib.suppress(AttributeError):
            capabilities = torch.cpu.get_capabilities()
            return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return False


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory of this process so far: on the GPU if it ran there, else resident."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.is_file():
        # What getrusage tells would begin with what the parent held when it started this process.
        return next(int(line.split()[1]) / 2**20 for line in status.read_text().splitlines() if "VmHWM" in line)
    import resource

    # macOS counts bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30
