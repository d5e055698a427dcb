"""Runs `eabf` command lines in processes of their own, at the price of one import of torch for all of them.

The server imports the package and then forks for every command, so that a test can kill a command at a chosen
moment, or read the peak memory of one.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        returncode: the exit code, or minus the signal that ended it.
        peak_mib: largest resident memory of its process.
    """

    returncode: int
    stdout: str
    stderr: str
    peak_mib: float

    @property
    def was_killed(self) -> bool:
        return self.returncode == -signal.SIGKILL


class ForkServer:
    """One process with everything imported, forked for each command."""

    def __init__(self, *, environment: Mapping[str, str] | None = None, prepare: str | None = None) -> None:
        """Start it.

        Args:
            environment: goes over this process's; libraries read much of it only once.
            prepare: a module to import before the first command.
        """
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server", *([prepare] if prepare is not None else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
            env=os.environ | (environment or {}),
        )

    def run(
        self,
        arguments: Sequence[object],
        *,
        cwd: Path,
        kill_at: int | None = None,
        kill_where: str | None = None,
        signal_number: int = signal.SIGKILL,
        refuse_where: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Outcome:
        """Run `eabf ARGUMENTS` in `cwd`.

        Args:
            kill_at: send itself the signal just before its n-th change of the file system below `cwd`.
            kill_where: a regular expression that the changed path must contain to be counted.
            refuse_where: the first change of a path that this finds fails as on a full disk.
            environment: of this command alone, over the server's.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {
            "arguments": list(map(str, arguments)),
            "cwd": str(cwd),
            "kill_at": kill_at,
            "kill_where": kill_where or "",
            "signal": int(signal_number),
            "refuse_where": refuse_where,
            "environment": dict(environment or {}),
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


def _kill_before_change(number: int, where: str, below: str, signal_number: int) -> None:
    """Send this process a signal just before its n-th change of a file below a folder."""
    _before_change(number, where, below, lambda: os.kill(os.getpid(), signal_number))


def _refuse_change(where: str, below: str) -> None:
    def refuse() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _before_change(1, where, below, refuse)


def _before_change(number: int, where: str, below: str, act: Callable[[], None]) -> None:
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "open":
            changes = isinstance(arguments[2], int) and bool(arguments[2] & _WRITES)
        else:
            changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
        if not changes or not isinstance(arguments[0], str | os.PathLike):
            return
        # Changes through a folder's descriptor (as rmtree makes them) come as names without a folder.
        path = os.path.join(below, os.fspath(arguments[0]))
        if path.startswith(below) and re.search(where, path):
            seen += 1
            if seen == number:
                act()

    sys.addaudithook(hook)


def _run_command(request: dict[str, Any]) -> None:
    """Become one command; does not return."""
    from eabf_cli.cli import main

    os.chdir(request["cwd"])
    os.environ.update(request["environment"])
    if request["kill_at"] is not None:
        _kill_before_change(request["kill_at"], request["kill_where"], request["cwd"], request["signal"])
    if request["refuse_where"] is not None:
        _refuse_change(request["refuse_where"], request["cwd"])
    sys.argv = ["eabf", *request["arguments"]]
    main(request["arguments"])


def _fork(request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        pid = os.fork()
        if pid == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            code = 1
            try:
                _run_command(request)
            except SystemExit as ended:
                code = int(ended.code or 0)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status, usage = os.wait4(pid, 0)
        out.seek(0)
        err.seek(0)
        peak = usage.ru_maxrss / (2**10 if sys.platform == "linux" else 2**20)
        return {
            "returncode": os.waitstatus_to_exitcode(status),
            "stdout": out.read(),
            "stderr": err.read(),
            "peak_mib": peak,
        }


def _serve() -> None:
    import torch

    import eabf_cli.core.entropy.run
    import eabf_cli.core.export.exporting
    import eabf_cli.core.finetune.run
    import eabf_cli.core.patch_checkpoint  # noqa: F401

    for module in sys.argv[1:]:
        importlib.import_module(module)
    # The models are tiny, and threads would not survive a fork.
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        answers.write(json.dumps(_fork(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
