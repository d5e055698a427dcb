"""The folder of a comparison: its settings first, what is measured while it goes on, the result last."""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eabf_cli.core.errors import CheckpointError, OutputExistsError
from eabf_cli.core.evals.compare_plan import ComparePlan
from eabf_cli.core.evals.compare_settings import CompareConfig
from eabf_cli.core.evals.report import RESULT_FILE
from eabf_cli.core.evals.scored_model import ScoredModel
from eabf_cli.core.files import check_target, disk_errors_explained, read_json, write_json
from eabf_cli.core.run_record import RUN_FILE
from eabf_cli.core.run_settings import SETTINGS_FILE, check_settings, in_json_form, write_settings

logger = logging.getLogger(__name__)

RUNS_FOLDER = "runs"
_MEASURED_FOLDER = "measured"
# They change what is written or shown, not what is measured; the texts' hash stands for where they come from.
_FREE_RUN_SETTINGS = ("output", "overwrite", "dry_run", "show_progress", "text", "dataset", "dataset_split")


def check_resumable(config: CompareConfig) -> None:
    """Refuse to resume where nothing was begun.

    Raises:
        CheckpointError: there is nothing to resume.
    """
    folder = config.run.output
    if config.resume and folder is not None and not (folder / SETTINGS_FILE).is_file():
        raise CheckpointError(f"folder {folder} holds no unfinished comparison: leave --resume out to start one there")


class CompareFolder:
    """Keeps what a comparison has measured, so that it can go on after an interruption.

    Nothing is written before the first measurement or training run begins.
    """

    def __init__(self, plan: ComparePlan, folder: Path) -> None:
        """Check the folder.

        `is_open` tells whether the folder is there and this comparison's.

        Raises:
            OutputExistsError: it is not empty and neither to be resumed nor overwritten.
            InvalidConfigError: the comparison in it was started with other settings.
        """
        self.folder = folder
        self._settings = _settings(plan)
        self.is_open = False
        if plan.config.resume:
            check_settings(folder, self._settings, kind="comparison")
            self.is_open = True
            return
        is_unfinished = (folder / SETTINGS_FILE).is_file() and not (folder / RUN_FILE).is_file()
        if is_unfinished and not plan.config.run.overwrite:
            raise OutputExistsError(
                f"comparison {folder} is not finished: go on with --resume -o {folder}, or start anew with --overwrite"
            )
        check_target(
            folder, overwrite=plan.config.run.overwrite, sources=(plan.source.folder, *plan.measuring.texts.files)
        )

    def finished(self) -> dict[str, Any] | None:
        """The result of the comparison to be resumed if it is finished, or None."""
        if not (self.is_open and (self.folder / RUN_FILE).is_file() and (self.folder / RESULT_FILE).is_file()):
            return None
        logger.warning("comparison %s is finished already: nothing to resume", self.folder)
        return read_json(self.folder / RESULT_FILE)

    def open(self) -> None:
        """Make the folder, in place of what may be overwritten."""
        if self.is_open:
            return
        with disk_errors_explained(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            write_settings(self.folder, self._settings)
        self.is_open = True

    def run_folder(self, name: str, seed: int) -> Path:
        """Where a contender is finetuned."""
        return self.folder / RUNS_FOLDER / f"{name}-seed{seed}"

    def kept(self, name: str) -> ScoredModel | None:
        """What was measured under this name before an interruption."""
        path = self.folder / _MEASURED_FOLDER / f"{name}.json"
        return ScoredModel.from_dict(read_json(path)) if path.is_file() else None

    def keep(self, name: str, scored: ScoredModel) -> None:
        """Keep a measurement for the case of an interruption."""
        self.open()
        with disk_errors_explained(self.folder):
            (self.folder / _MEASURED_FOLDER).mkdir(exist_ok=True)
            write_json(self.folder / _MEASURED_FOLDER / f"{name}.json", scored.to_dict())

    def forget(self) -> None:
        """Remove what was kept: the result has it."""
        shutil.rmtree(self.folder / _MEASURED_FOLDER, ignore_errors=True)


def _settings(plan: ComparePlan) -> dict[str, Any]:
    """What decides the result, in JSON form."""
    settings = asdict(plan.config)
    run = {name: value for name, value in settings.pop("run").items() if name not in _FREE_RUN_SETTINGS}
    run["evaluation"] = asdict(plan.measuring.evaluation) | {"documents": plan.measuring.texts.content_hash}
    del settings["resume"]
    settings |= run | {"dtype": plan.measuring.dtype, "weights": plan.source.fingerprint()}
    return in_json_form(settings)
