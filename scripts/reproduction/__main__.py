"""The paper's experiments in the small, on the demo model.

    python scripts/reproduction                          # run what is missing
    python scripts/reproduction --only extrapolation     # of one experiment

Every run is a file of its own in the folder of results, so that an interrupted series goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from cells import EXPERIMENTS
from running import run_missing

RESULTS = Path("docs/results/reproduction")


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(
        prog="reproduction", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"where the runs are kept ({RESULTS})")
    parser.add_argument("--only", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS))
    parser.add_argument("--workers", type=int, default=max(1, os.cpu_count() or 1), help="runs at a time")
    arguments = parser.parse_args()
    cells = [cell for name in arguments.only for cell in EXPERIMENTS[name]()]
    run_missing(cells, arguments.results, workers=arguments.workers)


if __name__ == "__main__":
    main()
