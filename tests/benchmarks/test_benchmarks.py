"""The benchmark scripts run, and compare what they say they compare."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results").glob("*.json"))

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a script by its name; the modules are forgotten afterwards, since their names are everyday words."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for path in BENCHMARKS.glob("*.py"):
        if path.stem not in before:
            sys.modules.pop(path.stem, None)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a script with the processes that it starts for its sides in this one; returns its report."""

    def run_script(module: ModuleType, *arguments: object) -> dict[str, Any]:
        def in_this_process(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            assert command[:2] == [sys.executable, module.__file__]
            monkeypatch.setattr(sys, "argv", command[1:])
            options = module.parse_arguments()
            found = module.SIDES[options.side](options) if hasattr(options, "side") else module.measure_memory(options)
            return subprocess.CompletedProcess(command, 0, stdout=json.dumps(found))

        report = tmp_path / f"{module.__name__}-cpu.json"
        with monkeypatch.context() as patch:
            if module.__name__ != "startup":
                patch.setattr(subprocess, "run", in_this_process)
            patch.setattr(sys, "argv", [str(module.__file__), *map(str, arguments), "-o", str(report)])
            module.main()
        found: dict[str, Any] = json.loads(report.read_text())
        return found

    return run_script


def lines_of(table: ModuleType, folder: Path) -> list[list[str]]:
    """The cells of the table of all reports in a folder, without its head."""
    lines = table.table(sorted(folder.glob("*.json"))).splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:] if line.startswith("|")]


def test_overhead_is_that_of_the_method_on_the_same_weights(
    script: Callable[[str], ModuleType], run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from transformers import PreTrainedModel

    from eabf_cli import describe_patch

    module = script("overhead")
    calls: list[tuple[bool, int, int]] = []
    forward = PreTrainedModel.__call__

    def spy(model: Any, *arguments: Any, **options: Any) -> Any:
        if "logits_to_keep" in options:
            cached = options["past_key_values"].get_seq_length()
            calls.append((describe_patch(model) is not None, options["input_ids"].shape[1], cached))
        return forward(model, *arguments, **options)

    monkeypatch.setattr(PreTrainedModel, "__call__", spy)
    report = run(module, "--model", "tiny", "--lengths", 64, "--rounds", 1, "--steps", 8)

    # Two rounds, of which the first is not counted; the second goes the other way round.
    assert [(patched, cached) for patched, length, cached in calls if length == 64] == [
        (False, 0), (True, 0), (True, 0), (False, 0),
    ]  # fmt: skip
    # Each side decodes behind its own row.
    steps = [(patched, cached) for patched, length, cached in calls if length == 1]
    assert sorted(steps) == sorted(2 * [(patched, 64 + step) for patched in (False, True) for step in range(8)])
    (result,) = report["results"]
    assert result["forward"]["ratio"] == pytest.approx(result["forward"]["patched_s"] / result["forward"]["plain_s"])
    lines = lines_of(script("table"), tmp_path)
    assert [line[0] for line in lines] == ["overhead", "overhead"]
    assert [float(line[5]) for line in lines] == [
        pytest.approx(result[name]["ratio"], abs=5e-4) for name in ("forward", "decode")
    ]


def test_startup_runs_the_real_command_lines(
    script: Callable[[str], ModuleType], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("startup")
    started: list[list[str]] = []
    real_run = subprocess.run

    def spy(command: list[str], **options: Any) -> Any:
        started.append(command)
        return real_run(command, **options)

    monkeypatch.setattr(subprocess, "run", spy)
    report = run(module, "--rounds", 1)
    commands = module.commands(["hf"])
    assert started == 2 * list(commands.values())
    shown = real_run(commands["eabf --help"], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("Usage: ")
    seconds = {name: found["seconds"] for name, found in report["results"].items()}
    against = {line[3]: float(line[5]) for line in lines_of(script("table"), tmp_path)}
    assert against == {
        name: pytest.approx(seconds["eabf --help"] / seconds[name], abs=5e-4)
        for name in ("python -c pass", "hf --help")
    }


def test_startup_names_a_peer_that_is_not_there(script: Callable[[str], ModuleType]) -> None:
    with pytest.raises(SystemExit, match="no command 'no-such-command'"):
        script("startup").commands(["no-such-command"])


def test_evaluate_finds_the_losses_of_the_plain_way(
    script: Callable[[str], ModuleType], run: Run, tmp_path: Path
) -> None:
    sizes = ["--lengths", "128,640", "--documents", 3, "--trials", 5, "--target-tokens", 32, "--rounds", 1]
    report = run(script("evaluate"), *sizes)
    for side in report["sides"].values():
        for name in ("perplexity", "context_nll", "passkey"):
            assert list(side[name]) == ["128", "640"]
            assert None not in side[name].values()
        # 640 tokens are beyond the demo model's window; it was extended, so its passkeys are found.
        assert side["passkey"]["640"] > 0
    assert report["max_difference"] < 1e-4
    lines = lines_of(script("table"), tmp_path)
    assert {line[0] for line in lines} == {"evaluate"}
    assert lines[0][3] == "a forward pass a row"


def test_losses_of_different_lengths_are_not_compared(script: Callable[[str], ModuleType]) -> None:
    module = script("evaluate")
    ours, theirs = ({"perplexity": {"8": 2.0}, "context_nll": {length: 1.0}} for length in ("8", "16"))
    assert module.max_difference(ours, ours | {"context_nll": {"8": 1.5}}) == 0.5
    with pytest.raises(ValueError, match="context_nll"):
        module.max_difference(ours, theirs)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("entropy", ["--model", "tiny", "--lengths", 64, "--num-positions", 8, "--rounds", 1, "--device", "cpu"]),
        ("finetune", ["--model", "tiny", "--lengths", 64, "--rounds", 1, "--steps", 1, "--device", "cpu"]),
        ("summarize", ["--model", "eabf-tiny", "--lengths", 64, "--new-tokens", 4, "--rounds", 1]),
    ],
)
def test_another_benchmark_runs_and_is_in_the_table(
    name: str, sizes: list[object], script: Callable[[str], ModuleType], run: Run, tmp_path: Path
) -> None:
    run(script(name), *sizes)
    lines = lines_of(script("table"), tmp_path)
    assert {line[0] for line in lines} == {name}
    assert all(float(line[5]) > 0 for line in lines)


def test_the_table_has_every_kept_result_and_names_its_machine(script: Callable[[str], ModuleType]) -> None:
    shown = script("table").table(RESULTS)
    for path in RESULTS:
        assert f"| {path.stem.partition('-')[0]} " in shown
    machines = {json.loads(path.read_text())["machine"]["cpu"] for path in RESULTS}
    assert machines
    for cpu in machines:
        assert f"cpu {cpu}" in shown.split("\n\n")[1]


def test_an_overhead_is_the_ratio_that_was_measured_and_names_its_series(
    script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    """Seconds that were taken down from a printed table are rounded more than the ratio beside them."""
    found = {"plain_s": 0.01, "patched_s": 0.0107, "ratio": 1.068}
    report = {
        "machine": {"cpu": "a"},
        "model": "1b",
        "dtype": "bfloat16",
        "method": "eabf",
        "series": "second",
        "results": [{"length": 2_048, "forward": found, "decode": found}],
    }
    (tmp_path / "overhead.json").write_text(json.dumps(report))
    shown = script("table").table([tmp_path / "overhead.json"])
    assert shown.count("| 1.068 |") == 2
    assert shown.count("2,048 tokens (second series)") == 2


def test_a_file_of_no_benchmark_is_named(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"other\.json.*overhead"):
        script("table").table([tmp_path / "other.json"])
