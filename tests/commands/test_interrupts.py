"""What a signal does to the command line before, or without, a training run that saves."""

from __future__ import annotations

import subprocess
import sys

import pytest

# The import of the command line, or a command, gets the signal and has something to clean.
_IN_IMPORT = """
import os, signal, sys
class Cli:
    def find_spec(self, name, path=None, target=None):
        if name == "eabf_cli.cli":
            os.kill(os.getpid(), signal.{name})
sys.meta_path.insert(0, Cli())
from eabf_cli.__main__ import run
run()
"""
_IN_COMMAND = """
import os, signal, sys
import click
from eabf_cli import cli
@cli.main.command()
def stopped():
    try:
        os.kill(os.getpid(), signal.{name})
    finally:
        click.echo("cleaned")
sys.argv = ["eabf", "stopped"]
from eabf_cli.__main__ import run
run()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(("program", "stdout"), [(_IN_IMPORT, ""), (_IN_COMMAND, "cleaned\n")])
def test_a_signal_cleans_up_and_ends_with_130(program: str, stdout: str, name: str) -> None:
    done = subprocess.run([sys.executable, "-c", program.format(name=name)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, stdout, "Interrupted.\n")
