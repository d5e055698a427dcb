"""Facts planted in a document, and asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eabf_cli.core.checkpoint import load_model, load_tokenizer
from eabf_cli.core.patching import apply_eabf
from eabf_cli.core.summarize import check
from eabf_cli.core.summarize.check import DEPTHS, check_reading, num_check_tokens, plant_facts
from eabf_cli.core.summarize.generation import Generator
from tests.tiny_llama import tiny_llama

TEXT = "".join(f"Sentence number {number} of the text. " for number in range(60))


def test_facts_stand_between_sentences_near_their_depths() -> None:
    planted = plant_facts(TEXT)
    rest = planted.text
    for needle, (depth, index) in zip(planted.needles, planted.places, strict=True):
        assert planted.text[index:].startswith(needle.statement)
        assert planted.text[:index].endswith(".")
        before = len(planted.text[:index]) - sum(
            len(other.statement)
            for other, place in zip(planted.needles, planted.places, strict=True)
            if place[1] < index
        )
        assert depth * len(TEXT) - 40 <= before <= depth * len(TEXT)
        rest = rest.replace(needle.statement, "")
    assert rest == TEXT
    assert len({needle.key for needle in planted.needles}) == len(DEPTHS)
    assert plant_facts(TEXT, seed=1).needles != planted.needles


@pytest.mark.parametrize("depths", [(0.0,), (1.0,), (0.0, 0.0, 1.0, 1.0)])
@pytest.mark.parametrize("text", [TEXT, "no sentence at all", "One. Two."])
def test_any_text_takes_facts_at_any_depth(text: str, depths: tuple[float, ...]) -> None:
    planted = plant_facts(text, depths)
    rest = planted.text
    for needle in planted.needles:
        rest = rest.replace(needle.statement, "", 1)
    assert rest == text


@pytest.fixture
def generator() -> Generator:
    return Generator(
        model=tiny_llama(max_position_embeddings=4096), tokenizer=load_tokenizer("eabf-tiny"), chunk_tokens=64
    )


def test_only_right_answers_count(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = plant_facts(TEXT)
    values = [needle.value for needle in planted.needles]
    said = iter([f" {values[0]}.", f"{values[1]}7", "none", f"It is {values[3]}", values[0]])
    prompts: list[list[int]] = []
    lengths: list[int] = []

    def answer(generator: Generator, prompt_ids: list[int], cache: Any) -> str:
        prompts.append(prompt_ids)
        lengths.append(cache.get_seq_length())
        return next(said)

    monkeypatch.setattr(check, "_answer", answer)
    result = check_reading(generator, TEXT)
    assert [entry["found"] for entry in result["depths"]] == [True, False, False, True, False]
    assert (result["planted"], result["found"]) == (5, 2)
    assert max(map(len, prompts)) < num_check_tokens(generator.tokenizer, TEXT)
    assert len(set(lengths)) == 1
    text = generator.tokenizer.decode(prompts[0])
    assert planted.text in text
    assert text.endswith(f"belongings of {planted.needles[0].key} are stored in locker")
    for entry, needle in zip(result["depths"], planted.needles, strict=True):
        rest = generator.tokenizer.decode(prompts[0][entry["position"] - 1 :])
        assert needle.statement in rest[: len(needle.statement) + 24]


def test_asking_is_the_same_as_generating_from_the_whole_prompt(generator: Generator) -> None:
    """One reading serves all questions: each answer is what the model says to the prompt read anew."""
    apply_eabf(generator.model, 4.0)
    answers: list[tuple[list[int], str]] = []
    original = check._answer

    def answer(generator: Generator, prompt_ids: list[int], cache: Any) -> str:
        said = original(generator, prompt_ids, cache)
        answers.append((prompt_ids, said))
        return said

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "_answer", answer)
        check_reading(generator, TEXT)
    assert len(answers) == len(DEPTHS)
    for prompt_ids, said in answers:
        row = torch.tensor([prompt_ids])
        made = generator.model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=12, do_sample=False)
        assert said == generator.tokenizer.decode(made[0, len(prompt_ids) :], skip_special_tokens=True)


@pytest.mark.slow
def test_the_demo_model_finds_facts_in_its_window() -> None:
    generator = Generator(model=load_model("eabf-tiny", dtype="float32"), tokenizer=load_tokenizer("eabf-tiny"))
    text = "The sun was warm and the house by the sea stood open to a mild wind. " * 15
    result = check_reading(generator, text)
    assert max(entry["position"] for entry in result["depths"]) < 512
    assert result["found"] >= 1
