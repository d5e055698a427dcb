"""`python -m eabf_cli`, and the command `eabf`."""

from __future__ import annotations

import sys


def run() -> None:
    """Run the command line; an interrupt while it is imported ends like any other."""
    try:
        from eabf_cli.cli import main

        main(prog_name="eabf")
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        sys.exit(130)


if __name__ == "__main__":
    run()
