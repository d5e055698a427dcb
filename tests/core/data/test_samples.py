from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from eabf_cli.core.data.sample_set import IGNORE_INDEX, length_histogram
from eabf_cli.core.data.samples import DataConfig, SampleCollator, load_samples
from eabf_cli.core.errors import DataError, InvalidConfigError
from tests.byte_tokenizer import MARKED_TEMPLATE, SlowTokenizer, byte_tokenizer

TOKENIZER = byte_tokenizer()


def write_texts(path: Path, lengths: list[int]) -> Path:
    """Texts of so many characters, each of its own letter, so a sample says which text it is from."""
    path.write_text("\n".join(json.dumps({"text": chr(97 + n) * length}) for n, length in enumerate(lengths)))
    return path


def texts_of(samples: Any) -> list[str]:
    return [TOKENIZER.decode(sample.input_ids, skip_special_tokens=True) for sample in samples.samples]


def test_a_seed_draws_the_same_samples_and_another_seed_others(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "data.jsonl", list(range(5, 25)))
    first, again, other = (
        load_samples(DataConfig(dataset=path, num_samples=10, seed=seed), TOKENIZER) for seed in (1, 1, 2)
    )
    assert first == again
    assert set(texts_of(first)) != set(texts_of(other))
    assert len(set(texts_of(first))) == 10
    assert first.num_available == 20
    assert first.data_hash != other.data_hash


def test_the_draw_does_not_depend_on_the_process(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "data.jsonl", list(range(5, 25)))
    program = f"""
import sys
from eabf_cli.core.data.samples import DataConfig, load_samples
class Letters:
    bos_token_id = None
    def __call__(self, text, **options):
        return {{"input_ids": [ord(letter) for letter in text]}}
print(load_samples(DataConfig(dataset={str(path)!r}, num_samples=10), Letters()).data_hash)
assert "torch" not in sys.modules
"""
    hashes = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(hashes) == 1


def test_the_hash_is_of_lengths_ids_and_labels_as_little_endian_int64(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "data.jsonl", [3])
    samples = load_samples(DataConfig(dataset=path, num_samples=1), TOKENIZER)
    ids = [TOKENIZER.bos_token_id] + [TOKENIZER.convert_tokens_to_ids("a")] * 3
    assert samples.data_hash == hashlib.sha256(struct.pack("<9q", 4, *ids, *ids)).hexdigest()


def test_a_document_has_loss_everywhere_and_a_chat_on_the_answers(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    chat = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "yes"}]}
    path.write_text(json.dumps({"text": "plain"}) + "\n" + json.dumps(chat))
    samples = load_samples(DataConfig(dataset=path, num_samples=2), TOKENIZER).samples
    document, conversation = sorted(samples, key=lambda sample: len(sample.input_ids))
    assert document.labels == document.input_ids
    trained = [token for token in conversation.labels if token != IGNORE_INDEX]
    assert TOKENIZER.decode(trained) == " yes</s>"
    assert TOKENIZER.decode(conversation.input_ids) == "<s>USER: q\nASSISTANT: yes</s>\n"


def test_too_long_error_names_the_sample_its_length_and_the_ways_out(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "data.jsonl", [40])
    with pytest.raises(DataError) as refused:
        load_samples(DataConfig(dataset=path, num_samples=1, max_length=40), TOKENIZER)
    message = str(refused.value)
    assert f"{path}, line 1" in message
    assert "41 tokens" in message
    assert all(way in message for way in ("truncate", "drop", "split"))


@pytest.mark.parametrize("too_long", ["error", "drop", "truncate"])
def test_a_sample_of_exactly_the_length_is_not_too_long(tmp_path: Path, too_long: Any) -> None:
    path = write_texts(tmp_path / "data.jsonl", [40])
    samples = load_samples(DataConfig(dataset=path, num_samples=1, max_length=41, too_long=too_long), TOKENIZER)
    assert samples.tokens_per_sample == {"min": 41, "median": 41, "max": 41}
    assert (samples.num_dropped, samples.num_truncated) == (0, 0)


def test_truncate_and_drop_are_counted(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "data.jsonl", [5, 60, 9, 3, 60])
    truncated = load_samples(DataConfig(dataset=path, num_samples=5, max_length=10, too_long="truncate"), TOKENIZER)
    assert sorted(map(len, texts_of(truncated))) == [3, 5, 9, 9, 9]
    assert (truncated.num_truncated, truncated.num_dropped, truncated.num_split) == (2, 0, 0)
    assert truncated.tokens_per_sample == {"min": 4, "median": 10, "max": 10}
    dropped = load_samples(DataConfig(dataset=path, num_samples=3, max_length=10, too_long="drop"), TOKENIZER)
    assert sorted(texts_of(dropped)) == ["a" * 5, "c" * 9, "d" * 3]
    assert 0 <= dropped.num_dropped <= 2
    with pytest.raises(DataError, match=r"gives 3 samples out of 5 records \(2 too long\), but 4 are asked for"):
        load_samples(DataConfig(dataset=path, num_samples=4, max_length=10, too_long="drop"), TOKENIZER)


@pytest.mark.parametrize(
    ("too_long", "told"),
    [
        ("truncate", "2 of 5 samples were cut to 10 tokens"),
        ("drop", "2 samples above 10 tokens were left out"),
        ("split", "2 records above 10 tokens were split into samples"),
    ],
)
def test_what_is_done_to_long_samples_is_told(too_long: Any, told: str, tmp_path: Path) -> None:
    path = write_texts(tmp_path / "data.jsonl", [5, 60, 9, 3, 61])
    samples = load_samples(
        DataConfig(dataset=path, num_samples=None, max_length=10, too_long=too_long, cache=False), TOKENIZER
    )
    assert told in samples.notes


def write_chats(path: Path, roles: list[tuple[str, ...]]) -> Path:
    """A conversation for each tuple of roles."""
    lines = []
    for number, turns in enumerate(roles):
        messages = [{"role": role, "content": f"{role[0]}{number}"} for role in turns]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines))
    return path


NO_SYSTEM = byte_tokenizer(
    chat_template="{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{{ m.role + m.content + '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
)
GOOD, BAD = ("user", "assistant"), ("system", "user", "assistant")


@pytest.mark.parametrize("seed", range(4))
def test_conversations_that_the_template_refuses_are_left_out_and_told_whatever_the_seed(
    seed: int, tmp_path: Path
) -> None:
    path = write_chats(tmp_path / "chats.jsonl", [GOOD, BAD, GOOD, BAD, GOOD])
    samples = load_samples(DataConfig(dataset=path, num_samples=3, seed=seed), NO_SYSTEM)
    assert {sample.origin for sample in samples.samples} == {f"{path}, line {line}" for line in (1, 3, 5)}
    every = load_samples(DataConfig(dataset=path, num_samples=None, seed=seed), NO_SYSTEM)
    assert (len(every), every.num_refused, every.summary()["num_refused"]) == (3, 2, 2)
    note = every.notes[-1]
    assert note.startswith(f"2 conversations were left out, the first: {path}, line ")
    assert "no system turn" in note


def test_too_few_conversations_that_the_template_takes_are_refused_with_its_words(tmp_path: Path) -> None:
    some = write_chats(tmp_path / "some.jsonl", [GOOD, BAD])
    with pytest.raises(DataError, match=r"gives 1 samples out of 2 records \(1 refused by the chat template\)") as few:
        load_samples(DataConfig(dataset=some, num_samples=2), NO_SYSTEM)
    assert f"{some}, line 2: " in str(few.value)
    none = write_chats(tmp_path / "none.jsonl", [BAD, BAD])
    with pytest.raises(DataError, match=rf"^{none}, line [12]: .*refuses the conversation: no system turn$"):
        load_samples(DataConfig(dataset=none, num_samples=1), NO_SYSTEM)


def test_split_loses_nothing_and_begins_each_piece_with_bos(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    text = "".join(chr(97 + index % 26) for index in range(100))
    path.write_text(text)
    samples = load_samples(DataConfig(dataset=path, num_samples=None, max_length=31, too_long="split"), TOKENIZER)
    assert samples.num_split == 1
    assert all(sample.input_ids[0] == TOKENIZER.bos_token_id for sample in samples.samples)
    assert sorted(texts_of(samples)) == sorted([text[:30], text[30:60], text[60:90], text[90:]])
    drawn = {
        load_samples(
            DataConfig(dataset=path, num_samples=2, max_length=11, too_long="split", seed=seed), TOKENIZER
        ).data_hash
        for seed in range(4)
    }
    assert len(drawn) > 1


def test_a_conversation_cut_before_its_first_answer_is_dropped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": "q" * length}, {"role": "assistant", "content": "a" * 50}]}
        for length in (100, 5)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(dataset=path, num_samples=None, max_length=60, too_long="truncate")
    samples = load_samples(config, TOKENIZER)
    assert (len(samples), samples.num_truncated, samples.num_dropped) == (1, 1, 1)


def test_too_few_records_say_how_many_there_are(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "data.jsonl", [5, 6, 7])
    with pytest.raises(DataError, match="gives 3 samples out of 3 records, but 100 are asked for"):
        load_samples(DataConfig(dataset=path), TOKENIZER)
    assert len(load_samples(DataConfig(dataset=path, num_samples=None), TOKENIZER)) == 3


def test_duplicates_are_left_out_and_others_drawn_for_them(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    texts = ["same"] * 6 + ["one", "two", "three"]
    path.write_text("\n".join(json.dumps({"text": text, "id": n}) for n, text in enumerate(texts)))
    samples = load_samples(DataConfig(dataset=path, num_samples=4), TOKENIZER)
    assert sorted(texts_of(samples)) == ["one", "same", "three", "two"]
    assert 0 < samples.num_duplicates <= 5
    every = load_samples(DataConfig(dataset=path, num_samples=None), TOKENIZER)
    assert every.num_duplicates == 5
    assert every.notes == ("5 samples were left out because another has the same tokens",)
    with pytest.raises(DataError, match=r"gives 4 samples out of 9 records \(5 duplicates\), but 5 are asked for"):
        load_samples(DataConfig(dataset=path, num_samples=5), TOKENIZER)


def test_samples_that_are_the_same_once_cut_are_duplicates(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"text": "x" * length}) for length in (20, 30, 5)))
    cut = load_samples(DataConfig(dataset=path, num_samples=None, max_length=10, too_long="truncate"), TOKENIZER)
    assert (len(cut), cut.num_truncated, cut.num_duplicates) == (2, 1, 1)
    pieces = load_samples(DataConfig(dataset=path, num_samples=None, max_length=11, too_long="split"), TOKENIZER)
    # 20 = 10 + 10 and 30 = 10 + 10 + 10.
    assert (sorted(map(len, texts_of(pieces))), pieces.num_duplicates) == ([5, 10], 4)


def test_short_samples_are_told_and_dropped_only_on_request(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "data.jsonl", [5, 20, 9, 30, 40])
    config = DataConfig(dataset=path, num_samples=None, min_length=10)
    told = load_samples(config, TOKENIZER)
    # BOS makes ten tokens of nine letters.
    assert (len(told), told.num_short, told.num_dropped) == (5, 1, 0)
    assert told.notes == (
        "1 of 5 samples are shorter than 10 tokens: too short to teach anything about a longer window",
    )
    dropped = load_samples(replace(config, num_samples=4, too_short="drop"), TOKENIZER)
    assert sorted(map(len, texts_of(dropped))) == [9, 20, 30, 40]
    assert dropped.num_short == dropped.num_dropped <= 1
    assert dropped.notes == ()
    with pytest.raises(DataError, match=r"4 samples out of 5 records \(1 too short\), .* or .*--too-short report"):
        load_samples(replace(config, num_samples=5, too_short="drop"), TOKENIZER)


def test_too_few_says_every_reason(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    rows = [{"text": text} for text in ("a" * 50, "b" * 50, "cc", "dddddd", "eeeeee", "eeeeee", " ")]
    rows += [{"messages": [{"role": "assistant", "content": "only a greeting"}]}]
    path.write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(
        dataset=path, num_samples=3, max_length=30, too_long="drop", min_length=5, too_short="drop", cache=False
    )
    with pytest.raises(DataError) as refused:
        load_samples(config, TOKENIZER)
    first, left_out = str(refused.value).splitlines()
    counts = "2 too long, 1 too short, 1 without loss, 1 duplicates"
    assert f"gives 2 samples out of 7 records ({counts}), but 3 are asked for" in first
    assert left_out.startswith("1 of 8 records in")


def test_a_tokenizer_without_chat_template_is_told(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}))
    (note,) = load_samples(DataConfig(dataset=path, num_samples=1), TOKENIZER).notes
    assert "no chat template" in note
    assert "Vicuna" in note
    templated = byte_tokenizer(chat_template=MARKED_TEMPLATE)
    assert load_samples(DataConfig(dataset=path, num_samples=1), templated).notes == ()
    path.write_text(json.dumps({"text": "a document"}))
    assert load_samples(DataConfig(dataset=path, num_samples=1), TOKENIZER).notes == ()


def test_what_was_not_read_is_told_with_the_samples(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a document")
    (tmp_path / "table.csv").write_text("1,2")
    for _ in range(2):
        (note,) = load_samples(DataConfig(dataset=tmp_path, num_samples=1), TOKENIZER).notes
        assert "ignored: 1 .csv" in note


@given(st.lists(st.integers(1, 20_000), min_size=1, max_size=50))
def test_the_histogram_counts_every_length_once_in_at_most_ten_bins(lengths: list[int]) -> None:
    bins = length_histogram(lengths)
    assert len(bins) <= 10
    assert bins[0]["count"] > 0
    assert bins[-1]["count"] > 0
    for bin_, following in pairwise(bins):
        assert following["from"] == bin_["to"] + 1
    (width,) = {bin_["to"] - bin_["from"] + 1 for bin_ in bins}
    assert width & (width - 1) == 0
    assert len(bins) > 5 or width == 1
    for bin_ in bins:
        assert bin_["count"] == sum(bin_["from"] <= length <= bin_["to"] for length in lengths)


def test_the_histogram_ends_where_the_window_does() -> None:
    bins = length_histogram([16_384, 16_384, 10_000])
    assert bins[-1] == {"from": 15_361, "to": 16_384, "count": 2}
    assert bins[0] == {"from": 9_217, "to": 10_240, "count": 1}


@pytest.mark.parametrize("kind", ["text", "chat", "marked chat"])
def test_ten_million_tokens_are_refused_or_cut_without_reading_them_all(tmp_path: Path, kind: str) -> None:
    tokenizer = byte_tokenizer(chat_template=MARKED_TEMPLATE if kind == "marked chat" else None)
    text = "word " * 2_000_000
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": text} if kind == "text" else {"messages": turns}))
    read = []

    class Counting(SlowTokenizer):
        is_fast = True

        def __call__(self, text: str, **options: Any) -> Any:
            read.append(len(text))
            return self._tokenizer(text, **options)

    config = DataConfig(dataset=path, num_samples=1, max_length=1_000, cache=False)
    with pytest.raises(DataError, match=r"line 1: the sample has more than 8,\d{3} tokens, more than max_length"):
        load_samples(config, Counting(tokenizer))
    (sample,) = load_samples(replace(config, too_long="truncate"), Counting(tokenizer)).samples
    assert len(sample.input_ids) == 1_000
    assert sum(read) < 20_000


def test_the_summary_is_json(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "data.jsonl", [5, 9])
    summary = load_samples(DataConfig(dataset=path, num_samples=2), TOKENIZER).summary()
    assert json.loads(json.dumps(summary)) == summary
    assert summary["num_tokens"] == 16


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"num_samples": 0}, "--samples"),
        ({"max_length": 1}, "max_length"),
        ({"too_long": "shorten"}, "--too-long"),
        ({"too_short": "pad"}, "--too-short"),
        ({"min_length": 0}, "min_length"),
        ({"min_length": 11, "max_length": 10}, "min_length"),
    ],
)
def test_nonsense_settings_are_refused(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidConfigError, match=name):
        DataConfig(**fields)


def test_padding_changes_neither_loss_nor_what_is_trained(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "data.jsonl", [5, 17, 11])
    samples = load_samples(DataConfig(dataset=path, num_samples=3), TOKENIZER)
    collate = SampleCollator.from_tokenizer(TOKENIZER)
    assert collate.pad_token_id == TOKENIZER.eos_token_id
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), max_position_embeddings=32, **sizes)).eval()
    (batch,) = DataLoader(samples, batch_size=3, collate_fn=collate)
    assert batch["attention_mask"].sum() == samples.num_tokens
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORE_INDEX).all()
    weights = [len(sample.input_ids) - 1 for sample in samples.samples]
    losses = [model(**row).loss.item() for row in DataLoader(samples, batch_size=1, collate_fn=collate)]
    expected = sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)
    assert model(**batch).loss.item() == pytest.approx(expected, rel=1e-5)


def test_rows_that_are_spread_over_processes_have_a_length_that_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_texts(tmp_path / "data.jsonl", [5, 17])
    samples = load_samples(DataConfig(dataset=path, num_samples=2), TOKENIZER)
    rows = [samples[index] for index in range(2)]
    plain = SampleCollator.from_tokenizer(TOKENIZER)(rows)
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "4")
    # Set by accelerate whether the rest is used or not.
    assert SampleCollator.from_tokenizer(TOKENIZER)(rows)["input_ids"].shape == plain["input_ids"].shape
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    spread = SampleCollator.from_tokenizer(TOKENIZER)(rows)
    length, longest = spread["input_ids"].shape[1], plain["input_ids"].shape[1]
    assert length % 8 == 0
    assert longest <= length < longest + 8
    for name, padding in (("input_ids", TOKENIZER.eos_token_id), ("labels", IGNORE_INDEX), ("attention_mask", 0)):
        assert torch.equal(spread[name][:, :longest], plain[name])
        assert (spread[name][:, longest:] == padding).all()
