"""The Hub token: found, checked, and kept out of everything that others can read."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from huggingface_hub import constants, get_token

from eabf_cli.core.errors import HubError

HIDDEN = "***"
# Fields of /proc/self/stat, counted from the one after the command's name.
_ARG_START, _ARG_END = 45, 46


def find_token(given: str | None) -> str:
    """The token to use: the given one, else huggingface_hub's own search.

    Raises:
        HubError: none, or one that no HTTP header can carry.
    """
    token = (given or "").strip() or get_token()
    if not token:
        raise HubError(
            "no token for the Hub: log in with `hf auth login`, or set HF_TOKEN to a token with write permission\n"
            f"({constants.ENDPOINT}/settings/tokens makes one)"
        )
    # HTTP libraries quote such a header in their errors, token and all.
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise HubError("the Hub token holds spaces or characters that no token has: copy it again (HF_TOKEN)")
    return token


def redact(text: str, token: str | None) -> str:
    """A text without the token."""
    return text.replace(token, HIDDEN) if token else text


def check_no_token(files: list[Path], token: str) -> None:
    """Refuse to publish a file with the token in it (weights are not searched).

    Raises:
        HubError: names the file.
    """
    for path in files:
        if path.suffix != ".safetensors" and token.encode() in path.read_bytes():
            raise HubError(f"{path} holds your Hub token, and would be published: take it out, or export again")


def hide_token_argument(token: str) -> None:
    """Take a token that was given as an argument out of `sys.argv` and out of the process's title.

    The title is what `ps` shows. It can be changed on Linux only; elsewhere, and before this call, the
    token is there to read, which is why HF_TOKEN is the better way.
    """
    sys.argv = [redact(argument, token) for argument in sys.argv]
    stat = Path("/proc/self/stat")
    if not stat.is_file():
        return
    fields = stat.read_text().rpartition(")")[2].split()
    start, end = int(fields[_ARG_START]), int(fields[_ARG_END])
    if start == 0:
        return
    title = ctypes.string_at(start, end - start)
    secret = token.encode()
    position = title.find(secret)
    while position >= 0:
        ctypes.memset(start + position, ord("*"), len(secret))
        position = title.find(secret, position + len(secret))
