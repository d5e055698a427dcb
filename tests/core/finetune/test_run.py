"""A finetune run on a tiny model: what is measured is what is saved, and the control is a fair one."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eabf_cli.core.checkpoint import load_model
from eabf_cli.core.data.samples import IGNORE_INDEX, DataConfig, Sample, SampleSet, load_samples
from eabf_cli.core.errors import CheckpointError, DataError, EabfError, InvalidConfigError, OutputExistsError
from eabf_cli.core.evaluation import EvalConfig, evaluate
from eabf_cli.core.finetune import plan as finetune_plan
from eabf_cli.core.finetune import run as finetune_run
from eabf_cli.core.finetune import run_folder
from eabf_cli.core.finetune.control import cut_samples
from eabf_cli.core.finetune.memory import PARTS
from eabf_cli.core.finetune.plan import find_target, make_plan
from eabf_cli.core.finetune.restoration import Restoration
from eabf_cli.core.finetune.run import FinetuneConfig, finetune
from eabf_cli.core.finetune.settings import RestorationConfig
from eabf_cli.core.patch_checkpoint import MethodRequest
from eabf_cli.core.patching import apply_method, describe_patch
from eabf_cli.core.scaling_config import RopeScalingConfig
from tests.tiny_llama import LAYERS, ROPE_THETA, TARGET, WINDOW, edit_config, logits, read_config, write_tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")

BOS = 1
STEPS = 8
DOCUMENTS = tuple(" ".join(f"{word} {number}" for number in range(200)) for word in ("day", "night"))
MEASURED = EvalConfig(
    tasks=("perplexity", "passkey"),
    lengths=(WINDOW, TARGET),
    documents=DOCUMENTS,
    target_tokens=32,
    num_passkey_trials=2,
    depths=(0.5,),
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As most models are stored: in bfloat16."""
    return write_tiny_llama(tmp_path_factory.mktemp("bf16") / "model", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def config(model_folder: Path, texts_file: Path) -> FinetuneConfig:
    return FinetuneConfig(
        model=str(model_folder),
        request=MethodRequest(rope_theta="paper"),
        dataset=str(texts_file),
        samples=8,
        batch_size=2,
        learning_rate=3e-3,
        device="cpu",
        evaluation=None,
    )


@pytest.fixture(scope="module")
def finished(config: FinetuneConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """One run with everything: the result and the folder."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return finetune(replace(config, output=folder, evaluation=MEASURED, control=True)), folder


def float32(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
    return model.eval()


def test_the_result_has_the_keys_of_the_contract(finished: tuple[dict[str, Any], Path], texts_file: Path) -> None:
    result, folder = finished
    keys = (
        "model dataset num_samples tokens_per_sample num_steps num_tokens train_loss tuning original before after "
        "control wall_s tokens_per_s peak_memory_gib output method factor rope_theta max_position_embeddings"
    )
    assert [key for key in keys.split() if key not in result] == []
    assert set(result["tokens_per_sample"]) == {"min", "median", "max"}
    assert (result["num_samples"], result["num_steps"], len(result["train_loss"])) == (8, STEPS, STEPS)
    assert (result["tuning"], result["dataset"], result["output"]) == ("full", str(texts_file), str(folder))
    assert WINDOW < result["tokens_per_sample"]["min"] <= result["tokens_per_sample"]["max"] <= TARGET
    record = json.loads((folder / "eabf_run.json").read_text())
    assert {name: record[name] for name in result} == json.loads(json.dumps(result))
    assert record["command"] == "finetune"
    for name in ("versions", "commit", "data_hash", "seed", "device"):
        assert record[name]


def test_the_loss_falls(finished: tuple[dict[str, Any], Path]) -> None:
    losses = finished[0]["train_loss"]
    assert losses[-1] < losses[0] - 0.5


def test_each_model_is_measured_as_it_stands_at_that_moment(
    finished: tuple[dict[str, Any], Path], model_folder: Path
) -> None:
    result, folder = finished
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    original = float32(model_folder)
    measured = {"original": evaluate(original, tokenizer, MEASURED)}
    apply_method(original, RopeScalingConfig(rope_theta="paper"))
    measured["before"] = evaluate(original, tokenizer, MEASURED)
    # Loaded by transformers alone, from what was saved.
    measured["after"] = evaluate(float32(folder), AutoTokenizer.from_pretrained(folder), MEASURED)
    for name, expected in measured.items():
        for told, found in zip(result[name]["perplexity"], expected["perplexity"], strict=True):
            assert told["length"] == found["length"]
            assert told["perplexity"] == pytest.approx(found["perplexity"], rel=1e-5), name
    figures = [[entry["perplexity"] for entry in measured[name]["perplexity"]] for name in measured]
    assert figures[0] != figures[1] != figures[2]


def test_the_final_folder_is_a_checkpoint_of_the_design(
    finished: tuple[dict[str, Any], Path], model_folder: Path
) -> None:
    result, folder = finished
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "eabf_run.json",
        "eabf_settings.json",
        "generation_config.json",
        "loss.png",
        "metrics.jsonl",
        "model.safetensors",
        "modeling_eabf.py",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    config = read_config(folder)
    assert config["model_type"] == "eabf_llama"
    assert config["dtype"] == "bfloat16"
    # Training has the cache off; who generates needs it.
    assert config["use_cache"] is True
    assert config["rope_scaling"]["unscaled_layers"] == [0, 1]
    assert (folder / "tokenizer.json").read_bytes() == (model_folder / "tokenizer.json").read_bytes()
    ours, stock = load_model(folder, dtype="float32"), float32(folder)
    assert describe_patch(ours).max_position_embeddings == TARGET  # type: ignore[union-attr]
    assert (logits(ours) - logits(stock)).abs().max() < 1e-4
    assert (logits(ours) - logits(float32(model_folder))).abs().max() > 1e-2
    card = (folder / "README.md").read_text()
    for name, measured in (("original", "original"), ("finetuned", "after"), ("control", "control")):
        cells = [f"{entry['perplexity']:.2f}" for entry in result[measured]["perplexity"]]
        assert f"| {name} | {' | '.join(cells)} |" in card


def test_the_control_trains_on_the_same_tokens_without_a_method(finished: tuple[dict[str, Any], Path]) -> None:
    result, _ = finished
    control = result["control"]
    assert control["method"] is None
    assert control["num_tokens"] == pytest.approx(result["num_tokens"], rel=0.1)
    assert control["num_steps"] == result["num_steps"]
    assert control["train_loss"][-1] < control["train_loss"][0] - 0.5
    assert [entry["length"] for entry in control["perplexity"]] == [WINDOW, TARGET]


@pytest.mark.parametrize("has_bos", [True, False])
def test_cut_samples_are_the_same_tokens_in_pieces_of_the_window(has_bos: bool) -> None:
    start = [BOS] if has_bos else []
    samples = [Sample(start + list(range(10, 10 + n)), start + list(range(10, 10 + n))) for n in (150, 64, 20)]
    pieces = cut_samples(SampleSet(samples=tuple(samples), num_available=3, data_hash="x"), WINDOW, BOS)
    assert max(len(piece.input_ids) for piece in pieces.samples) == WINDOW
    assert all((piece.input_ids[0] == BOS) == has_bos for piece in pieces.samples)
    joined = [token for piece in pieces.samples for token in piece.input_ids[has_bos:]]
    assert joined == [token for sample in samples for token in sample.input_ids[has_bos:]]
    labels = [label for piece in pieces.samples for label in piece.labels[has_bos:]]
    assert labels == [label for sample in samples for label in sample.labels[has_bos:]]


def test_pieces_without_an_answer_are_left_out_of_the_control() -> None:
    labels = [IGNORE_INDEX] * 100 + list(range(100))
    pieces = cut_samples(
        SampleSet(samples=(Sample(list(range(10, 210)), labels),), num_available=1, data_hash="x"), WINDOW, None
    )
    assert [len(piece.input_ids) for piece in pieces.samples] == [64, 64, 8]


def test_the_control_does_not_change_the_extended_model(
    finished: tuple[dict[str, Any], Path], config: FinetuneConfig, tmp_path: Path
) -> None:
    alone = finetune(replace(config, output=tmp_path / "alone"))
    assert alone["train_loss"] == pytest.approx(finished[0]["train_loss"], rel=1e-6)
    assert (alone["original"], alone["before"], alone["after"], alone["control"]) == (None,) * 4
    assert "No evaluation was run" in (tmp_path / "alone" / "README.md").read_text()


def test_a_dry_run_plans_the_same_and_writes_nothing(
    config: FinetuneConfig, finished: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    planned = finetune(replace(config, output=tmp_path / "run", dry_run=True))
    for name in ("num_steps", "num_samples", "num_tokens", "tokens_per_sample", "data_hash", "recipe", "rope_theta"):
        assert planned[name] == finished[0][name], name
    assert list(tmp_path.iterdir()) == []


def test_a_plan_needs_no_weights_and_may_not_fit(
    config: FinetuneConfig, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "no-weights"
    folder.mkdir()
    for path in model_folder.iterdir():
        if path.suffix == ".json":
            (folder / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr("eabf_cli.core.finetune.plan.available_memory", lambda _: 1000)
    planned = finetune(replace(config, model=str(folder), dry_run=True))
    assert planned["memory"]["fits"] == []
    assert "no tuning fits" in planned["tuning_reason"]
    assert sum(entry["count"] for entry in planned["length_histogram"]) == 8
    parts = PARTS
    for tuning in ("full", "lora", "qlora"):
        estimate = planned["memory"]["tunings"][tuning]
        assert sum(estimate[f"{part}_gib"] for part in parts) == pytest.approx(estimate["total_gib"], abs=0.01)
    with pytest.raises(InvalidConfigError, match="no tuning fits"):
        finetune(replace(config, output=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("is_installed", "tuning"), [(True, "qlora"), (False, "lora")])
def test_a_plan_that_does_not_fit_names_the_smallest_tuning_that_can_be_had(
    is_installed: bool, tuning: str, config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(*_: Any, **__: Any) -> None:
        if not is_installed:
            raise EabfError("bitsandbytes is not installed")

    monkeypatch.setattr("eabf_cli.core.finetune.plan.available_memory", lambda _: 1000)
    monkeypatch.setattr("eabf_cli.core.finetune.plan.check_tuning", check)
    assert finetune(replace(config, dry_run=True))["tuning"] == tuning


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_restoration_loss_is_planned_and_probed(
    tuning: str, config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[float] = []
    take_mean = Restoration.take_mean
    monkeypatch.setattr(Restoration, "take_mean", lambda self: measured.append(take_mean(self) or 0) or measured[-1])
    restored = replace(config, tuning=tuning, restoration=RestorationConfig(share=0.1), dry_run=True, probe=True)
    finetune(restored)
    # Both steps have the loss, though a share of a tenth would leave it out; the first one's divergence may be 0.
    assert len(measured) == 2
    assert measured[1] > 0
    found, without = (make_plan(given, find_target(given)).memory for given in (restored, config))
    num_weights = sum(weight.numel() for weight in load_model(config.model).parameters())
    assert found["full"].restoration - found["lora"].restoration >= 2 * num_weights
    assert [without[name].restoration for name in without] == [0, 0, 0]
    assert found["full"].total > without["full"].total


def test_a_probe_measures_two_steps_and_writes_nothing(config: FinetuneConfig, tmp_path: Path) -> None:
    planned = finetune(replace(config, output=tmp_path / "run", dry_run=True, probe=True))
    assert planned["probe"]["seq_len"] == planned["tokens_per_sample"]["max"]
    assert planned["probe"]["expected_s"] > 0
    assert list(tmp_path.iterdir()) == []


# ---- What is trained -----------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", ["lora", "qlora"])
def test_adapters_are_merged_and_kept(tuning: str, config: FinetuneConfig, tmp_path: Path) -> None:
    if tuning == "qlora":
        pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes, which has no wheel for every system")
    run = replace(config, output=tmp_path / "run", tuning=tuning, evaluation=MEASURED, learning_rate=1e-2)
    result = finetune(run)
    assert result["tuning"] == tuning
    assert result["train_loss"][-1] < result["train_loss"][0] - 0.3
    merged = load_model(tmp_path / "run", dtype="float32")
    assert describe_patch(merged).max_position_embeddings == TARGET  # type: ignore[union-attr]
    # What is measured is what is saved, and what the adapter alone gives.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    found = evaluate(load_model(tmp_path / "run"), tokenizer, MEASURED)["perplexity"]
    for told, entry in zip(result["after"]["perplexity"], found, strict=True):
        assert told["perplexity"] == pytest.approx(entry["perplexity"], rel=2e-2)
    alone = load_model(tmp_path / "run" / "adapter")
    assert (logits(alone) - logits(load_model(tmp_path / "run"))).abs().max() < 1e-2


def test_an_adapter_can_be_left_alone(config: FinetuneConfig, tmp_path: Path) -> None:
    finetune(replace(config, output=tmp_path / "run", tuning="lora", merge=False))
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert "adapter" in names
    assert not names & {"config.json", "model.safetensors"}
    model = load_model(tmp_path / "run")
    assert describe_patch(model).max_position_embeddings == TARGET  # type: ignore[union-attr]


def test_packed_rows_hold_all_samples_and_skipped_positions_short_rows(
    config: FinetuneConfig, texts_file: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short.jsonl"
    lines = [json.dumps({"text": f"{number} " + "the sun was warm and the sea was calm " * 2}) for number in range(16)]
    short.write_text("\n".join(lines))
    packed = finetune(
        replace(config, output=tmp_path / "packed", dataset=str(short), samples=16, batch_size=8, pack=True)
    )
    assert packed["num_samples"] == 16
    assert packed["num_rows"] < 8
    assert packed["train_loss"][-1] < packed["train_loss"][0]
    skipped = finetune(replace(config, output=tmp_path / "pose", pose=True))
    # As many steps, and about as many tokens, as whole samples have.
    assert skipped["num_steps"] == STEPS
    assert skipped["memory"]["seq_len"] == WINDOW
    assert skipped["train_loss"][-1] < skipped["train_loss"][0]


def test_the_original_model_s_predictions_can_be_kept(config: FinetuneConfig, tmp_path: Path) -> None:
    result = finetune(replace(config, output=tmp_path / "run", restoration=RestorationConfig(share=1.0)))
    assert result["train_loss"][-1] < result["train_loss"][0]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["restoration_loss"] > 0 for line in lines)


# ---- A run's folder ------------------------------------------------------------------------------


def test_a_finished_run_is_not_resumed_and_says_so(
    config: FinetuneConfig, finished: tuple[dict[str, Any], Path], caplog: pytest.LogCaptureFixture
) -> None:
    result, folder = finished
    before = (folder / "eabf_run.json").read_bytes()
    with caplog.at_level(logging.WARNING, logger="eabf_cli"):
        again = finetune(replace(config, output=folder, evaluation=MEASURED, control=True, resume=True))
    assert {name: again[name] for name in result} == json.loads(json.dumps(result))
    assert "finished already" in caplog.text
    assert (folder / "eabf_run.json").read_bytes() == before


def test_a_finished_run_needs_neither_model_nor_data(
    config: FinetuneConfig, model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    model, data = tmp_path / "model", tmp_path / "data.jsonl"
    shutil.copytree(model_folder, model)
    shutil.copy(texts_file, data)
    run = replace(config, model=str(model), dataset=str(data), epochs=1, output=tmp_path / "run")
    result = finetune(run)
    shutil.rmtree(model)
    data.unlink()
    assert finetune(replace(run, resume=True))["train_loss"] == result["train_loss"]
    with pytest.raises(InvalidConfigError, match=r"other settings: epochs 1 -> 2;"):
        finetune(replace(run, epochs=2, resume=True))
    (tmp_path / "run" / "eabf_run.json").unlink()
    with pytest.raises(CheckpointError, match="model"):
        finetune(replace(run, resume=True))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 7}, ["seed 42 -> 7"]),
        ({"learning_rate": 1e-3}, ["learning_rate 0.003 -> 0.001"]),
        ({"request": MethodRequest(rope_theta=20_000.0)}, ["request.rope_theta paper -> 2"]),
        ({"tuning": "lora"}, ["tuning full -> lora"]),
    ],
)
def test_a_finished_run_is_not_resumed_with_other_settings(
    changes: dict[str, Any], told: list[str], config: FinetuneConfig, finished: tuple[dict[str, Any], Path]
) -> None:
    folder = finished[1]
    before = (folder / "eabf_run.json").read_bytes()
    run = replace(config, output=folder, evaluation=MEASURED, control=True, resume=True)
    with pytest.raises(InvalidConfigError) as error:
        finetune(replace(run, **changes))
    said = str(error.value)
    assert [part for part in ("was started with other settings", *told) if part not in said] == []
    # What stayed the same is not told: a recipe has a dozen of fields.
    assert "weight_decay" not in said
    assert "data_hash" not in said or "seed" in changes
    assert (folder / "eabf_run.json").read_bytes() == before


def test_a_resumed_run_has_the_tuning_that_auto_came_to(
    config: FinetuneConfig, finished: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eabf_cli.core.finetune.plan.available_memory", lambda _: 1000)
    run = replace(config, output=finished[1], evaluation=MEASURED, control=True, resume=True)
    assert finetune(run)["tuning"] == "full"


def test_several_sources_are_a_list_in_the_result(config: FinetuneConfig, texts_file: Path, tmp_path: Path) -> None:
    more = tmp_path / "more.jsonl"
    more.write_text(texts_file.read_text().replace("sun", "moon"))
    sources = (str(texts_file), str(more))
    planned = finetune(replace(config, dataset=sources, samples=16, dry_run=True))
    assert planned["dataset"] == list(sources)


def unfinished_run(config: FinetuneConfig, folder: Path) -> FinetuneConfig:
    """A run that was cut off before its first checkpoint."""
    run = replace(config, output=folder)
    finetune(run)
    for path in folder.iterdir():
        if path.name != "eabf_settings.json":
            path.unlink()
    return run


def test_a_run_is_not_resumed_with_another_number_of_processes(
    config: FinetuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = unfinished_run(config, tmp_path / "run")
    monkeypatch.setattr(run_folder, "num_processes", lambda: 2)
    with pytest.raises(InvalidConfigError, match=r"num_processes 1 -> 2"):
        finetune(replace(run, resume=True))


def test_what_stops_a_training_is_told_even_if_its_picture_cannot_be_drawn(
    config: FinetuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise MemoryError("no memory")

    def no_library(*_: Any) -> None:
        raise ImportError("failed to map segment")

    monkeypatch.setattr(finetune_run, "train", no_memory)
    monkeypatch.setattr(finetune_run, "plot_loss", no_library)
    with pytest.raises((MemoryError, EabfError)) as error:
        finetune(replace(config, output=tmp_path / "run"))
    assert "map segment" not in str(error.value)


def test_an_unfinished_folder_is_resumed_overwritten_or_refused_with_both_hints(
    config: FinetuneConfig, tmp_path: Path
) -> None:
    run = unfinished_run(config, tmp_path / "run")
    with pytest.raises(OutputExistsError, match=r"not finished.*--resume.*--overwrite"):
        finetune(run)
    with pytest.raises(InvalidConfigError) as error:
        finetune(replace(run, resume=True, learning_rate=1e-3, seed=7))
    said = str(error.value)
    assert [part for part in ("learning_rate 0.003 -> 0.001", "seed 42 -> 7", "started with") if part not in said] == []
    assert len(said.splitlines()) <= 3
    with pytest.raises(CheckpointError, match=r"holds no finetune run"):
        finetune(replace(run, resume=True, output=tmp_path))
    assert sorted(path.name for path in run.output.iterdir()) == ["eabf_settings.json"]  # type: ignore[union-attr]
    resumed = finetune(replace(run, resume=True))
    assert len(resumed["train_loss"]) == STEPS


def test_overwriting_a_run_never_removes_its_sources(
    config: FinetuneConfig, model_folder: Path, texts_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "eabf_settings.json").write_text("{}")
    data = folder / "texts.jsonl"
    data.write_text(texts_file.read_text())
    with pytest.raises(OutputExistsError, match="holds the source"):
        finetune(replace(config, output=folder, dataset=str(data), overwrite=True))
    model = write_tiny_llama(folder / "model")
    with pytest.raises(OutputExistsError, match="holds the source"):
        finetune(replace(config, output=folder, model=str(model), overwrite=True))
    assert data.is_file()
    assert (model / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"samples": 9}, DataError, "8 samples out of 8 records.*9 are asked for"),
        ({"batch_size": 9}, InvalidConfigError, "batch size 9.*8 samples"),
        ({"request": MethodRequest(factor=2)}, DataError, "more than max_length 128"),
        ({"request": MethodRequest(unscaled_layers=(0, 1, 2))}, Exception, "exempts every layer"),
        ({"dtype": "fp8"}, InvalidConfigError, "fp8"),
        ({"report_to": ("notebook-of-mine",)}, InvalidConfigError, "notebook-of-mine.*not installed or not known"),
        ({"preset": "paper", "learning_rate": 2.0}, InvalidConfigError, "--learning-rate.*2.0"),
        ({"preset": "paper", "batch_size": None}, InvalidConfigError, "batch size 32 is larger than the 8 samples"),
        ({"micro_batch_size": 3}, InvalidConfigError, "micro-batches of 3.*multiple of 3"),
    ],
)
def test_what_cannot_run_is_refused_before_a_folder_is_made(
    changes: dict[str, Any], error: type[Exception], said: str, config: FinetuneConfig, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        finetune(replace(config, output=tmp_path / "run", **changes))
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_without_its_key_is_refused_before_a_folder_is_made(
    config: FinetuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # wandb is not among what the tests install: as its `login` fails where it can ask nobody.
    wandb = SimpleNamespace(Error=RuntimeError, login=Mock(side_effect=RuntimeError("No API key configured.")))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(finetune_plan, "get_available_reporting_integrations", lambda: ["wandb"])
    reported = replace(config, output=tmp_path / "run", report_to=("wandb",))
    with pytest.raises(EabfError, match=r"wandb.*No API key configured(.|\n)*WANDB_MODE=offline"):
        finetune(reported)
    assert list(tmp_path.iterdir()) == []
    # A plan needs no key, and asks for none.
    assert finetune(replace(reported, dry_run=True))["settings"]["report_to"] == ("wandb",)
    wandb.login.assert_called_once_with(verify=False)


def scaled_model(kind: str, plain: Path, folder: Path) -> Path:
    """The weights of a plain model under a scaling by four that the checkpoint carries."""
    if kind == "eabf":
        model = load_model(plain)
        apply_method(model, RopeScalingConfig(rope_theta="paper"))
        model.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(plain / name, folder / name)
        return folder
    shutil.copytree(plain, folder)
    parameters = {"rope_type": kind, "rope_theta": ROPE_THETA, "factor": 4.0}
    if kind == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    parameters["original_max_position_embeddings"] = WINDOW
    return edit_config(folder, rope_parameters=parameters, max_position_embeddings=TARGET)


@pytest.mark.parametrize("kind", ["llama3", "eabf"])
def test_a_scaled_model_is_refused_with_the_way_out(
    kind: str, config: FinetuneConfig, tmp_path: Path, model_folder: Path
) -> None:
    scaled = scaled_model(kind, model_folder, tmp_path / "scaled")
    with pytest.raises(InvalidConfigError, match=r"scaled already.*--rebase"):
        finetune(replace(config, model=str(scaled), output=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "tuning"), [("llama3", "full"), ("yarn", "full"), ("eabf", "full"), ("eabf", "lora"), ("eabf", "qlora")]
)
def test_a_rebased_model_is_trained_as_its_unscaled_twin(
    kind: str, tuning: str, config: FinetuneConfig, tmp_path: Path, model_folder: Path
) -> None:
    if tuning == "qlora":
        pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes, which has no wheel for every system")
    scaled = scaled_model(kind, model_folder, tmp_path / "scaled")
    run = replace(config, samples=4, epochs=1, tuning=tuning)
    twin = finetune(replace(run, output=tmp_path / "twin"))
    rebased = replace(run, model=str(scaled), request=MethodRequest(rope_theta="paper", rebase=True))
    result = finetune(replace(rebased, output=tmp_path / "run"))
    assert any(kind in note and "removed" in note for note in result["notes"])
    assert result["train_loss"] == twin["train_loss"]
    written, expected = (read_config(tmp_path / name) for name in ("run", "twin"))
    for name in ("model_type", "rope_theta", "rope_scaling", "max_position_embeddings"):
        assert written[name] == expected[name], name
    assert "rope_parameters" not in written
    assert written["rope_scaling"]["original_max_position_embeddings"] == WINDOW
    assert written["rope_scaling"]["original_rope_theta"] == ROPE_THETA
    assert torch.equal(logits(load_model(tmp_path / "run")), logits(load_model(tmp_path / "twin")))
    assert torch.equal(logits(float32(tmp_path / "run")), logits(float32(tmp_path / "twin")))
    if tuning != "full":
        # On its base, which carries the old scaling.
        adapters = [load_model(tmp_path / name / "adapter") for name in ("run", "twin")]
        assert torch.equal(logits(adapters[0]), logits(adapters[1]))


@pytest.mark.parametrize("kind", ["llama3", "eabf"])
def test_of_a_rebased_model_the_original_is_measured_as_it_was_given(
    kind: str, config: FinetuneConfig, tmp_path: Path, model_folder: Path
) -> None:
    scaled = scaled_model(kind, model_folder, tmp_path / "scaled")
    run = replace(config, model=str(scaled), output=tmp_path / "run", samples=4, epochs=1, evaluation=MEASURED)
    result = finetune(replace(run, request=MethodRequest(method="abf", rope_theta=100_000.0, rebase=True)))
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    extended = load_model(model_folder, dtype="float32")
    apply_method(extended, RopeScalingConfig(method="abf", rope_theta=100_000.0))
    for name, model in (("original", load_model(scaled, dtype="float32")), ("before", extended)):
        expected = evaluate(model, tokenizer, MEASURED)["perplexity"]
        for told, found in zip(result[name]["perplexity"], expected, strict=True):
            assert told["perplexity"] == pytest.approx(found["perplexity"], rel=1e-5), name


def test_the_samples_are_those_of_the_data_module(
    config: FinetuneConfig, finished: tuple[dict[str, Any], Path], model_folder: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    samples = load_samples(DataConfig(dataset=config.dataset, num_samples=8, max_length=TARGET), tokenizer)
    assert finished[0]["data_hash"] == samples.data_hash
    assert all(sample.input_ids[0] == BOS for sample in samples.samples)
    assert finished[0]["num_scaled_layers"] == LAYERS - 2


def test_a_disk_too_small_for_the_checkpoints_is_known_before(
    config: FinetuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match=r"no space for .*out.* GiB needed"):
        finetune(replace(config, output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_while_training_is_an_explained_error(
    config: FinetuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("eabf_cli.core.finetune.run.train", is_full)
    with pytest.raises(CheckpointError, match="no space left for"):
        finetune(replace(config, output=tmp_path / "out"))


def test_a_model_that_is_to_be_sharded_is_loaded_on_the_cpu_and_trained_on_its_gpu(
    config: FinetuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(config, find_target(replace(config, output=tmp_path / "out")))
    gpu = torch.device("cuda:0")
    trainer = Mock()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(finetune_run, "choose_device", Mock(return_value=gpu))
    monkeypatch.setattr(finetune_run, "plot_loss", Mock())
    monkeypatch.setattr(finetune_run, "train", trainer)
    run = finetune_run._Run(config, plan)
    model = run._load()
    assert model.device.type == "cpu"
    run._train(model, plan.rows, plan.row_recipe, tmp_path)
    assert trainer.call_args.kwargs["device"] == gpu
    prober = Mock()
    monkeypatch.setattr(finetune_run, "probe", prober)
    run.probe()
    assert prober.call_args.kwargs["device"] == gpu


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"dtype": "float32"}, "context parallelism trains in bfloat16 alone"),
        ({"pack": True}, "which --pack cannot have"),
        ({"restoration": RestorationConfig()}, "which --restore-weight cannot have"),
    ],
)
def test_what_rows_that_are_spread_cannot_have_is_refused(
    fields: dict[str, Any], told: str, config: FinetuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune_plan, "has_fast_bfloat16", Mock(return_value=True))
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    target = find_target(replace(config, output=tmp_path / "out"))
    plain = replace(config, dtype="auto")
    assert make_plan(plain, target).settings.mixed_precision
    with pytest.raises(InvalidConfigError, match=told):
        make_plan(replace(plain, **fields), target)
