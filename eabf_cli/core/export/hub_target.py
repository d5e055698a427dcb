"""`HubTarget`: where and how a checkpoint is published."""

from __future__ import annotations

from dataclasses import dataclass, field

from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from eabf_cli.core.errors import InvalidConfigError


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

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise InvalidConfigError(f"{self.repo_id!r} is no repository of the Hub (OWNER/NAME): {error}") from error
        if "/" not in self.repo_id:
            raise InvalidConfigError(f"{self.repo_id!r} names no owner: write it as OWNER/{self.repo_id}")
        if self.create_pr and self.revision not in (None, constants.DEFAULT_REVISION):
            raise InvalidConfigError("a pull request goes to the default branch: leave out --revision or --create-pr")
