"""Which query positions are measured: a list, a number of them spaced evenly, or all. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from eabf_cli.core.errors import InvalidConfigError

NUM_POSITIONS = 64
ALL = "all"
_WAYS = "a list like 1,512,2048, log, linear, log:N, linear:N, or all"


def choose_positions(rule: str | Sequence[int], length: int) -> tuple[int, ...]:
    """The 1-based positions of a rule, ascending and distinct.

    Args:
        rule: positions, or their text form: `1,512,2048`, `log` (64 in all, evenly spaced by logarithm), `linear`,
            `log:N`, `linear:N` or `all`.
        length: tokens in a document.

    Raises:
        InvalidConfigError: no such rule, or a position outside 1 to `length`.
    """
    if not isinstance(rule, str):
        return _checked(rule, length)
    kind, _, count = rule.partition(":")
    if rule == ALL:
        return tuple(range(1, length + 1))
    if kind not in ("log", "linear"):
        return _checked(_numbers(rule), length)
    num_positions = NUM_POSITIONS if rule == kind else _number(count, rule)
    if num_positions < 1:
        raise InvalidConfigError(f"positions {rule!r} asks for none; for example {kind}:{NUM_POSITIONS}")
    return (log_positions if kind == "log" else linear_positions)(length, num_positions)


def log_positions(length: int, num_positions: int = NUM_POSITIONS) -> tuple[int, ...]:
    """That many distinct positions from 1 to `length`, each a constant times the one before as far as they can be
    whole and distinct; all positions, if there are not as many."""
    positions = [1]
    for left in range(min(num_positions, length) - 1, 0, -1):
        last = positions[-1]
        positions.append(max(last + 1, round(last * (length / last) ** (1 / left))))
    return tuple(positions) if num_positions > 1 else (length,)


def linear_positions(length: int, num_positions: int = NUM_POSITIONS) -> tuple[int, ...]:
    """That many positions in equal steps, the last one `length`; all, if there are not as many."""
    count = min(num_positions, length)
    return tuple(round(length * (index + 1) / count) for index in range(count))


def check_positions(rule: str | Sequence[int]) -> None:
    """Refuse a rule that makes no sense for any length.

    Raises:
        InvalidConfigError: no such rule, or a position below 1.
    """
    if not isinstance(rule, str):
        _checked(rule, None)
    elif rule != ALL and rule.partition(":")[0] not in ("log", "linear"):
        _checked(_numbers(rule), None)
    else:
        choose_positions(rule, 1)


def largest_position(rule: str | Sequence[int]) -> int | None:
    """The last position that a list names; None for a rule that adapts to the length."""
    if isinstance(rule, str) and (rule == ALL or rule.partition(":")[0] in ("log", "linear")):
        return None
    return max(_numbers(rule) if isinstance(rule, str) else rule)


def _numbers(text: str) -> list[int]:
    return [_number(part, text) for part in text.split(",")]


def _number(part: str, rule: str) -> int:
    try:
        return int(part)
    except ValueError:
        raise InvalidConfigError(f"positions {rule!r} is none of {_WAYS}") from None


def _checked(positions: Sequence[int], length: int | None) -> tuple[int, ...]:
    if not positions:
        raise InvalidConfigError(f"no position is given: {_WAYS}")
    if min(positions) < 1:
        raise InvalidConfigError(f"position {min(positions)} is below 1: positions count tokens from 1")
    if length is not None and max(positions) > length:
        raise InvalidConfigError(
            f"position {max(positions):,} is beyond the length of {length:,} tokens: give a larger --length, "
            "or smaller --positions"
        )
    return tuple(sorted(set(positions)))
