"""What of a run file goes to the Hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eabf_cli.core.export.published_record import published_record, without_local_paths


@pytest.mark.parametrize(
    ("text", "published"),
    [
        ("/mnt/me/models/llama", "llama"),
        ("/mnt/me/models/llama/", "llama"),
        ("--output=/mnt/me/out", "--output=out"),
        ("~/data/chats.jsonl", "chats.jsonl"),
        ("~me/data/chats.jsonl", "chats.jsonl"),
        (r"C:\Data\me\chats.jsonl", "chats.jsonl"),
        ("file:///mnt/me/x.gguf", "x.gguf"),
        ("/mnt/me/llama has no tokenizer, '/data/other' has one", "llama has no tokenizer, 'other' has one"),
        ("/", "/"),
        *(
            (text, text)
            for text in (
                "eabf-runs/llama-eabf-x4",
                "../models/llama",
                "./out",
                "meta-llama/Llama-2-7b-hf",
                "1/4 to 8 windows",
                "https://huggingface.co/a/b",
                "tokens / s",
                "cuda:0",
                "a: b",
            )
        ),
    ],
)
def test_of_an_absolute_path_the_last_name_is_left(text: str, published: str) -> None:
    assert without_local_paths(text) == published


def test_a_path_with_spaces_is_known_by_its_being_there(tmp_path: Path) -> None:
    folder = tmp_path / "my data"
    folder.mkdir()
    assert without_local_paths(str(folder)) == "my data"


def test_the_home_directory_is_found_whatever_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/mnt/my self")
    assert without_local_paths(["-m", "/mnt/my self/llama"]) == ["-m", "llama"]


def test_all_of_the_record_is_gone_through_and_the_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "eabf_run.json"
    record = {"argv": ["export", "/a/b"], "run": {"files": {"/a/c.txt": 1}, "seed": 42, "revision": None}}
    path.write_text(json.dumps(record))
    before = path.read_bytes()
    assert json.loads(published_record(path)) == {
        "argv": ["export", "b"],
        "run": {"files": {"c.txt": 1}, "seed": 42, "revision": None},
    }
    assert path.read_bytes() == before


def test_a_record_without_paths_is_published_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "eabf_run.json"
    path.write_bytes(b'{"command":  "export", "output": "eabf-runs/x"}')
    assert published_record(path) == path.read_bytes()
