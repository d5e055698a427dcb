"""A verdict on a tiny model: what each way of reading is scored on, against plain forward passes of transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from eabf_cli.core.checkpoint import load_model, load_tokenizer
from eabf_cli.core.device_memory import InsufficientMemoryError
from eabf_cli.core.errors import DataError, InvalidConfigError, OutputExistsError
from eabf_cli.core.evals.settings import EvalConfig, EvalRunConfig
from eabf_cli.core.evals.verdict import VerdictConfig, verdict
from eabf_cli.core.evals.verdict_plan import make_plan
from eabf_cli.core.evals.verdict_rows import retrieved_chunks
from eabf_cli.core.files import read_json
from eabf_cli.core.method_request import MethodRequest
from eabf_cli.core.patch_checkpoint import PatchConfig, patch_checkpoint
from eabf_cli.core.patching import apply_method
from eabf_cli.core.sources import find_model
from tests.tiny_llama import TARGET, WINDOW, write_tiny_llama

TEXT = "the river ran past an old mill and a boy sat by the water with his dog until the sun had gone"
WORDS = TEXT.split()
DOCUMENTS = tuple(" ".join(WORDS[(7 * n + n * k + k // 5) % len(WORDS)] for k in range(500)) for n in range(1, 6))


@pytest.fixture(scope="module")
def extended(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model extended, with weights that are not the original's, as after finetuning."""
    folder = tmp_path_factory.mktemp("extended") / "model"
    patch_checkpoint(PatchConfig(model=str(tiny_llama_folder), output=folder))
    model = load_model(folder, dtype="float32", device="cpu")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def config(extended: Path) -> VerdictConfig:
    run = EvalRunConfig(model=str(extended), dtype="float32", device="cpu", evaluation=EvalConfig(documents=DOCUMENTS))
    return VerdictConfig(run=run, target_tokens=8, num_stretches=2, chunk_tokens=6, query_tokens=8, num_resamples=500)


@pytest.fixture(scope="module")
def result(config: VerdictConfig) -> dict[str, Any]:
    return verdict(config)


@torch.no_grad()
def loss_of_last(model: PreTrainedModel, tokens: list[int], count: int) -> float:
    """transformers' own loss of the last tokens."""
    labels = [-100] * (len(tokens) - count) + tokens[-count:]
    loss: float = model(input_ids=torch.tensor([tokens]), labels=torch.tensor([labels])).loss.item()
    return loss


def test_losses_are_those_of_plain_forward_passes(
    config: VerdictConfig, result: dict[str, Any], extended: Path, tiny_llama_folder: Path
) -> None:
    tokenizer = load_tokenizer(tiny_llama_folder)
    plan = make_plan(config)
    after = load_model(extended, dtype="float32", device="cpu")
    before = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32).eval()
    yarn = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32).eval()
    apply_method(yarn, {"type": "yarn", "factor": 4.0})
    room = WINDOW - 1 - 8
    sums = dict.fromkeys(("extended", "last_window", "retrieved", "yarn", "extended_last_window"), 0.0)
    for stretch in plan.stretches:
        document, targets = list(stretch.tokens), list(stretch.targets)
        everything = [1, *document[stretch.piece_start : stretch.start], *targets]
        recent = [1, *document[stretch.start - room : stretch.start], *targets]
        chunks = retrieved_chunks(stretch, room, tokenizer, chunk_tokens=6, query_tokens=8, share=0.5)
        assert len(everything) <= TARGET
        assert len(recent) == WINDOW
        sums["extended"] += loss_of_last(after, everything, 8)
        sums["extended_last_window"] += loss_of_last(after, recent, 8)
        sums["last_window"] += loss_of_last(before, recent, 8)
        sums["retrieved"] += loss_of_last(before, [1, *chunks, *targets], 8)
        sums["yarn"] += loss_of_last(yarn, everything, 8)
    for row in result["verdict"]["rows"]:
        assert row["nll"] == pytest.approx(sums[row["name"]] / len(plan.stretches), abs=1e-4), row["name"]


def test_the_result_says_what_was_compared(result: dict[str, Any], tiny_llama_folder: Path, extended: Path) -> None:
    assert json.loads(json.dumps(result)) == result
    assert (result["model"], result["original"]) == (str(extended), str(tiny_llama_folder))
    assert (result["original_max_position_embeddings"], result["max_position_embeddings"]) == (WINDOW, TARGET)
    assert (result["seed"], len(result["data_hash"])) == (42, 64)
    weights = [find_model(str(folder)).fingerprint() for folder in (extended, tiny_llama_folder)]
    assert [result["weights"], result["original_weights"]] == weights
    assert len(set(weights)) == 2
    assert (result["method"], result["length"], result["num_documents"]) == ("eabf", TARGET, len(DOCUMENTS))
    assert result["verdict"]["resampled"] == "documents"
    assert "YaRN x4 without training" in result["verdict"]["rows"][3]["title"]


def test_documents_shorter_than_the_extended_window_are_read_whole(config: VerdictConfig) -> None:
    short = tuple(text[:500] for text in DOCUMENTS)
    plan = make_plan(replace(config, run=replace(config.run, evaluation=EvalConfig(documents=(*short, "a few words")))))
    assert WINDOW < plan.length < TARGET
    assert plan.length == max(len(stretch.tokens) for stretch in plan.stretches) + 1
    assert any("longest document" in note for note in plan.notes)
    assert any("1 of 6 documents are left out" in note for note in plan.notes)


def test_stretches_have_the_tokens_asked_for_up_to_an_eighth_of_the_original_window(config: VerdictConfig) -> None:
    plan = make_plan(replace(config, target_tokens=5))
    assert {stretch.end - stretch.start for stretch in plan.stretches} == {5}
    assert not any("stretches" in note for note in plan.notes)
    plan = make_plan(replace(config, target_tokens=100))
    assert {stretch.end - stretch.start for stretch in plan.stretches} == {WINDOW // 8}
    assert plan.describe()["target_tokens"] == WINDOW // 8
    assert any("stretches of 8 tokens are predicted, not of 100" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"length": WINDOW + 4}, InvalidConfigError, "has no 8 tokens beyond the original window"),
        ({"original": "self"}, InvalidConfigError, "not longer than the 256 of its original"),
        ({"documents": ("a few words",)}, DataError, "longer than the original window"),
        ({"request": MethodRequest()}, InvalidConfigError, "leave --method out"),
        ({"model": "original"}, InvalidConfigError, "--original"),
    ],
)
def test_what_makes_no_sense_is_refused(
    config: VerdictConfig, extended: Path, tiny_llama_folder: Path, changes: dict[str, Any], error: type, message: str
) -> None:
    run = config.run
    if "documents" in changes:
        run = replace(run, evaluation=EvalConfig(documents=changes.pop("documents")))
    if "request" in changes:
        run = replace(run, request=changes.pop("request"))
    if "model" in changes:
        run = replace(run, model=str({"original": tiny_llama_folder}[changes.pop("model")]))
    if changes.get("original") == "self":
        changes["original"] = str(extended)
    with pytest.raises(error, match=message):
        verdict(replace(config, run=run, **changes))


def test_a_length_that_does_not_fit_is_refused_before_weights_are_loaded(
    config: VerdictConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eabf_cli.core.evals.verdict_plan.available_memory", lambda _: 2**20)
    monkeypatch.setattr("eabf_cli.core.evals.verdict.load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(InsufficientMemoryError, match="256 tokens"):
        verdict(config)


def test_an_original_with_another_tokenizer_is_refused(config: VerdictConfig, tmp_path: Path) -> None:
    other = write_tiny_llama(tmp_path / "other")
    settings = read_json(other / "tokenizer.json")
    # Without merges every byte is a token.
    settings["model"]["merges"] = []
    (other / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(InvalidConfigError, match="read the documents as other tokens"):
        verdict(replace(config, original=str(other)))


def test_a_model_that_transformers_scales_itself_can_be_judged(
    config: VerdictConfig, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    """A long model without a record, as one finds them."""
    folder = write_tiny_llama(tmp_path / "long", max_position_embeddings=TARGET)
    result = verdict(replace(config, run=replace(config.run, model=str(folder)), original=str(tiny_llama_folder)))
    assert result["method"] is None
    assert result["original_reason"] == "as named with --original"
    assert result["verdict"]["num_stretches"] > 0


def test_the_folder_is_written_whole_and_not_over_another(config: VerdictConfig, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = verdict(replace(config, run=replace(config.run, output=output)))
    assert sorted(path.name for path in output.iterdir()) == [
        "differences.png",
        "eabf_run.json",
        "eval.json",
        "report.html",
        "report.md",
    ]
    assert read_json(output / "eval.json") == result
    record = read_json(output / "eabf_run.json")
    assert (record["command"], record["model"]) == ("eval", result["model"])
    for key in ("seed", "data_hash", "weights", "original_weights"):
        assert record[key] == result[key]
    assert DOCUMENTS[0][:50] not in (output / "eabf_run.json").read_text()
    assert result["verdict"]["sentence"] in (output / "report.md").read_text().replace("\\", "")
    with pytest.raises(OutputExistsError):
        verdict(replace(config, run=replace(config.run, output=output)))


def test_a_dry_run_measures_nothing(config: VerdictConfig, tmp_path: Path) -> None:
    result = verdict(replace(config, run=replace(config.run, dry_run=True, output=tmp_path / "out")))
    assert "verdict" not in result
    assert result["num_stretches"] > 0
    assert not (tmp_path / "out").exists()
