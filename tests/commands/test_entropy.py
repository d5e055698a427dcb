"""`eabf entropy`: what it prints and writes, what it refuses, and how an interrupted measurement goes on."""

from __future__ import annotations

import json
import math
import signal
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config

import eabf_cli
from eabf_cli.core.checkpoint import load_model, load_tokenizer
from eabf_cli.core.data.records import open_records
from eabf_cli.core.entropy import result as entropy_result
from eabf_cli.core.patching import apply_eabf
from tests.conftest import Eabf
from tests.core.data.pdf_files import make_pdf
from tests.fork_server import ForkServer
from tests.outcomes import assert_told, printed, succeeded
from tests.tiny_llama import LAYERS, WINDOW, edit_config, write_tiny_llama

HEADS = 4
LENGTH = 2 * WINDOW
CONTRACT_KEYS = {
    "num_documents",
    "length",
    "positions",
    "entropy",
    "stderr",
    "suggestion",
    "model",
    "revision",
    "weights",
    "method",
    "factor",
    "original_max_position_embeddings",
    "max_position_embeddings",
    "num_skipped_documents",
    "dataset",
    "visible_keys",
    "layers",
    "head_slope",
    "wall_s",
    "tokens_per_s",
    "peak_memory_gib",
    "output",
}
FILES = ["eabf_run.json", "entropy.json", "entropy.png", "report.html"]


def brute_force(model: Any, texts: Path, tokenizer: Any, length: int) -> np.ndarray:
    """`(documents, layers, heads, length)`: -sum p ln p of the eager attention weights, in float64."""
    model.set_attn_implementation("eager")
    found = []
    for read in open_records(texts):
        ids = torch.tensor(tokenizer(read().text)["input_ids"][:length])[None]
        with torch.no_grad():
            attentions = model(ids, output_attentions=True).attentions
        found.append(torch.stack([torch.special.entr(weights[0].double()).sum(-1) for weights in attentions]))
    return torch.stack(found).numpy()


@pytest.fixture
def arguments(tiny_llama_folder: Path, texts_file: Path) -> list[Any]:
    return ["entropy", "-m", tiny_llama_folder, "--dataset", texts_file, "--length", LENGTH, "--positions", "log:20"]


# ---- What is printed and written -----------------------------------------------------------------


def test_the_numbers_are_means_and_standard_errors_over_documents(
    eabf: Eabf, arguments: list[Any], tiny_llama_folder: Path, texts_file: Path
) -> None:
    result = printed(eabf(*arguments, "--json"))
    assert set(result) >= CONTRACT_KEYS
    tokenizer = load_tokenizer(tiny_llama_folder)
    expected = brute_force(load_model(tiny_llama_folder), texts_file, tokenizer, LENGTH)
    chosen = expected[..., np.array(result["positions"]) - 1]
    assert result["num_documents"] == len(expected) == 8
    np.testing.assert_allclose(result["entropy"], chosen.mean(0), atol=1e-4)
    np.testing.assert_allclose(result["stderr"], chosen.std(0, ddof=1) / math.sqrt(8), atol=1e-4)
    assert result["visible_keys"] == [result["positions"]] * LAYERS
    assert (result["length"], result["positions"][-1], len(result["positions"])) == (LENGTH, LENGTH, 20)
    assert (result["method"], result["factor"], result["output"]) == (None, None, None)
    assert (result["original_max_position_embeddings"], result["max_position_embeddings"]) == (WINDOW, WINDOW)

    # Least squares against ln n from an eighth of the window to the window, by numpy.
    positions = np.array(result["positions"])
    inside = (positions >= WINDOW / 8) & (positions <= WINDOW)
    x = np.log(positions[inside])
    slopes = np.array([[np.polyfit(x, chosen[d, n][:, inside].T, 1)[0] for n in range(LAYERS)] for d in range(8)])
    np.testing.assert_allclose(result["head_slope"], slopes.mean(0), atol=1e-4)
    layers = slopes.mean(2)
    assert [layer["index"] for layer in result["layers"]] == list(range(LAYERS))
    np.testing.assert_allclose([layer["slope"] for layer in result["layers"]], layers.mean(0), atol=1e-4)
    stderr = layers.std(0, ddof=1) / math.sqrt(8)
    np.testing.assert_allclose([layer["slope_stderr"] for layer in result["layers"]], stderr, atol=1e-4)
    assert {layer["kind"] for layer in result["layers"]} == {"full"}
    rising = [n for n in range(LAYERS) if layers.mean(0)[n] - 2 * stderr[n] > 0.5]
    assert [layer["index"] for layer in result["layers"] if layer["rises"]] == rising


def test_a_method_is_measured_as_it_would_be_applied(
    eabf: Eabf, arguments: list[Any], tiny_llama_folder: Path, texts_file: Path
) -> None:
    result = printed(eabf(*arguments, "--json", "--method", "eabf", "--factor", 2, "--unscaled-layers", 1))
    model = load_model(tiny_llama_folder)
    apply_eabf(model, 2.0, rope_theta=_auto_theta(result), unscaled_layers=(1,))
    expected = brute_force(model, texts_file, load_tokenizer(tiny_llama_folder), LENGTH)
    np.testing.assert_allclose(result["entropy"], expected[..., np.array(result["positions"]) - 1].mean(0), atol=1e-4)
    assert (result["method"], result["factor"], result["max_position_embeddings"]) == ("eabf", 2.0, 2 * WINDOW)
    assert [layer["scaled"] for layer in result["layers"]] == [True, False, True]


def _auto_theta(result: dict[str, Any]) -> float:
    theta = (2 * WINDOW / math.tau) ** (math.log(10_000) / math.log(WINDOW / math.tau))
    return max(500_000.0, float(f"{theta:.4g}"))


def test_a_folder_has_everything_and_the_same_numbers(eabf: Eabf, arguments: list[Any], workdir: Path) -> None:
    result = printed(eabf(*arguments, "--json", "-o", "out", "--rows", "--scores", "--documents", 3))
    assert sorted(path.name for path in (workdir / "out").iterdir()) == sorted([*FILES, "rows.safetensors"])
    assert [path.name for path in workdir.iterdir()] == ["out"]
    assert json.loads((workdir / "out" / "entropy.json").read_text()) == result
    record = json.loads((workdir / "out" / "eabf_run.json").read_text())
    assert (record["command"], record["suggestion"]) == ("entropy", result["suggestion"])
    rows = load_file(workdir / "out" / "rows.safetensors")["rows"]
    assert rows.shape == (LAYERS, HEADS, 20, LENGTH)
    torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:-1]))
    scores = result["scores"]
    assert np.shape(scores["sink"]) == np.shape(scores["recent"]) == (LAYERS, HEADS)
    np.testing.assert_allclose(np.sum(scores["by_distance"], -1), 1.0, atol=1e-4)
    assert len(scores["distance_edges"]) == np.shape(scores["by_distance"])[-1] + 1


def test_one_document_has_no_standard_error(eabf: Eabf, arguments: list[Any]) -> None:
    result = printed(eabf(*arguments, "--json", "--documents", 1))
    assert result["stderr"] is None
    assert {layer["slope_stderr"] for layer in result["layers"]} == {None}


def test_large_arrays_lie_beside_the_document(
    eabf: Eabf, arguments: list[Any], workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entropy_result, "MAX_JSON_VALUES", 100)
    result = printed(eabf(*arguments, "--json", "-o", "out", "--compare", arguments[2]))
    document = json.loads((workdir / "out" / "entropy.json").read_text())
    assert document["entropy"] is document["stderr"] is document["compare"]["difference"] is None
    arrays = load_file(workdir / "out" / "entropy.safetensors")
    np.testing.assert_allclose(arrays["entropy"], result["entropy"], atol=1e-6)
    assert sorted(document["arrays"]["names"]) == sorted(arrays)
    again = printed(eabf(*arguments, "--json", "-o", "out", "--compare", arguments[2], "--resume"))
    np.testing.assert_allclose(again["compare"]["stderr"], result["compare"]["stderr"], atol=1e-5)
    assert again.keys() == result.keys()


def test_the_difference_to_a_second_model_is_paired_by_document(eabf: Eabf, arguments: list[Any]) -> None:
    same = printed(eabf(*arguments, "--json", "--compare", arguments[2]))["compare"]
    assert np.abs(same["difference"]).max() == np.abs(same["difference_stderr"]).max() == 0
    method = ("--method", "eabf", "--factor", 2)
    result = printed(eabf(*arguments, "--json", *method, "--compare", arguments[2]))
    compare = result["compare"]
    assert (result["method"], compare["method"], compare["model"]) == ("eabf", None, str(arguments[2]))
    np.testing.assert_allclose(
        compare["difference"], np.array(compare["entropy"]) - np.array(result["entropy"]), atol=2e-6
    )
    plain = printed(eabf(*arguments, "--json"))
    assert compare["entropy"] == plain["entropy"]
    positions = np.array(result["positions"])
    inside = (positions >= result["slope_range"][0]) & (positions <= result["slope_range"][1])
    for part in (result, compare):
        fitted = np.polyfit(
            np.log(positions[inside]), np.array(part["entropy"]).reshape(-1, len(positions)).T[inside], 1
        )
        np.testing.assert_allclose(np.ravel(part["head_slope"]), fitted[0], atol=1e-5)
    assert np.max(compare["difference_stderr"]) > 0
    last_inside = max(position for position in result["positions"] if position <= WINDOW)
    for part in (result, compare):
        means = np.array(part["entropy"]).mean((0, 1))
        change = means[-1] - means[result["positions"].index(last_inside)]
        assert part["drift"] == {"from": last_inside, "to": LENGTH, "nats": pytest.approx(change, abs=2e-6)}
    assert printed(eabf(*arguments, "--json", "--length", WINDOW))["drift"] is None


def test_the_text_is_a_table_of_layers_and_a_suggestion(eabf: Eabf, arguments: list[Any]) -> None:
    said = succeeded(eabf(*arguments)).stdout.splitlines()
    assert [part for part in ("as it stands", f"{LENGTH} tokens", "8 documents") if part not in said[0]] == []
    header = said[2].split()
    assert header.count("at") == 3
    assert [line.split()[0] for line in said[3 : 3 + LAYERS]] == list(map(str, range(LAYERS)))
    assert any(line.startswith("Suggestion: ") and "--rope-theta" in line for line in said)


def test_tried_settings_come_as_a_file_that_other_commands_take(
    eabf: Eabf, arguments: list[Any], workdir: Path
) -> None:
    result = eabf(*arguments, "--suggest", "--factor", 2, "-o", "out", "--json")
    suggestion = printed(result)["suggestion"]
    search = suggestion["search"]
    assert (suggestion["method"], suggestion["factor"], search["length"]) == ("eabf", 2, 2 * WINDOW)
    assert (search["num_documents"], search["num_confirming_documents"]) == (4, 4)
    assert search["default"] == {"rope_theta": 500_000.0, "unscaled_layers": [0, 1]}
    assert search["tried"][0]["loss"] > 0
    chosen = search["found"] if search["is_confirmed"] else search["default"]
    assert {name: suggestion[name] for name in chosen} == chosen
    assert f"rope_theta {search['tried'][1]['rope_theta']:,.0f}" in result.stderr

    settings = tomllib.loads((workdir / "out" / "suggestion.toml").read_text())
    assert settings == {name: suggestion[name] for name in ("method", "factor", "rope_theta", "unscaled_layers")}
    patched = printed(eabf("patch", "-m", arguments[2], "--config", "out/suggestion.toml", "--dry-run", "--json"))
    assert {name: patched[name] for name in settings} == settings


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--method", "yarn"], "method 'yarn' sets its own base frequency"),
        (["--factor", 64], "needs 4 stretches of 4,096 tokens, and the documents have 0"),
        (["--factor", 0.5], "factor"),
    ],
)
def test_a_search_that_cannot_be_made_is_refused_before_the_weights(
    given: list[Any], said: str, eabf: Eabf, arguments: list[Any], llama_copy: Path, workdir: Path
) -> None:
    (llama_copy / "model.safetensors").write_bytes(b"")
    arguments[2] = llama_copy
    assert_told(eabf(*arguments, "--suggest", *given, "-o", "out"), said)
    assert not (workdir / "out").exists()


def test_a_finished_measurement_without_a_search_does_not_pass_for_one(
    eabf: Eabf, arguments: list[Any], workdir: Path
) -> None:
    succeeded(eabf(*arguments, "-o", "out"))
    assert_told(eabf(*arguments, "-o", "out", "--resume", "--suggest", "--factor", 2), "--overwrite")


def test_the_demo_model_and_its_documents_are_the_default(eabf: Eabf, workdir: Path) -> None:
    result = eabf("entropy", "--documents", 2, "--json")
    value = printed(result)
    assert (value["model"], value["dataset"], value["num_documents"]) == ("eabf-tiny", "demo-long (held out)", 2)
    assert (value["length"], len(value["positions"])) == (2048, 64)
    assert value["suggestion"]["unscaled_layers"] == [0]
    assert "eabf-tiny" in result.stderr
    assert "Length 2,048 tokens, 4 times the pre-trained window of 512" in result.stderr
    assert list(workdir.iterdir()) == []


def test_a_dry_run_tells_the_documents_and_the_memory_without_weights(
    eabf: Eabf, llama_copy: Path, texts_file: Path, workdir: Path
) -> None:
    (llama_copy / "model.safetensors").unlink()
    command = ["entropy", "-m", llama_copy, "--dataset", texts_file, "--dry-run", "-o", "out"]
    result = printed(eabf(*command, "--json"))
    assert result["num_documents"] == 8
    assert result["memory"]["total_gib"] > 0
    assert "entropy" not in result
    assert "Nothing was measured" in succeeded(eabf(*command)).stdout
    assert list(workdir.iterdir()) == []


def test_python_gives_the_same_document(tiny_llama_folder: Path, texts_file: Path, eabf: Eabf) -> None:
    config = eabf_cli.EntropyConfig(
        model=str(tiny_llama_folder), dataset=str(texts_file), length=LENGTH, positions=(1, 64, 128)
    )
    result = eabf_cli.compute_attention_entropy(config)
    assert json.loads(json.dumps(result)) == result
    command = ["entropy", "-m", tiny_llama_folder, "--dataset", texts_file, "--length", LENGTH]
    same = printed(eabf(*command, "--positions", "128,1,64", "--json"))
    assert same["entropy"] == result["entropy"]
    # At the first position there is one key.
    assert all(head[0] == 0 for layer in result["entropy"] for head in layer)


def test_a_settings_file_may_list_positions(eabf: Eabf, arguments: list[Any], workdir: Path) -> None:
    (workdir / "settings.toml").write_text("positions = [1, 64]\n")
    assert printed(eabf(*arguments[:-2], "--config", "settings.toml", "--json"))["positions"] == [1, 64]


# ---- What is refused -----------------------------------------------------------------------------


def test_refusals_come_before_the_weights_and_leave_nothing(
    eabf: Eabf, llama_copy: Path, texts_file: Path, workdir: Path, tmp_path: Path
) -> None:
    (llama_copy / "model.safetensors").write_bytes(b"no weights")
    command = ["entropy", "-m", llama_copy, "--dataset", texts_file, "-o", "out"]
    assert_told(eabf(*command, "--length", 5000), "no document of", "5,000 tokens", "--length")
    assert_told(eabf(*command, "--length", 100, "--positions", "7,101"), "position 101", "100 tokens")
    assert_told(eabf(*command, "--positions", "0,7"), "position 0", "from 1")
    assert_told(eabf(*command, "--positions", "some"), "'some'", "log")
    assert_told(eabf(*command, "--documents", 0), "num_documents")
    assert_told(eabf(*command, "--rope-theta", "auto"), "--rope-theta", "--method", exit_code=2)
    pdf = tmp_path / "scan.pdf"
    pdf.write_bytes(make_pdf([[]]))
    assert_told(eabf("entropy", "-m", llama_copy, "--text", pdf), "scan.pdf", "no text layer")
    assert_told(eabf("entropy", "-m", llama_copy, "--text", "none.txt"), "none.txt not found")
    assert_told(eabf(*command[:-2], "--rows"), "-o")
    assert_told(eabf(*command[:-2], "--resume"), "-o")
    assert_told(eabf(*command, "--resume"), "no unfinished measurement", "leave --resume out")
    assert list(workdir.iterdir()) == []


def test_a_model_without_rope_is_refused(eabf: Eabf, tmp_path: Path) -> None:
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    assert_told(eabf("entropy", "-m", tmp_path / "gpt2"), "'gpt2'", "supported")


def test_a_length_beyond_the_memory_is_refused_with_an_estimate(
    eabf: Eabf, arguments: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eabf_cli.core.entropy.plan.available_memory", lambda _: 2**20)
    assert_told(eabf(*arguments), f"{LENGTH} tokens needs about", "GiB", "available", "shorter --length")


def test_a_comparison_needs_the_same_shape_and_tokenizer(
    eabf: Eabf, arguments: list[Any], llama_copy: Path, tmp_path: Path
) -> None:
    other = write_tiny_llama(tmp_path / "other", num_hidden_layers=2)
    assert_told(eabf(*arguments, "--compare", other), "3 layers", "2", "same shape")
    tokenizer = json.loads((llama_copy / "tokenizer.json").read_text())
    merges = tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = merges[: len(merges) // 4]
    (llama_copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert_told(eabf(*arguments, "--compare", llama_copy), "other tokens", "same tokenizer")


def test_what_is_not_a_number_is_told(eabf: Eabf, tmp_path: Path, texts_file: Path, workdir: Path) -> None:
    folder = write_tiny_llama(tmp_path / "broken")
    model = load_model(folder)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[8] = torch.nan
    model.save_pretrained(folder)
    command = ["entropy", "-m", folder, "--dataset", texts_file, "--length", LENGTH, "-o", "out"]
    assert_told(eabf(*command), "layer 1, head 1", "position 1 of", "texts.jsonl, line")
    assert list(workdir.iterdir()) == []


def test_an_output_is_not_overwritten_unless_asked(eabf: Eabf, arguments: list[Any], workdir: Path) -> None:
    succeeded(eabf(*arguments, "-o", "out"))
    assert_told(eabf(*arguments, "-o", "out"), "not empty", "--overwrite")
    succeeded(eabf(*arguments, "-o", "out", "--overwrite", "--documents", 2))
    assert json.loads((workdir / "out" / "entropy.json").read_text())["num_documents"] == 2
    assert [path.name for path in workdir.iterdir()] == ["out"]


# ---- Going on after an interruption --------------------------------------------------------------


def test_a_killed_measurement_goes_on_where_it_was(
    fork_server: ForkServer, arguments: list[Any], workdir: Path
) -> None:
    command = [*arguments, "-o", "out", "--json", "--scores", "--rows", "--documents", 4]
    whole = fork_server.run(command, cwd=workdir)
    assert whole.returncode == 0, whole.stderr
    expected = json.loads(whole.stdout)
    killed = fork_server.run([*command[:-1], 3, "-o", "cut"], cwd=workdir, kill_at=1, kill_where="model-000002")
    assert killed.was_killed
    assert not (workdir / "cut").exists()
    begun = workdir / ".cut.eabf-entropy"
    measured = {path.name: path.stat().st_mtime_ns for path in begun.glob("model-*.safetensors")}
    assert sorted(measured) == ["model-000000.safetensors", "model-000001.safetensors"]

    three = [*command[:-1], 3, "-o", "cut"]
    refused = fork_server.run(three, cwd=workdir)
    assert refused.returncode == 1
    assert [part for part in ("not finished", "--resume", "--overwrite") if part not in refused.stderr] == []
    changed = fork_server.run([*three, "--resume", "--positions", "1,5", "--dtype", "bfloat16"], cwd=workdir)
    assert changed.returncode == 1
    assert "other settings: positions [1, 2" in changed.stderr
    assert "dtype auto -> bfloat16" in changed.stderr
    resumed = fork_server.run([*three, "--resume"], cwd=workdir)
    assert resumed.returncode == 0, resumed.stderr
    assert sorted(path.name for path in workdir.iterdir()) == ["cut", "out"]
    assert json.loads(resumed.stdout)["num_documents"] == 3

    again = fork_server.run([*command, "--resume"], cwd=workdir)
    assert again.returncode == 0
    assert "finished already" in again.stderr
    assert json.loads(again.stdout) == expected


def test_an_interrupt_says_how_to_go_on(fork_server: ForkServer, arguments: list[Any], workdir: Path) -> None:
    command = [*arguments, "-o", "out"]
    stopped = fork_server.run(command, cwd=workdir, kill_at=1, kill_where="model-000003", signal_number=signal.SIGINT)
    assert stopped.returncode == 130
    assert "Interrupted: 3 measurements are kept; go on with --resume -o out" in stopped.stderr
    assert fork_server.run([*command, "--resume"], cwd=workdir).returncode == 0
    early = fork_server.run([*arguments, "-o", "new/out"], cwd=workdir, kill_at=1, kill_where="model", signal_number=2)
    assert early.returncode == 130
    assert [path.name for path in workdir.iterdir()] == ["out"]


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_numbers(
    fork_server: ForkServer, arguments: list[Any], workdir: Path
) -> None:
    command = [*arguments, "-o", "out", "--json", "--documents", 2]
    expected = json.loads(fork_server.run([*command, "-o", "whole"], cwd=workdir).stdout)["entropy"]
    moment = 0
    while True:
        moment += 1
        outcome = fork_server.run([*command, "--overwrite"], cwd=workdir, kill_at=moment, kill_where="out")
        if not outcome.was_killed:
            break
        is_begun = (workdir / ".out.eabf-entropy" / "settings.json").is_file()
        if (workdir / "out").exists():
            assert sorted(path.name for path in (workdir / "out").iterdir()) == sorted(FILES)
        if is_begun or (workdir / "out").exists():
            resumed = fork_server.run([*command, "--resume"], cwd=workdir)
            assert resumed.returncode == 0, resumed.stderr
            assert json.loads(resumed.stdout)["entropy"] == expected
            assert sorted(path.name for path in workdir.iterdir() if "partial" not in path.name) == ["out", "whole"]
    assert outcome.returncode == 0, outcome.stderr
    assert moment > 12


def test_a_scaled_checkpoint_is_measured_scaled(eabf: Eabf, arguments: list[Any], workdir: Path) -> None:
    succeeded(eabf("patch", "-m", arguments[2], "-o", "scaled", "--factor", 2))
    result = printed(eabf("entropy", "-m", "scaled", *arguments[3:], "--json"))
    assert (result["method"], result["factor"], result["max_position_embeddings"]) == ("eabf", 2.0, 2 * WINDOW)
    same = printed(eabf(*arguments, "--json", "--method", "eabf", "--factor", 2))
    assert result["entropy"] == same["entropy"]
    assert_told(eabf("entropy", "-m", "scaled", *arguments[3:], "--method", "abf"), "scaled already", "--rebase")
    rebased = printed(eabf("entropy", "-m", "scaled", *arguments[3:], "--method", "abf", "--rebase", "--json"))
    plain = printed(eabf(*arguments, "--json", "--method", "abf"))
    assert rebased["entropy"] == plain["entropy"]


def test_sliding_layers_are_marked_and_see_fewer_keys(eabf: Eabf, arguments: list[Any], llama_copy: Path) -> None:
    edit_config(llama_copy, model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=16)
    result = printed(eabf("entropy", "-m", llama_copy, *arguments[3:], "--json"))
    assert result["visible_keys"] == [[min(position, 16) for position in result["positions"]]] * LAYERS
    assert {(layer["kind"], layer["rises"]) for layer in result["layers"]} == {("sliding", False)}
    assert result["suggestion"]["unscaled_layers"] is None
    bound = np.log(np.minimum(result["positions"], 16))
    assert (np.array(result["entropy"]) <= bound + 1e-4).all()
