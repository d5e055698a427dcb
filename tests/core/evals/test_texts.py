"""Where the texts that are measured on come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eabf_cli.core.data import records
from eabf_cli.core.data.files import Records
from eabf_cli.core.data.parsing import Record
from eabf_cli.core.documents import DocumentError
from eabf_cli.core.errors import DataError, InvalidConfigError
from eabf_cli.core.evals import texts
from eabf_cli.core.evals.settings import EvalConfig, EvalRunConfig
from eabf_cli.core.evals.texts import read_texts


def write_jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_folder_gives_its_documents_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "mydocs"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_text("second text")
    (folder / "a.md").write_text("first text")
    (folder / "sub" / "c.txt").write_text("third text")
    (folder / "notes.bin").write_bytes(b"\0\1")
    (folder / ".hidden.txt").write_text("not this")
    found = read_texts(EvalRunConfig(text=(folder,)))
    assert found.texts == ("first text", "second text", "third text")
    assert found.names == tuple(str(folder / name) for name in ("a.md", "b.txt", "sub/c.txt"))
    assert found.files == (folder,)
    assert found.source == str(folder)


def test_files_and_data_sets_come_together(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_text("from a file")
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    rows = write_jsonl(tmp_path / "rows.jsonl", {"text": "from a data set"}, {"messages": turns})
    found = read_texts(EvalRunConfig(text=(file,), dataset=(str(rows),)))
    assert found.texts == ("from a file", "from a data set", "Why?\n\nBecause.")
    assert found.source == f"{file}, {rows}"


def test_a_text_that_occurs_twice_counts_once(tmp_path: Path) -> None:
    """Intervals are over documents as if each were drawn by itself."""
    folder = tmp_path / "mydocs"
    folder.mkdir()
    for name, text in (("a", "one"), ("b", "two"), ("c", "one")):
        (folder / f"{name}.txt").write_text(text)
    rows = write_jsonl(tmp_path / "rows.jsonl", {"text": "two"}, {"text": "three"})
    found = read_texts(EvalRunConfig(text=(folder, folder / "a.txt"), dataset=(str(rows),)))
    assert found.texts == ("one", "two", "three")
    assert found.names[:2] == (str(folder / "a.txt"), str(folder / "b.txt"))
    assert found.notes == ("left out for having the same text as another: 3 of 6 documents",)
    assert read_texts(EvalRunConfig(text=(folder / "a.txt", folder / "b.txt"))).notes == ()


def test_the_default_is_the_held_out_part_of_the_demo_data() -> None:
    found = read_texts(EvalRunConfig())
    assert found.source == "demo-long (held out)"
    assert len(found.texts) > 16


def test_of_many_records_the_seed_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_CANDIDATES", 2)
    rows = write_jsonl(tmp_path / "rows.jsonl", *({"text": f"text {number}"} for number in range(30)))

    def drawn(seed: int) -> texts.TextSet:
        evaluation = EvalConfig(num_documents=3)
        return read_texts(EvalRunConfig(dataset=(str(rows),), evaluation=evaluation, seed=seed))

    assert len(drawn(1).texts) == 6
    assert drawn(1).texts == drawn(1).texts != drawn(2).texts
    assert drawn(1).notes == ("6 of 30 records were drawn to choose documents from",)


def test_the_field_s_data_sets_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def open_dataset(name: str, split: str, revision: str | None) -> Records:
        asked.append((name, split))
        return Records(readers=[lambda: Record("a book", text="a long text")])

    monkeypatch.setattr(records, "_open_dataset", open_dataset)
    assert read_texts(EvalRunConfig(dataset=("PG19",))).texts == ("a long text",)
    read_texts(EvalRunConfig(dataset=("proof-pile",), dataset_split="validation"))
    assert asked == [("emozilla/pg19", "test"), ("emozilla/proofpile-test-tokenized", "validation")]


def test_the_hash_is_of_the_texts_alone(tmp_path: Path) -> None:
    hashes = set()
    for name, text in (("a.txt", "some text"), ("b.txt", "some text"), ("c.txt", "other text")):
        (tmp_path / name).write_text(text)
        hashes.add(read_texts(EvalRunConfig(text=(tmp_path / name,))).content_hash)
    assert len(hashes) == 2


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no document"):
        read_texts(EvalRunConfig(text=(tmp_path / "empty",)))
    with pytest.raises(DocumentError, match=r"nothing\.txt does not exist"):
        read_texts(EvalRunConfig(text=(tmp_path / "nothing.txt",)))
    with pytest.raises(InvalidConfigError, match="give one of them"):
        EvalRunConfig(text=(tmp_path,), evaluation=EvalConfig(documents=("a",)))
