"""What fits: memory limits read from faked systems, the choice of a tuning, and the messages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eabf_cli.core.device_memory import (
    USABLE_SHARE,
    InsufficientMemoryError,
    available_host_memory,
    available_memory,
    is_out_of_memory,
)
from eabf_cli.core.finetune.memory import GIB, PARTS, MemoryEstimate
from eabf_cli.core.finetune.memory_plan import (
    MemorySettings,
    choose_tuning,
    explain_out_of_memory,
    fits_on,
    format_plan,
    plan_to_dict,
    run_memory_explained,
)

MIB = 2**20
CPU = torch.device("cpu")


def of_size(tuning: str, gib: float, *, micro_batch: int = 1) -> MemoryEstimate:
    parts = dict.fromkeys(PARTS, 0) | {"weights": round(gib * GIB)}
    return MemoryEstimate(tuning=tuning, seq_len=16_384, micro_batch=micro_batch, moment="loss", **parts)


ESTIMATES = {"full": of_size("full", 100), "lora": of_size("lora", 20), "qlora": of_size("qlora", 10)}


# --- What a device has ------------------------------------------------------------------------------------


def fake_system(root: Path, *, available_mib: int = 8000, groups: str = "0::/\n", **files: str) -> Path:
    """A root folder with `/proc`, and other files given as path (`/` for `__`) and content."""
    proc = root / "proc" / "self"
    proc.mkdir(parents=True)
    (root / "proc" / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {available_mib * 1024} kB\nHuge: 0\n")
    (proc / "status").write_text("Name:\tpython\nVmHWM:\t  999999 kB\nVmRSS:\t  102400 kB\n")
    (proc / "cgroup").write_text(groups)
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def group(folder: Path, version: int, limit: str, used_mib: int, cache_mib: int = 0) -> None:
    """One control group's files."""
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used_mib * MIB}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cache_mib * MIB}\n")


def test_without_limits_it_is_what_the_kernel_calls_available_and_what_the_process_has(tmp_path: Path) -> None:
    assert available_host_memory(fake_system(tmp_path)) == 8100 * MIB


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_control_group_counts(tmp_path: Path, version: int) -> None:
    groups = "0::/user/job\n" if version == 2 else "5:cpu:/elsewhere\n4:memory,hugetlb:/user/job\n0::/\n"
    root = fake_system(tmp_path, groups=groups)
    base = root / "sys" / "fs" / "cgroup" / ("memory" if version == 1 else "")
    group(base / "user" / "job", version, str(9000 * MIB), used_mib=1000)
    group(base / "user", version, str(6000 * MIB), used_mib=4000, cache_mib=500)
    group(base, version, "max" if version == 2 else str(2**63 - 4096), used_mib=0)
    # 6000 - 4000 + 500 in the group above, and 100 that the process has.
    assert available_host_memory(root) == 2600 * MIB


def test_a_container_sees_its_own_group_under_a_path_of_the_host(tmp_path: Path) -> None:
    root = fake_system(tmp_path, groups="0::/docker/0123abcd\n")
    group(root / "sys" / "fs" / "cgroup", 2, str(3000 * MIB), used_mib=1000)
    assert available_host_memory(root) == 2100 * MIB


def test_a_full_group_has_nothing_left_but_what_the_process_holds(tmp_path: Path) -> None:
    root = fake_system(tmp_path)
    group(root / "sys" / "fs" / "cgroup", 2, str(100 * MIB), used_mib=120)
    assert available_host_memory(root) == 100 * MIB


def test_this_machine_has_memory() -> None:
    assert 2**28 < available_memory(CPU) < 2**46


# --- The choice -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("available", "expected"),
    [
        (112, ("full", "lora", "qlora")),
        (111, ("lora", "qlora")),
        (23, ("lora", "qlora")),
        (22, ("qlora",)),
        (12, ("qlora",)),
        (11, ()),
    ],
)
def test_the_strongest_that_fits_in_nine_tenths(available: int, expected: tuple[str, ...]) -> None:
    assert fits_on(ESTIMATES, available * GIB) == expected
    if expected:
        choice = choose_tuning(ESTIMATES, available * GIB, can_quantize=True)
        assert choice.tuning == expected[0]
        assert (
            f"{expected[0]} needs {ESTIMATES[expected[0]].total / GIB:.1f} GiB of {available:.1f} GiB" in choice.reason
        )
        assert "\n" not in choice.reason
        for name in ESTIMATES:
            assert (f"{name} (" in choice.reason) == (name not in expected)
    else:
        with pytest.raises(InsufficientMemoryError, match=r"no tuning fits into 90% of the 11\.0 GiB"):
            choose_tuning(ESTIMATES, available * GIB, can_quantize=True)


def test_qlora_is_not_chosen_where_it_cannot_run() -> None:
    with pytest.raises(InsufficientMemoryError) as raised:
        choose_tuning(ESTIMATES, 15 * GIB, can_quantize=False)
    message = str(raised.value)
    assert "full (100.0 GiB), lora (20.0 GiB) at 16,384 tokens" in message
    assert "--tuning qlora (pip install bitsandbytes)" in message
    assert "--micro-batch-size" not in message
    assert message.count("\n") <= 2


def test_a_smaller_micro_batch_is_advised_where_there_is_one() -> None:
    estimates = {"full": of_size("full", 100, micro_batch=4)}
    with pytest.raises(InsufficientMemoryError, match="--micro-batch-size 1, a shorter --max-length, --pose, more dev"):
        choose_tuning(estimates, GIB, can_quantize=True)


# --- What people read -------------------------------------------------------------------------------------


def test_the_plan_is_a_table_of_parts_and_tunings() -> None:
    lines = format_plan(plan_to_dict(ESTIMATES, 24 * GIB, device="cuda:0")).splitlines()
    assert lines[0] == "Peak memory in GiB at 16,384 tokens, the longest row; cuda:0 has 24.0 GiB available"
    assert lines[1].split() == ["full", "lora", "qlora"]
    assert lines[2].split() == ["weights", "100.00", "20.00", "10.00"]
    assert lines[-3].split() == ["total", "100.00", "20.00", "10.00"]
    assert lines[-2].split() == ["highest", "at", "loss", "loss", "loss"]
    assert lines[-1].split() == ["fits", "no", "yes", "yes"]
    assert len({len(line) for line in lines[1:]}) == 1
    assert [line[: len("one layer's working set")].strip() for line in lines[2:-3]] == list(PARTS.values())


def test_the_plan_in_json() -> None:
    plan = json.loads(json.dumps(plan_to_dict(ESTIMATES, 24 * GIB, device="cpu")))
    assert plan["fits"] == ["lora", "qlora"]
    assert plan["seq_len"] == 16_384
    assert plan["available_gib"] == 24
    assert plan["usable_share"] == USABLE_SHARE
    assert plan["tunings"]["lora"]["total_gib"] == 20


# --- Out of memory ----------------------------------------------------------------------------------------


def test_only_what_is_not_in_use_is_advised() -> None:
    worst = MemorySettings(tuning="full", checkpointing=False, micro_batch=2, seq_len=16_384)
    message = explain_out_of_memory(worst, peak_bytes=23 * GIB, device="cuda:0", device_bytes=24 * GIB)
    assert "out of memory on cuda:0: the run held 23.0 GiB of 24.0 GiB (full, 2 x 16,384 tokens)" in message
    advice = message.split(": ")[-1]
    assert advice == (
        "--activation-checkpointing, --micro-batch-size 1, --tuning lora, --tuning qlora, --pose, "
        "a --max-length below 16,384, more devices (accelerate launch with FSDP)"
    )
    best = MemorySettings(tuning="qlora", checkpointing=True, micro_batch=1, seq_len=16_384, uses_pose=True)
    advice = explain_out_of_memory(best, peak_bytes=GIB, device="cpu", device_bytes=GIB).split(": ")[-1]
    assert advice == "a --max-length below 16,384, more devices (accelerate launch with FSDP)"


def test_a_refused_allocation_is_recognised() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(refused.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(OSError("Cannot allocate memory"))


def test_a_refused_allocation_becomes_one_message() -> None:
    run = MemorySettings(tuning="lora", checkpointing=True, micro_batch=1, seq_len=512)
    refusal = pytest.raises(InsufficientMemoryError, match="out of memory on cpu: the run held")
    with refusal as raised, run_memory_explained(run, CPU):
        torch.empty(2**60, dtype=torch.uint8)
    assert isinstance(raised.value.__cause__, RuntimeError)
    with pytest.raises(RuntimeError, match="another"), run_memory_explained(run, CPU):
        raise RuntimeError("another")
