"""How long `eabf --help` takes, beside Python itself and the command lines of other packages.

    python benchmarks/startup.py --rounds 20 -o benchmarks/results/startup-cpu.json
    python benchmarks/startup.py --peers hf,accelerate,transformers

Whole processes, one after the other and in turns, their output thrown away: what a person waits. The first round, which
reads the files into the system's cache, is not counted. A peer is a command beside this interpreter or on the PATH.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import common

OURS = "eabf --help"
PYTHON = "python -c pass"
TARGET_S = 0.5


def main() -> None:
    options = parse_arguments()
    seconds = run_in_turns(commands(options.peers), options.rounds)
    results = {name: {"seconds": median(found), "rounds_s": found} for name, found in seconds.items()}
    report = {"machine": common.machine("cpu"), "rounds": options.rounds, "target_s": TARGET_S, "results": results}
    common.publish(report, options, table(report))


def parse_arguments() -> argparse.Namespace:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], formatter_class=formatter)
    parser.add_argument("--peers", type=lambda text: text.split(","), default="hf", metavar="LIST")
    parser.add_argument("--rounds", type=int, default=10, help="processes of each command, in turns")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("-o", "--output", type=Path, help="write the report as JSON to this file")
    return parser.parse_args()


def commands(peers: list[str]) -> dict[str, list[str]]:
    """What is run, by its name in the report."""
    found = {OURS: [sys.executable, "-m", "eabf_cli", "--help"], PYTHON: [sys.executable, "-c", "pass"]}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    for name in peers:
        command = shutil.which(name, path=path)
        if command is None:
            raise SystemExit(f"there is no command {name!r}: leave it out of --peers")
        found[f"{name} --help"] = [command, "--help"]
    return found


def run_in_turns(commands: dict[str, list[str]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each command's processes."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, command in commands.items():
            started = time.perf_counter()
            subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
            took = time.perf_counter() - started
            if number:
                seconds[name].append(took)
            print(f"{f'round {number}' if number else 'not counted'}, {name}: {took:.3f} s", file=sys.stderr)
    return seconds


def table(report: dict[str, Any]) -> str:
    """The report for a person: a ratio above 1 says that the command takes longer than ours."""
    ours = report["results"][OURS]["seconds"]
    width = max(map(len, report["results"]))
    lines = [
        common.machine_line(report["machine"]),
        f"{'command':<{width}} {'seconds':>8} {'fastest':>8} {'to ours':>8}",
    ]
    for name, found in report["results"].items():
        seconds = found["seconds"]
        lines.append(f"{name:<{width}} {seconds:>8.3f} {min(found['rounds_s']):>8.3f} {seconds / ours:>8.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
