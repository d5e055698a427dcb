"""Which documents are measured, how long they are, and what is told about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eabf_cli.core.data.parsing import EmptyRecordError
from eabf_cli.core.entropy.documents import (
    DocumentSet,
    check_same_tokens,
    choose_documents,
    default_length,
    default_tokens,
)
from eabf_cli.core.entropy.settings import EntropyConfig
from eabf_cli.core.errors import DataError, InvalidConfigError
from tests.byte_tokenizer import MARKED_TEMPLATE, byte_tokenizer
from tests.core.data.pdf_files import make_pdf

WINDOW = 32


def write(folder: Path, name: str, num_bytes: int, seed: int = 0) -> Path:
    """A text of so many bytes, which are as many tokens."""
    path = folder / name
    path.write_text("".join(chr(97 + (seed + 7 * index) % 26) for index in range(num_bytes)))
    return path


def choose(tokenizer: Any = None, *, memory: int = 10**9, **fields: Any) -> DocumentSet:
    return choose_documents(
        EntropyConfig(**fields),
        tokenizer or byte_tokenizer(),
        window=WINDOW,
        target=WINDOW,
        fits=lambda length: length <= memory,
    )


def test_a_document_is_its_first_tokens_as_the_tokenizer_gives_them(tmp_path: Path) -> None:
    text = write(tmp_path, "a.txt", 100)
    tokenizer = byte_tokenizer()
    documents = choose(tokenizer, text=(text,), length=70)
    # This tokenizer has a BOS and does not add it.
    assert list(documents.documents[0].input_ids) == tokenizer(text.read_text())["input_ids"][:70]
    assert documents.documents[0].origin == str(text)
    assert documents.length == 70


def test_of_a_long_text_no_more_is_tokenised_than_is_needed() -> None:
    lengths = []

    class Counting:
        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            lengths.append(len(text))
            return {"input_ids": [0, *map(ord, text)]}

    text = "abcdefghij" * 100_000
    assert list(default_tokens(Counting(), text, 50)) == [0, *map(ord, text[:49])]
    assert max(lengths) < 2000
    lengths.clear()

    class Sparse(Counting):
        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            lengths.append(len(text))
            return {"input_ids": list(range(len(text) // 1000))}

    assert len(default_tokens(Sparse(), text, 900)) == 900
    assert max(lengths) == len(text)


def test_shorter_documents_are_skipped_and_counted_and_copies_count_once(tmp_path: Path) -> None:
    names = [write(tmp_path, "short.txt", 40), write(tmp_path, "a.md", 100), write(tmp_path, "b.txt", 120, seed=3)]
    copy = write(tmp_path, "copy.txt", 200)
    documents = choose(text=(*names, copy), length=64)
    assert [document.origin for document in documents.documents] == [str(names[1]), str(names[2])]
    assert (len(documents), documents.num_skipped) == (2, 1)
    told = " ".join(documents.notes)
    assert "fewer than 64 tokens: 1 document" in told
    assert "the tokens of another: 1 document" in told


def test_reading_stops_when_there_are_enough(tmp_path: Path) -> None:
    texts = tuple(write(tmp_path, f"{number}.txt", 100, seed=number) for number in range(5))
    documents = choose(text=texts, length=64, num_documents=2)
    assert [document.origin for document in documents.documents] == [str(texts[0]), str(texts[1])]


def test_of_a_larger_dataset_the_seed_draws(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"{number:03} " * 40}) + "\n" for number in range(30)))
    chosen = [choose(dataset=str(path), length=64, num_documents=5, seed=seed) for seed in (1, 1, 2)]
    assert chosen[0].data_hash == chosen[1].data_hash != chosen[2].data_hash
    assert len(chosen[0]) == 5
    everything = choose(dataset=(str(path),), length=64)
    assert len(everything) == 30
    assert "30 documents found where 128 are asked for" in everything.notes[-1]


def test_conversations_are_rendered_as_the_template_has_it(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "why " * 20}, {"role": "assistant", "content": "so " * 30}]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    tokenizer = byte_tokenizer(chat_template=MARKED_TEMPLATE)
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    expected = tokenizer(rendered)["input_ids"][:60]
    assert list(choose(tokenizer, dataset=str(path), length=60).documents[0].input_ids) == expected


@pytest.mark.parametrize(
    ("sizes", "memory", "expected", "place"),
    [
        ([200, 300, 90], 10**9, 128, "4 times the pre-trained window"),
        ([200, 70, 90], 10**9, 64, "2 times the pre-trained window"),
        ([33, 34, 200], 10**9, 32, "the pre-trained window"),
        ([20, 20, 20], 10**9, 16, "inside the pre-trained window of 32"),
        ([200, 300, 400], 100, 64, "2 times"),
    ],
)
def test_without_a_length_the_documents_decide_how_far_beyond_the_window(
    sizes: list[int], memory: int, expected: int, place: str, tmp_path: Path
) -> None:
    texts = tuple(write(tmp_path, f"{size}-{number}.txt", size, seed=number) for number, size in enumerate(sizes))
    documents = choose(text=texts, memory=memory)
    assert documents.length == expected
    assert len(documents) == sum(size >= expected for size in sizes)
    assert f"length {expected} tokens, {place}" in documents.notes[0]


def test_a_listed_position_is_reached_if_the_documents_allow_it(tmp_path: Path) -> None:
    text = write(tmp_path, "a.txt", 1000)
    assert choose(text=(text,), positions="5,900").length == 900
    with pytest.raises(InvalidConfigError, match="position 1,100 is beyond the length of 550"):
        choose(text=(text,), positions="5,1100")
    with pytest.raises(InvalidConfigError, match="position 65 is beyond the length of 64"):
        EntropyConfig(positions=(65,), length=64)


def test_refusals_name_the_file_and_the_way_out(tmp_path: Path) -> None:
    short, pdf, other = write(tmp_path, "short.txt", 40), tmp_path / "scan.pdf", write(tmp_path, "a.tex", 40)
    pdf.write_bytes(make_pdf([[], []]))
    with pytest.raises(DataError, match=r"has 64 tokens: the longest of 1 has 40\n.*--length"):
        choose(text=(short,), length=64)
    with pytest.raises(EmptyRecordError, match=r"scan\.pdf has no text layer"):
        choose(text=(pdf,))
    with pytest.raises(DataError, match=r"missing\.pdf not found"):
        choose(text=(tmp_path / "missing.pdf",))
    with pytest.raises(DataError, match=r"a\.tex: a text file ends in \.txt, \.md, \.pdf"):
        choose(text=(other,))
    with pytest.raises(DataError, match="too short to choose a length"):
        default_length([10, 5], WINDOW, 128, lambda length: length > 0)


def test_a_pdf_is_a_document(tmp_path: Path) -> None:
    path = tmp_path / "paper.pdf"
    path.write_bytes(make_pdf([["attention entropy " * 3], ["of long documents " * 3]]))
    documents = choose(text=(path,), length=50)
    assert byte_tokenizer().decode(documents.documents[0].input_ids).startswith("attention entropy")


def test_a_tokenizer_that_reads_the_documents_otherwise_is_refused(tmp_path: Path) -> None:
    documents = choose(text=(write(tmp_path, "a.txt", 100),), length=64)
    check_same_tokens(documents, byte_tokenizer(), "other")

    class Shifted:
        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [token + 1 for token in byte_tokenizer()(text)["input_ids"]]}

    with pytest.raises(InvalidConfigError, match=r"other reads .*a\.txt as other tokens"):
        check_same_tokens(documents, Shifted(), "other")
