"""Texts longer than the larger model's window, from the packages that the demo model's text comes from."""

from __future__ import annotations

import random
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from demo_corpus import source_text

_WORK_FOLDER = Path("build/reproduction")
_SOURCES = ("handbook", "postgresql", "austen")
# 16,384 tokens of SmolLM2's are 60,000 to 75,000 characters of these texts.
_NUM_CHARACTERS = 100_000


def book_stretches(seed: int) -> tuple[str, ...]:
    """A stretch of each source, from a place that the seed draws."""
    rng = random.Random(f"books/{seed}")
    texts = [source_text(name, _WORK_FOLDER) for name in _SOURCES]
    starts = [rng.randrange(len(text) - _NUM_CHARACTERS) for text in texts]
    return tuple(text[start : start + _NUM_CHARACTERS] for text, start in zip(texts, starts, strict=True))
