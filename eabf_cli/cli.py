"""The `eabf` command: a table of its subcommands and the one error boundary."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Any

import click

from eabf_cli.commands.entropy import entropy
from eabf_cli.commands.eval import evaluate
from eabf_cli.commands.export import export
from eabf_cli.commands.finetune import finetune
from eabf_cli.commands.patch import patch
from eabf_cli.commands.summarize import summarize
from eabf_cli.core.errors import EabfError

INTERRUPTED = 130


class _Group(click.Group):
    """Turns expected errors into exit code 1 and an interrupt into 130; bugs keep their traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EabfError as error:
            if os.environ.get("EABF_DEBUG") == "1":
                raise
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt as interrupt:
            # What can go on says how.
            click.echo(f"Interrupted{f': {interrupt}' if str(interrupt) else '.'}", err=True)
            ctx.exit(INTERRUPTED)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(version("eabf-cli"), prog_name="eabf")
def main() -> None:
    """Extend a language model's context window with 100 samples (Entropy-Aware ABF).

    \b
    Examples:
      eabf patch --factor 4 --dry-run
      eabf finetune --samples 100 --factor 4
      eabf finetune -m HuggingFaceTB/SmolLM2-135M-Instruct --dataset long.jsonl -o extended
      eabf eval -m extended --text mydocs/
    """


main.add_command(entropy)
main.add_command(export)


main.add_command(evaluate)
main.add_command(finetune)
main.add_command(patch)
main.add_command(summarize)
