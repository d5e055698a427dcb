from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from eabf_cli.core.errors import DataError
from eabf_cli.core.records import open_records

CHAT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_jsonl_records_are_read_in_order_past_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    lines = [{"text": "first é"}, None, {"text": "second", "other": 1}, {"text": "third"}]
    content = "\r\n".join("" if line is None else json.dumps(line, ensure_ascii=False) for line in lines)
    path = write(tmp_path / "data.jsonl", b"\xef\xbb\xbf" + content.encode())
    records = [read() for read in open_records(path)]
    assert [record.text for record in records] == ["first é", "second", "third"]
    assert [record.origin for record in records] == [f"{path}, line {number}" for number in (1, 3, 4)]


def test_both_chat_layouts_give_the_same_turns(tmp_path: Path) -> None:
    sharegpt = [{"from": "system", "value": "s"}]
    messages = [{"role": "system", "content": "s"}]
    for sender, role in (("human", "user"), ("gpt", "assistant"), ("user", "user"), ("chatgpt", "assistant")):
        sharegpt.append({"from": sender, "value": f"by {role}"})
        messages.append({"role": role, "content": f"by {role}"})
    rows = [{"conversations": sharegpt}, {"messages": messages}, {"text": "rendered", "messages": messages}]
    path = write(tmp_path / "chat.jsonl", "\n".join(map(json.dumps, rows)))
    assert [list(read().messages) for read in open_records(path)] == [messages] * 3


def test_a_folder_gives_its_texts_sorted_and_several_sources_keep_their_order(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "deeper").mkdir(parents=True)
    write(folder / "b.txt", "b\r\n")
    write(folder / "a.MD", "a")
    write(folder / "deeper" / "c.txt", "c")
    write(folder / "table.csv", "1,2")
    last = write(tmp_path / "last.jsonl", '{"text": "last"}')
    assert [read().text for read in open_records([folder, last])] == ["a", "b\n", "c", "last"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.jsonl", b"", "is empty"),
        ("data.txt", b" \n", "is empty"),
        ("data.csv", b"a,b", "unknown kind of file '.csv'"),
        ("data.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', "line 3: invalid JSON at column"),
        ("data.jsonl", b'{"text": "a"}\n{"text": "\xff"}', r"invalid UTF-8 at byte 24 \(0xff\)"),
        ("data.jsonl", b'\xef\xbb\xbf{"text": "\xfe"}', r"invalid UTF-8 at byte 13 \(0xfe\)"),
        ("data.txt", b"abc\xc3(", r"invalid UTF-8 at byte 3 \(0xc3\)"),
        ("data.jsonl", b'{"text": "a"}\n{"txt": "b", "id": 1}', "line 2: no key .* keys found: 'txt', 'id'"),
        ("data.jsonl", b'["a"]', "line 1: expected an object"),
        ("data.jsonl", b'{"text": "  "}', "line 1: 'text' must be a string that is not empty"),
        ("data.jsonl", b'{"text": 7}', "must be a string that is not empty, found 7"),
        ("data.jsonl", b'{"messages": []}', "no assistant turn"),
        ("data.jsonl", b'{"messages": [{"role": "user", "content": "hi"}]}', "no assistant turn"),
        ("data.jsonl", b'{"messages": [{"role": "assistant", "content": " "}]}', "no assistant turn"),
        ("data.jsonl", b'{"messages": [{"role": "pirate", "content": "arr"}]}', "turn 1 has the role 'pirate'"),
        ("data.jsonl", b'{"messages": [{"role": "user", "content": null}]}', "turn 1 must hold a string"),
        ("data.jsonl", b'{"conversations": [{"role": "user"}]}', "turn 1 of 'conversations' must be an object"),
        ("data.jsonl", b'{"messages": "hi"}', "'messages' must be a list of turns"),
    ],
)
def test_malformed_data_is_refused_where_it_is(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as refused:
        open_records(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("source", ["missing.jsonl", "some/where/else/data", "./data", "notes.txt", "/no/such"])
def test_a_mistyped_path_is_not_looked_up_on_the_hub(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(datasets, "load_dataset")
    with pytest.raises(DataError, match="not found"):
        open_records(source)


def test_an_empty_folder_and_an_empty_list_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no text"):
        open_records(tmp_path)
    with pytest.raises(DataError, match="no dataset given"):
        open_records([])


def test_a_hub_dataset_is_asked_for_with_its_split_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, **options: str | None) -> datasets.Dataset:
        asked.append((name, options))
        return datasets.Dataset.from_list([{"conversations": CHAT, "id": "1"}, {"conversations": CHAT, "id": "2"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    records = [read() for read in open_records("owner/name", split="test", revision="v1")]
    assert asked == [("owner/name", {"split": "test", "revision": "v1"})]
    assert [record.origin for record in records] == ["owner/name, row 0", "owner/name, row 1"]
    assert records[0].messages[1] == {"role": "assistant", "content": "hello"}


def test_a_hub_failure_is_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, **options: str | None) -> None:
        raise ConnectionError("no network\nand a long trace")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"'owner/name' .*split 'train'.*ConnectionError: no network$"):
        open_records("owner/name")


def test_split_and_revision_are_refused_for_local_data(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "a")
    for options in ({"split": "train"}, {"revision": "main"}):
        with pytest.raises(DataError, match="Hub dataset only"):
            open_records(path, **options)
    with pytest.raises(DataError, match="no split 'test'; its splits: train, heldout"):
        open_records("demo-long", split="test")
