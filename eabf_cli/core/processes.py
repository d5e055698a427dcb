"""Several processes that do one job together, as torchrun or accelerate launch starts them."""

from __future__ import annotations

import os
from datetime import timedelta

# One process may measure a model, or copy a large one, while the others wait for it.
_TIMEOUT = timedelta(hours=4)
# How long a process that fails waits for the main one to fail with the same words.
_TELLING_TIMEOUT = timedelta(seconds=5)
_TOLD_KEY = "eabf/told"


def num_processes() -> int:
    """How many there are; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def num_row_parts() -> int:
    """Over how many processes one row is spread (context parallelism); 1 without."""
    if not _is_on("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return 1
    return int(os.environ.get("PARALLELISM_CONFIG_CP_SIZE", "1"))


def num_replicas() -> int:
    """How many of them work on samples of their own: with context parallelism several share one sample."""
    return num_processes() // num_row_parts()


def is_main_process() -> bool:
    """Whether this is the one that speaks and writes."""
    return os.environ.get("RANK", "0") == "0"


def local_rank() -> int:
    """This process's number on its machine, which is also its GPU's."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_sharded() -> bool:
    """Whether the launcher's configuration spreads one model over the processes (FSDP, DeepSpeed ZeRO)."""
    return _is_on("ACCELERATE_USE_FSDP") or uses_deepspeed()


def uses_deepspeed() -> bool:
    """Whether it is DeepSpeed that does so."""
    return _is_on("ACCELERATE_USE_DEEPSPEED")


def join_processes(device_type: str) -> None:
    """Connect this process with the others; without a launcher there is nothing to do."""
    if num_processes() > 1:
        from accelerate import PartialState

        PartialState(cpu=device_type == "cpu", timeout=_TIMEOUT)


def wait_for_everyone() -> None:
    """Go on when every process has come here."""
    if num_processes() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def is_to_tell(message: str) -> bool:
    """Whether this process is the one to tell an error: the main one, and any whose error the main one does not have.

    The main one leaves its words in the launcher's store, where the others look for them.
    """
    if num_processes() == 1:
        return True
    from torch.distributed import DistError, TCPStore

    try:
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=_TELLING_TIMEOUT,
        )
        if is_main_process():
            store.set(_TOLD_KEY, message)
            return True
        told: bytes = store.get(_TOLD_KEY)
    except (DistError, KeyError):
        return True
    return told.decode() != message


def leave_processes() -> None:
    """Take the connection down, at the end of the job or of this process's part in it."""
    if num_processes() > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true")
