from __future__ import annotations

import pytest

from eabf_cli.core.evals.numbers import between, decimal, p_value, perplexity, share


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (decimal(-0.0004, 3), "0.000"),
        (decimal(-0.0126, 3), "−0.013"),
        (decimal(1234.5, 1), "1,234.5"),
        (decimal(None, 2), "–"),
        (perplexity(99.994), "99.99"),
        (perplexity(12_345.6), "12,346"),
        (share(0.999), "100 %"),
        (share(None), "–"),
        (between(-0.1, 0.25, 2), " (−0.10 to 0.25)"),
        (between(0.1, 0.25, 0, 100), " (10 to 25)"),
        (between(None, 0.25, 2), ""),
        (p_value(0.00099), "< 0.001"),
        (p_value(0.0412), "0.041"),
        (p_value(None), "–"),
    ],
)
def test_numbers_are_written_for_reading(text: str, expected: str) -> None:
    assert text == expected
