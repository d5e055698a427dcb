from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import pytest

from eabf_cli.core.data import files
from eabf_cli.core.data.parsing import EmptyRecordError
from eabf_cli.core.data.records import open_records
from eabf_cli.core.errors import DataError
from tests.core.data.pdf_files import make_pdf

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


def test_turns_are_the_same_in_every_spelling(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "how warm?"},
        {"role": "assistant", "content": "ask('weather')"},
        {"role": "tool", "content": "21"},
        {"role": "assistant", "content": "21 degrees"},
    ]
    senders = ("developer", "Human", "function_call", "observation", "GPT")
    sharegpt = [{"from": sender, "value": turn["content"]} for sender, turn in zip(senders, turns, strict=True)]
    in_parts = [
        turn | {"tool_calls": [], "content": [{"type": "text", "text": letter} for letter in turn["content"]]}
        for turn in turns
    ]
    rows: list[dict[str, object]] = [
        {"messages": turns},
        {"messages": sharegpt},
        {"conversations": turns},
        {"conversations": sharegpt},
        {"messages": in_parts},
        {"prompt": turns[:4], "completion": turns[4:]},
        {"messages": None, "text": None, "prompt": turns[:-1], "completion": "21 degrees"},
    ]
    path = write(tmp_path / "chat.jsonl", "\n".join(map(json.dumps, rows)))
    assert [list(read().messages) for read in open_records(path)] == [turns] * len(rows)


def test_a_prompt_and_its_completion_are_an_exchange(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": None}]
    records = open_records(write(tmp_path / "pairs.jsonl", "\n".join(map(json.dumps, rows))))
    assert [list(read().messages) for read in records] == [
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    ]
    assert "1 of 2 records" in records.notes[0]


def test_a_call_of_tools_that_is_no_text_leaves_its_conversation_out(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": [talk[0], call, {"role": "tool", "content": "r"}, talk[1]]}, {"messages": talk}]
    records = open_records(write(tmp_path / "calls.jsonl", "\n".join(map(json.dumps, rows))))
    assert [list(read().messages) for read in records] == [talk]
    assert "line 1: turn 2 calls tools by 'tool_calls'" in records.notes[0]


def test_a_folder_gives_its_texts_sorted_and_several_sources_keep_their_order(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "deeper").mkdir(parents=True)
    write(folder / "b.txt", "b\r\n")
    write(folder / "a.MD", "a")
    write(folder / "deeper" / "c.txt", "c")
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
        ("data.jsonl", b"[" * 100_000, "line 1: invalid JSON: nested too deeply"),
        ("data.jsonl", rb'{"text": "a \ud83d b"}', "line 1: half a character"),
        ("data.jsonl", rb'{"messages": [{"role": "assistant", "content": "\udc00"}]}', "line 1: half a character"),
        ("data.json", b"", "is empty"),
        ("data.json", b"[]", "is empty"),
        ("data.json", b"[1]", "record 1: expected an object"),
        ("data.json", b'[{"text": "a"}, {"text": "b"]', "record 2: invalid JSON: Expecting"),
        ("data.json", b'[{"text": "a"} {"text": "b"}]', "invalid JSON at byte 15: expected ','"),
        ("data.json", b'[{"text": "a"},]', "record 2: invalid JSON"),
        ("data.json", b'[{"text": "a"}', "at byte 14: expected ','"),
        ("data.json", b'[{"text": "a"}] x', "text after the list, at byte 16"),
        ("data.json", b'\xef\xbb\xbf[{"text": "\xc3\xa9"}, {"text": "\xff"}]', r"invalid UTF-8 at byte 30 \(0xff\)"),
        ("data.json", b'[{"text": "a\xc3', r"invalid UTF-8 at byte 12 \(0xc3\)"),
        ("data.json", b"[" * 100_000, "record 1: invalid JSON: nested too deeply"),
        ("data.json", b'[{"conversations": [{"from": "human", "value": "hi"}]}]', "record 1: no assistant turn"),
        ("data.json", b'{"text": "a"}\n{"txt": "b"}', "line 2: no key"),
        ("data.parquet", b"PAR1 but no more", "cannot be read as Parquet"),
        ("data.pdf", b"%PDF-1.7", "cannot be read as a PDF"),
    ],
)
def test_malformed_data_is_refused_where_it_is(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as refused:
        open_records(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("source", ["", " "])
def test_an_empty_name_is_not_the_working_directory(source: str) -> None:
    with pytest.raises(DataError, match="empty name"):
        open_records(source)


@pytest.mark.parametrize("source", ["missing.jsonl", "some/where/else/data", "./data", "notes.txt", "/no/such"])
def test_a_mistyped_path_is_not_looked_up_on_the_hub(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(datasets, "load_dataset")
    with pytest.raises(DataError, match="not found"):
        open_records(source)


def test_an_empty_folder_and_an_empty_list_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no data"):
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
    assert [record.origin for record in records] == [
        "dataset 'owner/name', split 'test', row 0",
        "dataset 'owner/name', split 'test', row 1",
    ]
    assert records[0].messages[1] == {"role": "assistant", "content": "hello"}


def test_a_hub_failure_is_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, **options: str | None) -> None:
        raise ConnectionError("no network\nand a long trace")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        DataError, match=r"'owner/name' is no file here .*split 'train'.*no network\nCheck .*HF_ENDPOINT"
    ):
        open_records("owner/name")


def test_split_and_revision_are_refused_for_local_data(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "a")
    for options in ({"split": "train"}, {"revision": "main"}):
        with pytest.raises(DataError, match="can be chosen for a Hub dataset"):
            open_records(path, **options)
    with pytest.raises(DataError, match="no split 'test'; its splits: train, heldout"):
        open_records("demo-long", split="test")


def test_a_json_list_is_read_alike_whatever_part_of_it_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ['é 😀 \\ " ] } ,', "x" * 70, "[1, {}]", " 𝄞"]
    rows = [{"id": -1.5e3, "text": text, "tags": [{"a": []}, None, True, 12]} for text in texts]
    for ensure_ascii, indent in ((True, None), (False, 2)):
        content = json.dumps(rows, ensure_ascii=ensure_ascii, indent=indent)
        for mark in (b"", b"\xef\xbb\xbf"):
            path = write(tmp_path / "data.json", mark + b"\n " + content.encode() + b" \n")
            for num_bytes in (1, 2, 3, 5, 17, 64, 10_000):
                monkeypatch.setattr(files, "_WINDOW_BYTES", num_bytes)
                records = [read() for read in open_records(path)]
                assert [record.text for record in records] == texts
                assert records[2].origin == f"{path}, record 3"


def test_a_json_file_may_hold_a_record_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "data.json", '{"text": "a"}\n{"text": "b"}\n')
    assert [read().text for read in open_records(path)] == ["a", "b"]


SHAREGPT = [
    {"id": f"chat-{number}", "conversations": [{"from": "human", "value": f"q{number}"}, {"from": "gpt", "value": "a"}]}
    for number in range(5)
]
DATASET_CARD = "---\nlicense: mit\n---\n\n# Long conversations\n"


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def test_parquet_rows_are_read_by_any_of_the_three_columns(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    for fields in ({"text": "hello"}, {"messages": messages}, {"conversations": CHAT}):
        path = write_table(tmp_path / f"{next(iter(fields))}.parquet", [{**fields, "id": 1}, {**fields, "id": 2}])
        records = [read() for read in open_records(path)]
        assert [record.text for record in records] == [fields.get("text")] * 2
        assert [list(record.messages) for record in records] == [[] if "text" in fields else messages] * 2
        assert str(path) in records[1].origin
        assert "row 1" in records[1].origin


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n"])
def test_the_column_of_an_error_at_a_line_s_end_is_behind_its_last_character(end: str, tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", '{"text": "a"' + end)
    with pytest.raises(DataError, match=r"line 1: invalid JSON at column 13: Expecting ',' delimiter"):
        open_records(path)


def test_a_parquet_file_without_rows_is_called_empty_and_one_that_is_damaged_logs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    no_rows = write_table(tmp_path / "rows.parquet", [{"text": "a"}])
    table = pyarrow.parquet.read_table(no_rows)
    pyarrow.parquet.write_table(table.slice(0, 0), no_rows)
    (tmp_path / "bytes.parquet").touch()
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 but no more")
    logger = logging.getLogger("datasets")
    level, propagate = logger.level, logger.propagate
    logger.propagate = True
    try:
        for name in ("rows.parquet", "bytes.parquet"):
            with pytest.raises(EmptyRecordError, match=rf"{name} is empty: no row in it$"):
                open_records(tmp_path / name)
        with pytest.raises(DataError, match="cannot be read as Parquet"):
            open_records(tmp_path / "damaged.parquet")
    finally:
        logger.propagate = propagate
    assert caplog.records == []
    assert logger.level == level


def test_a_parquet_file_that_changes_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    for text in ("first", "other"):
        write_table(path, [{"text": text}])
        assert [read().text for read in open_records(path)] == [text]


def test_a_table_without_a_known_column_says_which_it_has(tmp_path: Path) -> None:
    path = write_table(tmp_path / "data.parquet", [{"prompt": "a", "answer": "b"}])
    with pytest.raises(DataError, match="keys found: 'prompt', 'answer'"):
        open_records(path)


def test_turns_that_a_table_keeps_as_a_list_a_field_are_the_same_turns(tmp_path: Path) -> None:
    by_field = {"from": ["human", "gpt"], "value": ["hi", "hello"]}
    path = write(tmp_path / "data.jsonl", json.dumps({"conversations": by_field}))
    (read,) = open_records(path)
    assert [message["content"] for message in read().messages] == ["hi", "hello"]


@pytest.mark.parametrize("layout", ["parquet", "json"])
def test_a_folder_as_the_hub_serves_it_is_read_by_its_splits(tmp_path: Path, layout: str) -> None:
    folder = tmp_path / "EABF-ShareGPT-Long-3.5k"
    (folder / "data").mkdir(parents=True)
    write(folder / "README.md", DATASET_CARD)
    write(folder / ".gitattributes", "*.parquet filter=lfs")
    for split, rows in (("train", SHAREGPT[:3]), ("test", SHAREGPT[3:])):
        if layout == "parquet":
            write_table(folder / "data" / f"{split}-00000-of-00001.parquet", rows)
        else:
            write(folder / "data" / f"{split}.json", json.dumps(rows, indent=1))
    for options, rows in (({}, SHAREGPT[:3]), ({"split": "test"}, SHAREGPT[3:])):
        records = [read() for read in open_records(folder, **options)]
        assert [record.messages[0]["content"] for record in records] == [r["conversations"][0]["value"] for r in rows]
        assert all(record.messages[1] == {"role": "assistant", "content": "a"} for record in records)
    with pytest.raises(DataError, match=r"cannot be loaded \(split 'validation'"):
        open_records(folder, split="validation")


def test_a_dataset_file_in_the_folder_of_a_hub_dataset_needs_no_split_in_its_name(tmp_path: Path) -> None:
    write(tmp_path / "README.md", DATASET_CARD)
    write(tmp_path / "ShareGPT_long.json", json.dumps(SHAREGPT))
    assert [read().messages[0]["content"] for read in open_records(tmp_path)] == ["q0", "q1", "q2", "q3", "q4"]


def test_a_folder_may_hold_any_mix_and_tells_what_it_ignored(tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    write(folder / "README.md", "# My notes\n")
    write(folder / "a.txt", "from text")
    write(folder / "b.jsonl", '{"text": "from lines"}\n')
    write(folder / "c.json", '[{"text": "from a list"}]')
    write_table(folder / "d.parquet", [{"text": "from a table"}])
    write(folder / "e.pdf", make_pdf([["from a page"]]))
    write(folder / "empty.txt", " ")
    write(folder / "scan.pdf", make_pdf([[]]))
    write(folder / "old.csv", "1,2")
    write(folder / "new.csv", "1,2")
    write(folder / "LICENSE", "MIT")
    (folder / ".cache").mkdir()
    write(folder / ".cache" / "hidden.txt", "hidden")
    records = open_records(folder)
    expected = ["# My notes\n", "from text", "from lines", "from a list", "from a table", "from a page"]
    assert [read().text for read in records] == expected
    empty, scan, ignored = records.notes
    assert "empty.txt is empty" in empty
    assert "scan.pdf has no text layer" in scan
    assert ignored == f"files in {folder} that are no data were ignored: 2 .csv, 1 LICENSE"


def test_a_folder_without_data_says_what_is_in_it(tmp_path: Path) -> None:
    write(tmp_path / "old.csv", "1,2")
    write(tmp_path / "empty.txt", "")
    with pytest.raises(DataError, match=r"holds no data .*empty.txt is empty.*other files there: 1 .csv"):
        open_records(tmp_path)


def test_records_with_nothing_to_train_on_are_left_out_and_told(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": " "}, {"conversations": CHAT[:1]}, {"text": None}, {"conversations": CHAT}]
    path = write(tmp_path / "data.jsonl", "\n".join(map(json.dumps, rows)))
    records = open_records(path)
    assert [read().origin for read in records] == [f"{path}, line 1", f"{path}, line 5"]
    (note,) = records.notes
    assert note.startswith(f"3 of 5 records in {path} were left out, the first: {path}, line 2: 'text' must be")


def test_the_hash_of_the_contents_is_of_bytes_and_kinds(tmp_path: Path) -> None:
    def content_hash(*sources: Path) -> str:
        return open_records(sources).content_hash()

    content = '{"text": "a"}'
    path, copy = write(tmp_path / "a.jsonl", content), write(tmp_path / "b.jsonl", content)
    text, other = write(tmp_path / "a.txt", content), write(tmp_path / "c.jsonl", content.replace("a", "b"))
    table = write_table(tmp_path / "d.parquet", [{"text": "a"}])
    assert content_hash(path, table) == content_hash(copy, table)
    assert len({content_hash(path), content_hash(text), content_hash(other), content_hash(path, other)}) == 4
    assert content_hash(path, other) != content_hash(other, path)


def test_the_hash_of_a_dataset_stays_until_it_changes(tmp_path: Path) -> None:
    write(tmp_path / "README.md", DATASET_CARD)
    path = write(tmp_path / "data.json", json.dumps(SHAREGPT))
    first, again = (open_records(tmp_path).content_hash() for _ in range(2))
    assert first == again
    write(path, json.dumps(SHAREGPT[1:]))
    assert open_records(tmp_path).content_hash() != first
