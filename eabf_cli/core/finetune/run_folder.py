"""The folder of a finetune run: new, unfinished, finished, or refused."""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from eabf_cli.core.errors import CheckpointError, OutputExistsError
from eabf_cli.core.files import check_target, read_json, write_json
from eabf_cli.core.finetune.manifest import newest_whole_checkpoint, remove_checkpoints_after, step_of
from eabf_cli.core.finetune.plan import FinetuneConfig, FinetunePlan, FinetuneTarget
from eabf_cli.core.finetune.settings import TUNINGS
from eabf_cli.core.finetune.sharding import sharding_engine
from eabf_cli.core.finetune.tuning import check_tuning
from eabf_cli.core.processes import is_main_process, num_processes, wait_for_everyone
from eabf_cli.core.run_record import RUN_FILE, read_run_record
from eabf_cli.core.run_settings import SETTINGS_FILE, check_settings, in_json_form, write_settings

logger = logging.getLogger(__name__)

_MEASURED_FILE = "eabf_measured_{}.json"
# Settings that a resumed run may change: they do not touch the weights.
_FREE_SETTINGS = ("overwrite", "resume", "output", "show_progress", "dry_run", "probe", "save_steps", "report_to")


def run_settings(config: FinetuneConfig, plan: FinetunePlan) -> dict[str, Any]:
    """What decides the weights of a run, in JSON form."""
    return in_json_form(
        _arguments(config)
        | {
            # What "auto" came to: with other memory left it might come to something else.
            "tuning": plan.tuning,
            "recipe": asdict(plan.recipe),
            "scaling": plan.resolution.scaling.to_dict(),
            "data_hash": plan.samples.data_hash,
            "weights": plan.source.fingerprint(),
        }
    )


def _arguments(config: FinetuneConfig) -> dict[str, Any]:
    """Those settings that are known without model and data."""
    given = {name: value for name, value in asdict(config).items() if name not in _FREE_SETTINGS}
    return given | {
        "dataset": config.dataset_names,
        # Over several processes gradients are summed in another order.
        "num_processes": num_processes(),
        # Each keeps the optimizer's state in files of its own, and leaves out those of others without a word.
        "sharding": sharding_engine(),
    }


def check_folder(config: FinetuneConfig, target: FinetuneTarget) -> None:
    """Refuse a folder that cannot become, or is not, this run's.

    Raises:
        CheckpointError: there is no run to resume.
        OutputExistsError: an unfinished run without `resume`, or see `check_target`.
    """
    folder = target.folder
    if config.resume:
        _check_is_run(folder)
        return
    is_unfinished = (folder / SETTINGS_FILE).is_file() and not (folder / RUN_FILE).is_file()
    if is_unfinished and not config.overwrite:
        raise OutputExistsError(
            f"run folder {folder} is not finished: go on with --resume -o {folder}, or start anew with --overwrite"
        )
    datasets = [config.dataset] if isinstance(config.dataset, str | Path) else config.dataset
    local = [Path(name) for name in datasets if Path(name).exists()]
    check_target(folder, overwrite=config.overwrite, sources=(target.source.folder, *local))


def _check_is_run(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"run folder {folder} does not exist: leave --resume out to start a run there")
    if not (folder / SETTINGS_FILE).is_file():
        raise CheckpointError(f"folder {folder} holds no finetune run ({SETTINGS_FILE} is missing)")
    record = read_run_record(folder)
    if record is not None and record.get("command") != "finetune":
        raise CheckpointError(f"folder {folder} holds no finetune run: `eabf {record.get('command')}` made it")


def as_started(config: FinetuneConfig, target: FinetuneTarget) -> FinetuneConfig:
    """The config with the tuning that "auto" came to when the run to be resumed was started.

    Raises:
        EabfError: this machine cannot have that tuning.
    """
    if config.tuning != "auto":
        return config
    tuning = read_json(target.folder / SETTINGS_FILE).get("tuning", TUNINGS[0])
    check_tuning(tuning, target.source, target.resolution.base_config, device=config.device)
    return replace(config, tuning=tuning)


def finished_run(config: FinetuneConfig, folder: Path | None) -> dict[str, Any] | None:
    """The result of the run that is to be resumed in a folder if it is finished; else None, as for no folder.

    Neither model nor data are read, which need not be there any more: arguments are compared as they are given.

    Raises:
        CheckpointError: there is no run to resume.
        InvalidConfigError: it is finished, and was started with other arguments.
    """
    if folder is None or not config.resume or config.dry_run:
        return None
    _check_is_run(folder)
    record = read_run_record(folder)
    if record is None:
        return None
    arguments = _arguments(config)
    if config.tuning == "auto":
        del arguments["tuning"]
    check_settings(folder, arguments, kind="run")
    logger.warning("run %s is finished already: nothing to resume", folder)
    return record


def check_unchanged(config: FinetuneConfig, plan: FinetunePlan) -> None:
    """Refuse to go on with an unfinished run of other settings.

    Raises:
        InvalidConfigError: it was started with other ones.
    """
    check_settings(plan.folder, run_settings(config, plan), kind="run")


def open_folder(config: FinetuneConfig, plan: FinetunePlan) -> Path | None:
    """Make or reopen the run's folder; of several processes the main one does, and the others wait for it.

    Returns:
        the checkpoint to go on from, or None for a start.
    """
    if is_main_process():
        if config.resume:
            _reopen(plan.folder)
        else:
            shutil.rmtree(plan.folder, ignore_errors=True)
            plan.folder.mkdir(parents=True)
            write_settings(plan.folder, run_settings(config, plan))
    wait_for_everyone()
    return newest_whole_checkpoint(plan.folder) if config.resume else None


def _reopen(folder: Path) -> None:
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
