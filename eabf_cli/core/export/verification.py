"""A written checkpoint is reloaded in a clean process and held to the model that it was made from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eabf_cli.core.scaling_config import RopeScalingConfig
from eabf_cli.core.sources import ModelSource


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What a verification found; it exists only where every check passed.

    Attributes:
        max_logit_difference: the largest difference of a logit, over all compared positions.
        max_logit: the largest logit of the reference, by absolute value.
        tolerance: the largest difference that passes; a small part of `max_logit`.
        compute_dtype: the dtype in which both sides computed.
        lengths: rows of tokens, each from position 0.
        spread_to: the last position of the row whose positions are spread over the whole window.
        logit_scale: t as measured in the reloaded model, by 1-based position (three of them).
        checks: what was compared, each with what was found, in words.
        notes: what could not be checked, and why.
    """

    max_logit_difference: float
    max_logit: float
    tolerance: float
    compute_dtype: str
    lengths: tuple[int, ...]
    spread_to: int
    logit_scale: dict[int, float]
    checks: dict[str, str]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        result = asdict(self)
        result["logit_scale"] = {str(position): t for position, t in self.logit_scale.items()}
        return result | {"lengths": list(self.lengths), "notes": list(self.notes)}


def verify_export(
    folder: Path,
    source: ModelSource,
    *,
    scaling: RopeScalingConfig | None = None,
    device: str = "auto",
    seed: int = 42,
) -> Verification:
    """Reload a written checkpoint without this package and compare it with its source.

    Args:
        folder: the written checkpoint.
        source: the model that it was made from, as `find_model` gives it.
        scaling: the method that the checkpoint carries where it is not the source's own (`--compat`).
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        seed: of the tokens.

    Raises:
        VerificationError: the two differ, or the checkpoint does not load in a clean process.
    """
    raise NotImplementedError


def verify_existing(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str = "auto",
    seed: int = 42,
) -> dict[str, Any]:
    """Verify a folder or a Hub model that exists (`eabf export --verify`); nothing is written.

    The reference is this package's own load of the same files.

    Args:
        trust_remote_code: run a modelling file that differs from this package's.

    Returns:
        `model`, `revision`, `verified` (the largest logit difference), `verification` (the details).

    Raises:
        VerificationError: the two differ, files are not those that were recorded, or a foreign modelling file
            would have to be run.
    """
    raise NotImplementedError
