"""What a process keeps of memory that it has used: the C library's allocator, and compiled kernels."""

from __future__ import annotations

import ctypes
import os
import platform

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_KERNEL_CACHE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
# The products of a step on rows of one length, forward and backward, of adapters and of a second model: below 80.
_NUM_KERNELS = 128
_keeps = False


def keep_freed_memory() -> bool:
    """Let this process keep memory that it frees, for its next tensors, instead of giving it back to the kernel.

    A training step on a CPU frees and takes the same gigabytes at every layer, and the kernel clears each page that it
    hands out anew (measured in docs/finetuning.md). It concerns the whole process and its later allocations, so
    commands call it before anything large is loaded.

    Returns:
        whether it was done: not where the C library is another one, nor where the environment sets its allocator.
    """
    is_set = any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get(
        "GLIBC_TUNABLES", ""
    )
    if platform.libc_ver()[0] != "glibc" or is_set:
        return False
    global _keeps
    mallopt = ctypes.CDLL(None).mallopt
    # One heap for all threads, out of which large blocks come too, and whose end is never cut off.
    _keeps = all(
        [
            mallopt(_M_MMAP_MAX, 0),
            mallopt(_M_TRIM_THRESHOLD, -1),
            mallopt(_M_ARENA_MAX, 1),
        ]
    )
    return _keeps


def give_back_freed_memory() -> None:
    """Give the kernel what `keep_freed_memory` has kept; nothing happens where it was not called.

    Rows of other lengths leave holes that the next ones do not fit into, so that the heap grows with every row. What
    was given back costs nothing until it is used again, and a row's worth of pages is cleared in a moment.
    """
    if _keeps:
        ctypes.CDLL(None).malloc_trim(0)


def limit_kept_kernels() -> None:
    """Let oneDNN keep fewer of its kernels for bfloat16 products, unless the environment says otherwise.

    It compiles one for every shape and would keep 1,024 of them: rows of a hundred lengths come to hold 0.6 GiB of
    kernels (measured in docs/finetuning.md). It reads the number at its first product, and only there.
    """
    os.environ.setdefault(_KERNEL_CACHE, str(_NUM_KERNELS))
