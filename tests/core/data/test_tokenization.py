from __future__ import annotations

import logging
from importlib import resources
from typing import Any

import pytest
from transformers import AutoTokenizer

from eabf_cli.core.data import tokenization
from eabf_cli.core.data.tokenization import PLAIN_CHAT_TEMPLATE, encode_chat, encode_text
from eabf_cli.core.errors import DataError
from tests.byte_tokenizer import MARKED_TEMPLATE, UNMARKED_TEMPLATE, SlowTokenizer, byte_tokenizer

CHAT = [
    {"role": "system", "content": "Be kind. 😀"},
    {"role": "user", "content": "  What is é?"},
    {"role": "assistant", "content": " A letter: é 😀"},
    {"role": "user", "content": "And\nthen"},
    {"role": "assistant", "content": "\n\nNothing.\n"},
]


def trained_text(tokenizer: Any, encoded: Any) -> list[str]:
    """The stretches of text that carry loss."""
    stretches: list[list[int]] = []
    was_trained = False
    for token, has_loss in zip(encoded.input_ids, encoded.has_loss, strict=True):
        if has_loss:
            stretches = [*stretches[:-1], [*stretches[-1], token]] if was_trained else [*stretches, [token]]
        was_trained = has_loss
    return [tokenizer.decode(stretch) for stretch in stretches]


@pytest.mark.parametrize("has_bos", [True, False])
def test_a_text_has_loss_on_every_token_and_begins_with_bos(has_bos: bool) -> None:
    tokenizer = byte_tokenizer(has_bos=has_bos)
    encoded = encode_text(tokenizer, "aé b")
    tokens = tokenizer.convert_ids_to_tokens(encoded.input_ids)
    # The two bytes of é (0xc3 0xa9) and the space, as byte-level vocabularies spell them.
    assert tokens == ["<s>"] * has_bos + ["a", "Ã", "©", "Ġ", "b"]
    assert encoded.has_loss == [True] * len(tokens)
    assert encoded.is_whole


def test_a_long_text_is_neither_tokenised_whole_nor_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer, num_characters = byte_tokenizer(), []

    class Counting(SlowTokenizer):
        def __call__(self, text: str, **options: Any) -> Any:
            num_characters.append(len(text))
            return super().__call__(text, **options)

    text = "0123456789" * 1_000_000
    with caplog.at_level(logging.WARNING):
        encoded = encode_text(Counting(tokenizer), text, max_tokens=100)
    assert not encoded.is_whole
    assert len(encoded.input_ids) > 100
    assert tokenizer.decode(encoded.input_ids[1:]) == text[: len(encoded.input_ids) - 1]
    assert sum(num_characters) < 10_000
    assert not caplog.records


def test_a_word_that_the_cut_splits_does_not_change_the_tokens() -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(resources.files("eabf_cli") / "demo" / "eabf-tiny"))
    text = "extraordinarily " * 3_000
    whole = encode_text(tokenizer, text).input_ids
    for max_tokens in range(1, 30):
        cut = encode_text(tokenizer, text, max_tokens=max_tokens)
        assert not cut.is_whole
        assert cut.input_ids == whole[: len(cut.input_ids)]


def test_blocks_give_the_tokens_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(resources.files("eabf_cli") / "demo" / "eabf-tiny"))
    text = "It was  the best of times,\n\nit was the worst of times;\t" * 5
    chat = [*CHAT, {"role": "user", "content": text}, {"role": "assistant", "content": text}]
    whole_chat = encode_chat(tokenizer, chat, "chat")
    for num_characters in range(20, 60):
        monkeypatch.setattr(tokenization, "_BLOCK_CHARACTERS", num_characters)
        assert encode_text(tokenizer, text).input_ids[1:] == tokenizer(text)["input_ids"]
        assert encode_chat(tokenizer, chat, "chat") == whole_chat


def test_a_text_without_white_space_is_tokenised_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "_BLOCK_CHARACTERS", 10)
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(encode_text(tokenizer, "0123456789" * 5).input_ids[1:]) == "0123456789" * 5


def test_a_text_whose_prefix_gives_too_few_tokens_is_read_on() -> None:
    tokenizer = byte_tokenizer()

    class Sparse(SlowTokenizer):
        """One token for a hundred characters."""

        def __call__(self, text: str, **options: Any) -> Any:
            return super().__call__(text[::100], **options)

    text = "x" * 100_000
    assert len(encode_text(Sparse(tokenizer), text, max_tokens=500).input_ids) > 500
    whole = encode_text(Sparse(tokenizer), text, max_tokens=5_000)
    assert whole.is_whole
    assert len(whole.input_ids) == 1001


@pytest.mark.parametrize("make", [lambda tokenizer: tokenizer, SlowTokenizer], ids=["offsets", "prefixes"])
def test_only_the_answers_and_their_ends_carry_loss(make: Any) -> None:
    tokenizer = make(byte_tokenizer(chat_template=UNMARKED_TEMPLATE))
    encoded = encode_chat(tokenizer, CHAT, "chat")
    assert trained_text(tokenizer, encoded) == [" A letter: é 😀</s>", "\n\nNothing.\n</s>"]
    assert tokenizer.decode(encoded.input_ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)


def test_a_template_with_generation_marks_gives_the_same() -> None:
    marked = encode_chat(byte_tokenizer(chat_template=MARKED_TEMPLATE), CHAT, "chat")
    assert marked == encode_chat(byte_tokenizer(chat_template=UNMARKED_TEMPLATE), CHAT, "chat")


def test_a_tokenizer_without_template_gets_the_plain_format() -> None:
    tokenizer = byte_tokenizer()
    encoded = encode_chat(tokenizer, CHAT[:3], "chat")
    assert tokenizer.decode(encoded.input_ids) == (
        "<s>Be kind. 😀\n\nUSER:   What is é?\nASSISTANT:  A letter: é 😀</s>\n"
    )
    assert trained_text(tokenizer, encoded) == ["  A letter: é 😀</s>"]
    without_bos = byte_tokenizer(has_bos=False)
    assert without_bos.decode(encode_chat(without_bos, CHAT[1:3], "chat").input_ids).startswith("USER:")


def test_the_plain_format_refuses_turns_of_tools() -> None:
    turns = [*CHAT[:3], {"role": "tool", "content": "r"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(DataError, match=r"chat: .*no place for turns of tools"):
        encode_chat(byte_tokenizer(), turns, "chat")


def test_an_answer_that_opens_the_conversation_has_no_loss() -> None:
    tokenizer = byte_tokenizer()
    turns = [{"role": "assistant", "content": "Welcome"}, *CHAT[1:3]]
    assert trained_text(tokenizer, encode_chat(tokenizer, turns, "chat")) == ["  A letter: é 😀</s>"]


def test_a_long_conversation_is_cut_with_its_marks() -> None:
    tokenizer = byte_tokenizer()
    turns = [{"role": "user", "content": "q" * 50}, {"role": "assistant", "content": "a" * 100_000}]
    whole, cut = encode_chat(tokenizer, turns, "chat"), encode_chat(tokenizer, turns, "chat", max_tokens=200)
    assert 200 < len(cut.input_ids) < 5_000
    assert not cut.is_whole
    assert cut.input_ids == whole.input_ids[: len(cut.input_ids)]
    assert cut.has_loss == whole.has_loss[: len(cut.input_ids)]


def test_turns_behind_the_cut_are_not_rendered_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, num_renderings = byte_tokenizer(), []
    render = tokenizer.apply_chat_template
    monkeypatch.setattr(
        tokenizer, "apply_chat_template", lambda *args, **options: num_renderings.append(1) or render(*args, **options)
    )
    turns = [{"role": role, "content": "x" * 50} for role in ("user", "assistant")] * 500
    encoded = encode_chat(tokenizer, turns, "chat", max_tokens=200)
    assert not encoded.is_whole
    # Two for each answer of about 120 tokens, with its question.
    assert len(num_renderings) < 100


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    last_only = "{% for m in messages %}{{ m['content'] if loop.last or m['role'] == 'user' else '...' }}{% endfor %}"
    with pytest.raises(DataError, match=r"chat, line 7: .* renders the first 3 turns differently"):
        encode_chat(byte_tokenizer(chat_template=last_only), CHAT, "chat, line 7")


def test_what_a_template_refuses_is_told_with_its_own_words() -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    with pytest.raises(DataError, match=r"chat: .* refuses the conversation: no system role"):
        encode_chat(byte_tokenizer(chat_template=template), CHAT, "chat")


def test_the_plain_prompt_ends_where_tokenizers_join_the_space_to_the_next_word() -> None:
    tokenizer = byte_tokenizer(chat_template=PLAIN_CHAT_TEMPLATE)
    prompt = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("\nASSISTANT:")
    assert tokenizer.apply_chat_template(CHAT[:3], tokenize=False).startswith(prompt)
