"""The paper's results: macro averages over 12 LongBench tasks, in points (arXiv 2401.07004, Tables 4 and 5)."""

from __future__ import annotations

BY_LENGTH: dict[str, dict[int, float]] = {
    "linear": {1: 36.2, 2: 36.9, 4: 36.3, 8: 28.4},
    "ntk-by-parts": {1: 35.2, 2: 36.6, 4: 34.7, 8: 28.5},
    "yarn": {1: 36.1, 2: 36.6, 4: 35.7, 8: 28.6},
    "abf": {1: 36.5, 2: 37.9, 4: 38.6, 8: 37.6},
    "eabf": {1: 36.3, 2: 38.1, 4: 39.1, 8: 39.1},
}
"""Table 5, by windows of Llama-2-7B-chat (4,096 tokens): trained at four with 3,500 samples."""

BY_SAMPLES: dict[str, dict[int, float]] = {
    "yarn": {32: 25.0, 100: 30.9, 1_000: 35.2, 3_500: 35.5},
    "abf": {32: 26.4, 100: 35.1, 1_000: 37.2, 3_500: 38.6},
    "eabf": {32: 31.3, 100: 37.4, 1_000: 38.3, 3_500: 39.1},
}
"""Table 4, by training samples, at four windows."""
