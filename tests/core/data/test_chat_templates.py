"""Loss on the assistant's tokens alone, token by token, in the formats that most chat models have.

The templates are written for these tests after the published formats. What is expected is put together from
strings, turn by turn, without any template: a conversation is a list of (text, whether it is trained).
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
from transformers import AutoTokenizer

from eabf_cli.core.data.tokenization import encode_chat
from tests.tiny_llama import DEMO_TOKENIZER

Turns = list[dict[str, str]]
Pieces = list[tuple[str, bool]]

LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for turn in turns %}"
    "{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if turn['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + turn['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + turn['content'].strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
CHATML = (
    "{% for turn in messages %}"
    "{{ '<|im_start|>' + turn['role'] + '\\n' + turn['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}"
    "{% for turn in messages %}"
    "{{ '<|start_header_id|>' + turn['role'] + '<|end_header_id|>\\n\\n' + turn['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)


def llama_2_pieces(turns: Turns) -> Pieces:
    """<s>[INST] <<SYS>>system<</SYS>> user [/INST] answer </s><s>[INST] user [/INST] answer </s>"""
    pieces: Pieces = []
    system = ""
    for turn in turns:
        content = turn["content"].strip()
        if turn["role"] == "system":
            system = f"<<SYS>>\n{turn['content']}\n<</SYS>>\n\n"
        elif turn["role"] == "user":
            pieces.append((f"<s>[INST] {system}{content} [/INST]", False))
            system = ""
        else:
            pieces.append((f" {content} </s>", True))
    return pieces


def chatml_pieces(turns: Turns) -> Pieces:
    """<|im_start|>role, content<|im_end|>, each on its lines; the last line end is the format's, not the answer's."""
    pieces: Pieces = []
    for turn in turns:
        is_answer = turn["role"] == "assistant"
        pieces += [(f"<|im_start|>{turn['role']}\n", False), (f"{turn['content']}<|im_end|>", is_answer), ("\n", False)]
    return pieces


def llama_3_pieces(turns: Turns) -> Pieces:
    """<|begin_of_text|>, then for each turn a header, an empty line, the content and <|eot_id|>."""
    pieces: Pieces = [("<|begin_of_text|>", False)]
    for turn in turns:
        pieces.append((f"<|start_header_id|>{turn['role']}<|end_header_id|>\n\n", False))
        pieces.append((f"{turn['content'].strip()}<|eot_id|>", turn["role"] == "assistant"))
    return pieces


FORMATS = {
    "llama-2": (LLAMA_2, ("<s>", "</s>"), llama_2_pieces),
    "chatml": (CHATML, ("<|im_start|>", "<|im_end|>"), chatml_pieces),
    "llama-3": (
        LLAMA_3,
        ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        llama_3_pieces,
    ),
}
SYSTEM = {"role": "system", "content": "You are a careful reader of long books."}
EXCHANGES = [
    {"role": "user", "content": "Who wrote the letter, and when? "},
    {"role": "assistant", "content": "  The captain wrote it; in 1841.\n\nHe was old, café — 😀"},
    {"role": "user", "content": "assistant"},
    {"role": "assistant", "content": "assistant"},
    {"role": "user", "content": "\nAnd then?"},
    {"role": "assistant", "content": "[INST] Nothing more is known.\n"},
]
CONVERSATIONS = {
    "one exchange": EXCHANGES[:2],
    "system": [SYSTEM, *EXCHANGES[:2]],
    "several": EXCHANGES,
    "system and several": [SYSTEM, *EXCHANGES],
    "unanswered": [SYSTEM, *EXCHANGES[:5]],
}


def make_tokenizer(name: str) -> Any:
    """The demo model's byte-level BPE, with a format's special tokens and template."""
    template, special, _ = FORMATS[name]
    tokenizer = AutoTokenizer.from_pretrained(str(DEMO_TOKENIZER))
    tokenizer.add_tokens(list(special), special_tokens=True)
    tokenizer.bos_token, tokenizer.eos_token = special[:2]
    tokenizer.chat_template = template
    return tokenizer


def num_bytes(tokenizer: Any, token: str) -> int:
    """A byte-level vocabulary spells each byte as one character, but for tokens that were added."""
    return len(token.encode()) if token in tokenizer.get_added_vocab() else len(token)


def expected_tokens(tokenizer: Any, pieces: Pieces) -> tuple[list[int], list[bool]]:
    """The tokens of the whole text; one is trained if its last byte is."""
    is_trained = [trained for text, trained in pieces for _ in text.encode()]
    ids = tokenizer("".join(text for text, _ in pieces), add_special_tokens=False)["input_ids"]
    sizes = [num_bytes(tokenizer, token) for token in tokenizer.convert_ids_to_tokens(ids)]
    ends = list(accumulate(sizes))
    assert ends[-1] == len(is_trained)
    return ids, [is_trained[end - 1] for end in ends]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", FORMATS)
def test_only_the_assistants_tokens_carry_loss(name: str, conversation: str) -> None:
    tokenizer, turns = make_tokenizer(name), CONVERSATIONS[conversation]
    ids, has_loss = expected_tokens(tokenizer, FORMATS[name][2](turns))
    encoded = encode_chat(tokenizer, turns, "chat")
    assert encoded.input_ids == ids
    assert encoded.has_loss == has_loss
    # Each answer is one stretch of loss, and the token that ends the turn is the last of it.
    lasts = [token for token, now, then in zip(ids, has_loss, [*has_loss[1:], False], strict=True) if now and not then]
    assert lasts == [tokenizer.eos_token_id] * sum(turn["role"] == "assistant" for turn in turns)


@pytest.mark.parametrize("name", FORMATS)
def test_generation_marks_around_the_same_text_give_the_same(name: str) -> None:
    tokenizer = make_tokenizer(name)
    expected = encode_chat(tokenizer, CONVERSATIONS["system and several"], "chat")
    marked = {
        "llama-2": LLAMA_2.replace("{% else %}{{ ' '", "{% else %}{% generation %}{{ ' '").replace(
            "+ eos_token }}{% endif %}", "+ eos_token }}{% endgeneration %}{% endif %}"
        ),
        "chatml": CHATML.replace(
            "turn['content'] + '<|im_end|>' + '\\n' }}",
            "'' }}{% if turn['role'] == 'assistant' %}{%- generation -%}{{ turn['content'] + '<|im_end|>' }}"
            "{%- endgeneration -%}{% else %}{{ turn['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}",
        ),
        "llama-3": LLAMA_3.replace(
            "turn['content'] | trim + '<|eot_id|>' }}",
            "'' }}{% if turn['role'] == 'assistant' %}{% generation %}{{ turn['content'] | trim + '<|eot_id|>' }}"
            "{% endgeneration %}{% else %}{{ turn['content'] | trim + '<|eot_id|>' }}{% endif %}",
        ),
    }
    tokenizer.chat_template = marked[name]
    assert "generation" in tokenizer.chat_template.replace("add_generation", "")
    assert encode_chat(tokenizer, CONVERSATIONS["system and several"], "chat") == expected
