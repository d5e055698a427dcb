"""What a repository on the Hub holds, whether an export may go there, and which files would travel.

An export goes into a repository that is new, empty (git's files, a licence, a card without a model), or holds an
earlier output of eabf (it has an `eabf_run.json`) of the same base model. Anything else is somebody's other model,
which a stray --to-hub must not replace; a pull request, which people read before it takes effect, is possible there.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelInfo
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from eabf_cli.core.checkpoint_format import MODELING_FILE
from eabf_cli.core.errors import HubError
from eabf_cli.core.export.published_record import published_record
from eabf_cli.core.run_record import RUN_FILE
from eabf_cli.core.sources import INDEX_FILE

# What a repository may hold and still count as empty.
_NO_MODEL = (".gitattributes", ".gitignore", "README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")
_CARD = "README.md"

Action = Literal["send", "there", "delete"]


@dataclass(frozen=True, kw_only=True)
class RepoContents:
    """A branch of a repository.

    Attributes:
        head: its commit; None where there is no repository yet.
        has_branch: False where the branch has yet to be made; the rest is then the default branch's.
        private: whether only its owner sees it; None where there is no repository yet.
        base_model: what its card names as such.
        files: by their path.
    """

    head: str | None = None
    has_branch: bool = True
    private: bool | None = None
    base_model: str | None = None
    files: dict[str, RepoFile] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        return all(name in _NO_MODEL for name in self.files)

    @property
    def is_ours(self) -> bool:
        return RUN_FILE in self.files


def read_contents(api: HfApi, repo_id: str, revision: str | None) -> RepoContents:
    """Ask the Hub what is there.

    Raises:
        HfHubHTTPError: the Hub refuses or fails.
    """
    has_branch = True
    try:
        info = api.model_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        if revision is None or revision.startswith("refs/"):
            raise
        has_branch = False
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        return RepoContents(has_branch=revision is None)
    tree = api.list_repo_tree(repo_id, recursive=True, revision=info.sha)
    return RepoContents(
        head=info.sha,
        has_branch=has_branch,
        private=info.private,
        base_model=_base_model(info),
        files={entry.path: entry for entry in tree if isinstance(entry, RepoFile)},
    )


def _base_model(info: ModelInfo) -> str | None:
    named = info.card_data.base_model if info.card_data is not None else None
    if isinstance(named, list):
        return str(named[0]) if len(named) == 1 else None
    return str(named) if named else None


def base_model_of(folder: Path) -> str | None:
    """What a checkpoint folder's card names as its base model."""
    if not (folder / _CARD).is_file():
        return None
    named = ModelCard.load(folder / _CARD).data.base_model
    return str(named) if isinstance(named, str) else None


def check_contents(
    contents: RepoContents, *, repo_id: str, base_model: str | None, private: bool, create_pr: bool
) -> list[str]:
    """Refuse to put an export where something else lives.

    Args:
        base_model: of the export; only a Hub id is compared with the one on the Hub, a folder says nothing there.

    Returns:
        Warnings for the user.

    Raises:
        HubError: another model is there, or the repository is public against the user's wish, or a pull request
            has no repository to go to.
    """
    if contents.head is None:
        if create_pr:
            raise HubError(
                f"there is no repository {repo_id} that a pull request could go to (or the token may not see it): "
                "leave out --create-pr to make one"
            )
        return []
    if private and contents.private is False:
        raise HubError(
            f"repository {repo_id} exists and is public, but --private was given: "
            "make it private in its settings on the Hub, or name another"
        )
    if create_pr:
        return []
    ways_out = "name another repository, another branch with --revision, or propose the change with --create-pr"
    if not contents.is_ours:
        if contents.is_empty:
            return [f"the card of {repo_id} is replaced by the export's"] if _CARD in contents.files else []
        names = ", ".join(sorted(contents.files)[:4])
        raise HubError(
            f"repository {repo_id} exists and holds something that eabf did not write ({names}, ...): it is not "
            f"replaced\nTo go on, {ways_out}"
        )
    if _is_hub_id(base_model) and contents.base_model is not None and contents.base_model != base_model:
        raise HubError(
            f"repository {repo_id} holds an export of {contents.base_model}, this one is of {base_model}: it is not "
            f"replaced\nTo go on, {ways_out}"
        )
    return []


def _is_hub_id(name: str | None) -> bool:
    return name is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What one commit would change.

    Attributes:
        additions: the files to send.
        there: files of the folder that the repository has already, bit for bit.
        deletions: files of an earlier export that would spoil this one.
    """

    additions: list[CommitOperationAdd]
    there: list[CommitOperationAdd]
    deletions: list[RepoFile]

    @property
    def is_empty(self) -> bool:
        return not self.additions and not self.deletions

    def listed(self) -> list[dict[str, object]]:
        """Name, bytes and action of every file."""
        actions: list[tuple[str, int, Action]] = [
            *((op.path_in_repo, op.upload_info.size, "send") for op in self.additions),
            *((op.path_in_repo, op.upload_info.size, "there") for op in self.there),
            *((file.path, file.size, "delete") for file in self.deletions),
        ]
        return [{"name": name, "bytes": size, "action": action} for name, size, action in sorted(actions)]


def folder_files(folder: Path) -> list[Path]:
    """The files of a checkpoint folder that are published: all but hidden ones."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def compare(folder: Path, contents: RepoContents) -> Transfer:
    """Find out what has to travel: by size first, then by the hash that the Hub keeps.

    Raises:
        CheckpointError: the folder's run file is damaged.
    """
    operations = [
        CommitOperationAdd(
            path_in_repo=path.relative_to(folder).as_posix(),
            path_or_fileobj=published_record(path) if path.name == RUN_FILE else path,
        )
        for path in folder_files(folder)
    ]
    there = [op for op in operations if is_same(op, contents.files.get(op.path_in_repo))]
    names = {op.path_in_repo for op in operations}
    return Transfer(
        additions=[op for op in operations if op not in there],
        there=there,
        deletions=[file for name, file in sorted(contents.files.items()) if name not in names and _spoils(name)],
    )


def _spoils(name: str) -> bool:
    """Whether a leftover file would be loaded in place of, or beside, the new ones."""
    return "/" not in name and (name.endswith(".safetensors") or name in (INDEX_FILE, MODELING_FILE))


def is_same(local: CommitOperationAdd, remote: RepoFile | None) -> bool:
    """Whether a file on the Hub has the bytes of a local one."""
    if remote is None or remote.size != local.upload_info.size:
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == local.upload_info.sha256.hex()
    with local.as_file() as file:
        content = file.read()
    return remote.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def differing(transfer: Transfer, files: dict[str, RepoFile]) -> list[str]:
    """Names of files that are not on the Hub as they were sent."""
    sent = [*transfer.additions, *transfer.there]
    return [op.path_in_repo for op in sent if not is_same(op, files.get(op.path_in_repo))]
