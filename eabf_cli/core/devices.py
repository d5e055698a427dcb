"""Command-line names of dtypes and devices. Options read this module, so torch is imported when it is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eabf_cli.core.errors import InvalidConfigError

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "bfloat16", "float16", "float32")


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
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InvalidConfigError(f"unknown device {device!r}; known: auto, cpu, cuda, cuda:N, mps") from error
    num_gpus = torch.cuda.device_count()
    if chosen.type == "cuda" and (chosen.index or 0) >= num_gpus:
        raise InvalidConfigError(f"device {device!r} is not there: torch sees {num_gpus} CUDA devices; try cpu")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise InvalidConfigError("device 'mps' is not there on this machine; try cpu")
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise InvalidConfigError(f"unknown device {device!r}; known: auto, cpu, cuda, cuda:N, mps")
    return chosen
