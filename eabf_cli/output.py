"""The one writer: results go to stdout, the conversation goes to stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from eabf_cli.core.errors import EabfError
from eabf_cli.core.processes import is_main_process

_verbosity = 0


def set_verbosity(*, quiet: bool, verbose: bool) -> None:
    """Choose how much is said on stderr, and route the package's log there."""
    global _verbosity
    _verbosity = -1 if quiet or not is_main_process() else int(verbose)
    package = logging.getLogger("eabf_cli")
    package.handlers = [_Conversation()]
    package.setLevel(logging.INFO)
    package.propagate = False


def is_interactive() -> bool:
    """Whether progress bars make sense."""
    return _verbosity >= 0 and sys.stderr.isatty()


def result(data: dict[str, Any], text: str, *, as_json: bool) -> None:
    """Print a command's result: one JSON document, or text for people."""
    with _failures_told():
        click.echo(json.dumps(data, indent=2, ensure_ascii=False, default=str) if as_json else text)


def piece(text: str) -> None:
    """Print a part of a result that is still being made, without a line end."""
    with _failures_told():
        click.echo(text, nl=False)


def status(message: str) -> None:
    """Say what is going on."""
    if _verbosity >= 0:
        click.echo(message, err=True)


def detail(message: str) -> None:
    """Say what only `--verbose` wants to know."""
    if _verbosity > 0:
        click.echo(message, err=True)


def warn(message: str) -> None:
    """Say what the user should not miss; `--quiet` does not silence it."""
    if is_main_process():
        click.echo(click.style("warning: ", fg="yellow") + message, err=True)


def quiet_libraries() -> None:
    """Keep the libraries' own chatter and bars off stderr; call it before anything imports them."""
    # Read when datasets is imported.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "0" if is_interactive() else "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    if not is_interactive():
        # transformers shows some bars whatever its settings say; tqdm reads this when it is imported.
        os.environ.setdefault("TQDM_DISABLE", "1")
    # bitsandbytes, which peft imports where it is installed, misses an optional kernel.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # accelerate imports DeepSpeed where it is installed, and that logs to stdout.
    logging.getLogger("DeepSpeed").addFilter(_diverted)
    import huggingface_hub.utils
    import transformers

    if _verbosity <= 0:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        huggingface_hub.utils.logging.set_verbosity_error()
        warnings.filterwarnings("ignore", module="torch|transformers|accelerate|peft")
    if not is_interactive():
        huggingface_hub.utils.disable_progress_bars()


@contextmanager
def prints_on_stderr() -> Iterator[None]:
    """Send to stderr what libraries, and the compilers that they start, print to stdout meanwhile."""
    if sys.stdout is None:  # closed by the caller
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _diverted(record: logging.LogRecord) -> bool:
    """Take a library's log record for the conversation; never lets its own handlers have it."""
    show = warn if record.levelno >= logging.ERROR else detail
    show(record.getMessage())
    return False


@contextmanager
def _failures_told() -> Iterator[None]:
    """Around what goes to stdout: a full disk is one message; a reader that has gone is left to click.

    Raises:
        EabfError: stdout cannot be written.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        # Else the interpreter tries once more when it ends, and tells that in its own way.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise EabfError(f"standard output cannot be written: {error.strerror or error}") from error


class _Conversation(logging.Handler):
    """Hands log records of this package to the functions above."""

    def emit(self, record: logging.LogRecord) -> None:
        show = warn if record.levelno >= logging.WARNING else status
        show(record.getMessage())
