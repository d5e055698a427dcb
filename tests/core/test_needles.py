"""Needle prompts: exact lengths, places and texts, checked by decoding what was built."""

import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import eabf_cli
from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.needles import (
    GRASS_FILLER,
    PASSKEY,
    PASSKEY_INTRO,
    TEMPLATES,
    needle_prompt,
    passkey_prompt,
    plain_token_ids,
    templates_of,
)

DEMO = Path(eabf_cli.__path__[0]) / "demo" / "eabf-tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Puts a word-boundary mark before whatever it is given, splits off every character; has no BOS."""
    characters = ["<unk>", *"▁.?", *string.digits, *string.ascii_letters]
    vocabulary = {character: index for index, character in enumerate(characters)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Split("", "isolated")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_passkey_prompt_is_the_published_text(tokenizer):
    prompt = passkey_prompt(tokenizer, 300, 0.5)
    key = prompt.answer.strip()
    assert len(key) == 5
    assert key.isdigit()
    text = tokenizer.decode(prompt.input_ids[1:])
    assert text.startswith(
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it."
        " The grass is green. The sky is blue."
    )
    assert f" The pass key is {key}. Remember it. {key} is the pass key." in text
    assert text.endswith(" What is the pass key? The pass key is")
    assert tokenizer.decode(prompt.answer_ids) == f" {key}"
    filler = text.removeprefix(PASSKEY_INTRO).removesuffix(PASSKEY.question)
    filler = filler.replace(f" The pass key is {key}. Remember it. {key} is the pass key.", "")
    assert (GRASS_FILLER * 20).startswith(filler)


@settings(max_examples=30, deadline=None)
@given(length=st.integers(150, 2100), depth=st.floats(0, 1), name=st.sampled_from(sorted(TEMPLATES)))
def test_length_is_exact_and_the_needle_where_it_says(tokenizer, length, depth, name):
    prompt = needle_prompt(tokenizer, TEMPLATES[name], length, depth)
    assert len(prompt.input_ids) + len(prompt.answer_ids) == length
    assert prompt.input_ids[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in prompt.input_ids[1:]
    statement = tokenizer.decode(prompt.input_ids[prompt.needle_position :])
    assert statement.startswith(TEMPLATES[name].statement.split("{")[0])
    assert prompt.answer in statement


def test_text_around_the_needle_reads_like_one_text(tokenizer):
    """Tokens of the pieces are the tokens of the joined text, from the needle's start on."""
    prompt = needle_prompt(tokenizer, TEMPLATES["telephone"], 256, 1.0)
    tail = prompt.input_ids[prompt.needle_position :] + prompt.answer_ids
    assert tokenizer.encode(tokenizer.decode(tail)) == tail
    assert "  " not in tokenizer.decode(tail)


@given(length=st.integers(150, 2100), depth=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_depth_is_the_share_of_the_filler_before_the_needle(tokenizer, length, depth):
    first, here, last = (passkey_prompt(tokenizer, length, d).needle_position for d in (0, depth, 1))
    assert abs(here - first - depth * (last - first)) <= 0.5


def test_depths_order_the_needle(tokenizer):
    positions = [passkey_prompt(tokenizer, 512, depth).needle_position for depth in (0, 0.25, 0.5, 0.75, 1)]
    assert positions == sorted(set(positions))
    first = passkey_prompt(tokenizer, 512, 0)
    assert tokenizer.decode(first.input_ids[1 : first.needle_position]) == PASSKEY_INTRO


def test_same_seed_same_prompt_other_seed_other_answer(tokenizer):
    assert passkey_prompt(tokenizer, 200, 0.5, seed=3) == passkey_prompt(tokenizer, 200, 0.5, seed=3)
    answers = {passkey_prompt(tokenizer, 200, 0.5, seed=seed).answer for seed in range(8)}
    assert len(answers) == 8


def test_distractors_have_other_keys_and_values(tokenizer):
    prompt = needle_prompt(tokenizer, TEMPLATES["debt"], 400, 0.5, num_distractors=3)
    text = tokenizer.decode(prompt.input_ids)
    assert text.count(" owes the bank ") == 4
    assert text.count(prompt.answer) == 1
    position = prompt.needle_position
    assert prompt.answer in tokenizer.decode(prompt.input_ids[position : position + 24])
    with pytest.raises(ValueError, match="magic-number"):
        needle_prompt(tokenizer, TEMPLATES["magic-number"], 400, 0.5, num_distractors=1)


def test_given_filler_is_used_and_repeated(tokenizer):
    filler = tokenizer.encode(" one two three")
    prompt = needle_prompt(tokenizer, PASSKEY, 256, 1.0, filler_ids=filler)
    between = prompt.input_ids[1 + len(tokenizer.encode(PASSKEY_INTRO)) : prompt.needle_position]
    assert between == [filler[i % len(filler)] for i in range(len(between))]
    assert len(between) > 100


def test_pieces_take_no_extra_space_and_no_bos_where_there_is_none():
    tokenizer = sentencepiece_like()
    prompt = passkey_prompt(tokenizer, 600, 0.5)
    assert len(prompt.input_ids) + len(prompt.answer_ids) == 600
    tokens = "".join(tokenizer.convert_ids_to_tokens(prompt.input_ids + prompt.answer_ids))
    assert "▁▁" not in tokens
    assert tokens.endswith("▁The▁pass▁key▁is▁" + prompt.answer.strip())


def test_plain_tokens_are_all_but_the_added_ones(tokenizer):
    added = set(tokenizer.get_added_vocab().values())
    plain = plain_token_ids(tokenizer)
    assert added
    assert not added & set(plain)
    assert len(set(plain)) == len(plain) == len(tokenizer) - len(added)


@pytest.mark.parametrize("bad", [{"length": 40}, {"depth": -0.1}, {"depth": 1.5}])
def test_impossible_prompts_are_refused(tokenizer, bad):
    settings = {"length": 300, "depth": 0.5, **bad}
    with pytest.raises(InvalidConfigError, match=str(next(iter(bad.values())))):
        needle_prompt(tokenizer, PASSKEY, **settings)


def test_table_of_templates():
    assert len(templates_of("train")) >= 8
    assert len(templates_of("heldout")) >= 3
    for template in TEMPLATES.values():
        assert "{value}" in template.statement
        assert "{value}" not in template.question
        assert template.is_keyed == ("{key}" in template.question)


def test_heldout_templates_share_no_wording_with_the_others():
    """No four words in a row of a held-out statement or question occur in a template that may be taught."""

    def four_grams(split):
        words = [part.split() for t in templates_of(split) for part in (t.statement, t.question)]
        return {tuple(w[i : i + 4]) for w in words for i in range(len(w) - 3)}

    assert four_grams("heldout")
    assert not four_grams("heldout") & (four_grams("train") | four_grams("standard"))
    held, taught = ({word for t in templates_of(split) for word in t.name.split("-")} for split in ("heldout", "train"))
    assert not held & taught
