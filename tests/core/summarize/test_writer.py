"""What is shown while a summary is written, and what is kept of it."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from eabf_cli.core.checkpoint import load_tokenizer
from eabf_cli.core.summarize.repetition import (
    MIN_REPEATS,
    MIN_TOKENS,
    looping_from,
    number_tokens,
    repeated_from,
    repeating_from,
)
from eabf_cli.core.summarize.sentences import last_sentence_end
from eabf_cli.core.summarize.writer import SummaryWriter
from tests.byte_tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()


def write(text: str, *, is_cut: bool = False, start: str = "") -> tuple[str, list[str]]:
    """Feed a text byte by byte, so that every character of several bytes comes in parts."""
    pieces: list[str] = []
    writer = SummaryWriter(TOKENIZER, pieces.append, start=start)
    writer.put(torch.tensor([[7, 8, 9]]))  # the prompt
    for token in TOKENIZER(text, add_special_tokens=False)["input_ids"]:
        writer.put(torch.tensor([token]))
    writer.end()
    return writer.finish(is_cut=is_cut), pieces


@settings(max_examples=60, deadline=None)
@example(text="1 \n", is_cut=False, start="")
@given(st.text(alphabet="ab .!\n-1é漢🙂。", max_size=40), st.booleans(), st.sampled_from(["", "-"]))
def test_pieces_join_to_the_text(text: str, is_cut: bool, start: str) -> None:
    whole, pieces = write(text, is_cut=is_cut, start=start)
    assert "".join(pieces) == whole
    assert (start + text).strip().startswith(whole)
    if not is_cut:
        assert whole == (start + text).strip()
    assert "\ufffd" not in whole


def test_text_is_shown_before_it_ends() -> None:
    pieces: list[str] = []
    writer = SummaryWriter(TOKENIZER, pieces.append)
    writer.put(torch.tensor([[7]]))
    shown = []
    for token in TOKENIZER("One. Two words. Rest", add_special_tokens=False)["input_ids"]:
        writer.put(torch.tensor([token]))
        shown.append("".join(pieces))
    assert shown[4] == "One."
    assert shown[-1] == "One. Two words."


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("One point. Two poi", "One point."),
        ("One point. Two points.", "One point. Two points."),
        ("One point of 3.5 percent", "One point of 3.5 percent"),
        ("- first\n- second\n- thi", "- first\n- second"),
        ("1. first\n2. sec", "1. first"),
        ("Shown by Smith et al. in a stu", "Shown by Smith et al. in a stu"),
        ('He said "no." Then he', 'He said "no."'),
        ("最初。次の", "最初。"),
        ("no end at all", "no end at all"),
    ],
)
def test_a_cut_text_ends_with_a_sentence(text: str, kept: str) -> None:
    assert write(text, is_cut=True)[0] == kept


def test_a_text_without_any_end_yet_has_none() -> None:
    assert last_sentence_end("Half a sentence") == 0
    assert last_sentence_end("Is it 3.") == 0
    assert last_sentence_end("Is it 3. Yes") == len("Is it 3.")


def slow_repeated_from(ids: list[int]) -> int | None:
    """By trying every block size and every number of repeats."""
    for size in range(1, len(ids) + 1):
        repeats = 0
        while (repeats + 1) * size <= len(ids):
            start = len(ids) - (repeats + 1) * size
            if ids[start : start + size] != ids[-size:]:
                break
            repeats += 1
        if repeats >= MIN_REPEATS and repeats * size >= MIN_TOKENS:
            return len(ids) - (repeats - 1) * size
    return None


def test_a_repeated_block_is_found_wherever_it_begins() -> None:
    rng = random.Random(0)
    found = 0
    for _ in range(2000):
        block = [rng.randrange(3) for _ in range(rng.randrange(1, 9))]
        ids = [rng.randrange(3) for _ in range(rng.randrange(6))] + block * rng.randrange(1, 12)
        expected = slow_repeated_from(ids)
        assert repeated_from(ids) == expected
        found += expected is not None
    assert 200 < found < 1800


def test_a_row_of_zeros_is_no_loop() -> None:
    assert repeated_from([1, 2] + [0] * (MIN_TOKENS - 1)) is None
    assert repeated_from([1, 2] + [0] * MIN_TOKENS) == 3


def test_counting_without_words_is_a_loop_and_a_list_is_none() -> None:
    tokenizer = load_tokenizer("eabf-tiny")
    numbers = number_tokens(tokenizer)
    assert {tokenizer.decode([index]).strip() for index in numbers} >= set("0123456789")

    def loop(text: str) -> int | None:
        return looping_from(tokenizer(text, add_special_tokens=False)["input_ids"], numbers)

    counting = "".join(f"- {number}.\n" for number in range(10, 40))
    assert loop(counting) == loop(f"Points:\n{counting}") - len(
        tokenizer("Points:\n", add_special_tokens=False)["input_ids"]
    )
    assert loop("".join(f"- {number}.\n" for number in range(10, 14))) is None
    assert loop("in 2017, 2018, 2019 and 2020") is None
    words = ["the", "sun", "was", "warm", "each", "house", "by", "sea", "stood", "open", "to", "mild", "wind"]
    assert loop("".join(f"- {number}. {word} rose.\n" for number, word in enumerate(words, 10))) is None


@pytest.mark.parametrize(
    ("ids", "start"),
    [
        ("abcdefgh", None),
        ("abcdefgabcde", None),
        ("abcdefgabcdef", 7),
        ("abcdefgabcdefgabc", 7),
        ("abcdefgabcdefX", None),
        ("xab ab ab", 4),
        ("aa", 1),
    ],
)
def test_a_block_that_is_spelled_again_waits(ids: str, start: int | None) -> None:
    assert repeating_from([ord(letter) for letter in ids]) == start


def test_what_only_looked_like_a_loop_is_shown_in_the_end() -> None:
    text = "The sun is warm. The sun is warm. The sun is gone."
    assert write(text)[0] == text
    assert "".join(write(text)[1]) == text
