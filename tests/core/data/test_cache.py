from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from eabf_cli.core.data import cache, samples
from eabf_cli.core.data.sample_set import IGNORE_INDEX, SampleSet
from eabf_cli.core.data.samples import DataConfig, load_samples
from tests.byte_tokenizer import MARKED_TEMPLATE, SlowTokenizer, byte_tokenizer

CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "an answer"}]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where entries lie, empty."""
    monkeypatch.setenv("EABF_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "samples"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[DataConfig]:
    """The configs for which samples were really drawn."""
    configs = []
    draw = samples._draw

    def counting(config: DataConfig, tokenizer: Any, records: Any) -> SampleSet:
        configs.append(config)
        return draw(config, tokenizer, records)

    monkeypatch.setattr(samples, "_draw", counting)
    return configs


def write_data(path: Path, *more: dict[str, Any]) -> Path:
    rows = [*({"text": f"document {number} {'x' * number}"} for number in range(8)), CHAT, *more]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_the_second_call_tokenises_nothing_and_gives_the_same(tmp_path: Path, folder: Path, drawn: list[Any]) -> None:
    config = DataConfig(dataset=write_data(tmp_path / "a.jsonl"), num_samples=None, min_length=13)
    first = load_samples(config, byte_tokenizer())
    assert first.num_short > 0
    assert len(first.notes) == 2
    again = load_samples(config, byte_tokenizer())
    assert again == first
    assert len(drawn) == 1
    (entry,) = folder.iterdir()
    tensors = load_file(entry)
    assert tensors["lengths"].sum() == len(tensors["input_ids"]) == first.num_tokens
    assert (tensors["labels"] == IGNORE_INDEX).any()


def test_a_copy_of_the_data_gives_the_same_samples_under_its_own_name(
    tmp_path: Path, folder: Path, drawn: list[Any]
) -> None:
    path = write_data(tmp_path / "a.jsonl")
    first = load_samples(DataConfig(dataset=path, num_samples=3), byte_tokenizer())
    copy = tmp_path / "b.jsonl"
    copy.write_bytes(path.read_bytes())
    second = load_samples(DataConfig(dataset=str(copy), num_samples=3), byte_tokenizer())
    assert second.data_hash == first.data_hash
    assert [row.input_ids for row in second.samples] == [row.input_ids for row in first.samples]
    for name, found in (("a.jsonl, line", first), ("b.jsonl, line", second)):
        assert all(name in found.origin(index) for index in range(3))
    os.utime(copy, ns=(0, 0))
    assert load_samples(DataConfig(dataset=str(copy), num_samples=3), byte_tokenizer()) == second
    assert len(drawn) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"num_samples": 4},
        {"max_length": 100},
        {"too_long": "truncate"},
        {"min_length": 5},
        {"too_short": "drop"},
        {"seed": 1},
    ],
)
def test_another_setting_is_another_entry(
    tmp_path: Path, folder: Path, drawn: list[Any], change: dict[str, Any]
) -> None:
    config = DataConfig(dataset=write_data(tmp_path / "a.jsonl"), num_samples=3)
    load_samples(config, byte_tokenizer())
    load_samples(replace(config, **change), byte_tokenizer())
    assert len(drawn) == len(list(folder.iterdir())) == 2


def test_an_edit_that_keeps_size_and_time_is_seen(tmp_path: Path, folder: Path, drawn: list[Any]) -> None:
    path = write_data(tmp_path / "a.jsonl")
    config = DataConfig(dataset=path, num_samples=None)
    first, status = load_samples(config, byte_tokenizer()), path.stat()
    path.write_text(path.read_text().replace("document 3", "document Z"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert load_samples(config, byte_tokenizer()).data_hash != first.data_hash


def test_another_tokenizer_is_another_entry(tmp_path: Path, folder: Path, drawn: list[Any]) -> None:
    config = DataConfig(dataset=write_data(tmp_path / "a.jsonl"), num_samples=3)
    renamed = byte_tokenizer()
    renamed.eos_token = "x"
    extended = byte_tokenizer()
    extended.add_tokens(["document"])
    tokenizers = [
        byte_tokenizer(),
        byte_tokenizer(has_bos=False),
        byte_tokenizer(chat_template=MARKED_TEMPLATE),
        renamed,
        extended,
    ]
    for tokenizer in tokenizers * 2:
        load_samples(config, tokenizer)
    assert len(drawn) == len(tokenizers)


def test_a_tokenizer_that_cannot_be_written_out_and_cache_off_keep_nothing(
    tmp_path: Path, folder: Path, drawn: list[Any]
) -> None:
    config = DataConfig(dataset=write_data(tmp_path / "a.jsonl"), num_samples=3)

    class Slow(SlowTokenizer):
        backend_tokenizer = None

    for _ in range(2):
        load_samples(config, Slow(byte_tokenizer()))
        load_samples(replace(config, cache=False), byte_tokenizer())
    assert len(drawn) == 4
    assert not folder.exists()


def damage(content: bytes, how: str) -> bytes:
    if how == "cut off":
        return content[: len(content) // 2]
    if how == "flipped":
        return content[:-1] + bytes([content[-1] ^ 1])
    if how == "foreign":
        return pickle.dumps({"input_ids": [1]})
    if how == "renamed field":
        # Of the same length, so that the header's own length still fits.
        return content.replace(b"num_split", b"num_spilt")
    return b""


@pytest.mark.parametrize("how", ["cut off", "flipped", "foreign", "renamed field", "empty"])
def test_a_damaged_entry_is_made_anew(tmp_path: Path, folder: Path, drawn: list[Any], how: str) -> None:
    config = DataConfig(dataset=write_data(tmp_path / "a.jsonl"), num_samples=3)
    first = load_samples(config, byte_tokenizer())
    (entry,) = folder.iterdir()
    content = entry.read_bytes()
    entry.write_bytes(damage(content, how))
    assert entry.read_bytes() != content
    for _ in range(2):
        assert load_samples(config, byte_tokenizer()) == first
    assert len(drawn) == 2


def test_a_folder_that_cannot_be_written_is_no_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn: list[Any]
) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    monkeypatch.setenv("EABF_CACHE_DIR", str(blocked))
    config = DataConfig(dataset=write_data(tmp_path / "a.jsonl"), num_samples=3)
    assert load_samples(config, byte_tokenizer()) == load_samples(config, byte_tokenizer())
    assert len(drawn) == 2


@pytest.mark.parametrize("limit", ["MAX_ENTRIES", "MAX_BYTES"])
def test_the_entries_that_were_not_used_for_longest_go(
    tmp_path: Path, folder: Path, drawn: list[DataConfig], monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    config = DataConfig(dataset=write_data(tmp_path / "a.jsonl"), num_samples=None)
    load_samples(replace(config, seed=0), byte_tokenizer())
    (entry,) = folder.iterdir()
    monkeypatch.setattr(cache, limit, 3 if limit == "MAX_ENTRIES" else 3 * entry.stat().st_size + 100)
    abandoned = folder / f"{'0' * 64}.samples.safetensors.123"
    abandoned.write_bytes(b"half of an entry")
    (folder / "notes.txt").write_text("someone else's")
    now = entry.stat().st_mtime_ns
    for age, path in enumerate((entry, abandoned), start=1):
        os.utime(path, ns=(now, now - age * 10**12))
    for seed in (1, 2):
        load_samples(replace(config, seed=seed), byte_tokenizer())
    # Seed 0 is used again, so that seed 1 is the oldest.
    os.utime(entry, ns=(now, now - 10**12))
    load_samples(replace(config, seed=0), byte_tokenizer())
    assert [config.seed for config in drawn] == [0, 1, 2]
    load_samples(replace(config, seed=3), byte_tokenizer())
    drawn.clear()
    for seed in (0, 2, 3, 1):
        load_samples(replace(config, seed=seed), byte_tokenizer())
    assert [config.seed for config in drawn] == [1]
    assert not abandoned.exists()
    assert (folder / "notes.txt").exists()


def test_the_folder_is_the_platforms_unless_one_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("EABF_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder().name == "samples"
    assert cache.cache_folder().parent.name == "eabf"
