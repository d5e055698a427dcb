"""One table of benchmark reports: every line is a ratio to a peer, or to the plain way, of one run.

    python benchmarks/table.py                            # what is kept in benchmarks/results/
    python benchmarks/table.py build/benchmarks/*.json    # what `make bench` wrote

A report's kind is the first word of its file name. Ratios are ours / theirs; below 1 is better.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import common

RESULTS = Path(__file__).parent / "results"
HEADER = ("benchmark", "case", "ours", "against", "theirs", "ratio", "target", "machine")


@dataclass(frozen=True)
class Line:
    """A measured value and its peer's, in the same unit.

    Attributes:
        benchmark: the script that measured it.
        case: what was run: model, length, ...
        ours, theirs: both values.
        against: what theirs is.
        unit: of both values.
        target: what the ratio, or ours, should be at most; empty without one.
        measured_ratio: where the values are rounded more than their ratio was; None divides them.
    """

    benchmark: str
    case: str
    ours: float
    against: str
    theirs: float
    unit: str = "s"
    target: str = ""
    measured_ratio: float | None = None


def read_overhead(report: dict[str, Any]) -> Iterator[Line]:
    for result in report["results"]:
        for name in ("forward", "decode"):
            found = result[name]
            case = f"{name}, {report['model']} {report['dtype']}, {report['method']}, {result['length']:,} tokens"
            if "series" in report:
                case += f" ({report['series']} series)"
            seconds = (found["patched_s"], "not patched", found["plain_s"])
            yield Line("overhead", case, *seconds, target="1.02", measured_ratio=found["ratio"])


def read_startup(report: dict[str, Any]) -> Iterator[Line]:
    (name, ours), *others = report["results"].items()
    for other, theirs in others:
        yield Line("startup", name, ours["seconds"], other, theirs["seconds"], target=f"{report['target_s']} s")


def read_evaluate(report: dict[str, Any]) -> Iterator[Line]:
    ours, plain = report["sides"]["eabf"], report["sides"]["plain"]
    case = f"{report['model']} {report['dtype']}, up to {max(report['lengths']):,} tokens"
    yield Line("evaluate", case, ours["seconds"], "a forward pass a row", plain["seconds"])
    if ours["peak_memory_gib"] and plain["peak_memory_gib"]:
        yield Line("evaluate", case, ours["peak_memory_gib"], "the same", plain["peak_memory_gib"], "GiB")


def read_entropy(report: dict[str, Any]) -> Iterator[Line]:
    against = {"plain": "forward, nothing measured", "eager": "eager attention weights"}
    for result in report["results"]:
        sides = result["sides"]
        for ours in ("chosen", "all"):
            for theirs in against:
                if ours in sides and theirs in sides:
                    case = f"{ours} positions, {report['model']} {report['dtype']}, {result['length']:,} tokens"
                    seconds = (sides[side]["seconds"] for side in (ours, theirs))
                    yield Line("entropy", case, next(seconds), against[theirs], next(seconds))


def read_finetune(report: dict[str, Any]) -> Iterator[Line]:
    for result in report["results"]:
        case = f"a step, {report['model']} {report['dtype']}, {result['length']:,} tokens"
        ours = result["sides"].pop("eabf")
        for name, theirs in result["sides"].items():
            against = "the plain Trainer" if name == "plain" else name
            yield Line("finetune", case, median(ours["step_s"]), against, median(theirs["step_s"]))
            if ours["peak_memory_gib"] and theirs["peak_memory_gib"]:
                yield Line("finetune", case, ours["peak_memory_gib"], against, theirs["peak_memory_gib"], "GiB")


def read_loss(report: dict[str, Any]) -> Iterator[Line]:
    for result in report["results"]:
        ours, theirs = (result["sides"][side]["seconds"] for side in ("eabf", "plain"))
        case = f"its loss alone, {report['model']} {report['dtype']}, {result['length']:,} tokens"
        yield Line("loss", case, ours, "transformers' loss of all logits", theirs)


def read_summarize(report: dict[str, Any]) -> Iterator[Line]:
    for result in report["results"]:
        case = f"{report['model']} {report['dtype']}, {result['length']:,} + {report['new_tokens']} tokens"
        ours = result["sides"].pop("eabf")
        for name, theirs in result["sides"].items():
            yield Line("summarize", case, ours["total_s"], name, theirs["total_s"])
            if ours["peak_memory_gib"] and theirs["peak_memory_gib"]:
                yield Line("summarize", case, ours["peak_memory_gib"], name, theirs["peak_memory_gib"], "GiB")


def read_memory(report: dict[str, Any]) -> Iterator[Line]:
    """The estimates farthest from what was measured, on either side."""
    rows = sorted(report["rows"], key=lambda row: float(row["estimate_mib"] / row["measured_mib"]))
    for name, row in {"lowest": rows[0], "highest": rows[-1]}.items():
        case = f"estimate for {row['model']} {row['tuning']}, {row['seq_len']:,} tokens"
        ours, theirs = row["estimate_mib"] / 1024, row["measured_mib"] / 1024
        yield Line("memory", case, ours, f"measured, {name} ratio of {len(rows)}", theirs, "GiB")


READERS: dict[str, Callable[[dict[str, Any]], Iterator[Line]]] = {
    "overhead": read_overhead,
    "startup": read_startup,
    "evaluate": read_evaluate,
    "entropy": read_entropy,
    "finetune": read_finetune,
    "loss": read_loss,
    "summarize": read_summarize,
    "memory": read_memory,
}


def table(paths: list[Path]) -> str:
    """The reports as one Markdown table, with their machines below it."""
    machines: list[str] = []
    rows = [HEADER, tuple("---" for _ in HEADER)]
    for path in sorted(paths, key=lambda path: (list(READERS).index(kind_of(path)), path.name)):
        report = json.loads(path.read_text(encoding="utf-8"))
        machine = common.machine_line(report["machine"])
        if machine not in machines:
            machines.append(machine)
        rows += [cells(line, machines.index(machine) + 1) for line in READERS[kind_of(path)](report)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    notes = [f"- Machine {number}: {machine}" for number, machine in enumerate(machines, 1)]
    return "\n".join([*lines, "", *notes])


def cells(line: Line, machine: int) -> tuple[str, ...]:
    """One line of the table."""
    benchmark, case, ours, against, theirs, unit, target, ratio = astuple(line)
    ratio = ours / theirs if ratio is None else ratio
    values = (f"{ours:.3g} {unit}", against, f"{theirs:.3g} {unit}", f"{ratio:.3f}")
    return (benchmark, case, *values, target and f"at most {target}", str(machine))


def kind_of(path: Path) -> str:
    """Which benchmark wrote a file.

    Raises:
        SystemExit: none did.
    """
    kind = path.stem.partition("-")[0]
    if kind not in READERS:
        raise SystemExit(f"{path}: no benchmark has this name; known: {', '.join(READERS)}")
    return kind


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("reports", nargs="*", type=Path, help="reports in JSON (default: benchmarks/results/*.json)")
    print(table(parser.parse_args().reports or sorted(RESULTS.glob("*.json"))))


if __name__ == "__main__":
    main()
