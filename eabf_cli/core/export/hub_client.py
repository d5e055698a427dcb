"""The requests of an upload, each tried again when that may help, its errors explained."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import TypeVar

from huggingface_hub import CommitOperationDelete, HfApi, constants, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile

from eabf_cli.core.errors import HubError
from eabf_cli.core.export.hub_contents import RepoContents, Transfer, differing, read_contents
from eabf_cli.core.export.hub_errors import OFFLINE, hub_errors_explained
from eabf_cli.core.export.hub_retries import Retries, is_busy, is_passing, with_retries
from eabf_cli.core.export.hub_target import HubTarget
from eabf_cli.core.export.hub_token import find_token

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")
_BRANCH_MOVED = 412


def _uses_xet() -> bool:
    return not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None


@dataclass(frozen=True, kw_only=True)
class Commit:
    """A commit that the Hub made."""

    url: str
    oid: str
    pr_url: str | None = None


class HubClient:
    """What an upload asks of the Hub.

    Raises:
        HubError: offline mode, or no token.
    """

    def __init__(self, target: HubTarget, retries: Retries) -> None:
        if is_offline_mode():
            raise HubError(OFFLINE)
        self.target = target
        self.token = find_token(target.token)
        self._retries = retries
        self._api = HfApi(token=self.token)

    def whoami(self) -> dict[str, object]:
        """Who the token belongs to, and its role."""
        return self._ask("the check of the token", self._api.whoami)

    def contents(self) -> RepoContents:
        """What the branch of the target holds."""
        repo_id, revision = self.target.repo_id, self.target.revision
        return self._ask("reading the repository", lambda: read_contents(self._api, repo_id, revision))

    def make_place(self, contents: RepoContents) -> RepoContents:
        """Make the repository and the branch where they are missing; returns what is there then."""
        repo_id, revision = self.target.repo_id, self.target.revision
        if contents.head is None:
            # None leaves it to the owner's settings; some organisations make everything private.
            private = True if self.target.private else None
            self._ask("making the repository", lambda: self._api.create_repo(repo_id, private=private, exist_ok=True))
        if revision is not None and not contents.has_branch:
            self._ask("making the branch", lambda: self._api.create_branch(repo_id, branch=revision, exist_ok=True))
        return contents if contents.head is not None and contents.has_branch else self.contents()

    def send_blobs(self, transfer: Transfer) -> None:
        """Send the large files; nobody sees them before the commit that names them.

        huggingface_hub itself tries each of these requests again, and sends only what the Hub lacks.
        """
        with hub_errors_explained(
            self.target.repo_id, doing="sending the weights", token=self.token, through_xet=_uses_xet()
        ):
            self._api.preupload_lfs_files(
                self.target.repo_id,
                additions=transfer.additions,
                revision=self.target.revision,
                create_pr=self.target.create_pr,
                free_memory=False,
            )

    def commit(self, transfer: Transfer, contents: RepoContents) -> Commit:
        """Make the one commit, on top of what was compared with."""
        operations = [
            *transfer.additions,
            *(CommitOperationDelete(path_in_repo=file.path) for file in transfer.deletions),
        ]

        def send() -> Commit:
            made = self._api.create_commit(
                self.target.repo_id,
                operations,
                commit_message=self.target.commit_message or f"Upload by eabf-cli {version('eabf-cli')}",
                revision=self.target.revision,
                create_pr=self.target.create_pr,
                parent_commit=contents.head,
            )
            return Commit(url=made.commit_url, oid=made.oid, pr_url=made.pr_url)

        def landed() -> Commit | None:
            """The commit of an earlier try whose answer was lost: the branch moved, and holds what was sent."""
            there = read_contents(self._api, self.target.repo_id, self.target.revision)
            if there.head is None or differing(transfer, there.files):
                return None
            return Commit(url=f"{self._api.endpoint}/{self.target.repo_id}/commit/{there.head}", oid=there.head)

        def send_or_find() -> Commit:
            try:
                return send()
            except HfHubHTTPError as error:
                found = landed() if error.response.status_code == _BRANCH_MOVED else None
                if found is None:
                    raise
                return found

        # A pull request cannot be found again, and a second one would be in the way.
        may_repeat = is_busy if self.target.create_pr else is_passing
        return self._ask("the commit", send_or_find, may_repeat=may_repeat)

    def check_arrival(self, transfer: Transfer, commit: Commit) -> None:
        """Compare the commit's files, by the Hub's own hashes, with the local ones.

        Raises:
            HubError: they differ.
        """

        def listed() -> dict[str, RepoFile]:
            tree = self._api.list_repo_tree(self.target.repo_id, recursive=True, revision=commit.oid)
            return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

        try:
            files = self._ask("the check of the upload", listed)
        except HubError as error:
            logger.warning(f"The files were sent, but the Hub could not be asked whether they arrived whole: {error}")
            return
        wrong = differing(transfer, files)
        if wrong:
            raise HubError(
                f"commit {commit.url} does not hold what was sent: {', '.join(wrong)} differ\n"
                "Run the same command again; until then nobody should load that commit"
            )

    def _ask(
        self,
        doing: str,
        call: Callable[[], Answer],
        *,
        may_repeat: Callable[[Exception], bool] = is_passing,
    ) -> Answer:
        with hub_errors_explained(self.target.repo_id, doing=doing, token=self.token):
            return with_retries(call, self._retries, what=doing, may_repeat=may_repeat)
