"""`python -m eabf_cli`, and the command `eabf`."""

from __future__ import annotations

import signal
import sys
from types import FrameType


def run() -> None:
    """Run the command line; SIGTERM ends it as Ctrl-C does, and so does either while it is imported."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        from eabf_cli.cli import main

        main(prog_name="eabf")
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(130)


def _interrupt(number: int, frame: FrameType | None) -> None:
    # What cleans up after an interrupt would be skipped by the signal's own way to end a process.
    raise KeyboardInterrupt


if __name__ == "__main__":
    run()
