"""How a command line ended, as the tests of commands ask for it."""

from __future__ import annotations

import json
from typing import Any

from click.testing import Result


def succeeded(result: Result) -> Result:
    """The same result, whose exit code has to be 0."""
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result


def printed(result: Result) -> dict[str, Any]:
    """The one JSON document that a command printed."""
    value: dict[str, Any] = json.loads(succeeded(result).stdout)
    return value


def assert_told(result: Result, *said: str, exit_code: int = 1) -> None:
    """An expected failure: nothing on stdout, and all of `said` on stderr."""
    assert result.exit_code == exit_code, (result.stderr, result.exception)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    assert [part for part in said if part not in result.stderr] == [], result.stderr
