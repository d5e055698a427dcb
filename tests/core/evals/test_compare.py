"""Comparisons on a tiny model: every contender is measured as it would be alone, and trained on the same samples."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eabf_cli.core.checkpoint import load_model, load_tokenizer
from eabf_cli.core.errors import (
    AlreadyScaledError,
    CheckpointError,
    InvalidConfigError,
    OutputExistsError,
    TrainingInterrupted,
)
from eabf_cli.core.evals import compare as compare_module
from eabf_cli.core.evals.compare import CompareConfig, compare
from eabf_cli.core.evals.settings import EvalConfig, EvalRunConfig
from eabf_cli.core.evaluation import evaluate
from eabf_cli.core.files import read_json
from eabf_cli.core.finetune.run import FinetuneConfig, finetune
from eabf_cli.core.method_request import MethodRequest
from eabf_cli.core.patch_checkpoint import PatchConfig, patch_checkpoint
from eabf_cli.core.patching import apply_method
from eabf_cli.core.sources import find_model
from tests.tiny_llama import TARGET, WINDOW

pytestmark = pytest.mark.usefixtures("one_thread")

DOCUMENTS = tuple(" ".join(f"{word} {number}" for number in range(200)) for word in ("day", "night", "dawn"))
MEASURED = EvalConfig(
    tasks=("perplexity", "context_gain", "passkey"),
    lengths=(WINDOW, TARGET),
    documents=DOCUMENTS,
    target_tokens=32,
    num_passkey_trials=2,
    depths=(0.5,),
)
TIMES = ("wall_s", "peak_memory_gib", "output")


@pytest.fixture(scope="module")
def config(tiny_llama_folder: Path) -> CompareConfig:
    run = EvalRunConfig(model=str(tiny_llama_folder), dtype="float32", device="cpu", evaluation=MEASURED)
    return CompareConfig(run=run, methods=("pi", "dynamic", "eabf"), num_resamples=200)


def without_times(result: Any) -> Any:
    if isinstance(result, dict):
        return {key: without_times(value) for key, value in result.items() if key not in TIMES}
    return [without_times(value) for value in result] if isinstance(result, list) else result


def at(config: CompareConfig, output: Path, **changes: Any) -> CompareConfig:
    run = {name: changes.pop(name) for name in ("overwrite", "evaluation", "dry_run") if name in changes}
    return replace(config, run=replace(config.run, output=output, **run), **changes)


@pytest.fixture(scope="module")
def compared(config: CompareConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """An untrained comparison and its folder."""
    output = tmp_path_factory.mktemp("compared") / "out"
    return compare(at(config, output)), output


# ---- Untrained -----------------------------------------------------------------------------------------


def test_each_contender_is_measured_as_it_would_be_alone(
    compared: tuple[dict[str, Any], Path], tiny_llama_folder: Path
) -> None:
    result, _ = compared
    tokenizer = load_tokenizer(tiny_llama_folder)
    assert list(result["compare"]) == ["original", "linear", "dynamic", "eabf"]
    for name, entry in result["compare"].items():
        model = load_model(tiny_llama_folder, dtype="float32", device="cpu")
        if name != "original":
            apply_method(model, {"type": name, "factor": TARGET / WINDOW})
        alone = evaluate(model, tokenizer, MEASURED)
        for key in ("perplexity", "passkey"):
            assert entry[key] == [
                {k: pytest.approx(v, rel=1e-4) if isinstance(v, float) else v for k, v in row.items()}
                for row in alone[key]
            ], (name, key)
        assert entry["method"] == (None if name == "original" else name)


def test_the_result_tells_numbers_intervals_and_differences(compared: tuple[dict[str, Any], Path]) -> None:
    result, _ = compared
    assert json.loads(json.dumps(result)) == result
    assert (result["factor"], result["max_position_embeddings"], result["reference"]) == (4.0, TARGET, "eabf")
    eabf = result["compare"]["eabf"]
    # The critical-dimension rule, which is above the paper's 500,000 for so small a window.
    rule = (TARGET / (2 * math.pi)) ** (math.log(10_000) / math.log(WINDOW / (2 * math.pi)))
    assert eabf["rope_theta"] == pytest.approx(rule, rel=1e-3)
    assert (eabf["unscaled_layers"], eabf["kind"]) == ([0, 1], "method")
    # The passkey's prompt does not fit into the original window.
    assert {(e["measurement"], e["length"]) for e in eabf["intervals"]} == {
        (task, length) for task in MEASURED.tasks for length in (WINDOW, TARGET)
    } - {("passkey", WINDOW)}
    assert {e["model"] for e in result["differences"]} == {"original", "linear", "dynamic"}
    assert len(result["summary"]) == 2
    assert any("key tokens are not compared" in note for note in result["notes"])


def test_the_folder_has_the_result_and_no_leftovers(compared: tuple[dict[str, Any], Path]) -> None:
    result, output = compared
    assert sorted(path.name for path in output.iterdir()) == [
        "differences.png",
        "eabf_run.json",
        "eabf_settings.json",
        "eval.json",
        "needles.png",
        "perplexity.png",
        "report.html",
        "report.md",
    ]
    assert read_json(output / "eval.json") == result
    record = read_json(output / "eabf_run.json")
    for key in ("seed", "data_hash", "weights", "device", "wall_s"):
        assert record[key] == result[key]


def test_the_result_names_the_weights_and_the_seed(
    compared: tuple[dict[str, Any], Path], tiny_llama_folder: Path
) -> None:
    result, _ = compared
    assert (result["weights"], result["seed"]) == (find_model(str(tiny_llama_folder)).fingerprint(), 42)


def test_nothing_is_written_without_an_output(config: CompareConfig, workdir: Path) -> None:
    evaluation = MEASURED.replace(tasks=("passkey",), lengths=(TARGET,))
    result = compare(replace(config, methods=("yarn",), run=replace(config.run, evaluation=evaluation)))
    assert result["output"] is None
    assert result["reference"] == "yarn"
    assert not list(workdir.iterdir())


def test_a_dry_run_resolves_and_measures_nothing(config: CompareConfig, tmp_path: Path) -> None:
    result = compare(at(config, tmp_path / "out", dry_run=True))
    assert result["lengths"] == [WINDOW, TARGET]
    assert "compare" not in result
    assert not (tmp_path / "out").exists()


class Interrupted:
    """`measure`, with an interruption at a call."""

    def __init__(self, at_call: int | None) -> None:
        self.at_call = at_call
        self.calls = 0
        self.measure = compare_module.measure

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls == self.at_call:
            raise KeyboardInterrupt
        return self.measure(*arguments, **options)


def test_an_interrupted_comparison_goes_on_and_comes_to_the_same(
    config: CompareConfig,
    compared: tuple[dict[str, Any], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "out"
    monkeypatch.setattr(compare_module, "measure", Interrupted(3))
    with pytest.raises(TrainingInterrupted, match=f"--resume -o {output}"):
        compare(at(config, output))
    with pytest.raises(OutputExistsError, match="--resume"):
        compare(at(config, output))
    with pytest.raises(InvalidConfigError, match=r"other settings.*methods"):
        compare(at(config, output, methods=("yarn", "eabf"), resume=True))
    again = Interrupted(None)
    monkeypatch.setattr(compare_module, "measure", again)
    result = compare(at(config, output, resume=True))
    assert again.calls == 2
    assert without_times(result) == without_times(compared[0])
    assert compare(at(config, output, resume=True)) == result
    with pytest.raises(InvalidConfigError, match=r"other settings: methods linear, dynamic, eabf -> eabf, yarn;"):
        compare(at(config, output, methods=("eabf", "yarn"), resume=True))
    assert again.calls == 2


def test_an_interruption_before_anything_was_measured_leaves_nothing(
    config: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_module, "measure", Interrupted(1))
    with pytest.raises(KeyboardInterrupt):
        compare(at(config, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="holds no unfinished comparison"):
        compare(at(config, tmp_path / "out", resume=True))


def test_the_target_window_is_the_factors_where_one_is_given(config: CompareConfig) -> None:
    run = replace(config.run, request=MethodRequest(factor=2.0), dry_run=True)
    result = compare(replace(config, run=run))
    assert (result["factor"], result["max_position_embeddings"]) == (2.0, 2 * WINDOW)


@pytest.mark.parametrize(
    ("request_", "lengths", "message"),
    [
        (None, (16, WINDOW), "lie inside the model's window of 64"),
        (MethodRequest(rope_theta=1e6), (TARGET,), "leave --rope-theta out"),
        (MethodRequest(unscaled_layers=(0,)), (TARGET,), "leave --unscaled-layers out"),
    ],
)
def test_numbers_without_meaning_are_refused(
    config: CompareConfig, request_: MethodRequest | None, lengths: tuple[int, ...], message: str
) -> None:
    run = replace(config.run, request=request_, evaluation=MEASURED.replace(lengths=lengths))
    with pytest.raises(InvalidConfigError, match=message):
        compare(replace(config, methods=("linear", "yarn"), run=run))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ()}, "needs methods"),
        ({"methods": ("yarn", "yam")}, "unknown method 'yam'; known: linear"),
        ({"reference": "abf"}, "'abf' is not among the methods compared: linear, dynamic, eabf"),
        ({"num_seeds": 3}, "nothing is trained"),
        ({"num_seeds": 0}, "num_seeds"),
        ({"resume": True}, "name it with -o"),
        ({"confidence": 2.0}, "confidence"),
    ],
)
def test_settings_without_meaning_are_refused(config: CompareConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfigError, match=message):
        replace(config, **changes)


def test_a_scaled_model_is_refused_and_rebased_if_asked_to(
    config: CompareConfig, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    patch_checkpoint(PatchConfig(model=str(tiny_llama_folder), output=tmp_path / "scaled"))
    run = replace(config.run, model=str(tmp_path / "scaled"), dry_run=True)
    with pytest.raises(AlreadyScaledError, match="--rebase"):
        compare(replace(config, run=run))
    rebased = replace(config, run=replace(run, request=MethodRequest(rebase=True)))
    planned = compare(rebased)
    assert planned["original_max_position_embeddings"] == WINDOW
    assert [note for note in planned["notes"] if "removed" in note] == [
        "removed the checkpoint's 'eabf' (window 256) before the new method"
    ]


# ---- Finetuned -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_config(config: CompareConfig, texts_file: Path) -> CompareConfig:
    return replace(
        config,
        methods=("yarn",),
        finetune=True,
        num_seeds=2,
        train_dataset=(str(texts_file),),
        samples=4,
        batch_size=2,
        learning_rate=3e-3,
        epochs=1,
    )


@pytest.fixture(scope="module")
def trained(trained_config: CompareConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    output = tmp_path_factory.mktemp("trained") / "out"
    return compare(at(trained_config, output)), output


def test_contenders_of_a_seed_are_trained_on_the_same_samples_and_seeds_on_others(
    trained: tuple[dict[str, Any], Path],
) -> None:
    result, output = trained
    assert list(result["compare"]) == ["original", "control-cut", "control-long", "yarn"]
    runs = {name: entry["runs"] for name, entry in result["compare"].items() if name != "original"}
    hashes = {tuple(run["data_hash"] for run in found) for found in runs.values()}
    assert len(hashes) == 1
    assert len(set(hashes.pop())) == 2
    for name, found in runs.items():
        assert [run["seed"] for run in found] == [42, 43]
        assert [Path(run["output"]) for run in found] == [output / "runs" / f"{name}-seed{seed}" for seed in (42, 43)]
    assert {found[0]["num_rows"] for name, found in runs.items() if name != "control-cut"} == {4}
    assert runs["control-cut"][0]["num_rows"] > 8


def test_the_control_on_cut_samples_is_that_of_finetune(
    trained: tuple[dict[str, Any], Path], trained_config: CompareConfig, tmp_path: Path
) -> None:
    result, _ = trained
    own = finetune(
        FinetuneConfig(
            model=trained_config.run.model,
            request=MethodRequest(method="yarn", max_length=TARGET),
            dataset=trained_config.train_source,
            samples=4,
            batch_size=2,
            learning_rate=3e-3,
            epochs=1,
            device="cpu",
            dtype="float32",
            evaluation=None,
            control=True,
            output=tmp_path / "own",
        )
    )
    runs = {name: entry["runs"][0] for name, entry in result["compare"].items() if "runs" in entry}
    assert runs["control-cut"]["train_loss"] == pytest.approx(own["control"]["train_loss"], abs=1e-4)
    assert runs["yarn"]["train_loss"] == pytest.approx(own["train_loss"], abs=1e-4)


@pytest.mark.parametrize("other", ["pose", "pack"])
def test_cut_samples_are_rows_as_they_are(other: str) -> None:
    with pytest.raises(InvalidConfigError, match="leave out pack and pose"):
        FinetuneConfig(cut_to_window=True, **{other: True})


def test_the_control_on_long_samples_has_plain_rope(trained: tuple[dict[str, Any], Path]) -> None:
    result, output = trained
    model = load_model(output / "runs" / "control-long-seed42", dtype="float32", device="cpu")
    parameters = model.config.rope_parameters
    assert (parameters["rope_type"], parameters["rope_theta"]) == ("default", 10_000.0)
    entry = result["compare"]["control-long"]
    assert (entry["method"], entry["kind"], entry["rope_theta"]) == (None, "control", None)


@pytest.mark.parametrize("method", ["yarn", "eabf"])
def test_a_rebased_model_is_compared_as_its_unscaled_twin(
    method: str, trained: tuple[dict[str, Any], Path], trained_config: CompareConfig, tmp_path: Path
) -> None:
    twin, _ = trained
    run = trained_config.run
    scaled = tmp_path / "scaled"
    patch_checkpoint(PatchConfig(model=run.model, output=scaled, request=MethodRequest(method=method)))
    rebased = replace(run, model=str(scaled), output=tmp_path / "out", request=MethodRequest(rebase=True))
    result = compare(replace(trained_config, run=rebased, num_seeds=1))
    # As it stands it has the old scaling; all else, the controls too, starts without it.
    assert result["compare"]["original"]["method"] == method
    for name in ("control-cut", "control-long", "yarn"):
        (found,), (expected, _) = result["compare"][name]["runs"], twin["compare"][name]["runs"]
        assert found["train_loss"] == expected["train_loss"], name
    assert any("removed" in note for note in result["notes"])


def test_what_is_measured_are_the_trained_checkpoints_of_every_seed(
    trained: tuple[dict[str, Any], Path], tiny_llama_folder: Path
) -> None:
    result, output = trained
    tokenizer = load_tokenizer(tiny_llama_folder)
    losses = []
    for seed in (42, 43):
        model = load_model(output / "runs" / f"yarn-seed{seed}", dtype="float32", device="cpu")
        found = evaluate(model, tokenizer, MEASURED.replace(tasks=("context_gain",)))["context_gain"]
        losses.append({entry["context"]: entry["nll"] for entry in found})
    assert losses[0] != losses[1]
    interval = next(
        e for e in result["compare"]["yarn"]["intervals"] if (e["measurement"], e["length"]) == ("context_gain", TARGET)
    )
    assert interval["mean"] == pytest.approx((losses[0][TARGET] + losses[1][TARGET]) / 2, abs=1e-4)
    assert (interval["num_seeds"], interval["num_units"]) == (2, 3)


def test_finished_runs_are_not_trained_again(
    trained_config: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    single = replace(trained_config, num_seeds=1)
    monkeypatch.setattr(compare_module, "measure", Interrupted(3))
    with pytest.raises(TrainingInterrupted):
        compare(at(single, output))
    # The original and the first control were measured; the second control was trained and not measured.
    names = ("control-cut-seed42", "control-long-seed42")
    before = {name: (output / "runs" / name / "model.safetensors").stat().st_mtime_ns for name in names}
    monkeypatch.undo()
    result = compare(at(single, output, resume=True))
    after = {name: (output / "runs" / name / "model.safetensors").stat().st_mtime_ns for name in names}
    assert after == before
    assert set(result["compare"]) == {"original", "control-cut", "control-long", "yarn"}
    assert not (output / "measured").exists()


def test_other_samples_under_a_finished_run_are_noticed(
    trained_config: CompareConfig, tmp_path: Path, texts_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text(texts_file.read_text())
    config = at(replace(trained_config, num_seeds=1, train_dataset=(str(texts),)), tmp_path / "out")
    monkeypatch.setattr(compare_module, "measure", Interrupted(2))
    with pytest.raises(TrainingInterrupted):
        compare(config)
    monkeypatch.undo()
    texts.write_text("".join(line.replace("sun", "moon") + "\n" for line in texts_file.read_text().splitlines()))
    with pytest.raises(InvalidConfigError, match="trained on other samples"):
        compare(replace(config, resume=True))
