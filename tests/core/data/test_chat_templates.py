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
from eabf_cli.core.errors import DataError
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

# What a thinking model's template does to the past: thoughts are kept, or made up empty, in the last answer alone.
QWEN_3 = (
    "{% set ns = namespace(last_query=-1) %}"
    "{% for turn in messages %}{% if turn.role == 'user' %}{% set ns.last_query = loop.index0 %}{% endif %}{% endfor %}"
    "{% for turn in messages %}"
    "{% if turn.role != 'assistant' %}"
    "{{ '<|im_start|>' + turn.role + '\n' + turn.content + '<|im_end|>\n' }}"
    "{% else %}"
    "{% set content = turn.content %}{% set thought = '' %}"
    "{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}"
    "{% endif %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last_query and (loop.last or thought) %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{% else %}{{ content }}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
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


def qwen_3_pieces(turns: Turns) -> Pieces:
    """As ChatML; an answer that nobody spoke after shows its thought, be it empty, and those before show none."""
    pieces: Pieces = []
    for number, turn in enumerate(turns, start=1):
        is_answer = turn["role"] == "assistant"
        content = turn["content"]
        if is_answer:
            thought, _, said = content.rpartition("</think>")
            thought = thought.removeprefix("<think>").strip("\n")
            said = said.lstrip("\n") if thought else said
            is_last = number == len(turns)
            content = f"<think>\n{thought}\n</think>\n\n{said.lstrip(chr(10))}" if is_last else said
        pieces += [(f"<|im_start|>{turn['role']}\n", False), (f"{content}<|im_end|>", is_answer), ("\n", False)]
    return pieces


FORMATS = {
    "llama-2": (LLAMA_2, ("<s>", "</s>"), llama_2_pieces),
    "chatml": (CHATML, ("<|im_start|>", "<|im_end|>"), chatml_pieces),
    "llama-3": (
        LLAMA_3,
        ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        llama_3_pieces,
    ),
    "qwen-3": (QWEN_3, ("<|im_start|>", "<|im_end|>", "<think>", "</think>"), qwen_3_pieces),
}
MARKABLE = ("llama-2", "chatml", "llama-3")
SYSTEM = {"role": "system", "content": "You are a careful reader of long books."}
EXCHANGES = [
    {"role": "user", "content": "Who wrote the letter, and when? "},
    {"role": "assistant", "content": "  The captain wrote it; in 1841.\n\nHe was old, café — 😀"},
    {"role": "user", "content": "assistant"},
    {"role": "assistant", "content": "assistant"},
    {"role": "user", "content": "\nAnd then?"},
    {"role": "assistant", "content": "[INST] Nothing more is known.\n"},
]
TOOL_TURNS = [
    EXCHANGES[0],
    {"role": "assistant", "content": "search('letter')"},
    {"role": "tool", "content": "captain, 1841 <|im_start|>assistant\nNo."},
    {"role": "assistant", "content": "The captain, in 1841."},
]
CONVERSATIONS = {
    "one exchange": EXCHANGES[:2],
    "system": [SYSTEM, *EXCHANGES[:2]],
    "several": EXCHANGES,
    "system and several": [SYSTEM, *EXCHANGES],
    "unanswered": [SYSTEM, *EXCHANGES[:5]],
    "tool": [*TOOL_TURNS, *EXCHANGES[2:4]],
    "system and tool": [SYSTEM, *TOOL_TURNS],
    "headers as words": [
        {"role": "user", "content": "What does <|im_start|>assistant\nYes<|im_end|>\n mean?"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "Yes"},
        {"role": "assistant", "content": "Yes"},
    ],
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


@pytest.mark.parametrize(
    ("name", "conversation"),
    # Llama-2's format has no place for tools.
    [(name, kind) for name in FORMATS for kind in CONVERSATIONS if (name == "llama-2") <= ("tool" not in kind)],
)
def test_only_the_assistants_tokens_carry_loss(name: str, conversation: str) -> None:
    tokenizer, turns = make_tokenizer(name), CONVERSATIONS[conversation]
    ids, has_loss = expected_tokens(tokenizer, FORMATS[name][2](turns))
    encoded = encode_chat(tokenizer, turns, "chat")
    assert encoded.input_ids == ids
    assert encoded.has_loss == has_loss
    # Each answer is one stretch of loss, and the token that ends the turn is the last of it.
    lasts = [token for token, now, then in zip(ids, has_loss, [*has_loss[1:], False], strict=True) if now and not then]
    assert lasts == [tokenizer.eos_token_id] * sum(turn["role"] == "assistant" for turn in turns)


def test_thoughts_carry_loss_where_the_template_shows_them() -> None:
    tokenizer = make_tokenizer("qwen-3")
    turns = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "<think>\nIt is odd.\n</think>\n\nOdd."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "<think>\nIt is even.\n</think>\n\nEven."},
    ]
    encoded = encode_chat(tokenizer, turns, "chat")
    assert (encoded.input_ids, encoded.has_loss) == expected_tokens(tokenizer, qwen_3_pieces(turns))
    told = tokenizer.decode([t for t, loss in zip(encoded.input_ids, encoded.has_loss, strict=True) if loss])
    assert told == "Odd.<|im_end|><think>\nIt is even.\n</think>\n\nEven.<|im_end|>"


def test_answers_that_follow_each_other_are_told_apart() -> None:
    tokenizer = make_tokenizer("qwen-3")
    turns = [*EXCHANGES[:2], {"role": "assistant", "content": "He sailed."}]
    encoded = encode_chat(tokenizer, turns, "chat")
    assert (encoded.input_ids, encoded.has_loss) == expected_tokens(tokenizer, qwen_3_pieces(turns))


@pytest.mark.parametrize(
    "template",
    [
        # The past has no generation prompt to find.
        "{% for m in messages %}{{ '[' + m.role + (': ' if loop.last else '. ') + m.content + ']' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant: ' }}{% endif %}",
        # What ends a turn depends on the turns behind it.
        "{% for m in messages %}{{ m.role + ': ' + m.content + ('</s>' if loop.last else ';') }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        # All turns in one line.
        "{% for m in messages %}{{ m.content if loop.last else m.content[:2] }}{% endfor %}",
    ],
)
def test_a_template_that_does_not_tell_where_its_answers_are_is_refused(template: str) -> None:
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=r"chat, line 3: .* cannot be told apart: .*generation"):
        encode_chat(tokenizer, EXCHANGES, "chat, line 3")


@pytest.mark.parametrize("name", MARKABLE)
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
