"""Where the ticks of an axis stand."""

from __future__ import annotations

import math
from collections.abc import Sequence

_STEPS = (1, 2, 5, 10)


def linear_ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers in [low, high], at most so many and at least two where the range allows."""
    rough = (high - low or 1.0) / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in _STEPS if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [count * step for count in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """1, 2 and 5 times powers of ten in [low, high]; powers alone, and of those every so many, where that is more."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1,)):
        found = [factor * 10.0**power for power in powers for factor in factors]
        found = [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if 2 <= len(found) <= most:
            return found
    if len(found) > most:
        return found[:: math.ceil(len(found) / most)]
    # Less than a factor of two or so is spanned: as on a linear axis.
    return linear_ticks(low, high, most)


def length_ticks(values: Sequence[float], most: int) -> list[float]:
    """Ticks on an axis of lengths: the lengths themselves where they are few, else doublings up to the longest."""
    distinct = sorted(set(values))
    if len(distinct) <= most:
        return distinct
    top = 2.0 ** math.floor(math.log2(distinct[-1]))
    doublings = [top / 2**count for count in range(most) if top / 2**count >= distinct[0]]
    return sorted(doublings)


def padded(low: float, high: float, *, is_log: bool) -> tuple[float, float]:
    """A range with some room around it."""
    if is_log:
        room = (high / low) ** 0.06 if high > low else 1.5
        return low / room, high * room
    room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return low - room, high + room
