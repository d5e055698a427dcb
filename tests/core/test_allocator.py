"""Freed memory stays in the process, unless the user has said otherwise."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")

# Fills 256 MiB, frees them, and prints what the call returned and how much of them the process still holds.
_SCRIPT = """
import ctypes, re
from eabf_cli.core import allocator

def resident_mib():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

kept = {call}
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
before = resident_mib()
blocks = [libc.malloc(ctypes.c_size_t(32 << 20)) for _ in range(8)]
for block in blocks:
    ctypes.memset(block, 1, 32 << 20)
for block in blocks:
    libc.free(block)
{after}
print(kept, round(resident_mib() - before))
"""


def _run(call: str, after: str = "", **environment: str) -> tuple[str, int]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT.format(call=call, after=after)],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    kept, mib = done.stdout.split()
    return kept, int(mib)


def test_freed_blocks_stay_in_the_process() -> None:
    kept, mib = _run("allocator.keep_freed_memory()")

    assert kept == "True"
    assert mib > 200


def test_what_was_kept_can_be_given_back() -> None:
    # A block that stays in use at the heap's end, as later tensors do.
    give_back = "pinned = libc.malloc(ctypes.c_size_t(64)); allocator.give_back_freed_memory()"
    kept, mib = _run("allocator.keep_freed_memory()", give_back)

    assert kept == "True"
    assert mib < 50


def test_where_nothing_is_kept_the_heap_is_left_alone() -> None:
    program = "allocator.ctypes = None; allocator.give_back_freed_memory()"
    assert _run("None", program)[0] == "None"


def test_without_it_they_go_back() -> None:
    assert _run("None")[1] < 50


@pytest.mark.parametrize(
    "setting", [{"MALLOC_ARENA_MAX": "2"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}]
)
def test_the_users_own_settings_stand(setting: dict[str, str]) -> None:
    kept, mib = _run("allocator.keep_freed_memory()", **setting)

    assert kept == "False"
    assert mib < 50
