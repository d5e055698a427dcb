"""`eabf export`: a checkpoint that anyone can load, verified before success is said, and published on request."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eabf_cli.core.errors import HubError
from eabf_cli.core.export.compat import measure_compat
from eabf_cli.core.export.hub import check_hub, push_folder
from eabf_cli.core.export.plan import ExportPlan, make_plan
from eabf_cli.core.export.resuming import kept_export
from eabf_cli.core.export.settings import ExportConfig
from eabf_cli.core.export.verification import verify_export
from eabf_cli.core.export.writing import describe_file, list_files, planned_files, write_checkpoint
from eabf_cli.core.files import check_space, check_target, whole_folder
from eabf_cli.core.patch_checkpoint import changed_fields
from eabf_cli.core.run_record import RUN_FILE, run_record, write_run_record

logger = logging.getLogger(__name__)


def export_checkpoint(config: ExportConfig) -> dict[str, Any]:
    """Write a checkpoint that others can load, verify it in a clean process, and publish it if that is asked for.

    The folder appears whole and verified, or not at all; what goes to the Hub goes in one commit.

    Returns:
        the JSON result of docs/api.md.

    Raises:
        EabfError: anything the user can put right, before weights are read where it can be known; nothing is left
            behind, but for a failed upload, which leaves the folder.
        VerificationError: the written checkpoint does not do what its source does.
    """
    plan = make_plan(config)
    warnings = [*plan.warnings]
    if config.hub is not None:
        warnings += check_hub(config.hub, licence=plan.provenance.card.licence, base_model=plan.provenance.base_model)
    result = _known_result(plan) | {"warnings": warnings}
    kept = _kept(plan, config) if config.hub is not None else None
    if kept is None:
        check_target(plan.output, overwrite=config.overwrite, sources=_source_folders(plan))
    if config.dry_run:
        return result | _planned_result(plan, config)
    if kept is None:
        result |= _written(plan, config, result)
    else:
        logger.info("%s holds this export already, verified: it is published as it is", plan.output)
        result |= {name: kept[name] for name in ("output", "files", "verified", "verification", "compat")}
    result["files"].append(describe_file(plan.output / RUN_FILE))
    return result | _published(plan.output, config)


def _kept(plan: ExportPlan, config: ExportConfig) -> dict[str, Any] | None:
    """What an export whose upload failed left in the target."""
    if config.overwrite or not (plan.output / RUN_FILE).is_file():
        return None
    return kept_export(plan.output, arguments=_arguments(config, plan), origin=_origin(plan))


def _written(plan: ExportPlan, config: ExportConfig, known: dict[str, Any]) -> dict[str, Any]:
    """Write and verify the folder.

    Args:
        known: the result so far, for the record.

    Returns:
        the rest of it.
    """
    if plan.weights is not None:
        check_space(plan.output, plan.weights.num_bytes)
    compat = _measured(plan, config)
    with whole_folder(plan.output, overwrite=config.overwrite) as partial:
        write_checkpoint(plan, config, partial, compat=compat)
        logger.info("Verifying it in a clean process")
        verification = verify_export(
            partial,
            plan.source,
            scaling=plan.compat,
            tokenizer=plan.tokenizer,
            trust_remote_code=config.trust_remote_code,
            device=config.device,
            seed=config.seed,
        )
        found = {
            "output": str(plan.output),
            "files": list_files(partial),
            "verified": verification.max_logit_difference,
            "verification": verification.to_dict(),
            "compat": compat,
        }
        write_run_record(partial, run_record("export", _arguments(config, plan), known | found | _origin(plan)))
    return found


def _source_folders(plan: ExportPlan) -> tuple[Path, ...]:
    base = plan.source.base
    return (plan.source.folder, *([base.folder] if base is not None else []))


def _known_result(plan: ExportPlan) -> dict[str, Any]:
    """What is known before anything is written."""
    return plan.report.to_dict() | {
        "source": plan.source.name,
        "model": plan.provenance.base_model,
        "revision": plan.provenance.revision,
        "licence": plan.provenance.card.licence,
        "output": None,
        "repo_id": None,
        "commit_url": None,
        "verified": None,
        "compat": None,
    }


def _planned_result(plan: ExportPlan, config: ExportConfig) -> dict[str, Any]:
    """What a dry run tells beside that: where it would go, the files, and the fields that change."""
    on_disk = plan.loaded.raw if (plan.source.base or plan.source).gguf_file else plan.source.config()
    return {
        "planned_output": str(plan.output),
        "files": planned_files(plan, config),
        "repo_id": config.hub.repo_id if config.hub is not None else None,
        "changes": changed_fields(on_disk, plan.joined),
    }


def _measured(plan: ExportPlan, config: ExportConfig) -> dict[str, Any] | None:
    """What a compatible form costs; None where the form is the source's own."""
    if plan.compat is None:
        return None
    logger.info("Measuring what the form %s costs", plan.compat.method)
    measured = measure_compat(
        plan.source, plan.compat, tokenizer=plan.tokenizer, device=config.device, seed=config.seed
    )
    logger.info(measured["summary"])
    return measured


def _arguments(config: ExportConfig, plan: ExportPlan) -> dict[str, Any]:
    """The settings for the record; the token is not among them."""
    hub = None
    if config.hub is not None:
        hub = {name: value for name, value in asdict(config.hub).items() if name != "token"}
    return asdict(config) | {"source": plan.source.name, "output": str(plan.output), "hub": hub}


def _origin(plan: ExportPlan) -> dict[str, Any]:
    """What the record keeps, so that the exported folder can tell it, too: the run, and the source's weights."""
    return {"run": plan.provenance.record, "weights": plan.source.fingerprint()}


def _published(folder: Path, config: ExportConfig) -> dict[str, Any]:
    if config.hub is None:
        return {}
    try:
        pushed = push_folder(folder, config.hub, show_progress=config.show_progress)
    except HubError as error:
        raise HubError(f"{error}\nThe verified export stays in {folder}") from error
    return {"repo_id": pushed["repo_id"], "commit_url": pushed["commit_url"], "upload": pushed}
