"""A tokenizer whose tokens are the bytes of the text, so that a test can say by itself what they must be."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
MARKED_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '[' + message['role'] + ']' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
UNMARKED_TEMPLATE = MARKED_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def byte_tokenizer(*, has_bos: bool = True, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Ids: the two special tokens first, then one for each byte; it adds no token by itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([BOS, EOS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special: dict[str, Any] = {"eos_token": EOS} | ({"bos_token": BOS} if has_bos else {})
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **special)
    made.chat_template = chat_template
    return made


class SlowTokenizer:
    """The same tokenizer without offsets, as the slow ones of transformers are."""

    is_fast = False

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str, *, return_offsets_mapping: bool = False, **options: Any) -> Any:
        assert not return_offsets_mapping
        return self._tokenizer(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)
