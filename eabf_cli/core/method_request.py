"""What a user asks of a method. No torch in here, so that commands can check their input before it loads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MethodRequest:
    """What a user asks of a method, before the model is known.

    `factor` and `max_length` give each other; neither means the default factor.
    """

    method: str = "eabf"
    factor: float | None = None
    max_length: int | None = None
    rope_theta: float | str | None = None
    original_length: int | None = None
    unscaled_layers: tuple[int, ...] | None = None
    rebase: bool = False
