"""Retrieval prompts: a fact hidden in a long text and asked for at its end, and spans repeated far away.

The templates are data. `split` says who may use one: `standard` is the field's passkey prompt and its keyed
form, which evaluations ask; `train` may be taught by fine-tuning samples; `heldout` appears in no training
row of this project, so a model that answers it has learned retrieval and not a sentence. No torch in here.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from eabf_cli.core.errors import InvalidConfigError

Split = Literal["standard", "train", "heldout"]

GRASS_FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
PASSKEY_INTRO = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it."

# Any sentence end will do: what counts is that text encoded after it begins with its own space.
_SENTENCE_END = "."

_KEYS: dict[str, tuple[str, ...]] = {
    "train": (
        "Alice", "Robert", "Martha", "Daniel", "Susan", "Peter", "Helen", "George", "Rachel", "Thomas",
        "Clara", "Samuel", "Ruth", "Henry", "Sophia", "Joseph", "Agnes", "Philip", "Edith", "Simon",
        "the baker", "the captain", "the doctor", "the farmer", "the gardener", "the judge", "the miller",
        "the painter", "the sailor", "the teacher", "the widow", "the stranger",
    ),
    "heldout": (
        "Victor", "Ingrid", "Oscar", "Paula", "Leonard", "Yvonne", "Walter", "Bianca", "Gilbert", "Naomi",
        "the pilot", "the plumber", "the librarian", "the referee", "the janitor", "the violinist",
    ),
    "standard": (
        "apple", "river", "stone", "garden", "window", "horse", "silver", "winter", "bridge", "candle",
        "forest", "island", "mirror", "needle", "orange", "pepper", "rabbit", "saddle", "thunder", "valley",
    ),
}  # fmt: skip

_WORDS = (
    "amber", "anchor", "barley", "basket", "butter", "cedar", "chestnut", "copper", "cotton", "crimson",
    "feather", "ginger", "hammer", "honey", "ivory", "kettle", "ladder", "lantern", "linen", "marble",
    "oyster", "pebble", "purple", "ribbon", "saffron", "scarlet", "tinder", "velvet", "walnut", "willow",
)  # fmt: skip


class Tokenizer(Protocol):
    """What is asked of a tokenizer; every transformers tokenizer qualifies."""

    bos_token_id: int | None
    all_special_ids: list[int]

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def get_added_vocab(self) -> dict[str, int]: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class NeedleTemplate:
    """One way to state a fact and to ask for it.

    `statement` and `question` hold `{value}` and, in a keyed template, `{key}`; the question ends where the
    answer begins. `num_digits` is the length of a number value; None takes a word instead.
    """

    name: str
    statement: str
    question: str
    split: Split
    intro: str = ""
    num_digits: int | None = 5

    @property
    def is_keyed(self) -> bool:
        return "{key}" in self.statement


PASSKEY = NeedleTemplate(
    name="passkey",
    intro=PASSKEY_INTRO,
    statement=" The pass key is {value}. Remember it. {value} is the pass key.",
    question=" What is the pass key? The pass key is",
    split="standard",
)
KEYED_PASSKEY = NeedleTemplate(
    name="keyed-passkey",
    statement=" The pass key of {key} is {value}. Remember it. {value} is the pass key of {key}.",
    question=" What is the pass key of {key}? The pass key of {key} is",
    split="standard",
)

TEMPLATES: dict[str, NeedleTemplate] = {
    template.name: template
    for template in (
        PASSKEY,
        KEYED_PASSKEY,
        NeedleTemplate(
            name="magic-number",
            statement=" Keep this in mind: the magic number is {value}.",
            question=" Do you recall the magic number? Yes, the magic number is",
            split="train",
        ),
        NeedleTemplate(
            name="safe",
            statement=" To open the safe, turn the dial to {value}. The safe opens with {value}.",
            question=" How does one open the safe? To open the safe, turn the dial to",
            split="train",
            num_digits=6,
        ),
        NeedleTemplate(
            name="secret-word",
            statement=" The secret word of the day is {value}.",
            question=" Tell me the secret word of the day. The secret word of the day is",
            split="train",
            num_digits=None,
        ),
        NeedleTemplate(
            name="telephone",
            statement=" The telephone number of {key} is {value}.",
            question=" What is the telephone number of {key}? The telephone number of {key} is",
            split="train",
            num_digits=7,
        ),
        NeedleTemplate(
            name="room",
            statement=" By the way, {key} lives in room {value}.",
            question=" In which room is {key}? I was told that {key} lives in room",
            split="train",
            num_digits=3,
        ),
        NeedleTemplate(
            name="birth-year",
            statement=" It is written that {key} was born in the year {value}.",
            question=" When was {key} born? The answer is that {key} was born in the year",
            split="train",
            num_digits=4,
        ),
        NeedleTemplate(
            name="debt",
            statement=" The ledger says {key} owes the bank {value} pounds.",
            question=" How much must be paid? The ledger says {key} owes the bank",
            split="train",
            num_digits=4,
        ),
        NeedleTemplate(
            name="favourite",
            statement=" More than anything else, {key} is fond of {value}.",
            question=" And what does {key} like? More than anything else, {key} is fond of",
            split="train",
            num_digits=None,
        ),
        NeedleTemplate(
            name="parcel",
            statement=" A parcel marked {value} was left for {key}.",
            question=" There is a parcel waiting for {key}. It is marked",
            split="train",
            num_digits=6,
        ),
        NeedleTemplate(
            name="gift",
            statement=" Somebody gave {key} a box of {value}.",
            question=" What was in the box? Somebody gave {key} a box of",
            split="train",
            num_digits=None,
        ),
        NeedleTemplate(
            name="access-code",
            statement=" Please note that the access code has been set to {value}.",
            question=" Which access code should be entered? The access code has been set to",
            split="heldout",
        ),
        NeedleTemplate(
            name="locker",
            statement=" All the belongings of {key} are stored in locker {value}.",
            question=" Where can they be found? All the belongings of {key} are stored in locker",
            split="heldout",
            num_digits=4,
        ),
        NeedleTemplate(
            name="flight",
            statement=" Tomorrow morning {key} departs on flight {value}.",
            question=" Who is travelling, and how? Tomorrow morning {key} departs on flight",
            split="heldout",
            num_digits=4,
        ),
    )
}


def templates_of(split: Split) -> tuple[NeedleTemplate, ...]:
    """The templates of one split, in the table's order."""
    return tuple(template for template in TEMPLATES.values() if template.split == split)


@dataclass(frozen=True)
class Needle:
    """A template filled in: one fact with its value."""

    template: NeedleTemplate
    key: str
    value: str

    @property
    def statement(self) -> str:
        return self.template.statement.format(key=self.key, value=self.value)

    @property
    def question(self) -> str:
        return self.template.question.format(key=self.key)

    @property
    def answer(self) -> str:
        return f" {self.value}"


def draw_needles(rng: random.Random, template: NeedleTemplate, count: int = 1) -> list[Needle]:
    """`count` facts of one template with different keys and values; more than one needs a keyed template."""
    if count > 1 and not template.is_keyed:
        raise ValueError(f"template {template.name!r} has no key, so it cannot tell {count} needles apart")
    keys = rng.sample(_KEYS[template.split], count) if template.is_keyed else [""]
    if template.num_digits is None:
        values = rng.sample(_WORDS, count)
    else:
        first = 10 ** (template.num_digits - 1)
        values = [str(number) for number in rng.sample(range(first, 10 * first), count)]
    return [Needle(template, key, value) for key, value in zip(keys, values, strict=True)]


@dataclass(frozen=True)
class NeedlePrompt:
    """A prompt and the answer a model has to continue it with.

    `needle_position` is the 0-based index in `input_ids` where what is to be retrieved begins;
    `len(input_ids) + len(answer_ids)` is the requested length, exactly.
    """

    input_ids: list[int]
    answer_ids: list[int]
    needle_position: int
    answer: str


def needle_prompt(
    tokenizer: Tokenizer,
    template: NeedleTemplate,
    length: int,
    depth: float,
    *,
    seed: int = 0,
    num_distractors: int = 0,
    filler_ids: Sequence[int] | None = None,
) -> NeedlePrompt:
    """Hide one fact at `depth` (0: before the filler, 1: after it) of a prompt and ask for it at the end.

    Prompt and answer together have exactly `length` tokens: the begin-of-sequence token if the tokenizer has
    one, the template's introduction, the filler with the fact, the question, the answer. The filler is cut
    between any two tokens; it is `filler_ids`, or the grass sentences, repeated as often as needed.
    `num_distractors` facts of the same template with other keys stand at random places.
    Raises InvalidConfigError if `length` leaves no room for the fixed parts or `depth` is outside 0..1.
    """
    if not 0 <= depth <= 1:
        raise InvalidConfigError(f"a needle's depth must be between 0 and 1, got {depth}")
    rng = random.Random(f"{template.name}/{length}/{depth}/{seed}")
    asked, *distractors = draw_needles(rng, template, 1 + num_distractors)
    start = _bos(tokenizer) + tokenizer.encode(template.intro, add_special_tokens=False)
    question_ids = _encode_inside(tokenizer, asked.question)
    answer_ids = encode_after(tokenizer, asked.question, asked.answer)
    statement_ids = _encode_inside(tokenizer, asked.statement)
    distractor_ids = [_encode_inside(tokenizer, needle.statement) for needle in distractors]

    fixed = [start, statement_ids, *distractor_ids, question_ids, answer_ids]
    num_filler = length - sum(map(len, fixed))
    if num_filler < 0:
        raise InvalidConfigError(
            f"a {template.name} prompt of {length} tokens is too short: "
            f"{length - num_filler} is the least that holds the needle and its question"
        )
    filler = _repeat(filler_ids or _encode_inside(tokenizer, GRASS_FILLER), num_filler)
    cuts = [(round(depth * num_filler), statement_ids)]
    cuts += [(rng.randint(0, num_filler), ids) for ids in distractor_ids]
    input_ids, position, taken = list(start), 0, 0
    for cut, ids in sorted(cuts, key=lambda item: item[0]):
        input_ids += filler[taken:cut]
        taken = cut
        if ids is statement_ids:
            position = len(input_ids)
        input_ids += ids
    input_ids += filler[taken:] + question_ids
    return NeedlePrompt(input_ids, answer_ids, position, asked.answer)


def passkey_prompt(tokenizer: Tokenizer, length: int, depth: float, *, seed: int = 0) -> NeedlePrompt:
    """The field's passkey prompt (grass filler) of exactly `length` tokens with its five-digit answer."""
    return needle_prompt(tokenizer, PASSKEY, length, depth, seed=seed)


def plain_token_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids of the vocabulary without special and added tokens."""
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return [token for token in range(len(tokenizer)) if token not in special]


def _bos(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _repeat(ids: Sequence[int], count: int) -> list[int]:
    return (list(ids) * (count // len(ids) + 1))[:count]


def _encode_inside(tokenizer: Tokenizer, text: str) -> list[int]:
    return encode_after(tokenizer, _SENTENCE_END, text)


def encode_after(tokenizer: Tokenizer, before: str, text: str) -> list[int]:
    """The tokens of `text` as they stand after `before`.

    A SentencePiece tokenizer puts a space before whatever it is given, so a piece encoded alone would differ
    from the same piece inside a text. Where the two do not separate, `text` is encoded alone.
    """
    prefix = tokenizer.encode(before, add_special_tokens=False)
    whole = tokenizer.encode(before + text, add_special_tokens=False)
    if whole[: len(prefix)] == prefix:
        return whole[len(prefix) :]
    return tokenizer.encode(text, add_special_tokens=False)
