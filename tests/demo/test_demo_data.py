"""`demo-long` is what its card says: long enough, varied, and free of held-out text and wording."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import eabf_cli
from eabf_cli.core.needles import GRASS_FILLER, PASSKEY_INTRO, templates_of

DEMO = Path(eabf_cli.__path__[0]) / "demo"


def read_texts(name: str) -> list[str]:
    lines = (DEMO / "demo-long" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="module")
def train() -> list[str]:
    return read_texts("train")


@pytest.fixture(scope="module")
def heldout() -> list[str]:
    return read_texts("heldout")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO / "eabf-tiny", model_max_length=1_000_000)


def word_grams(texts: list[str], size: int) -> set[str]:
    grams = set()
    for text in texts:
        words = re.findall(r"[a-z0-9']+", text.lower())
        grams |= {" ".join(words[i : i + size]) for i in range(len(words) - size + 1)}
    return grams


def test_no_heldout_text_in_the_training_samples(train, heldout):
    """Thirteen words in a row; the Bible repeats itself, so samples that quote a held-out verse were left out."""
    held = word_grams(heldout, 13)
    assert len(held) > 50_000
    assert not held & word_grams(train, 13)


def test_samples_are_distinct(train):
    assert len(set(train)) == len(train)


def test_counts_and_lengths(train, heldout, tokenizer):
    assert len(train) >= 200
    lengths = [len(ids) for ids in tokenizer(train, add_special_tokens=False)["input_ids"]]
    assert min(lengths) >= 1_900
    assert max(lengths) <= 2_047
    assert len(heldout) >= 12
    assert min(len(ids) for ids in tokenizer(heldout, add_special_tokens=False)["input_ids"]) >= 4_300


def test_files_are_small():
    assert all(path.stat().st_size < 2_000_000 for path in (DEMO / "demo-long").iterdir())
    assert (DEMO / "eabf-tiny" / "model.safetensors").stat().st_size < 11_000_000


def test_neither_evaluation_prompts_nor_heldout_templates_are_taught(train):
    """Four words in a row of any wording that evaluations use, and every text between its blanks."""
    taught = "\n".join(train)
    held = [*templates_of("heldout"), *templates_of("standard")]
    wordings = [part for template in held for part in (template.statement, template.question)]
    pieces = [re.split(r"\{\w+\}", text) for text in (*wordings, GRASS_FILLER, PASSKEY_INTRO)]
    fixed = [piece.strip(" .,:?") for group in pieces for piece in group]
    long_enough = [piece for piece in fixed if len(piece.split()) >= 4]
    assert len(long_enough) >= 8
    assert [piece for piece in long_enough if piece in taught] == []
    assert not re.search(r"pass key|access code|locker \d|flight \d|grass is green", taught, re.IGNORECASE)


def test_questions_reach_back_over_the_whole_sample(train, tokenizer):
    """Facts are asked for from many distances, most of them beyond the model's window of 512 tokens."""
    distances = []
    for template in templates_of("train"):
        pattern = re.escape(template.question).replace(r"\{key\}", r"(?P<key>[\w ]+?)", 1)
        pattern = pattern.replace(r"\{key\}", "(?P=key)") + r" (?P<value>\w+)\."
        for text in train:
            for match in re.finditer(pattern, text):
                key = match.groupdict().get("key", "")
                statement = template.statement.format(key=key, value=match["value"])
                assert statement.strip() in text[: match.start()]
                between = text[text.index(statement.strip()) : match.start()]
                distances.append(len(between) / len(text))
    assert len(distances) > 300
    assert sum(distance > 0.25 for distance in distances) > len(distances) / 2
    assert sum(distance > 0.75 for distance in distances) > 40


def test_templates_of_the_train_split_are_all_there(train):
    for template in templates_of("train"):
        opening = template.question.split("{")[0].strip()
        assert sum(opening in text for text in train) >= 10, template.name


@pytest.mark.parametrize("folder", ["eabf-tiny", "demo-long"])
def test_cards_state_licence_and_provenance(folder):
    card = (DEMO / folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n")
    assert "\nlicense:" in card
    for word in ("Jane Austen", "King James", "public domain", "scripts/train_demo_model.py"):
        assert word in card
