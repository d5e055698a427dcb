"""A checkpoint passes only if a process without this package computes from it what its source computes here."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from eabf_cli.core.checkpoint import load_model
from eabf_cli.core.errors import CheckpointError, VerificationError
from eabf_cli.core.export import clean_reload, verification
from eabf_cli.core.export.clean_reload import measure_logit_scale
from eabf_cli.core.export.compat import compat_scaling
from eabf_cli.core.export.rows import choose_rows
from eabf_cli.core.export.verification import Verification, verify_existing, verify_export
from eabf_cli.core.export.writing import list_files
from eabf_cli.core.method_request import MethodRequest
from eabf_cli.core.patch_checkpoint import PatchConfig, patch_checkpoint
from eabf_cli.core.patching import apply_method
from eabf_cli.core.resolution import resolve_scaling
from eabf_cli.core.saving import modeling_source
from eabf_cli.core.scaling_config import RopeScalingConfig
from eabf_cli.core.sources import SINGLE_FILE, find_model
from tests.architectures import ARCHITECTURE_CONFIGS, build_tiny_model
from tests.architectures import WINDOW as ARCHITECTURE_WINDOW
from tests.scalings import SCALED_METHODS, scaling_for
from tests.tiny_llama import TARGET, WINDOW, edit_config, read_config

MODELING_FILE = "modeling_eabf.py"


def patched(model: Path, output: Path, method: str = "eabf") -> Path:
    patch_checkpoint(PatchConfig(model=str(model), output=output, request=MethodRequest(method=method)))
    return output


@pytest.fixture(scope="module")
def source(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with EABF, as `eabf patch` writes it; not to be changed."""
    return patched(tiny_llama_folder, tmp_path_factory.mktemp("source") / "eabf")


@pytest.fixture
def export(source: Path, tmp_path: Path) -> Path:
    """The same in another folder, to be damaged."""
    return Path(shutil.copytree(source, tmp_path / "export"))


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the clean process would do is done in this one, which saves two seconds."""

    def run(room: Path) -> None:
        clean_reload._reload(json.loads((room / "request.json").read_text()))

    monkeypatch.setattr(verification, "_run_clean", run)


def verify(folder: Path, source: Path, **options: Any) -> Verification:
    return verify_export(folder, find_model(source), device="cpu", **options)


def failure_of(folder: Path, source: Path, **options: Any) -> str:
    with pytest.raises(VerificationError) as error:
        verify(folder, source, **options)
    message = str(error.value)
    assert str(folder) in message
    assert len(message.splitlines()) == 1
    return message


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_faithful_checkpoint_passes_in_a_process_of_its_own(source: Path, export: Path) -> None:
    before = contents(export)
    found = verify(export, source)
    assert found.max_logit_difference <= found.tolerance < 1e-3 * found.max_logit
    assert found.compute_dtype == "float32"
    assert (found.lengths, found.spread_to) == ((WINDOW // 2, 2 * WINDOW, TARGET), TARGET - 1)
    # METHOD.md section 1: 1 up to c, then ln i / ln c.
    expected = {position: math.log(position) / math.log(WINDOW) for position in (WINDOW, 2 * WINDOW, TARGET)}
    assert found.logit_scale == pytest.approx(expected, rel=1e-5)
    assert set(found.checks) == {
        "method", "max_position_embeddings", "weights", "frequencies", "logit_scale", "tokenizer", "logits",
    }  # fmt: skip
    assert json.loads(json.dumps(found.to_dict()))["logit_scale"][str(TARGET)] == pytest.approx(4 / 3, rel=1e-5)
    assert contents(export) == before


def set_rope_theta(folder: Path) -> None:
    edit_config(folder, rope_theta=10_000.0)


def lose_the_scale(folder: Path) -> None:
    """What a stock save of the patched model would leave."""
    fields = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    edit_config(folder, drop=("auto_map", "rope_scaling"), **fields)


def scale_other_layers(folder: Path) -> None:
    edit_config(folder, rope_scaling=read_config(folder)["rope_scaling"] | {"unscaled_layers": [0, 2]})


def set_original_window(folder: Path) -> None:
    scaling = read_config(folder)["rope_scaling"] | {"original_max_position_embeddings": WINDOW // 2}
    edit_config(folder, rope_scaling=scaling)


def set_window(folder: Path) -> None:
    edit_config(folder, max_position_embeddings=WINDOW)


def change_a_weight(folder: Path) -> None:
    weights = load_file(folder / SINGLE_FILE)
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][3, 5] = torch.nextafter(weights[name][3, 5], torch.tensor(torch.inf))
    save_file(weights, folder / SINGLE_FILE, metadata={"format": "pt"})


def swap_two_merges(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    merges = tokenizer["model"]["merges"]
    merges[0], merges[-1] = merges[-1], merges[0]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def swap_two_tokens(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=lambda token: vocabulary[token])[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def shorten_the_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": WINDOW}))


def drop_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def modify_the_modeling_file(folder: Path) -> None:
    with (folder / MODELING_FILE).open("a") as file:
        file.write("\nraise SystemExit('it was run')\n")


def point_to_other_code(folder: Path) -> None:
    auto_map = read_config(folder)["auto_map"] | {"AutoConfig": "somebody/model--other.Config"}
    edit_config(folder, auto_map=auto_map)


def drop_the_modeling_file(folder: Path) -> None:
    (folder / MODELING_FILE).unlink()


def fetch_a_kernel(folder: Path) -> None:
    edit_config(folder, attn_implementation="somebody/kernel")


def bring_tokenizer_code(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    auto_map = {"AutoTokenizer": ["tokenization_other.Tokenizer", None]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))


DAMAGES: dict[Callable[[Path], None], str] = {
    set_rope_theta: "its rope_theta is 10,000, its source has 2,450,000",
    lose_the_scale: "it carries no method, its source the method 'eabf'",
    scale_other_layers: "its unscaled_layers is [0, 2], its source has [0, 1]",
    set_original_window: "its original_max_position_embeddings is 32, its source has 64",
    set_window: "its max_position_embeddings is 64, 256 is right",
    change_a_weight: "1 of its 29 weights are not those of its source (first: model.layers.1.mlp.up_proj.weight)",
    swap_two_merges: "the token ids of its tokenizer",
    swap_two_tokens: "the vocabulary of its tokenizer",
    shorten_the_tokenizer: "the model_max_length of its tokenizer is not that of its source: 64 instead of 256",
    drop_the_tokenizer: "it has no tokenizer, unlike its source",
    modify_the_modeling_file: "modeling_eabf.py differs from this version's, so it was not run",
    point_to_other_code: "its auto_map names other code than modeling_eabf.py ('somebody/model--other.Config')",
    drop_the_modeling_file: "there is no modeling_eabf.py",
    fetch_a_kernel: "attn_implementation",
    bring_tokenizer_code: "its tokenizer brings code of its own, which was not run",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_differs_from_the_source_is_named(
    damage: Callable[[Path], None], source: Path, export: Path, in_process: None
) -> None:
    damage(export)
    assert DAMAGES[damage] in failure_of(export, source)


# What goes wrong when the configuration is right, and only its reader errs.
READERS = {
    "rope_theta": (
        "super().__init__(rope_theta=rope_theta, **kwargs)",
        "super().__init__(rope_theta=rope_theta * 1.001, **kwargs)",
        "its rotary frequencies differ",
    ),
    "layers": (
        'index not in scaling["unscaled_layers"]',
        'index in scaling["unscaled_layers"]',
        "its layer 0 multiplies the attention logits at position 128 by 1.1667, 1.0000 is right",
    ),
    "scale": (
        "query = query * scale[:, None, :, None].to(query.dtype)",
        "query = query * 1.0",
        "its layer 2 multiplies the attention logits at position 128 by 1.0000, 1.1667 is right",
    ),
    "attention": (
        "scaling=self.scaling,",
        "scaling=1.001 * self.scaling,",
        "its logits differ from its source's by up to",
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_a_reader_that_errs_is_found_by_what_it_computes(
    name: str, source: Path, export: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong, said = READERS[name]
    modified = modeling_source().decode().replace(right, wrong)
    assert modified.count(wrong) == 1
    (export / MODELING_FILE).write_text(modified)
    monkeypatch.setattr(verification, "modeling_source", modified.encode)
    assert said in failure_of(export, source)


def test_a_checkpoint_that_needs_this_package_fails(
    source: Path, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modified = b"import eabf_cli.core.errors\n" + modeling_source()
    (export / MODELING_FILE).write_bytes(modified)
    monkeypatch.setattr(verification, "modeling_source", lambda: modified)
    message = failure_of(export, source)
    assert "a process with torch and transformers alone cannot load it" in message
    assert "eabf_cli" in message


def test_weights_are_compared_after_one_rounding_to_the_checkpoint_s_dtype(
    source: Path, export: Path, in_process: None
) -> None:
    rounded = {name: weight.to(torch.bfloat16) for name, weight in load_file(export / SINGLE_FILE).items()}
    save_file(rounded, export / SINGLE_FILE, metadata={"format": "pt"})
    edit_config(export, dtype="bfloat16")
    found = verify(export, source)
    assert (found.compute_dtype, found.max_logit_difference <= found.tolerance) == ("float32", True)


def test_too_large_for_float32_is_compared_in_the_stored_dtype(
    source: Path, export: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded = {name: weight.to(torch.bfloat16) for name, weight in load_file(export / SINGLE_FILE).items()}
    save_file(rounded, export / SINGLE_FILE, metadata={"format": "pt"})
    edit_config(export, dtype="bfloat16")
    monkeypatch.setattr("eabf_cli.core.export.reference.available_memory", lambda _: 0)
    found = verify(export, export)
    assert found.compute_dtype == "bfloat16"
    assert found.max_logit_difference <= found.tolerance
    assert found.logit_scale[TARGET] == pytest.approx(4 / 3, rel=0.01)
    assert "computed in bfloat16" in found.notes[0]


@pytest.mark.parametrize("method", ["abf", "native"])
def test_a_compatible_form_is_held_to_its_own_method(
    method: str, source: Path, tiny_llama_folder: Path, tmp_path: Path, in_process: None
) -> None:
    from eabf_cli.core.checkpoint import read_config as read_source_config

    carried = read_source_config(find_model(source)).resolution
    assert carried is not None
    scaling = compat_scaling(carried.scaling, method, "llama")
    folder = patched(tiny_llama_folder, tmp_path / method, method)
    found = verify(folder, source, scaling=scaling)
    expected = {"abf": 1.0, "native": 1.0 + math.log(4) / math.log(WINDOW)}[method]
    assert found.logit_scale[TARGET] == pytest.approx(expected, rel=1e-5)
    assert f"it carries the method {method!r}" in failure_of(folder, tiny_llama_folder)
    assert "its method is" in failure_of(folder, source)


@pytest.mark.parametrize("method", ["linear", "yarn", "dynamic"])
def test_what_transformers_scales_itself_passes_without_code(
    method: str, tiny_llama_folder: Path, tmp_path: Path, in_process: None
) -> None:
    folder = patched(tiny_llama_folder, tmp_path / method, method)
    assert not (folder / MODELING_FILE).exists()
    found = verify(folder, folder)
    assert found.max_logit_difference <= found.tolerance


def test_a_plain_model_is_held_to_no_scale(tiny_llama_folder: Path, in_process: None) -> None:
    found = verify_existing(str(tiny_llama_folder), device="cpu")
    assert found["verification"]["checks"]["method"] == "none, as its source"
    assert found["verification"]["logit_scale"] == {str(WINDOW): pytest.approx(1.0, abs=1e-5)}


# --- --verify --------------------------------------------------------------------------------------------


def record_files(folder: Path) -> None:
    path = folder / "eabf_run.json"
    files = [entry for entry in list_files(folder) if entry["name"] != "eabf_run.json"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": files}))


def test_an_existing_folder_is_verified_against_our_own_load_and_its_record(export: Path, in_process: None) -> None:
    record_files(export)
    before = contents(export)
    found = verify_existing(str(export), device="cpu")
    assert found["verified"] == found["verification"]["max_logit_difference"] <= found["verification"]["tolerance"]
    assert (found["model"], found["revision"]) == (str(export), None)
    assert found["verification"]["checks"]["files"] == f"{len(before) - 1} as exported (SHA-256)"
    assert contents(export) == before


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (change_a_weight, "its file model.safetensors is not the one that was exported"),
        (set_window, "its file config.json is not the one that was exported"),
        (drop_the_modeling_file, "its file modeling_eabf.py is missing"),
    ],
)
def test_a_file_that_is_not_the_recorded_one_fails(damage: Callable[[Path], None], said: str, export: Path) -> None:
    record_files(export)
    damage(export)
    with pytest.raises(VerificationError, match=said):
        verify_existing(str(export), device="cpu")


@pytest.mark.parametrize("files", [[{"name": "../config.json", "sha256": ""}], [{"name": 3}], ["config.json"]])
def test_a_damaged_record_is_a_failure(files: list[Any], export: Path) -> None:
    (export / "eabf_run.json").write_text(json.dumps({"files": files}))
    with pytest.raises(VerificationError, match=r"eabf_run\.json"):
        verify_existing(str(export), device="cpu")


def test_a_foreign_modeling_file_runs_only_if_it_is_trusted(export: Path, in_process: None) -> None:
    (export / MODELING_FILE).write_bytes(modeling_source() + b"\n# read and found harmless\n")
    with pytest.raises(VerificationError, match="--trust-remote-code"):
        verify_existing(str(export), device="cpu")
    assert verify_existing(str(export), device="cpu", trust_remote_code=True)["verified"] < 1e-3


def test_an_adapter_and_a_gguf_file_are_no_checkpoints_to_verify(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match="export it first"):
        verify_existing(str(tmp_path / "model.gguf"))


# --- How it is measured ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SCALED_METHODS)
@pytest.mark.parametrize("name", ["llama", "phi3", "olmo2", "gemma3_text", "smollm3", "qwen3_moe"])
def test_the_measured_scale_is_the_formula_s_in_scaled_layers_and_1_in_others(name: str, method: str) -> None:
    model = build_tiny_model(name)
    positions = [0, ARCHITECTURE_WINDOW - 1, 2 * ARCHITECTURE_WINDOW - 1, 4 * ARCHITECTURE_WINDOW - 1]
    plain = measure_logit_scale(model, positions)
    torch.testing.assert_close(plain, torch.ones_like(plain), atol=1e-5, rtol=0)
    report = apply_method(model, scaling_for(method))
    factor = {"native": lambda i: 1 + math.log1p((i - 1) // ARCHITECTURE_WINDOW) / math.log(ARCHITECTURE_WINDOW)}.get(
        method, lambda i: max(1.0, math.log(i) / math.log(ARCHITECTURE_WINDOW))
    )
    expected = torch.ones(len(plain), len(positions))
    for layer in report.scaled_layers:
        expected[layer] = torch.tensor([factor(position + 1) for position in positions])
    torch.testing.assert_close(measure_logit_scale(model, positions), expected, atol=1e-5, rtol=1e-5)


def test_measuring_leaves_the_model_as_it_was(source: Path) -> None:
    model = load_model(source, device="cpu")
    input_ids = torch.arange(TARGET)[None]
    with torch.no_grad():
        before = model(input_ids).logits
        measure_logit_scale(model, [5])
        assert torch.equal(model(input_ids).logits, before)


def test_the_spread_row_is_causal_attention_at_the_positions_it_names(tiny_llama_folder: Path) -> None:
    """Left padding gives the same positions to the same tokens."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    rows = {
        "a.input_ids": torch.arange(7, 17)[None],
        "a.position_ids": torch.arange(0, 50, 5)[None],
        "a.keep": torch.arange(10),
    }
    found = clean_reload.compute_logits(model, rows)["a.logits"]
    # One token after the other through a cache: nothing there can look ahead, or take the row for several.
    cache, singles = None, []
    with torch.no_grad():
        for token, position in zip(range(7, 17), range(0, 50, 5), strict=True):
            output = model(
                torch.tensor([[token]]), position_ids=torch.tensor([[position]]), past_key_values=cache, use_cache=True
            )
            cache = output.past_key_values
            singles.append(output.logits[0, -1])
    torch.testing.assert_close(found, torch.stack(singles), atol=1e-4, rtol=1e-4)


def test_rows_that_take_too_long_are_left_out_and_the_spread_row_reaches_the_end() -> None:
    config = ARCHITECTURE_CONFIGS["llama"]()
    rows = choose_rows(config, 7_000_000_000, 4096, 16384, device_type="cpu", seed=0)
    assert rows.lengths == (512,)
    assert rows.spread_to == 16383
    assert "2,048, 4,160, 16,384" in rows.notes[0]
    assert rows.tensors["spread.position_ids"].diff().min() > 0
    everything = choose_rows(config, 1_000_000, 4096, 16384, device_type="cpu", seed=0)
    assert (everything.lengths, everything.notes) == ((2048, 4160, 16384), ())


def test_the_expected_window_of_a_compat_form_is_the_source_s(source: Path) -> None:
    config = AutoModelForCausalLM.from_config(ARCHITECTURE_CONFIGS["llama"]()).config
    scaling = RopeScalingConfig(method="eabf", factor=3.0, rope_theta=70_000.0)
    carried = resolve_scaling(config, scaling).scaling
    for method in ("abf", "native"):
        found = resolve_scaling(config, compat_scaling(carried, method, "llama")).scaling
        assert (found.max_position_embeddings, found.rope_theta) == (96, 70_000.0)
