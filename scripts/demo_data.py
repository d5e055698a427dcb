"""`demo-long`: long training samples whose later parts need their earlier ones, and held-out long documents.

Only the public-domain sources are used. Training samples come from the training part of the corpus, documents from
its held-out part. A document that repeats the training part is left out, and so is a sample that shares 13 words in a
row with a document.
"""

import json
import random
import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from eabf_cli.core.needles import draw_needles, templates_of

SOURCES = ("austen", "bible", "sqlite")
MIN_TOKENS, MAX_TOKENS = 1_900, 2_047  # with BOS a sample is at most 2,048
HELDOUT_TOKENS = 4_350
OVERLAP_WORDS = 13
# Manuals repeat whole passages from page to page; a document made of them was seen in training.
MAX_OVERLAP = 0.02
KINDS = {"plain": 0.65, "needles": 0.25, "spans": 0.1}

# Stands in for natural text in some needle samples: retrieval must work in monotonous text as well.
REFRAINS = (
    " The rain falls. The wind is cold. The road is long. We walk on. The hills are far away.",
    " One boat goes out. One boat comes in. The tide turns. The gulls cry. So the day passes.",
    " Bread is on the table. The fire burns low. The door is shut. Nobody speaks. The clock strikes.",
)


def build_demo_long(
    text_dir: Path, tokenizer: PreTrainedTokenizerBase, output: Path, *, num_samples: int = 240, seed: int = 0
) -> None:
    """Write `train.jsonl` (`num_samples` lines) and `heldout.jsonl` to `output`, one `{"text"}` a line."""
    trained = {hash(gram) for path in text_dir.glob("*.train.txt") for gram in word_grams(path.read_text("utf-8"))}
    by_source = [
        [text for text in heldout_documents(text_dir, name, tokenizer) if overlap(text, trained) <= MAX_OVERLAP]
        for name in SOURCES
    ]
    # In turns, so that the first N documents are of every source.
    documents = [document for group in zip_longest(*by_source) for document in group if document is not None]
    heldout_grams = {gram for document in documents for gram in word_grams(document)}
    rng = random.Random(seed)
    chunks = [chunk for name in SOURCES for chunk in text_chunks(text_dir, name, tokenizer)]
    rng.shuffle(chunks)
    samples: list[str] = []
    while len(samples) < num_samples:
        sample = draw_sample(rng, chunks.pop(), chunks, tokenizer)
        if heldout_grams.isdisjoint(word_grams(sample)):
            samples.append(sample)
    output.mkdir(parents=True, exist_ok=True)
    for name, texts in (("train", samples), ("heldout", documents)):
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        (output / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def overlap(text: str, hashes: set[int]) -> float:
    """Share of a text's runs of `OVERLAP_WORDS` words whose hashes are among those given."""
    grams = list(word_grams(text))
    return sum(hash(gram) in hashes for gram in grams) / max(1, len(grams))


def word_grams(text: str, size: int = OVERLAP_WORDS) -> Iterator[tuple[str, ...]]:
    """Every run of `size` words, in lower case and without punctuation."""
    words = re.findall(r"[a-z0-9']+", text.lower())
    return (tuple(words[i : i + size]) for i in range(len(words) - size + 1))


def heldout_documents(text_dir: Path, name: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The held-out text of one source in consecutive documents of at least `HELDOUT_TOKENS` tokens."""
    sentences = split_sentences((text_dir / f"{name}.heldout.txt").read_text(encoding="utf-8"))
    documents = ("".join(group).strip() for group in _group(sentences, tokenizer, HELDOUT_TOKENS))
    return [text for text in documents if _count(tokenizer, text) >= HELDOUT_TOKENS]


def text_chunks(text_dir: Path, name: str, tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
    """The training text of one source as consecutive, disjoint lists of sentences, each enough for a sample."""
    sentences = split_sentences((text_dir / f"{name}.train.txt").read_text(encoding="utf-8"))
    return list(_group(sentences, tokenizer, MAX_TOKENS + 20))[:-1]


def split_sentences(text: str) -> list[str]:
    """Sentences and clauses of the text, each with the white space before it; joined they are the text."""
    return re.findall(r"\s*\S.*?(?:[.!?;:][\"')]*(?=\s)|(?=\n\n)|\Z)", text, flags=re.DOTALL)


def draw_sample(
    rng: random.Random, sentences: list[str], others: list[list[str]], tokenizer: PreTrainedTokenizerBase
) -> str:
    """One sample of 1,900 to 2,047 tokens made of the text in `sentences`.

    What is planted has a place in the text (0 to 1) and so has what refers to it, anywhere behind: half of
    the questions and repetitions stand at the very end, so distances up to the whole sample occur.
    `others` lends sentences to be repeated.
    """
    (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
    planted: list[tuple[float, str]] = []
    if kind == "needles":
        planted = _needle_events(rng)
        if rng.random() < 0.2:
            sentences = _refrain(rng)
    if kind == "spans":
        planted = _span_events(rng, others)
    budget = MAX_TOKENS - 10 - sum(_count(tokenizer, text) for _, text in planted)
    filler = _fill(sentences, tokenizer, budget)
    places = sorted((place * len(filler), order, text) for order, (place, text) in enumerate(planted))
    parts, taken = [], 0
    for place, _, text in places:
        parts += [*filler[taken : int(place)], text]
        taken = max(taken, int(place))
    sample = "".join(parts + filler[taken:]).strip()
    if not MIN_TOKENS <= _count(tokenizer, sample) <= MAX_TOKENS:
        raise AssertionError(f"a {kind} sample came out with {_count(tokenizer, sample)} tokens")
    return sample


def _needle_events(rng: random.Random) -> list[tuple[float, str]]:
    """Facts from three to five templates, each with its question; some keyed facts are never asked for."""
    events = []
    for template in rng.sample(templates_of("train"), rng.randint(3, 5)):
        needles = draw_needles(rng, template, rng.randint(1, 4) if template.is_keyed else 1)
        for index, needle in enumerate(needles):
            place, question_place = _two_places(rng)
            events.append((place, needle.statement))
            if index < 2:
                events.append((question_place, f"{needle.question}{needle.answer}."))
    return events


def _span_events(rng: random.Random, others: list[list[str]]) -> list[tuple[float, str]]:
    """Four to seven passages that occur twice: sentences of other chapters, or random words."""
    events = []
    for _ in range(rng.randint(4, 7)):
        chapter = rng.choice(others)
        if rng.random() < 0.4:
            start = rng.randrange(max(1, len(chapter) - 3))
            span = " " + " ".join("".join(chapter[start : start + 3]).split()[:40])
        else:
            words = re.findall(r"[A-Za-z]+", "".join(chapter))
            if not words:  # a list of dates, as manuals have
                continue
            span = " " + " ".join(rng.choices(words, k=rng.randint(10, 25))) + "."
        place, repeat_place = _two_places(rng)
        events += [(place, span), (repeat_place, span)]
    return events


def _two_places(rng: random.Random) -> tuple[float, float]:
    first = 0.95 * rng.random() ** 1.5
    return first, 1.0 if rng.random() < 0.5 else rng.uniform(first, 1.0)


def _refrain(rng: random.Random) -> list[str]:
    return split_sentences(rng.choice(REFRAINS) * 200)


def _fill(sentences: list[str], tokenizer: PreTrainedTokenizerBase, budget: int) -> list[str]:
    """As many sentences as fit `budget` tokens; the one that does not fit is cut between two words."""
    taken = []
    for sentence in sentences:
        budget -= _count(tokenizer, sentence)
        if budget < 0:
            words = sentence.split(" ")
            while words and _count(tokenizer, " ".join(words)) > _count(tokenizer, sentence) + budget:
                words.pop()
            return [*taken, " ".join(words)]
        taken.append(sentence)
    return taken


def _group(sentences: list[str], tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for sentence in sentences:
        group.append(sentence)
        size += _count(tokenizer, sentence)
        if size >= num_tokens + 10:  # white space at the cut, and tokens that join across sentences
            yield group
            group, size = [], 0
    if group:
        yield group


def _count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False))
