"""The other interpreter, which has transformers 4.57 (`make venv-457`; `.ci/run` makes it)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

PYTHON_457 = os.environ.get("EABF_TRANSFORMERS_457_PYTHON")
needs_457 = pytest.mark.skipif(
    not PYTHON_457,
    reason="one process has one transformers: 4.57 is in an environment of its own, which `make venv-457` makes "
    "and EABF_TRANSFORMERS_457_PYTHON names",
)


def run_457(script: str, root: Path, *arguments: str) -> str:
    """What a script prints there, with neither this package nor a network."""
    assert PYTHON_457 is not None
    environment = {**os.environ, "HF_HOME": str(root), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    run = subprocess.run(
        [PYTHON_457, "-c", script, *arguments],
        check=False,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=environment,
        cwd=root,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout
