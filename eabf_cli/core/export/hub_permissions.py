"""What a token may do, as far as the Hub tells before anything is written."""

from __future__ import annotations

from typing import Any

from huggingface_hub import constants

from eabf_cli.core.errors import HubError


def check_permission(user: dict[str, Any], repo_id: str, *, create_pr: bool) -> list[str]:
    """Refuse a token that cannot write where it has to.

    Args:
        user: the Hub's answer to whoami.
        create_pr: only a pull request is wanted, which anybody may open.

    Returns:
        Warnings for the user.

    Raises:
        HubError: a read-only token, or an owner that the user does not write for.
    """
    tokens = f"{constants.ENDPOINT}/settings/tokens"
    name = user.get("name")
    access = (user.get("auth") or {}).get("accessToken") or {}
    role = access.get("role")
    if role == "read":
        raise HubError(
            f"the Hub token of {name} can only read: make one with write permission ({tokens}) and set HF_TOKEN to it"
        )
    if create_pr:
        return []
    owner = repo_id.partition("/")[0]
    organisations = {entry.get("name"): entry.get("roleInOrg") for entry in user.get("orgs") or []}
    if organisations.get(owner) == "read":
        raise HubError(f"{name} may only read in {owner}: ask its administrators, or name a repository of your own")
    if owner == name or owner in organisations:
        return []
    if role == "write":
        others = ", ".join(filter(None, organisations)) or "none"
        raise HubError(
            f"the Hub token belongs to {name}, who cannot write to {owner} (organisations: {others}): name "
            f"{name}/{repo_id.partition('/')[2]}, or propose the change to an existing repository with --create-pr"
        )
    # Fine-grained tokens may reach further than the list of organisations says.
    return [f"the Hub does not say whether this token of {name} may write to {owner}; the upload will show it"]
