"""`python -m eabf_cli`."""

from eabf_cli.cli import main

main(prog_name="eabf")
