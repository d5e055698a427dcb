"""Freed memory stays in the process, unless the user has said otherwise."""

import os
import platform
import subprocess
import sys

import pytest

from eabf_cli.core import allocator

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


# Products of ever other shapes, and what is held of them when the heap's free pages are given back.
_SHAPES = """
import ctypes, re, sys
import torch
from eabf_cli.core import allocator
from eabf_cli.core.devices import has_fast_bfloat16

def resident_mib():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

if sys.argv[1] == "limited":
    allocator.limit_kept_kernels()
weight = torch.ones(64, 64, dtype=torch.bfloat16)
before = resident_mib()
for length in range(100, 700):
    torch.nn.functional.linear(torch.ones(length, 64, dtype=torch.bfloat16), weight)
ctypes.CDLL(None).malloc_trim(0)
print(round(resident_mib() - before), has_fast_bfloat16(torch.device("cpu")))
"""


def _mib_of_shapes(mode: str, **environment: str) -> tuple[int, bool]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "ONEDNN_"))}
    done = subprocess.run(
        [sys.executable, "-c", _SHAPES, mode],
        env=clean | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    mib, is_fast = done.stdout.split()
    return int(mib), is_fast == "True"


def test_fewer_kernels_of_other_shapes_are_kept() -> None:
    (every, is_fast), (limited, _) = _mib_of_shapes("unlimited"), _mib_of_shapes("limited")
    if is_fast:
        assert limited < 0.8 * every
        # What the environment says stands.
        assert _mib_of_shapes("limited", ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024")[0] > 1.2 * limited
    else:
        # Such a CPU need not compile kernels for these products; a smaller cache holds no more anyway.
        assert limited < every + 20


def test_the_environment_decides_how_many_kernels_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(name, "77")
    allocator.limit_kept_kernels()
    assert os.environ[name] == "77"
    monkeypatch.delenv(name)
    allocator.limit_kept_kernels()
    assert os.environ[name] == "128"


def test_without_it_they_go_back() -> None:
    assert _run("None")[1] < 50


@pytest.mark.parametrize(
    "setting", [{"MALLOC_ARENA_MAX": "2"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}]
)
def test_the_users_own_settings_stand(setting: dict[str, str]) -> None:
    kept, mib = _run("allocator.keep_freed_memory()", **setting)

    assert kept == "False"
    assert mib < 50
