"""Training rows of the demo model: plain text, needles to retrieve, and spans to copy.

A row is a list of exactly `length` token ids that begins with BOS. Every row is a function of its random
generator alone, so an interrupted run that continues at step N sees the rows it would have seen.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from demo_corpus import SOURCES
from transformers import PreTrainedTokenizerBase

from eabf_cli.core.needles import (
    GRASS_FILLER,
    PASSKEY,
    PASSKEY_INTRO,
    Needle,
    draw_needles,
    needle_prompt,
    plain_token_ids,
    templates_of,
)

PLAIN_SHARE = 0.42
NEEDLE_SHARE = 0.30  # the rest copies spans


@dataclass(frozen=True)
class TextMixture:
    """The corpus as token ids, sampled by source weight times the square root of its size."""

    tokens: tuple[np.ndarray, ...]
    weights: tuple[float, ...]

    @classmethod
    def load(cls, token_dir: Path, split: str = "train") -> "TextMixture":
        """Read `NAME.<split>.npy` of every source that is there."""
        found = [(s, token_dir / f"{s.name}.{split}.npy") for s in SOURCES]
        loaded = [(s, np.load(path, mmap_mode="r")) for s, path in found if path.exists()]
        if not loaded:
            raise FileNotFoundError(f"no {split} tokens in {token_dir}; run the `tokenizer` step first")
        return cls(tuple(ids for _, ids in loaded), tuple(s.weight * len(ids) ** 0.5 for s, ids in loaded))

    def draw(self, rng: random.Random, count: int) -> list[int]:
        """`count` consecutive tokens from a random place of a random source."""
        (source,) = rng.choices(self.tokens, self.weights)
        start = rng.randrange(max(1, len(source) - count))
        return source[start : start + count].tolist()


def draw_row(rng: random.Random, text: TextMixture, tokenizer: PreTrainedTokenizerBase, length: int) -> list[int]:
    """One row of a kind drawn by the shares above."""
    kind = rng.random()
    if kind < PLAIN_SHARE:
        return [tokenizer.bos_token_id, *text.draw(rng, length - 1)]
    if kind >= PLAIN_SHARE + NEEDLE_SHARE:
        return span_row(rng, text, tokenizer, length)
    if rng.random() < 0.25:
        return passkey_row(rng, text, tokenizer, length)
    return needle_row(rng, text, tokenizer, length)


def passkey_row(rng: random.Random, text: TextMixture, tokenizer: PreTrainedTokenizerBase, length: int) -> list[int]:
    """The standard passkey prompt of a random length with its answer, then plain text."""
    prompt_length = rng.randint(min(128, length), length)
    prompt = needle_prompt(tokenizer, PASSKEY, prompt_length, rng.random(), seed=rng.getrandbits(32))
    row = prompt.input_ids + prompt.answer_ids
    return row + text.draw(rng, length - len(row))


def needle_row(rng: random.Random, text: TextMixture, tokenizer: PreTrainedTokenizerBase, length: int) -> list[int]:
    """One to four needles among filler, all asked at the end in random order."""
    needles = _draw_mixed_needles(rng)
    statements = [_encode(tokenizer, needle.statement) for needle in needles]
    intro = _encode(tokenizer, PASSKEY_INTRO) if rng.random() < 0.3 else []
    asked = rng.sample(needles, len(needles))
    questions = [_encode(tokenizer, needle.question + needle.answer + ".") for needle in asked]
    fixed = [tokenizer.bos_token_id, *intro]
    num_filler = max(0, length - len(fixed) - sum(map(len, statements)) - sum(map(len, questions)))
    if rng.random() < 0.4:
        grass = _encode(tokenizer, GRASS_FILLER)
        filler = (grass * (num_filler // len(grass) + 1))[:num_filler]
    else:
        filler = text.draw(rng, num_filler)
    row = fixed + _scatter(rng, filler, statements) + [token for ids in questions for token in ids]
    return row[:length]


def span_row(rng: random.Random, text: TextMixture, tokenizer: PreTrainedTokenizerBase, length: int) -> list[int]:
    """One to three spans of 12 to 48 tokens that occur twice, at any distance the row allows.

    Half of the spans are natural text, half random tokens; what lies between is natural text, or in
    15 % of the rows random tokens.
    """
    plain = plain_token_ids(tokenizer)
    spans = []
    for _ in range(rng.randint(1, 3)):
        size = rng.randint(12, 48)
        spans.append(text.draw(rng, size) if rng.random() < 0.5 else rng.choices(plain, k=size))
    order = rng.sample(range(len(spans)), len(spans))
    blocks = spans + [spans[index] for index in order]
    num_filler = max(0, length - 1 - sum(map(len, blocks)))
    filler = rng.choices(plain, k=num_filler) if rng.random() < 0.15 else text.draw(rng, num_filler)
    return [tokenizer.bos_token_id, *_scatter(rng, filler, blocks)][:length]


def _draw_mixed_needles(rng: random.Random) -> list[Needle]:
    """One to four needles: all of one keyed template, or of different templates."""
    templates = templates_of("standard") + templates_of("train")
    count = rng.randint(1, 4)
    if rng.random() < 0.5:
        return draw_needles(rng, rng.choice([t for t in templates if t.is_keyed]), count)
    return [draw_needles(rng, template)[0] for template in rng.sample(templates, count)]


def _scatter(rng: random.Random, filler: Sequence[int], blocks: list[list[int]]) -> list[int]:
    """The filler with the blocks put in at random places, in the order given."""
    row, taken = [], 0
    for cut, block in zip(sorted(rng.randint(0, len(filler)) for _ in blocks), blocks, strict=True):
        row += [*filler[taken:cut], *block]
        taken = cut
    return row + list(filler[taken:])


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)
