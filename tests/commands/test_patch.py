"""`eabf patch`: what it prints and writes, what loads from it, and what is left of it when it is cut short."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from eabf_cli import modeling_eabf
from eabf_cli.core.methods import METHODS
from eabf_cli.core.patching import apply_eabf, apply_method
from eabf_cli.core.sources import INDEX_FILE
from eabf_cli.modeling_eabf import FAMILIES
from tests.architectures import ARCHITECTURE_CONFIGS, build_tiny_model, random_tokens
from tests.conftest import Eabf
from tests.fork_server import ForkServer
from tests.outcomes import printed, succeeded
from tests.scalings import SCALED_METHODS, scaling_for
from tests.tiny_llama import ROPE_THETA, TARGET, WINDOW, edit_config, logits, read_config, write_tiny_llama

CONTRACT_KEYS = {
    "method",
    "factor",
    "rope_theta",
    "original_max_position_embeddings",
    "max_position_embeddings",
    "unscaled_layers",
    "num_scaled_layers",
    "logit_scale",
    "output",
}
# The tiny window makes the other rule the larger.
PAPER = ("--rope-theta", "paper")
AUTO_THETA = (TARGET / math.tau) ** (math.log(ROPE_THETA) / math.log(WINDOW / math.tau))
CODE_FREE = [name for name in METHODS if name not in ("eabf", "logn")]


def paper_base(method: str) -> tuple[str, ...]:
    return PAPER if METHODS[method].raises_theta else ()


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder with the hash of its contents."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write_sharded(folder: Path, **fields: Any) -> Path:
    write_tiny_llama(folder, max_shard_size="300KB", **fields)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


# ---- What is printed -----------------------------------------------------------------------------


def test_the_result_has_the_keys_of_the_contract(eabf: Eabf, tiny_llama_folder: Path, workdir: Path) -> None:
    result = printed(eabf("patch", "-m", tiny_llama_folder, "-o", "out", "--json", *PAPER))
    assert set(result) >= CONTRACT_KEYS
    assert {name: result[name] for name in CONTRACT_KEYS - {"logit_scale"}} == {
        "method": "eabf",
        "factor": 4.0,
        "rope_theta": 500_000.0,
        "original_max_position_embeddings": WINDOW,
        "max_position_embeddings": TARGET,
        "unscaled_layers": [0, 1],
        "num_scaled_layers": 1,
        "output": "out",
    }
    # ln i / ln 64 at 128 and 256 are 7/6 and 8/6.
    assert result["logit_scale"]["64"] == 1.0
    assert result["logit_scale"]["128"] == pytest.approx(7 / 6, abs=1e-6)
    assert result["logit_scale"]["256"] == pytest.approx(8 / 6, abs=1e-6)
    record = json.loads((workdir / "out" / "eabf_run.json").read_text())
    assert record["command"] == "patch"
    assert {name: record[name] for name in result} == result


def test_the_text_says_what_changes_and_why(eabf: Eabf, tiny_llama_folder: Path) -> None:
    said = succeeded(eabf("patch", "-m", tiny_llama_folder, "-o", "out", *PAPER))
    parts = ["eabf", "64 -> 256 tokens", "10,000 -> 500,000: the paper's value", "t(256) = 1.333", "0, 1"]
    assert said.stdout.splitlines()[-1] == "Written to out"
    assert [part for part in parts if part not in said.stdout] == []
    assert said.stderr == ""


def test_a_dry_run_shows_old_and_new_and_needs_no_weights(
    eabf: Eabf, llama_copy: Path, workdir: Path, tmp_path: Path
) -> None:
    (llama_copy / "model.safetensors").unlink()
    before = contents(tmp_path)
    said = succeeded(eabf("patch", "-m", llama_copy, "-o", "out", "--dry-run", *PAPER)).stdout
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in said.splitlines() if line.startswith("  ")}
    assert lines["max_position_embeddings"] == "64 -> 256"
    assert lines["rope_theta"] == "10000.0 -> 500000.0"
    assert lines["model_type"] == "llama -> eabf_llama"
    assert lines["rope_scaling"].startswith("(absent) -> {")
    assert said.splitlines()[-1].startswith("Nothing was written")
    assert [part for part in ("t(64) = 1,", "t(128) = 1.167", "t(256) = 1.333") if part not in said] == []
    result = printed(eabf("patch", "-m", llama_copy, "-o", "out", "--dry-run", "--json"))
    assert result["output"] is None
    assert result["changes"]["max_position_embeddings"] == [WINDOW, TARGET]
    assert contents(tmp_path) == before
    assert list(workdir.iterdir()) == []


def test_the_demo_model_is_the_default_and_that_is_said(eabf: Eabf) -> None:
    result = eabf("patch", "--dry-run", "--json")
    assert printed(result)["model"] == "eabf-tiny"
    assert len(result.stderr.splitlines()) == 1
    assert "eabf-tiny" in result.stderr
    assert "-m " in result.stderr
    assert eabf("patch", "--dry-run", "--json", "-q").stderr == ""


def test_without_an_output_the_run_is_named_after_model_method_and_factor(
    eabf: Eabf, tiny_llama_folder: Path, workdir: Path
) -> None:
    assert printed(eabf("patch", "-m", tiny_llama_folder, "--json"))["output"] == "eabf-runs/tiny-llama-eabf-x4"
    assert (workdir / "eabf-runs" / "tiny-llama-eabf-x4" / "config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "factor", "window", "target"),
    [
        (["--factor", 2], 2.0, 64, 128),
        (["--max-length", 320], 5.0, 64, 320),
        (["--max-length", 256, "--factor", 4], 4.0, 64, 256),
        (["--original-length", 32], 4.0, 32, 128),
        (["--original-length", 128, "--max-length", 256], 2.0, 128, 256),
    ],
)
def test_factor_and_length_give_each_other(
    arguments: list[Any], factor: float, window: int, target: int, eabf: Eabf, tiny_llama_folder: Path
) -> None:
    result = printed(eabf("patch", "-m", tiny_llama_folder, "--dry-run", "--json", *arguments))
    numbers = [result[name] for name in ("factor", "original_max_position_embeddings", "max_position_embeddings")]
    assert numbers == [factor, window, target]


@pytest.mark.parametrize(
    ("arguments", "unscaled"),
    [([], [0, 1]), (["--unscaled-layers", "none"], []), (["--unscaled-layers", "2"], [2]), (["--method", "logn"], [])],
)
def test_exempt_layers(arguments: list[str], unscaled: list[int], eabf: Eabf, tiny_llama_folder: Path) -> None:
    result = printed(eabf("patch", "-m", tiny_llama_folder, "--dry-run", "--json", *arguments))
    assert result["unscaled_layers"] == unscaled
    assert result["num_scaled_layers"] == 3 - len(unscaled)


@pytest.mark.parametrize(
    ("theta", "expected"), [("paper", 5e5), ("auto", AUTO_THETA), ("20000", 2e4), ("2e4", 2e4), ("9000", 9e3)]
)
def test_the_base_is_a_rule_or_a_number(theta: str, expected: float, eabf: Eabf, tiny_llama_folder: Path) -> None:
    result = eabf("patch", "-m", tiny_llama_folder, "--dry-run", "--json", "--rope-theta", theta)
    assert printed(result)["rope_theta"] == pytest.approx(expected, rel=1e-3)
    assert ("below the model's own" in result.stderr) == (expected < 1e4)


# ---- What is written -----------------------------------------------------------------------------


def test_the_folder_is_the_design_s(eabf: Eabf, tmp_path: Path) -> None:
    source = write_sharded(tmp_path / "model")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    before = contents(source)
    succeeded(eabf("patch", "-m", source, "-o", tmp_path / "out"))
    out = tmp_path / "out"
    after = contents(out)
    assert contents(source) == before

    verbatim = {name for name in before if name not in ("config.json", "tokenizer_config.json", "pytorch_model.bin")}
    assert {INDEX_FILE, "tokenizer.json", "generation_config.json", "chat_template.jinja"} < verbatim
    assert {name: after[name] for name in verbatim} == {name: before[name] for name in verbatim}
    added = {"config.json", "tokenizer_config.json", "modeling_eabf.py", "README.md", "eabf_run.json"}
    assert set(after) == verbatim | added
    assert (out / "modeling_eabf.py").read_bytes() == Path(modeling_eabf.__file__).read_bytes()

    settings = json.loads((source / "tokenizer_config.json").read_text())
    assert json.loads((out / "tokenizer_config.json").read_text()) == settings | {"model_max_length": TARGET}
    assert AutoTokenizer.from_pretrained(out).model_max_length == TARGET
    config = read_config(out)
    assert config["rope_scaling"]["format"] == 1
    assert config["vocab_size"] == 4096


def test_the_run_file_tells_how_the_folder_was_made(eabf: Eabf, tiny_llama_folder: Path, workdir: Path) -> None:
    succeeded(eabf("patch", "-m", tiny_llama_folder, "-o", "out", "--factor", 2))
    record = json.loads((workdir / "out" / "eabf_run.json").read_text())
    assert record["arguments"]["model"] == str(tiny_llama_folder)
    assert record["arguments"]["request"]["factor"] == 2.0
    assert record["weights"].startswith("sha256:")
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["transformers"]


@pytest.mark.parametrize("number_of_shards", [1, 2])
def test_a_model_whose_weights_are_named_by_an_index_loads(
    number_of_shards: int, eabf: Eabf, tmp_path: Path, tiny_llama_folder: Path
) -> None:
    if number_of_shards == 2:
        source = write_sharded(tmp_path / "model")
    else:
        source = Path(shutil.copytree(tiny_llama_folder, tmp_path / "model"))
        name = "model-00001-of-00001.safetensors"
        (source / "model.safetensors").rename(source / name)
        keys = LlamaForCausalLM.from_pretrained(tiny_llama_folder).state_dict()
        (source / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(keys, name)}))
    succeeded(eabf("patch", "-m", source, "-o", tmp_path / "out", "--method", "abf", *PAPER))
    expected = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    apply_method(expected, scaling_for("abf"))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(expected))


def test_a_model_without_a_tokenizer_is_written_with_a_warning(eabf: Eabf, llama_copy: Path, workdir: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (llama_copy / name).unlink()
    said = succeeded(eabf("patch", "-m", llama_copy, "-o", "out"))
    assert "warning: " in said.stderr
    assert "no tokenizer" in said.stderr
    assert not (workdir / "out" / "tokenizer_config.json").exists()


# ---- What loads from it --------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_transformers_alone_gives_the_logits_of_the_patched_model(
    method: str, eabf: Eabf, tiny_llama_folder: Path, workdir: Path
) -> None:
    succeeded(eabf("patch", "-m", tiny_llama_folder, "-o", "out", "--method", method, *paper_base(method)))
    expected = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    apply_method(expected, scaling_for(method))
    stock = AutoModelForCausalLM.from_pretrained(workdir / "out", trust_remote_code=method not in CODE_FREE)
    classes = {"native": "Ministral3ForCausalLM", **dict.fromkeys(("eabf", "logn"), "EABFLlamaForCausalLM")}
    assert type(stock).__name__ == classes.get(method, "LlamaForCausalLM")
    difference = (logits(stock) - logits(expected)).abs().max()
    assert difference < 1e-5 * (logits(expected).max() - logits(expected).min())


@pytest.mark.parametrize("name", ARCHITECTURE_CONFIGS)
@torch.no_grad()
def test_every_architecture_loads_in_transformers_as_it_was_patched(name: str, eabf: Eabf, tmp_path: Path) -> None:
    source = build_tiny_model(name)
    source.save_pretrained(tmp_path / "model")
    tokens = random_tokens(80)
    # The configuration of phi3 knows only its own longrope.
    methods = ["abf", "ntk" if name == "phi3" else "yarn", *(["eabf", "native"] if name in FAMILIES else [])]
    for method in methods:
        out = tmp_path / method
        arguments = ["--method", method, *paper_base(method)]
        succeeded(eabf("patch", "-m", tmp_path / "model", "-o", out, *arguments))
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        stock = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=method in SCALED_METHODS)
        for model in (expected, stock):
            model.set_attn_implementation(source.config._attn_implementation)
        apply_method(expected, scaling_for(method))
        difference = (stock(tokens).logits - expected(tokens).logits).abs().max()
        assert difference < 1e-5 * expected(tokens).logits.abs().max(), method


@pytest.mark.parametrize("method", ["eabf", "logn"])
def test_without_its_code_a_scaled_checkpoint_fails_loudly(
    method: str, eabf: Eabf, tiny_llama_folder: Path, workdir: Path
) -> None:
    succeeded(eabf("patch", "-m", tiny_llama_folder, "-o", "out", "--method", method))
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(workdir / "out", trust_remote_code=False)
    with pytest.raises(KeyError, match=method):
        LlamaForCausalLM.from_pretrained(workdir / "out")


# ---- Models that are scaled already --------------------------------------------------------------

SCALED: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": WINDOW},
    "llama3": {
        "rope_type": "llama3",
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": WINDOW,
    },
}


def scaled_copy(folder: Path, kind: str) -> Path:
    """The tiny Llama as a model maker would have extended it; its weights are those of the plain one."""
    window = WINDOW if kind == "dynamic" else 2 * WINDOW
    rope = SCALED[kind] | {"rope_theta": 10_000.0}
    return edit_config(folder, rope_parameters=rope, max_position_embeddings=window)


@pytest.mark.parametrize("kind", SCALED)
def test_a_scaled_model_is_refused_and_rebase_starts_from_the_plain_one(
    kind: str, eabf: Eabf, llama_copy: Path, tiny_llama_folder: Path, workdir: Path
) -> None:
    scaled_copy(llama_copy, kind)
    refused = eabf("patch", "-m", llama_copy, "-o", "out")
    assert refused.exit_code == 1
    assert [part for part in (kind, "--rebase") if part not in refused.stderr] == []
    assert list(workdir.iterdir()) == []

    window = ["--original-length", WINDOW] if kind == "linear" else []
    if window:
        untold = eabf("patch", "-m", llama_copy, "-o", "out", "--rebase")
        assert untold.exit_code == 1
        assert "--original-length" in untold.stderr
    result = succeeded(eabf("patch", "-m", llama_copy, "-o", "out", "--rebase", *window, *PAPER))
    assert kind in result.stderr
    expected = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    apply_eabf(expected)
    stock = AutoModelForCausalLM.from_pretrained(workdir / "out", trust_remote_code=True)
    assert (logits(stock) - logits(expected)).abs().max() < 1e-4
    assert read_config(workdir / "out")["rope_scaling"]["original_max_position_embeddings"] == WINDOW


@pytest.mark.parametrize("method", METHODS)
def test_our_own_checkpoint_is_refused_and_rebased(
    method: str, eabf: Eabf, tiny_llama_folder: Path, workdir: Path
) -> None:
    succeeded(eabf("patch", "-m", tiny_llama_folder, "-o", "first", "--method", method))
    refused = eabf("patch", "-m", "first", "-o", "second", "--method", "abf")
    assert refused.exit_code == 1
    assert [part for part in (method, "--rebase", "64 tokens") if part not in refused.stderr] == []
    succeeded(eabf("patch", "-m", "first", "-o", "second", "--method", "abf", "--rebase"))
    succeeded(eabf("patch", "-m", tiny_llama_folder, "-o", "direct", "--method", "abf"))
    second, direct = read_config(workdir / "second"), read_config(workdir / "direct")
    for name in ("model_type", "architectures", "rope_theta", "rope_scaling", "max_position_embeddings"):
        assert second.get(name) == direct.get(name), name
    expected, rebased = (AutoModelForCausalLM.from_pretrained(workdir / name) for name in ("direct", "second"))
    assert torch.equal(logits(rebased), logits(expected))


def test_a_released_checkpoint_is_refused_and_rebased(
    eabf: Eabf, llama_copy: Path, tiny_llama_folder: Path, workdir: Path
) -> None:
    rope = ("rope_theta", "rope_parameters", "rope_scaling")
    edit_config(llama_copy, drop=rope, rope_scaling={"type": "eabf", "factor": 4.0})
    refused = eabf("patch", "-m", llama_copy, "-o", "out")
    assert refused.exit_code == 1
    assert "--rebase" in refused.stderr
    succeeded(eabf("patch", "-m", llama_copy, "-o", "out", "--rebase", *PAPER))
    expected = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    apply_eabf(expected)
    stock = AutoModelForCausalLM.from_pretrained(workdir / "out", trust_remote_code=True)
    assert (logits(stock) - logits(expected)).abs().max() < 1e-4


# ---- Interrupted, and large ----------------------------------------------------------------------


def is_whole(folder: Path, source: Path) -> bool:
    """Whether a folder is all that a patch of `source` writes."""
    names = {path.name for path in folder.iterdir()}
    return {path.name for path in source.iterdir()} | {"eabf_run.json", "README.md", "modeling_eabf.py"} == names


@pytest.mark.slow
def test_killed_at_any_moment_it_leaves_no_target_or_a_whole_one(
    fork_server: ForkServer, tmp_path: Path, workdir: Path
) -> None:
    source = write_sharded(tmp_path / "model")
    target = workdir / "out"
    command = ["patch", "-m", source, "-o", "out"]
    moment = num_whole = num_left = 0
    while True:
        moment += 1
        outcome = fork_server.run(command, cwd=workdir, kill_at=moment)
        if not outcome.was_killed:
            break
        num_left += any(path != target for path in workdir.iterdir())
        if target.exists():
            num_whole += 1
            assert is_whole(target, source)
            shutil.rmtree(target)
    assert outcome.returncode == 0, outcome.stderr
    # Every file is opened, the folder made and moved.
    assert moment > 12
    assert num_left > 5
    # The run that was not killed removed what all others had left.
    assert [path.name for path in workdir.iterdir()] == ["out"]
    assert is_whole(target, source)


@pytest.mark.slow
def test_killed_while_overwriting_it_leaves_the_old_folder_the_new_one_or_none(
    fork_server: ForkServer, tiny_llama_folder: Path, workdir: Path
) -> None:
    target = workdir / "out"
    command = ["patch", "-m", tiny_llama_folder, "-o", "out", "--overwrite", "--factor"]
    assert fork_server.run([*command, 2], cwd=workdir).returncode == 0
    old = contents(target)
    seen = set()
    # From the moment that the old folder is moved away.
    for moment in range(1, 40):
        outcome = fork_server.run([*command, 4], cwd=workdir, kill_at=moment, kill_where=r"out$|replaced")
        if not outcome.was_killed:
            break
        if not target.exists():
            seen.add("none")
        elif contents(target) == old:
            seen.add("old")
        else:
            seen.add("new")
            assert is_whole(target, tiny_llama_folder)
        shutil.rmtree(target, ignore_errors=True)
        assert fork_server.run([*command, 2], cwd=workdir).returncode == 0
        assert [path.name for path in workdir.iterdir()] == ["out"]
        old = contents(target)
    assert outcome.returncode == 0, outcome.stderr
    assert seen >= {"old", "new"}


@pytest.mark.slow
def test_weights_pass_without_being_loaded(fork_server: ForkServer, tmp_path: Path, workdir: Path) -> None:
    source = tmp_path / "model"
    num_shards, rows = 3, 200_000
    fields = {"hidden_size": 128, "vocab_size": rows, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = {
        "model_type": "llama",
        "max_position_embeddings": 512,
        "intermediate_size": rows // 2,
        "architectures": ["LlamaForCausalLM"],
    }
    source.mkdir()
    (source / "config.json").write_text(json.dumps(fields | config))
    weight_map = {}
    for shard in range(num_shards):
        name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        save_file({f"weight{shard}": torch.rand(rows, 128)}, source / name)
        weight_map[f"weight{shard}"] = name
    (source / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    size_mib = sum(path.stat().st_size for path in source.glob("*.safetensors")) / 2**20
    assert size_mib > 290

    command = ["patch", "-m", source, "-o", "out"]
    dry = fork_server.run([*command, "--dry-run"], cwd=workdir)
    real = fork_server.run(command, cwd=workdir)
    assert (dry.returncode, real.returncode) == (0, 0), real.stderr
    assert real.peak_mib < dry.peak_mib + 64
    for path in source.glob("*.safetensors"):
        assert (workdir / "out" / path.name).read_bytes() == path.read_bytes()
