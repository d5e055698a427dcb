"""Publishing a checkpoint folder on the Hub: what can be refused before any work, then one atomic commit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.export.hub_retries import Retries


@dataclass(frozen=True, kw_only=True)
class HubTarget:
    """Where and how a checkpoint is published.

    Attributes:
        repo_id: OWNER/NAME; the repository is made where there is none.
        private: make the repository private.
        revision: branch to upload to, made from the default branch where there is none; None: the default branch.
        create_pr: open a pull request instead of changing a branch.
        commit_message: first line of the commit.
        token: of the Hub; None: huggingface_hub finds it (HF_TOKEN, `hf auth login`).
        accept_license: the user accepts the conditions under which the base model's licence allows publishing.

    Raises:
        InvalidConfigError: no valid OWNER/NAME, or a pull request against a branch.
    """

    repo_id: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    token: str | None = field(default=None, repr=False)
    accept_license: bool = False


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
    raise NotImplementedError


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
    raise NotImplementedError
