"""The search for settings: its arithmetic, its walk, and what it measures on a model."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import cross_entropy

from eabf_cli.core.checkpoint import load_model, load_tokenizer
from eabf_cli.core.data.records import open_records
from eabf_cli.core.entropy.search import (
    Candidate,
    Outcome,
    SearchResult,
    _Search,
    _Trial,
    difference,
    search_settings,
)
from eabf_cli.core.errors import DataError, InvalidConfigError
from eabf_cli.core.patching import apply_method
from eabf_cli.core.scaling_config import RopeScalingConfig
from tests.tiny_llama import logits

DEFAULT = Candidate(rope_theta=500_000.0, unscaled_layers=(0, 1))


def outcome(loss: float, spread: float = 0.0) -> Outcome:
    """An outcome with a given loss whose documents differ from each other, but not from one outcome to another."""
    offsets = (-0.5, 0.1, 0.4)
    inside = tuple(loss / 2 + offset for offset in offsets)
    beyond = tuple(loss / 2 + 2 * offset + spread * index for index, offset in enumerate(offsets, -1))
    return Outcome(inside=inside, beyond=beyond, retrieval=(loss / 2, loss / 2))


def test_the_loss_is_that_of_text_and_answers() -> None:
    measured = Outcome(inside=(1.0, 2.0), beyond=(3.0, 6.0), retrieval=(0.5, 0.25, 0.75))
    assert measured.loss == pytest.approx((1.5 + 4.5) / 2 + 0.5)


def test_a_difference_is_paired_by_document_and_by_prompt() -> None:
    better = Outcome(inside=(1.0, 2.0, 4.0), beyond=(2.0, 2.0, 2.0), retrieval=(0.0, 0.5))
    worse = Outcome(inside=(1.1, 2.3, 4.2), beyond=(2.5, 2.1, 2.6), retrieval=(0.1, 0.4))
    found = difference(better, worse)
    # By hand: text gains .3, .2, .4 (mean .3, stderr .1 / sqrt 3), answers .1 and -.1.
    assert found.gain == pytest.approx(0.3)
    assert found.stderr == pytest.approx(math.hypot(0.1 / math.sqrt(3), 0.1))
    assert found.parts["inside"] == (pytest.approx(0.2), pytest.approx(0.1 / math.sqrt(3)))
    assert found.parts["retrieval"] == (pytest.approx(0.0), pytest.approx(0.1))


@pytest.mark.parametrize(("gain", "stderr", "is_sure"), [(0.2, 0.1, True), (0.1, 0.2, False), (0.0005, 0.0, False)])
def test_a_gain_below_its_error_or_too_small_is_not_sure(gain: float, stderr: float, is_sure: bool) -> None:
    spread = stderr * math.sqrt(3) * 2  # of half the text's loss
    found = difference(outcome(3.0), outcome(3.0 + gain, spread))
    assert (found.gain, found.stderr) == (pytest.approx(gain), pytest.approx(stderr, abs=1e-9))
    assert found.is_sure is is_sure


def walk(loss: Callable[[Candidate], float], *, least_theta: float = 1e4) -> tuple[Candidate, list[Candidate]]:
    """The best candidate of a search in which a candidate's loss is a formula, and all that were measured."""
    measured: list[Candidate] = []

    def measure(candidate: Candidate) -> Outcome:
        measured.append(candidate)
        return outcome(loss(candidate))

    search = _Search(measure=measure, progress=lambda _: None)
    return search.run(DEFAULT, ((), (0,)), least_theta=least_theta), measured


@pytest.mark.parametrize("best_theta", [30_000, 125_000, 400_000, 500_000, 3_000_000])
def test_the_base_is_found_to_a_half_step(best_theta: float) -> None:
    found, measured = walk(lambda candidate: 3 + math.log(candidate.rope_theta / best_theta) ** 2)
    assert abs(math.log2(found.rope_theta / best_theta)) <= 0.5
    assert found.unscaled_layers == (0, 1)
    assert len(measured) == len(set(measured)) <= 16


def test_layers_are_chosen_for_the_base_that_was_found() -> None:
    def loss(candidate: Candidate) -> float:
        other = 0.1 if candidate.rope_theta < 300_000 else -0.1
        return 3 + math.log(candidate.rope_theta / 125_000) ** 2 + other * (candidate.unscaled_layers != ())

    found, _ = walk(loss)
    assert found.unscaled_layers == ()


def test_what_does_not_pay_is_not_gone_on_with() -> None:
    found, measured = walk(lambda candidate: 3 - 1e-4 * math.log(candidate.rope_theta))
    assert found == DEFAULT
    # The layers, a step to both sides, a half step to both sides.
    assert len(measured) == 1 + 2 + 2 + 2


def test_the_base_never_goes_below_the_models_own() -> None:
    _, measured = walk(lambda candidate: math.log(candidate.rope_theta), least_theta=100_000)
    assert min(candidate.rope_theta for candidate in measured) >= 100_000


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    tokenizer = load_tokenizer("eabf-tiny")
    texts = [read().text or "" for read in open_records("demo-long", split="heldout")]
    return [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:2047] for text in texts]


def test_a_candidate_is_measured_as_transformers_computes_it(documents: list[list[int]]) -> None:
    model, tokenizer = load_model("eabf-tiny", dtype="float32"), load_tokenizer("eabf-tiny")
    before = logits(model)
    scaling = RopeScalingConfig(factor=2.0, original_max_position_embeddings=512, rope_theta=5e5)
    trial = _Trial(model, tokenizer, scaling, False, 512, 1024)
    documents = [document[:1023] for document in documents[:2]]
    candidate = Candidate(rope_theta=200_000.0, unscaled_layers=(1,))
    measured = trial.measure(candidate, trial.rows(documents, [tokenizer.bos_token_id], seed=0))
    assert torch.equal(logits(model), before)

    apply_method(model, scaling.replace(rope_theta=200_000.0, unscaled_layers=(1,)))
    for length, losses in ((512, measured.inside), (1024, measured.beyond)):
        for document, loss in zip(documents, losses, strict=True):
            row = torch.tensor([[tokenizer.bos_token_id, *document[1023 - (length - 1) :]]])
            with torch.no_grad():
                predicted = model(input_ids=row).logits[0, -257:-1]
            assert loss == pytest.approx(float(cross_entropy(predicted, row[0, -256:])), abs=1e-4)
    assert len(measured.retrieval) == 12


@pytest.fixture(scope="module")
def demo_search(documents: list[list[int]]) -> SearchResult:
    model, tokenizer = load_model("eabf-tiny", dtype="float32"), load_tokenizer("eabf-tiny")
    return search_settings(model, tokenizer, documents[:8], RopeScalingConfig(factor=4.0))


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_on_unused_text_the_demo_models_suggestion_is_no_worse_than_the_default(
    demo_search: SearchResult, documents: list[list[int]]
) -> None:
    model, tokenizer = load_model("eabf-tiny", dtype="float32"), load_tokenizer("eabf-tiny")
    scaling = RopeScalingConfig(factor=4.0, original_max_position_embeddings=512, rope_theta=5e5)
    trial = _Trial(model, tokenizer, scaling, False, 512, 2048)
    rows = trial.rows(documents[24:30], [tokenizer.bos_token_id], seed=7)
    chosen, default = (trial.measure(candidate, rows) for candidate in (demo_search.chosen, demo_search.default))
    assert demo_search.default == DEFAULT
    assert demo_search.num_documents == (4, 4)
    assert demo_search.chosen == demo_search.found != DEFAULT
    assert chosen.loss < default.loss


def test_a_method_with_a_base_of_its_own_has_none_to_look_for(documents: list[list[int]]) -> None:
    model, tokenizer = load_model("eabf-tiny"), load_tokenizer("eabf-tiny")
    with pytest.raises(InvalidConfigError, match=r"'yarn' sets its own base.*abf, eabf"):
        search_settings(model, tokenizer, documents, RopeScalingConfig(method="yarn"))


def test_too_little_text_says_how_much_is_needed(documents: list[list[int]]) -> None:
    model, tokenizer = load_model("eabf-tiny"), load_tokenizer("eabf-tiny")
    with pytest.raises(DataError, match=r"needs 4 stretches of 2,048 tokens, and the documents have 3"):
        search_settings(model, tokenizer, documents[:3], RopeScalingConfig())
