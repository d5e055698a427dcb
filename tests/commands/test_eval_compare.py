"""`eabf eval --verdict` and `--compare`: exit codes, one JSON document, the text and the folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import Eabf
from tests.outcomes import assert_told, printed
from tests.tiny_llama import TARGET, WINDOW


@pytest.fixture
def documents(workdir: Path) -> Path:
    folder = workdir / "mydocs"
    folder.mkdir()
    for number in range(6):
        words = [f"word{(number + 1) * index % 17}" for index in range(200)]
        (folder / f"{number}.txt").write_text(" ".join(words))
    return folder


def overconfident(folder: Path) -> Path:
    """The same model with weights that make its wrong predictions worse."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] = weights["model.norm.weight"] * 20
    save_file({name: weight.to(torch.float32) for name, weight in weights.items()}, path, metadata={"format": "pt"})
    return folder


def test_a_better_model_wins_and_the_exit_code_says_so(
    eabf: Eabf, tiny_llama_folder: Path, workdir: Path, documents: Path
) -> None:
    worse = overconfident(Path(shutil.copytree(tiny_llama_folder, workdir / "worse")))
    assert eabf("patch", "-m", tiny_llama_folder, "-o", "extended").exit_code == 0
    arguments = ("eval", "--verdict", "-m", "extended", "--text", documents, "--device", "cpu")
    result = eabf(*arguments, "--original", worse, "--json", "-o", "verdict")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["verdict"]["wins"] is True
    assert told["verdict"]["num_documents"] == 6
    assert told["original_reason"] == "as named with --original"
    assert "Yes: on these documents" in (workdir / "verdict" / "report.html").read_text()


def test_a_worse_model_loses_and_the_exit_code_says_so(
    eabf: Eabf, tiny_llama_folder: Path, workdir: Path, documents: Path
) -> None:
    assert eabf("patch", "-m", tiny_llama_folder, "-o", "extended").exit_code == 0
    overconfident(workdir / "extended")
    result = eabf("eval", "--verdict", "-m", "extended", "--text", documents, "--device", "cpu")
    assert result.exit_code == 1
    assert "No: on these documents" in result.stdout
    assert "chunks found by BM25" in result.stdout
    assert "Traceback" not in result.stderr


def test_a_verdict_is_on_as_many_tokens_as_asked_for(
    eabf: Eabf, tiny_llama_folder: Path, workdir: Path, documents: Path
) -> None:
    assert eabf("patch", "-m", tiny_llama_folder, "-o", "extended").exit_code == 0
    arguments = ("eval", "--verdict", "-m", "extended", "--text", documents, "--dry-run", "--json")
    planned = printed(eabf(*arguments, "--target-tokens", 4))
    assert (planned["target_tokens"], printed(eabf(*arguments))["target_tokens"]) == (4, WINDOW // 8)


def test_methods_are_compared_in_one_table(eabf: Eabf, tiny_llama_folder: Path, documents: Path, workdir: Path) -> None:
    arguments = ["eval", "--compare", "yarn,eabf", "-m", tiny_llama_folder, "--text", documents, "--device", "cpu"]
    arguments += ["--lengths", f"{WINDOW},{TARGET}", "--tasks", "perplexity,passkey", "--trials", 2, "-o", "out"]
    result = eabf(*arguments)
    assert result.exit_code == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    perplexity = rows.index(["Perplexity"])
    assert rows[perplexity + 1] == ["tokens", str(WINDOW), str(TARGET)]
    assert [row[0] for row in rows[perplexity + 2 : perplexity + 5]] == ["original", "yarn", "eabf"]
    written = json.loads((workdir / "out" / "eval.json").read_text())
    planned = eabf(*arguments, "--overwrite", "--dry-run")
    assert re.search(
        r"Measuring takes about \d+\.\d GiB on cpu \(\d+\.\d GiB available\), roughly 1 min\n", planned.stdout
    )
    again = eabf(*arguments, "--overwrite", "--json")
    compared = json.loads(again.stdout)["compare"]
    assert compared.keys() == written["compare"].keys() == {"original", "yarn", "eabf"}
    assert compared["yarn"]["perplexity"] == written["compare"]["yarn"]["perplexity"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--compare", "yarn,yam"], "unknown method 'yam'"),
        (["--compare", "yarn", "--lengths", "16,32"], "lie inside the model's window"),
        (["--compare", "yarn", "--seeds", "3"], "nothing is trained"),
        (["--verdict"], "--original"),
    ],
)
def test_what_makes_no_sense_is_told_in_one_line(
    eabf: Eabf, tiny_llama_folder: Path, documents: Path, flags: list[str], said: str
) -> None:
    result = eabf("eval", "-m", tiny_llama_folder, "--text", documents, *flags)
    assert result.exit_code == 1
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_the_recipe_is_named_as_for_finetune(
    eabf: Eabf, tiny_llama_folder: Path, texts_file: Path, documents: Path
) -> None:
    data = ["-m", tiny_llama_folder, "--factor", TARGET // WINDOW, "--samples", 4, "--device", "cpu", "--dry-run"]
    recipe = ["--preset", "paper", "--learning-rate", "3e-4", "--epochs", 3, "--batch-size", 2, "--tuning", "lora"]
    own = eabf("finetune", *data, *recipe, "--dataset", texts_file, "--method", "yarn", "--json")
    compared = eabf(
        *("eval", "--compare", "yarn", "--finetune", *data, *recipe, "--train-dataset", texts_file),
        *("--text", documents, "--lengths", f"{WINDOW},{TARGET}", "--json"),
    )
    assert own.exit_code == compared.exit_code == 0, own.stderr + compared.stderr
    expected, planned = json.loads(own.stdout), json.loads(compared.stdout)["training"]
    # What memory is free differs from one moment to the next.
    assert planned.keys() > {"num_steps", "tuning_reason", "memory"}
    assert [name for name in planned if planned[name] != expected[name]] in ([], ["memory"])
    assert planned["tuning"] == "lora"
    found = {name: planned["recipe"][name] for name in ("learning_rate", "epochs", "batch_size")}
    assert found == {"learning_rate": 3e-4, "epochs": 3, "batch_size": 2}


@pytest.mark.parametrize("too_long", ["truncate", "split"])
def test_samples_longer_than_the_target_window_are_handled_as_by_finetune(
    eabf: Eabf, tiny_llama_folder: Path, texts_file: Path, documents: Path, too_long: str
) -> None:
    data = ["-m", tiny_llama_folder, "--samples", 4, "--batch-size", 2, "--device", "cpu", "--dry-run", "--json"]
    compare = ["eval", "--compare", "yarn", "--finetune", *data, "--train-dataset", texts_file, "--text", documents]
    compare += ["--lengths", f"{WINDOW},{2 * WINDOW}"]
    assert_told(eabf(*compare), "more than max_length 128", "--too-long truncate, drop or split")
    own = printed(eabf("finetune", *data, "--factor", 2, "--dataset", texts_file, "--too-long", too_long))
    planned = printed(eabf(*compare, "--too-long", too_long))
    assert planned["too_long"] == too_long
    assert planned["training"]["num_tokens"] == own["num_tokens"]
    assert planned["training"][f"num_{'split' if too_long == 'split' else 'truncated'}"] > 0


def test_what_is_to_be_said_of_the_samples_is_a_note(
    eabf: Eabf, tiny_llama_folder: Path, documents: Path, workdir: Path
) -> None:
    (workdir / "short.jsonl").write_text("".join(json.dumps({"text": f"word {n}"}) + "\n" for n in range(8)))
    data = ["-m", tiny_llama_folder, "--samples", 4, "--batch-size", 2, "--device", "cpu", "--dry-run", "--json"]
    own = printed(eabf("finetune", *data, "--dataset", "short.jsonl"))
    compare = ("eval", "--compare", "yarn", "--finetune", *data, "--train-dataset", "short.jsonl", "--text", documents)
    planned = printed(eabf(*compare, "--lengths", f"{WINDOW},{TARGET}"))
    assert own["data_notes"]
    assert set(own["data_notes"]) <= set(planned["notes"])


def test_how_long_samples_are_handled_is_one_of_the_settings(
    eabf: Eabf, tiny_llama_folder: Path, texts_file: Path, documents: Path, workdir: Path
) -> None:
    arguments = ["eval", "--compare", "yarn", "--finetune", "-m", tiny_llama_folder, "--train-dataset", texts_file]
    arguments += ["--text", documents, "--lengths", f"{WINDOW},{2 * WINDOW}", "--tasks", "perplexity", "--samples", 2]
    arguments += ["--batch-size", 1, "--epochs", 1, "--device", "cpu", "-o", "compared"]
    found = printed(eabf(*arguments, "--too-long", "truncate", "--json"))
    settings = json.loads((workdir / "compared" / "eabf_settings.json").read_text())
    assert settings["too_long"] == "truncate"
    assert [run["num_tokens"] for run in found["compare"]["yarn"]["runs"]] == [2 * 2 * WINDOW]
    (workdir / "compared" / "eabf_run.json").unlink()
    assert_told(eabf(*arguments, "--too-long", "split", "--resume"), "other settings", "too_long")


def test_what_libraries_print_does_not_get_into_the_json(workdir: Path) -> None:
    # transformers prints a line when it finds this set.
    environment = os.environ | {"WANDB_MODE": "offline"}
    options = ["--compare", "yarn,eabf", "--finetune", "--samples", "4", "--lengths", "512,2048", "--dry-run", "--json"]
    command = [sys.executable, "-m", "eabf_cli", "eval", "-m", "eabf-tiny", *options]
    done = subprocess.run(command, cwd=workdir, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["model"] == "eabf-tiny"
    assert "WANDB offline mode" in done.stderr
