"""`eabf eval`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eabf_cli.core.checkpoint import load_model, load_tokenizer
from eabf_cli.core.data.records import open_records
from eabf_cli.core.evaluation import TASKS, EvalConfig, evaluate
from eabf_cli.core.patch_checkpoint import PatchConfig, patch_checkpoint
from eabf_cli.core.patching import apply_method
from eabf_cli.core.scaling_config import RopeScalingConfig
from tests.conftest import Eabf
from tests.lm_eval_task import write_task
from tests.outcomes import assert_told, printed, succeeded
from tests.tiny_llama import TARGET, WINDOW, write_tiny_llama

FILES = {"eabf_run.json", "eval.json", "table.txt", "report.html", "report.md"}


@pytest.fixture
def arguments(tiny_llama_folder: Path, texts_file: Path) -> list[Any]:
    """Losses at three lengths; the texts have about 200 tokens."""
    tasks = "context_gain,perplexity,perplexity_by_position"
    lengths = f"{WINDOW // 2},{WINDOW},{2 * WINDOW}"
    return ["eval", "-m", tiny_llama_folder, "--dataset", texts_file, "--lengths", lengths, "--tasks", tasks]


# ---- What is printed and written -----------------------------------------------------------------


def test_the_numbers_are_those_of_evaluate(
    eabf: Eabf, arguments: list[Any], tiny_llama_folder: Path, texts_file: Path
) -> None:
    found = printed(eabf(*arguments, "--json"))
    texts = tuple(read().text or "" for read in open_records(texts_file))
    config = EvalConfig(
        tasks=("context_gain", "perplexity", "perplexity_by_position"),
        lengths=(WINDOW // 2, WINDOW, 2 * WINDOW),
        documents=texts,
    )
    expected = evaluate(load_model(tiny_llama_folder), load_tokenizer(tiny_llama_folder), config)
    for task in config.tasks:
        assert found[task] == expected[task]
    assert found["key_tokens"] == expected["key_tokens"]
    assert (found["method"], found["factor"], found["output"]) == (None, None, None)
    assert (found["original_max_position_embeddings"], found["max_position_embeddings"]) == (WINDOW, WINDOW)
    assert (found["dataset"], found["num_documents"]) == (str(texts_file), 8)
    assert (found["dtype"], found["device"]) == ("float32", "cpu")
    assert found["weights"].startswith("sha256:")
    assert found["tokens_per_s"] > 0


def test_a_method_is_applied_first(eabf: Eabf, arguments: list[Any], tiny_llama_folder: Path, texts_file: Path) -> None:
    found = printed(eabf(*arguments, "--method", "logn", "--factor", 4, "--json"))
    model = load_model(tiny_llama_folder)
    apply_method(model, RopeScalingConfig(method="logn", factor=4.0))
    texts = tuple(read().text or "" for read in open_records(texts_file))
    config = EvalConfig(tasks=("perplexity",), lengths=(2 * WINDOW,), documents=texts)
    expected = evaluate(model, load_tokenizer(tiny_llama_folder), config)
    assert found["perplexity"][-1] == expected["perplexity"][0]
    assert (found["method"], found["factor"], found["max_position_embeddings"]) == ("logn", 4.0, TARGET)


def test_a_checkpoint_is_measured_under_its_own_method(eabf: Eabf, arguments: list[Any], workdir: Path) -> None:
    patch_checkpoint(PatchConfig(model=str(arguments[2]), output=workdir / "extended"))
    found = printed(eabf("eval", "-m", "extended", *arguments[3:], "--json"))
    assert (found["method"], found["original_max_position_embeddings"]) == ("eabf", WINDOW)
    assert found["max_position_embeddings"] == TARGET


def test_the_demo_model_retrieves_inside_its_window_and_not_beyond(eabf: Eabf) -> None:
    tasks = "passkey,multi_key,variable_tracking,repeated_span,needles,context_gain"
    result = eabf("eval", "--lengths", "448,896", "--tasks", tasks, "--trials", 10, "--documents", 4, "--json")
    found = printed(result)
    assert "using the demo model" in result.stderr
    assert set(found) > {"passkey", "multi_key", "variable_tracking", "repeated_span", "needles", "context_gain"}
    inside, beyond = ([entry for entry in found["passkey"] if entry["length"] == length] for length in (448, 896))
    assert sum(entry["accuracy"] for entry in inside) / 5 >= 0.8
    assert sum(entry["accuracy"] for entry in beyond) / 5 <= 0.4
    assert found["effective_length"] == found["effective_lengths"]["passkey"] == 448
    for entry in (*found["grid"], *found["needles"]):
        assert 0 <= entry["lower_bound"] <= entry["accuracy"] <= entry["upper_bound"] <= 1
    assert {entry["task"] for entry in found["grid"]} == {"passkey", "multi_key"}
    # Far outside its window an unextended model is worse off with more context.
    assert found["context_gain"][-1]["difference"] > 0.1


def test_the_text_has_a_table_and_what_follows_from_it(eabf: Eabf, arguments: list[Any]) -> None:
    shown = succeeded(eabf(*arguments)).stdout
    lines = shown.splitlines()
    assert lines[0].startswith(f"{arguments[2]} as it stands, pre-trained window {WINDOW}; ")
    header = next(line for line in lines if line.startswith("tokens"))
    assert header.split() == ["tokens", "32", "64", "128"]
    for title in ("loss by context", "  on key tokens", "perplexity", "perplexity by position"):
        assert any(line.startswith(title) for line in lines), shown
    assert "With 128 tokens visible the loss on the same tokens is" in shown


def test_a_folder_holds_the_result_and_how_it_was_made(eabf: Eabf, arguments: list[Any], workdir: Path) -> None:
    found = printed(eabf(*arguments, "-o", "measured", "--json"))
    folder = workdir / "measured"
    assert {path.name for path in folder.iterdir()} >= FILES
    assert json.loads((folder / "eval.json").read_text()) == found
    record = json.loads((folder / "eabf_run.json").read_text())
    assert (record["command"], record["data_hash"], record["seed"]) == ("eval", found["data_hash"], 42)
    assert record["arguments"]["evaluation"]["lengths"] == [WINDOW // 2, WINDOW, 2 * WINDOW]
    assert_told(eabf(*arguments, "-o", "measured"), "exists and is not empty")
    succeeded(eabf(*arguments, "-o", "measured", "--overwrite"))


def test_a_dry_run_tells_lengths_and_memory(eabf: Eabf, arguments: list[Any], workdir: Path) -> None:
    planned = [*arguments[:5], "--tasks", "perplexity,passkey", "--dry-run", "-o", "measured"]
    found = printed(eabf(*planned, "--json"))
    assert found["lengths"] == [WINDOW // 4, WINDOW // 2, WINDOW, 2 * WINDOW, 4 * WINDOW, 8 * WINDOW]
    assert found["memory"]["total_gib"] < found["available_gib"]
    assert set(found).isdisjoint(TASKS)
    shown = succeeded(eabf(*planned)).stdout
    assert "Nothing was measured" in shown
    assert "Tasks perplexity, passkey\n" in shown
    assert "8 times the pre-trained window" in shown
    assert list(workdir.iterdir()) == []


@pytest.mark.parametrize(("is_fast", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_the_demo_model_runs_in_a_dtype_that_the_cpu_has(
    eabf: Eabf, monkeypatch: pytest.MonkeyPatch, is_fast: bool, dtype: str
) -> None:
    monkeypatch.setattr("eabf_cli.core.evals.run.has_fast_bfloat16", lambda _: is_fast)
    assert printed(eabf("eval", "--device", "cpu", "--dry-run", "--json"))["dtype"] == dtype
    asked = printed(eabf("eval", "--device", "cpu", "--dtype", "float16", "--dry-run", "--json"))
    assert asked["dtype"] == "float16"


def test_documents_that_are_too_short_are_counted(eabf: Eabf, tiny_llama_folder: Path, workdir: Path) -> None:
    for name, count in (("short", 4), ("middle", 60), ("long", 200)):
        (workdir / f"{name}.txt").write_text("the sun was warm " * count)
    result = eabf(
        *("eval", "-m", tiny_llama_folder, "--text", ".", "--lengths", "32,512", "--tasks", "perplexity", "--json")
    )
    found = printed(result)
    assert [entry["num_documents"] for entry in found["perplexity"]] == [2, 1]
    assert "left out for having fewer than 32 tokens: 1 document" in found["notes"]
    assert (
        "1 of 2 documents have fewer than 512 tokens: they are measured at the lengths that they have"
        in (found["notes"])
    )
    assert "Left out for having fewer than 32 tokens" in result.stderr


def test_how_many_documents_a_loss_is_from_is_told(eabf: Eabf, tiny_llama_folder: Path, workdir: Path) -> None:
    for name, what, count in (("middle", "sun", 60), ("half", "sea", 60), ("long", "sun", 200)):
        (workdir / f"{name}.txt").write_text(f"the {what} was warm " * count)
    tasks = "perplexity,context_gain,perplexity_by_position"
    arguments = ("eval", "-m", tiny_llama_folder, "--text", ".", "--lengths", "32,256,512", "--tasks", tasks)
    result = eabf(*arguments, "--dry-run")
    why = "since it reads the same tokens at every context: shorter --lengths take more of them"
    assert f"the loss by context is from 1 of 3 documents, those with 512 tokens, {why}" in result.stdout
    shown = succeeded(eabf(*arguments)).stdout
    assert (
        "Documents: perplexity 3 up to 256 tokens, 1 up to 512; loss by context 1; "
        "perplexity by position 3 up to 288 tokens, 1 up to 512." in shown
    )
    few = (*arguments[:-4], "--lengths", "32,2048", "--tasks", "context_gain")
    assert "the loss by context ends at 32 tokens: no document has 2,048" in eabf(*few, "--dry-run").stdout


def test_bundled_documents_that_are_too_short_leave_the_needles(eabf: Eabf) -> None:
    found = printed(eabf("eval", "--lengths", 5000, "--tasks", "perplexity,passkey", "--trials", 1, "--json"))
    assert found["tasks"] == ["passkey"]
    assert [entry["length"] for entry in found["passkey"]] == [5000]
    assert any("perplexity left out" in note and "--text" in note for note in found["notes"])


def test_a_passkey_alone_reads_no_document(eabf: Eabf, tiny_llama_folder: Path) -> None:
    arguments = ("eval", "-m", tiny_llama_folder, "--tasks", "passkey", "--lengths", 512, "--trials", 1)
    found = printed(eabf(*arguments, "--json"))
    assert (found["dataset"], found["data_hash"], found["num_documents"]) == (None, None, 0)
    assert "demo-long" not in succeeded(eabf(*arguments)).stdout


@pytest.fixture
def task_folder(workdir: Path) -> Path:
    """Where a task of lm-eval's kind lies."""
    return write_task(workdir)


def test_tasks_of_lm_eval_alone_are_all_that_is_told(
    eabf: Eabf, tiny_llama_folder: Path, task_folder: Path, workdir: Path
) -> None:
    arguments = ("eval", "-m", tiny_llama_folder, "--tasks", "sun", "--task-folder", task_folder, "--lengths", 64)
    planned = succeeded(eabf(*arguments, "--dry-run")).stdout
    assert "min" not in planned.splitlines()[1]
    found = printed(eabf(*arguments, "--json", "-o", "measured"))
    assert set(found).isdisjoint(TASKS)
    assert (found["tasks"], found["depths"], found["seed"], found["dataset"]) == (["sun"], [], None, None)
    (entry,) = found["suites"]
    assert (entry["task"], entry["length"], entry["num_samples"]) == ("sun", 64, 2)
    accuracy = entry["metrics"][0]["value"]
    for name in ("report.md", "report.html"):
        report = (workdir / "measured" / name).read_text()
        assert f"{accuracy:.4f}" in report
        assert "ffective length" not in report


def test_a_chat_without_a_template_is_refused_before_weights_are_read(
    eabf: Eabf, llama_copy: Path, task_folder: Path
) -> None:
    (llama_copy / "model.safetensors").unlink()
    arguments = ("eval", "-m", llama_copy, "--tasks", "sun", "--task-folder", task_folder, "--chat", "--dry-run")
    assert_told(eabf(*arguments), "the tokenizer has no chat template: leave --chat out")


def test_tasks_of_lm_eval_stand_beside_ours(eabf: Eabf, tiny_llama_folder: Path, task_folder: Path) -> None:
    tasks = ("--tasks", "sun,passkey", "--task-folder", task_folder, "--lengths", 512, "--trials", 1)
    found = printed(eabf("eval", "-m", tiny_llama_folder, *tasks, "--json"))
    assert (found["tasks"], found["seed"]) == (["passkey", "sun"], 42)
    assert {"passkey", "suites"} <= set(found)


def test_settings_may_stand_in_a_file(eabf: Eabf, tiny_llama_folder: Path, workdir: Path) -> None:
    (workdir / "eval.toml").write_text(
        'tasks = ["passkey", "multi_key"]\nlengths = [256, 512]\ndepths = [0.5]\ntrials = 2\n'
    )
    found = printed(eabf("eval", "-m", tiny_llama_folder, "--config", "eval.toml", "--lengths", 512, "--json"))
    assert (found["tasks"], found["depths"], found["lengths"]) == (["passkey", "multi_key"], [0.5], [512])
    assert [(cell["task"], cell["num_trials"]) for cell in found["grid"]] == [("passkey", 2), ("multi_key", 2)]


# ---- What is refused -----------------------------------------------------------------------------


def test_documents_that_are_all_too_short_are_refused(eabf: Eabf, tiny_llama_folder: Path, workdir: Path) -> None:
    (workdir / "short.txt").write_text("the sun was warm")
    result = eabf("eval", "-m", tiny_llama_folder, "--text", "short.txt", "--lengths", "64,128", "-o", "measured")
    assert_told(result, "no document has 64 tokens", "short.txt", "--lengths")
    assert [path.name for path in workdir.iterdir()] == ["short.txt"]


def test_a_length_beyond_memory_is_refused_before_weights_are_read(
    eabf: Eabf, tmp_path: Path, texts_file: Path, workdir: Path
) -> None:
    folder = write_tiny_llama(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    result = eabf("eval", "-m", folder, "--dataset", texts_file, "--lengths", 10**9, "--dry-run")
    assert_told(result, "measuring at 1,000,000,000 tokens needs about", "fit")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lengths", "2"], "--lengths must be of at least 4 tokens each, got 2"),
        (["--depths", "0,2"], "--depths must be between 0 and 1, got 0, 2"),
        (["--trials", "0"], "--trials must be at least 1"),
        (["--target-tokens", "0"], "--target-tokens"),
        (["--tasks", "ruler", "--limit", "0"], "--limit must be at least 1"),
        (["--tasks", "ruler", "--batch-size", "0"], "--batch-size"),
        (["--verdict", "--lengths", "2"], "--lengths must be at least 4 tokens"),
        (["--verdict", "--target-tokens", "0"], "--target-tokens"),
        (["--compare", "yarn", "--seeds", "2"], "give --finetune too, or leave --seeds out"),
        (["--compare", "yarn", "--finetune", "--seeds", "0"], "--seeds"),
        (["--compare", "yarn", "--resume"], "--resume goes on"),
        (
            ["--compare", "yarn", "--resume", "--overwrite", "-o", "x"],
            "--resume keeps what was measured and --overwrite",
        ),
        (["--compare", "yarn", "--reference", "abf"], "--reference 'abf'"),
        (["--text", "nothing.txt"], "does not exist"),
        (["--documents", "0"], "--documents (num_documents)"),
    ],
)
def test_nonsense_is_told_in_one_line(eabf: Eabf, flags: list[str], said: str) -> None:
    assert_told(eabf("eval", *flags), said)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lengths", "some"], "whole numbers"),
        (["--depths", "0;1"], "list of numbers"),
        (["--tasks", "passkey,"], "list of names"),
        (["--tasks", "paskey"], "unknown task 'paskey': did you mean passkey?"),
        (["--finetune"], "--finetune belongs to --compare"),
        (["--seeds", "3", "--samples", "10"], "--seeds, --samples belongs to --compare"),
        (["--learning-rate", "1e-4", "--tuning", "lora"], "--learning-rate, --tuning belongs to --finetune"),
        (["--compare", "yarn", "--epochs", "2", "--preset", "paper"], "--preset, --epochs belongs to --finetune"),
        (["--compare", "yarn", "--samples", "10"], "--samples belongs to --finetune"),
        (["--compare", "yarn", "--batch-size", "4"], "belongs to tasks of lm-eval in --tasks, or --finetune"),
        (["--original", "eabf-tiny"], "--original belongs to --verdict"),
        (["--limit", "5"], "--limit belongs to tasks of lm-eval"),
        (["--verdict", "--compare", "yarn"], "different questions"),
        (["--compare", "yarn", "--method", "eabf"], "leave --method out"),
        (["--compare", "yarn", "--tasks", "ruler"], "not ruler"),
        (["--factor", "2"], "belongs to a method"),
    ],
)
def test_flags_that_do_not_go_together_are_wrong_usage(eabf: Eabf, flags: list[str], said: str) -> None:
    assert_told(eabf("eval", *flags), said, exit_code=2)
