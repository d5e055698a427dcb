"""Numbers as a report writes them."""

from __future__ import annotations

MISSING = "–"


def decimal(value: float | None, digits: int) -> str:
    """A number with so many decimals; with a true minus sign, and none before zero."""
    if value is None:
        return MISSING
    return f"{round(value, digits) + 0.0:,.{digits}f}".replace("-", "−")


def perplexity(value: float | None) -> str:
    """A perplexity: two decimals while it is small, none where it is beyond any use."""
    if value is None:
        return MISSING
    return decimal(value, 2 if value < 100 else 0)


def share(value: float | None) -> str:
    """A share in percent."""
    return MISSING if value is None else f"{decimal(100 * value, 0)} %"


def between(low: float | None, high: float | None, digits: int, scale: float = 1.0) -> str:
    """The ends of an interval in brackets; empty where it is not known."""
    if low is None or high is None:
        return ""
    return f" ({decimal(scale * low, digits)} to {decimal(scale * high, digits)})"


def p_value(value: float | None) -> str:
    """A p-value."""
    if value is None:
        return MISSING
    return "< 0.001" if value < 0.001 else decimal(value, 3)
