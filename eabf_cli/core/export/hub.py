"""Publishing a checkpoint folder on the Hub: what can be refused before any work, then one atomic commit."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from eabf_cli.core.export.hub_client import HubClient
from eabf_cli.core.export.hub_contents import RepoContents, base_model_of, check_contents, compare, folder_files
from eabf_cli.core.export.hub_permissions import check_permission
from eabf_cli.core.export.hub_retries import Retries
from eabf_cli.core.export.hub_target import HubTarget
from eabf_cli.core.export.hub_token import check_no_token
from eabf_cli.core.export.licences import check_licence

logger = logging.getLogger(__name__)


def check_hub(
    target: HubTarget, *, licence: str | None, base_model: str | None, retries: Retries | None = None
) -> list[str]:
    """Refuse what the Hub or the base model's licence would not let be published, before any work.

    Args:
        licence: of the base model, as the Hub writes it ("apache-2.0"); None where it is not known.
        base_model: Hub id (or name) of the base model.

    Returns:
        Warnings for the user.

    Raises:
        HubError: offline mode, no token or a wrong one, no permission, a repository with another model in it, a
            licence whose conditions were not accepted.
    """
    warnings = check_licence(licence, base_model, accepted=target.accept_license)
    hub = HubClient(target, retries or Retries())
    warnings += check_permission(hub.whoami(), target.repo_id, create_pr=target.create_pr)
    return warnings + _check(hub.contents(), target, base_model)


def push_folder(
    folder: Path,
    target: HubTarget,
    *,
    show_progress: bool,
    dry_run: bool = False,
    retries: Retries | None = None,
) -> dict[str, Any]:
    """Publish a checkpoint folder in one commit; files that are there already are not sent again.

    Args:
        dry_run: only list what would go.

    Returns:
        `repo_id`, `commit_url`, `commit_oid`, `pr_url`, and `files`: name, bytes and action ("send", "there" or
        "delete") of each.

    Raises:
        HubError: see `check_hub`; or the transfer failed. The folder is left as it is.
    """
    hub = HubClient(target, retries or Retries())
    check_no_token(folder_files(folder), hub.token)
    contents = hub.contents()
    _check(contents, target, base_model_of(folder))
    if not dry_run:
        contents = hub.make_place(contents)
    transfer = compare(folder, contents)
    result: dict[str, Any] = {"repo_id": target.repo_id, "commit_url": None, "commit_oid": None, "pr_url": None}
    result["files"] = transfer.listed()
    if dry_run:
        return result
    if transfer.is_empty:
        logger.info(f"{target.repo_id} has these files already: nothing was sent")
        url = f"{constants.ENDPOINT}/{target.repo_id}/commit/{contents.head}"
        return result | {"commit_url": url, "commit_oid": contents.head}
    num_bytes = sum(operation.upload_info.size for operation in transfer.additions)
    logger.info(f"Sending {len(transfer.additions)} files ({num_bytes / 1e6:,.1f} MB) to {target.repo_id}")
    with _progress_bars(show_progress):
        hub.send_blobs(transfer)
        commit = hub.commit(transfer, contents)
    hub.check_arrival(transfer, commit)
    return result | {"commit_url": commit.url, "commit_oid": commit.oid, "pr_url": commit.pr_url}


def _check(contents: RepoContents, target: HubTarget, base_model: str | None) -> list[str]:
    return check_contents(
        contents,
        repo_id=target.repo_id,
        base_model=base_model,
        private=target.private,
        create_pr=target.create_pr,
    )


@contextmanager
def _progress_bars(show: bool) -> Iterator[None]:
    """Let huggingface_hub show its bars, which count bytes, or not."""
    were_shown = not are_progress_bars_disabled()
    if not show:
        disable_progress_bars()
    try:
        yield
    finally:
        if not show and were_shown:
            enable_progress_bars()
