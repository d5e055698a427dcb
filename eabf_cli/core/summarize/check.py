"""Proof that a document was read: facts planted in it at several depths, and asked for behind it."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eabf_cli.core.caches import forget_after, make_cache
from eabf_cli.core.needles import TEMPLATES, Needle, draw_needles
from eabf_cli.core.summarize.generation import Generator
from eabf_cli.core.summarize.prompts import Frame, document_ids, make_frame
from eabf_cli.core.summarize.sentences import last_sentence_end
from eabf_cli.core.summarize.settings import TEXT_FIELD, Sampling

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
_TEMPLATE = TEMPLATES["locker"]
_OPENING = f"Read this text.\n=====\n{TEXT_FIELD}\n=====\n"
_QUESTION = "Where in the text are the belongings of {key}?"
_ANSWER_START = "All the belongings of {key} are stored in locker"
_MAX_ANSWER_TOKENS = 12


@dataclass(frozen=True)
class PlantedText:
    """A document with facts in it, and where each stands: its depth and index in characters."""

    text: str
    needles: tuple[Needle, ...]
    places: tuple[tuple[float, int], ...]


def plant_facts(text: str, depths: Sequence[float] = DEPTHS, *, seed: int = 42) -> PlantedText:
    """Put one fact behind the sentence that ends nearest before each depth (0: beginning, 1: end)."""
    needles = draw_needles(random.Random(f"check/{seed}"), _TEMPLATE, len(depths))
    planted, places, taken = "", [], 0
    for depth, needle in zip(sorted(depths), needles, strict=True):
        wanted = round(depth * len(text))
        cut = max(taken, last_sentence_end(text[:wanted], is_complete=wanted == len(text)))
        planted += text[taken:cut]
        places.append((depth, len(planted)))
        planted += needle.statement
        taken = cut
    return PlantedText(planted + text[taken:], tuple(needles), tuple(places))


def num_check_tokens(tokenizer: Any, text: str, *, seed: int = 42) -> int:
    """Tokens that the check of a document needs: the document with the facts, a question and its answer."""
    planted = plant_facts(text, seed=seed)
    questions = max(len(_frame(tokenizer, needle)) for needle in planted.needles)
    return len(document_ids(tokenizer, planted.text)) + questions + _MAX_ANSWER_TOKENS


def check_reading(generator: Generator, text: str, *, seed: int = 42) -> dict[str, Any]:
    """Ask the model for each of the facts planted in a document; it is read once for all of them.

    Returns:
        `planted` and `found` (counts) and `depths`: for each fact its `depth`, the `position` of its first token
        in the prompt (0-based), and whether it was `found`.
    """
    tokenizer = generator.tokenizer
    planted = plant_facts(text, seed=seed)
    frames = [_frame(tokenizer, needle) for needle in planted.needles]
    start = [*frames[0].head, *document_ids(tokenizer, planted.text)]
    cache = make_cache(generator.model, len(start) + max(len(frame.tail) for frame in frames) + _MAX_ANSWER_TOKENS)
    generator.read(start, cache, "Checking")
    cache.activate_past_recording()
    depths = []
    for needle, frame, (depth, index) in zip(planted.needles, frames, planted.places, strict=True):
        answer = _answer(generator, [*start, *frame.tail], cache)
        forget_after(cache, len(start))
        position = len(frame.head) + len(document_ids(tokenizer, planted.text[:index]))
        depths.append({"depth": depth, "position": position, "found": _says(answer, needle.value)})
    return {"planted": len(depths), "found": sum(entry["found"] for entry in depths), "depths": depths}


def _says(answer: str, number: str) -> bool:
    return re.search(rf"(?<!\d){number}(?!\d)", answer) is not None


def _answer(generator: Generator, prompt_ids: list[int], cache: Any) -> str:
    """The likeliest continuation of a prompt whose beginning is in the cache, as far as it matters."""
    import torch

    row = torch.tensor([prompt_ids], device=generator.model.device)
    made = generator.model.generate(
        input_ids=row,
        attention_mask=torch.ones_like(row),
        past_key_values=cache,
        max_new_tokens=_MAX_ANSWER_TOKENS,
        pad_token_id=generator.pad_id(),
        repetition_penalty=1.0,
        **Sampling().generate_options(),
    )
    return str(generator.tokenizer.decode(made[0, len(prompt_ids) :], skip_special_tokens=True))


def _frame(tokenizer: Any, needle: Needle) -> Frame:
    """The question after the document; the answer is begun, so that any model only has to finish it."""
    start = _ANSWER_START.format(key=needle.key)
    question = _OPENING + _QUESTION.format(key=needle.key)
    return make_frame(tokenizer, question, answer_start=start)
