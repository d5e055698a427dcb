"""The paper's experiments in the small, on the demo model.

    python scripts/reproduction                          # run what is missing, then write the documents
    python scripts/reproduction --only extrapolation     # of one experiment
    python scripts/reproduction --report                 # write the documents from what is there

Every run is a file of its own in the folder of results, so that an interrupted series goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from cells import EXPERIMENTS
from document import PAPER, experiment_cells, write_document
from running import run_missing
from study_document import write_study

RESULTS = Path("docs/results/reproduction")
_CHOSEN = ("tuned", "confirmation")


def main() -> None:
    """Run what is missing, and write docs/reproduction.md and docs/study.md."""
    parser = argparse.ArgumentParser(
        prog="reproduction", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"where the runs are kept ({RESULTS})")
    parser.add_argument(
        "--only", nargs="+", choices=[*EXPERIMENTS, *_CHOSEN], default=list(PAPER), help=f"({', '.join(PAPER)})"
    )
    parser.add_argument("--workers", type=int, default=max(1, os.cpu_count() or 1), help="runs at a time")
    parser.add_argument("--report", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    if not arguments.report:
        # What is chosen by other runs comes behind them.
        for name in sorted(arguments.only, key=[*EXPERIMENTS, *_CHOSEN].index):
            run_missing(experiment_cells(name, arguments.results), arguments.results, workers=arguments.workers)
    write_document(arguments.results)
    write_study(arguments.results)


if __name__ == "__main__":
    main()
