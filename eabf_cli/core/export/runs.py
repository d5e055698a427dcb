"""Which run `eabf export` takes when none is named, and what its output is called."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

from eabf_cli.core.errors import CheckpointError
from eabf_cli.core.run_record import RUN_FILE, read_run_record
from eabf_cli.core.sources import ADAPTER_FOLDER

logger = logging.getLogger(__name__)

RUNS_FOLDER = Path("eabf-runs")


def newest_run() -> str:
    """The finetune run below `eabf-runs/` that was finished last, which is said.

    Raises:
        CheckpointError: there is none.
    """
    finished = {}
    for path in RUNS_FOLDER.glob(f"*/{RUN_FILE}"):
        with suppress(CheckpointError):
            record = read_run_record(path.parent) or {}
            if record.get("command") == "finetune":
                finished[path.parent] = str(record.get("finished"))
    if not finished:
        raise CheckpointError(
            f"no finished finetune run below {RUNS_FOLDER.resolve()}: name a run, a checkpoint or a Hub id, "
            "or make one with eabf finetune"
        )
    newest = max(finished, key=lambda folder: (finished[folder], folder.stat().st_mtime))
    logger.info("No source given: exporting the newest finished run %s. Name another one as an argument.", newest)
    return str(newest)


def default_output(source: str, compat: str | None) -> Path:
    """`eabf-runs/NAME-export`, NAME made from the source's; a compatible form's name ends with it."""
    folder = Path(source).expanduser()
    if folder.exists():
        folder = folder.resolve()
    name = folder.name.removesuffix(".gguf") or "model"
    if folder.exists() and name == ADAPTER_FOLDER:
        name = folder.parent.name
    elif folder.exists() and name.startswith("checkpoint-"):
        name = f"{folder.parent.name}-{name}"
    return RUNS_FOLDER / (f"{name}-export" if compat is None else f"{name}-export-{compat}")
