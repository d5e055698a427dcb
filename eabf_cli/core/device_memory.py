"""The memory that a device has, the parts that a measurement needs, and what is said where it was not enough."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from eabf_cli.core.devices import peak_memory_gib
from eabf_cli.core.errors import InvalidConfigError

USABLE_SHARE = 0.9
"""The share of the available memory that a plan may fill."""


class InsufficientMemoryError(InvalidConfigError):
    """A run needs more memory than the device has."""


def available_memory(device: torch.device) -> int:
    """Bytes that this process can come to hold on a device: what is free, and what it holds already.

    A CPU has what the kernel calls available, or less under the limit of a container (cgroup v1 or v2).
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return available_host_memory()


def available_host_memory(root: Path = Path("/")) -> int:
    """`available_memory` of a CPU.

    Args:
        root: where `proc` and `sys` are.
    """
    meminfo = root / "proc" / "meminfo"
    if not meminfo.is_file():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = 1024 * _fields(meminfo)["MemAvailable"]
    return min([free, *_cgroup_rooms(root)]) + _resident(root)


def _fields(file: Path) -> dict[str, int]:
    """Names and numbers of a file with a line for each, `Name: 123 kB` or `name 123`."""
    rows = (line.replace(":", " ").split() for line in file.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _resident(root: Path) -> int:
    return 1024 * _fields(root / "proc" / "self" / "status")["VmRSS"]


def _cgroup_rooms(root: Path) -> Iterator[int]:
    """Bytes left under each limit that a control group of this process, or one above it, sets."""
    groups = root / "proc" / "self" / "cgroup"
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, usage = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit, usage = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = base / path.lstrip("/")
        # In a container the path may be the host's, and what is mounted the container's own group.
        for folder in (group, *group.parents):
            if (folder / limit).is_file():
                yield from _room(folder, limit, usage)
            if folder == base:
                break


def _room(folder: Path, limit: str, usage: str) -> Iterator[int]:
    text = (folder / limit).read_text().strip()
    if text == "max":
        return
    # Pages of files that nobody uses count as used, and go when they are needed.
    cache = _fields(folder / "memory.stat").get("inactive_file", 0)
    yield max(0, int(text) - int((folder / usage).read_text()) + cache)


@dataclass(frozen=True, kw_only=True)
class MemoryParts:
    """Peak memory by part; subclasses have a field for each, in bytes."""

    @property
    def total(self) -> int:
        """All parts together, in bytes."""
        return sum(asdict(self).values())

    @property
    def largest(self) -> str:
        """The name of the largest part."""
        parts = asdict(self)
        return max(parts, key=parts.__getitem__)

    def to_dict(self) -> dict[str, float]:
        """JSON form, in GiB."""
        parts = {f"{name}_gib": value / 2**30 for name, value in asdict(self).items()}
        return {name: round(value, 3) for name, value in (parts | {"total_gib": self.total / 2**30}).items()}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a refused allocation, on a GPU or by the operating system."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "not enough memory" in text or "out of memory" in text
    )


@contextmanager
def out_of_memory_explained(explain: Callable[[], str]) -> Iterator[None]:
    """Turn a refused allocation into an error with what `explain` says.

    Raises:
        InsufficientMemoryError: there was not enough memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise InsufficientMemoryError(explain()) from error


def explain_long_row(device: torch.device, length: int, ways_out: str) -> str:
    """That a row was too long for a device, and the ways out.

    Args:
        length: of the longest row, in tokens.
        ways_out: a sentence without its full stop.
    """
    return (
        f"out of memory on {device} at {length:,} tokens: the process held {peak_memory_gib(device):.1f} GiB of "
        f"{available_memory(device) / 2**30:.1f} GiB\n{ways_out}"
    )
