"""`ExportConfig`: what to export, in which form, and where to. No torch in here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from eabf_cli.core.devices import DTYPES
from eabf_cli.core.errors import InvalidConfigError

if TYPE_CHECKING:
    from eabf_cli.core.export.hub_target import HubTarget

# The forms for runtimes that cannot run our code.
Compat = Literal["abf", "native"]
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Arguments of `eabf export`.

    Attributes:
        source: a run folder, a checkpoint, an adapter, a GGUF file, the demo alias or a Hub id; None takes the newest
            finished run under `eabf-runs/`.
        source_revision: branch, tag or commit of a Hub source.
        output: the folder to write; None makes one from the source's name, under `eabf-runs/`.
        dry_run: work everything out from the small files; write nothing, send nothing.
        dtype: "auto" (as stored; float32 for GGUF), "bfloat16", "float16" or "float32".
        max_shard_size: of one weight file, such as "5GB" (powers of ten) or "200MB".
        compat: write a form for runtimes that cannot run our code: "abf" (rope_theta alone) or "native" (stock
            ministral3); the difference that it makes is measured.
        device: where the written folder is verified.
        seed: of the tokens that it is verified with.
        trust_remote_code: let a tokenizer's own code run.
        hub: where to publish; None stays local.

    Raises:
        InvalidConfigError: a value that makes no sense.
    """

    source: str | None = None
    source_revision: str | None = None
    output: Path | None = None
    overwrite: bool = False
    dry_run: bool = False
    dtype: str = "auto"
    max_shard_size: str = "5GB"
    compat: Compat | None = None
    device: str = "auto"
    seed: int = 42
    show_progress: bool = False
    trust_remote_code: bool = False
    hub: HubTarget | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InvalidConfigError(f"unknown dtype {self.dtype!r}; known: {', '.join(DTYPES)}")
        if self.compat is not None and self.compat not in get_args(Compat):
            raise InvalidConfigError(f"compat must be one of {', '.join(get_args(Compat))}, got {self.compat!r}")
        shard_bytes(self.max_shard_size)


def shard_bytes(size: str) -> int:
    """Bytes of a size such as "5GB" or "200MB" (powers of ten, as huggingface_hub counts).

    Raises:
        InvalidConfigError: something else.
    """
    match = re.fullmatch(r"(\d{1,6})\s*([KMGT]B)", size.strip().upper())
    if match is None or int(match[1]) == 0:
        raise InvalidConfigError(f"max_shard_size must be a size such as 5GB or 200MB, got {size!r}")
    return int(match[1]) * _UNITS[match[2]]
