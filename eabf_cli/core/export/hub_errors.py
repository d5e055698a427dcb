"""What the Hub's refusals mean, and what helps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from eabf_cli.core.errors import HubError
from eabf_cli.core.export.hub_retries import is_broken_connection
from eabf_cli.core.export.hub_token import redact

_LONGEST_QUOTE = 300
_AGAIN = "run the same command again later: files that are there already are not sent again"
OFFLINE = "HF_HUB_OFFLINE is set, so nothing can be sent to the Hub: unset it, or leave out --to-hub for a local export"


@contextmanager
def hub_errors_explained(repo_id: str, *, doing: str, token: str | None, through_xet: bool = False) -> Iterator[None]:
    """Turn the errors of huggingface_hub into ones that name the cure, without the token.

    Args:
        doing: the step in words, as in "sending the weights".
        through_xet: the step may go through Xet storage, whose client has errors of its own.

    Raises:
        HubError: the step failed.
    """
    try:
        yield
    except Exception as error:
        cause = _cause(error)
        is_xet = through_xet and not isinstance(cause, HTTPError)
        # KeyError: the Hub's answer lacks a field.
        if not is_xet and not isinstance(cause, HTTPError | OSError | ValueError | KeyError):
            raise
        message = _explain_xet(cause, repo_id, doing) if is_xet else _explain(cause, repo_id, doing)
        # A server may repeat the token in its answer; then the chain of errors must not show it either.
        raise HubError(redact(message, token)) from (None if token and token in _chain(error) else error)


def _cause(error: Exception) -> Exception:
    """The error that huggingface_hub wrapped into "Error while uploading"."""
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _chain(error: BaseException | None) -> str:
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


def _failed(repo_id: str, doing: str) -> str:
    return f"{doing} failed ({repo_id} at {constants.ENDPOINT})"


def _explain_xet(error: Exception, repo_id: str, doing: str) -> str:
    status = re.search(r"\((\d{3}) ", str(error))
    if "xet-write-token" in str(error) and status is not None and status[1] == "404":
        return (
            f"{_failed(repo_id, doing)}: this Hub has no Xet storage\n"
            "Set HF_HUB_DISABLE_XET=1 in the environment and run the same command again"
        )
    return (
        f"{_failed(repo_id, doing)} on its way to Xet storage: {_said(error)}\n"
        f"{_AGAIN.capitalize()}; HF_HUB_DISABLE_XET=1 goes around Xet"
    )


def _explain(error: Exception, repo_id: str, doing: str) -> str:
    failed = _failed(repo_id, doing)
    if isinstance(error, OfflineModeIsEnabled):
        return OFFLINE
    if isinstance(error, HfHubHTTPError):
        return _explain_answer(error, repo_id, failed)
    if is_broken_connection(error):
        return f"{failed}: the connection broke ({_said(error)})\nCheck the network and HF_ENDPOINT, then {_AGAIN}"
    if isinstance(error, KeyError):
        return f"{failed}: the Hub's answer has no {error}; is HF_ENDPOINT the address of a Hub?"
    return f"{failed}: {_said(error)}"


def _explain_answer(error: HfHubHTTPError, repo_id: str, failed: str) -> str:
    owner = repo_id.partition("/")[0]
    tokens = f"{constants.ENDPOINT}/settings/tokens"
    status = error.response.status_code
    said = error.server_message
    answer = f"the Hub answered {status}" + (f" ({_one_line(said)})" if said else "")
    if "checksum" in answer.lower() or "digest" in answer.lower():
        return f"{failed}: {answer}\nA file did not arrive as it was sent: run the same command again"
    if isinstance(error, GatedRepoError):
        return f"{failed}: the repository is gated, and this token's owner has no access to it"
    if isinstance(error, RevisionNotFoundError):
        return f"{failed}: no such branch; leave out --revision for the default branch"
    if isinstance(error, RepositoryNotFoundError) and status != 401:
        answer = "there is no such repository, or the token may not see it"
    cures = {
        401: f"The token is not valid: set HF_TOKEN to one that is, or log in with `hf auth login` ({tokens})",
        402: f"The storage or the plan of {owner} does not allow it: see {constants.ENDPOINT}/settings/billing",
        403: f"Use a token with write permission for {owner} ({tokens}), a repository of your own, or --create-pr",
        404: f"Check the spelling, and that the token has write permission for {owner} ({tokens})",
        409: f"Something else is changing the repository: {_AGAIN}",
        412: f"The branch was changed in the meantime: {_AGAIN}",
        413: "A file is larger than this Hub takes: export with a smaller --max-shard-size",
        429: f"Too many requests: {_AGAIN}",
    }
    if status in cures:
        return f"{failed}: {answer}\n{cures[status]}"
    if status >= 500:
        return f"{failed}: {answer}\nThe Hub has a fault of its own: {_AGAIN}"
    return f"{failed}: {answer}"


def _said(error: Exception) -> str:
    return _one_line(str(error)) or type(error).__name__


def _one_line(text: str) -> str:
    joined = " ".join(text.split())
    return joined if len(joined) <= _LONGEST_QUOTE else f"{joined[:_LONGEST_QUOTE]}..."
