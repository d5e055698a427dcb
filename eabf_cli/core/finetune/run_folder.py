"""The folder of a finetune run: new, unfinished, finished, or refused."""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eabf_cli.core.errors import CheckpointError, InvalidConfigError, OutputExistsError
from eabf_cli.core.files import check_target, read_json, write_json
from eabf_cli.core.finetune.manifest import newest_whole_checkpoint, remove_checkpoints_after, step_of
from eabf_cli.core.finetune.plan import FinetuneConfig, FinetunePlan, FinetuneTarget
from eabf_cli.core.processes import is_main_process, num_processes, wait_for_everyone
from eabf_cli.core.run_record import RUN_FILE, read_run_record

logger = logging.getLogger(__name__)

SETTINGS_FILE = "eabf_settings.json"
_MEASURED_FILE = "eabf_measured_{}.json"
# Settings that a resumed run may change: they do not touch the weights.
_FREE_SETTINGS = ("overwrite", "resume", "output", "show_progress", "dry_run", "probe", "save_steps", "report_to")


def run_settings(config: FinetuneConfig, plan: FinetunePlan) -> dict[str, Any]:
    """What decides the weights of a run, in JSON form."""
    given = {name: value for name, value in asdict(config).items() if name not in _FREE_SETTINGS}
    given["dataset"] = str(config.dataset)
    settings = given | {
        # What "auto" came to: with other memory left it might come to something else.
        "tuning": plan.tuning,
        "recipe": asdict(plan.recipe),
        "scaling": plan.resolution.scaling.to_dict(),
        "data_hash": plan.samples.data_hash,
        "weights": plan.source.fingerprint(),
        # Gradients are summed in another order.
        "num_processes": num_processes(),
    }
    return _jsonable(settings)


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _jsonable(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def finished_run(config: FinetuneConfig, folder: Path) -> dict[str, Any] | None:
    """The result of a run that `--resume` finds finished."""
    if not config.resume:
        return None
    if not folder.is_dir():
        raise CheckpointError(f"run folder {folder} does not exist: leave --resume out to start a run there")
    record = read_run_record(folder)
    if record is not None and record.get("command") == "finetune":
        logger.warning("run %s is finished already: nothing to resume", folder)
        return record
    if not (folder / SETTINGS_FILE).is_file():
        raise CheckpointError(f"folder {folder} holds no finetune run ({SETTINGS_FILE} is missing)")
    return None


def check_folder(config: FinetuneConfig, target: FinetuneTarget) -> None:
    """Refuse a folder that must not become this run's.

    Raises:
        OutputExistsError: an unfinished run without `resume`, or see `check_target`.
    """
    folder = target.folder
    if config.resume:
        return
    is_unfinished = (folder / SETTINGS_FILE).is_file() and not (folder / RUN_FILE).is_file()
    if is_unfinished and not config.overwrite:
        raise OutputExistsError(
            f"run folder {folder} is not finished: go on with --resume -o {folder}, or start anew with --overwrite"
        )
    datasets = [config.dataset] if isinstance(config.dataset, str | Path) else config.dataset
    local = [Path(name) for name in datasets if Path(name).exists()]
    check_target(folder, overwrite=config.overwrite, sources=(target.source.folder, *local))


def open_folder(config: FinetuneConfig, plan: FinetunePlan) -> Path | None:
    """Make or reopen the run's folder; of several processes the main one does, and the others wait for it.

    Returns:
        the checkpoint to go on from, or None for a start.

    Raises:
        InvalidConfigError: the run was started with other settings.
    """
    if is_main_process():
        if config.resume:
            _reopen(plan.folder, run_settings(config, plan))
        else:
            shutil.rmtree(plan.folder, ignore_errors=True)
            plan.folder.mkdir(parents=True)
            write_json(plan.folder / SETTINGS_FILE, run_settings(config, plan))
    wait_for_everyone()
    return newest_whole_checkpoint(plan.folder) if config.resume else None


def _reopen(folder: Path, settings: dict[str, Any]) -> None:
    before = read_json(folder / SETTINGS_FILE)
    changed = [name for name in settings if settings[name] != before.get(name)]
    if changed:
        lines = ", ".join(f"{name} {before.get(name)} -> {settings[name]}" for name in changed)
        raise InvalidConfigError(
            f"run {folder} was started with other settings: {lines}; give the same ones, "
            "or start anew in another folder"
        )
    checkpoint = newest_whole_checkpoint(folder)
    remove_checkpoints_after(folder, step_of(checkpoint) if checkpoint else 0)
    logger.info("Resuming %s from %s", folder, checkpoint.name if checkpoint else "its beginning")


# ---- What was measured before an interruption --------------------------------------------------------


def kept_measurement(folder: Path, name: str) -> dict[str, Any] | None:
    """What an interrupted run measured under this name, if it came to it."""
    path = folder / _MEASURED_FILE.format(name)
    return read_json(path) if path.is_file() else None


def keep_measurement(folder: Path, name: str, measured: dict[str, Any]) -> None:
    """Keep a measurement for the case that the run is interrupted."""
    write_json(folder / _MEASURED_FILE.format(name), measured)


def forget_measurements(folder: Path) -> None:
    """Remove what was kept: it is in the finished run's record."""
    for path in folder.glob(_MEASURED_FILE.format("*")):
        path.unlink()
