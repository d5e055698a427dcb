"""Models come back from disk as they were meant: plain, ours, or released, with their method and its reverse."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import PreTrainedTokenizerBase as Tokenizer

from eabf_cli.core.checkpoint import load_model, load_tokenizer, stored_dtype
from eabf_cli.core.devices import choose_device, torch_dtype
from eabf_cli.core.errors import (
    AlreadyScaledError,
    CheckpointError,
    EabfError,
    InvalidConfigError,
    UnsupportedModelError,
)
from eabf_cli.core.methods import METHODS
from eabf_cli.core.patching import apply_eabf, apply_method, describe_patch, remove_method
from eabf_cli.core.scaling_config import RopeScalingConfig
from eabf_cli.core.sources import find_model
from tests.reference import Extension, reference_forward
from tests.scalings import scaling_for
from tests.tiny_llama import TARGET, WINDOW, edit_config, logits, read_config, tiny_llama, token_ids

ROPE_FIELDS = ("rope_theta", "rope_parameters", "rope_scaling")
RELEASED_FORMS: dict[str, dict[str, Any]] = {
    "as released": {"rope_scaling": {"type": "eabf", "factor": 4.0}},
    "whole factor": {"rope_scaling": {"type": "eabf", "factor": 4}},
    "saved again by 5.x": {
        "rope_parameters": {"type": "eabf", "rope_type": "eabf", "factor": 4.0, "rope_theta": 10_000.0}
    },
}


@pytest.fixture
def released(llama_copy: Path) -> Path:
    return edit_config(llama_copy, drop=ROPE_FIELDS, **RELEASED_FORMS["as released"])


@pytest.fixture(scope="module")
def plain(tiny_llama_folder: Path) -> torch.Tensor:
    """Logits of the model without any method."""
    return logits(AutoModelForCausalLM.from_pretrained(tiny_llama_folder))


def reference(weights: dict[str, torch.Tensor], unscaled_layers: tuple[int, ...]) -> torch.Tensor:
    """What EABF by the formulas makes of the tiny model, in float64."""
    extension = Extension(method="eabf", factor=4.0, window=WINDOW, unscaled_layers=unscaled_layers)
    output = reference_forward(tiny_llama().config, weights, token_ids()[0].tolist(), extension)
    return torch.from_numpy(np.asarray(output.logits))[None].float()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the logits' range."""
    assert (actual - expected).abs().max() < tolerance * (expected.max() - expected.min())


def error_of(call: Callable[[], object], kind: type[EabfError] = EabfError) -> str:
    with pytest.raises(kind) as error:
        call()
    message = str(error.value)
    assert len(message.splitlines()) <= 3
    return message


# ---- Plain models --------------------------------------------------------------------------------


def test_a_plain_model_is_loaded_as_transformers_loads_it(tiny_llama_folder: Path, plain: torch.Tensor) -> None:
    model = load_model(tiny_llama_folder)
    assert torch.equal(logits(model), plain)
    assert describe_patch(model) is None
    assert not model.training


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float32, "auto", torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float32, "float16", torch.float16),
    ],
)
def test_the_dtype_is_the_stored_one_or_the_one_asked_for(
    stored: torch.dtype, asked: str, expected: torch.dtype, tmp_path: Path
) -> None:
    tiny_llama(dtype=stored).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=asked)
    assert {weight.dtype for weight in model.parameters()} == {expected}
    # Rotary frequencies in a lower precision would be wrong at long distance.
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize(
    "method", [RopeScalingConfig(), {"type": "eabf", "factor": 4}, {"rope_type": "yarn", "factor": 2}]
)
def test_a_method_can_be_applied_on_the_way(method: Any, tiny_llama_folder: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    apply_method(expected, method if isinstance(method, RopeScalingConfig) else RopeScalingConfig.from_dict(method))
    assert torch.equal(logits(load_model(tiny_llama_folder, rope_scaling=method)), logits(expected))


def test_loading_registers_nothing_and_runs_no_code_of_a_checkpoint(
    tiny_llama_folder: Path, tmp_path: Path, plain: torch.Tensor
) -> None:
    model = load_model(tiny_llama_folder, rope_scaling=RopeScalingConfig())
    expected = logits(model)
    model.save_pretrained(tmp_path / "scaled")
    (tmp_path / "scaled" / "modeling_eabf.py").write_text("raise SystemExit('code of the checkpoint was run')\n")
    assert torch.equal(logits(load_model(tmp_path / "scaled")), expected)
    with pytest.raises(ValueError, match="eabf_llama"):
        AutoConfig.for_model("eabf_llama")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tiny_llama_folder)), plain)


# ---- Our checkpoints -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_model_loads_and_saves_again_the_same(
    method: str, tiny_llama_folder: Path, tmp_path: Path, plain: torch.Tensor
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    apply_method(model, scaling_for(method))
    scaling, expected = describe_patch(model), logits(model)
    assert not torch.equal(expected, plain)
    configs = []
    for number in (1, 2, 3):
        model.save_pretrained(tmp_path / str(number))
        configs.append(read_config(tmp_path / str(number)))
        model = load_model(tmp_path / str(number))
        assert describe_patch(model) == scaling
        assert torch.equal(logits(model), expected)
    assert configs[0] == configs[1] == configs[2]
    names = [sorted(path.name for path in (tmp_path / str(number)).iterdir()) for number in (1, 3)]
    assert names[0] == names[1]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_comes_off_a_loaded_checkpoint_bit_for_bit(
    method: str, tiny_llama_folder: Path, tmp_path: Path, plain: torch.Tensor
) -> None:
    saved = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    apply_method(saved, scaling_for(method))
    saved.save_pretrained(tmp_path / "scaled")

    model = load_model(tmp_path / "scaled")
    assert remove_method(model).method == method
    assert describe_patch(model) is None
    assert torch.equal(logits(model), plain)
    assert model.config.max_position_embeddings == WINDOW

    model.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "modeling_eabf.py").exists()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), plain)


def test_a_scaled_checkpoint_is_not_scaled_again(tiny_llama_folder: Path, tmp_path: Path) -> None:
    load_model(tiny_llama_folder, rope_scaling=scaling_for("yarn")).save_pretrained(tmp_path)
    for method in ("eabf", "yarn"):
        with pytest.raises(AlreadyScaledError, match=r"yarn|already"):
            load_model(tmp_path, rope_scaling=scaling_for(method))


def test_exempt_layers_can_be_chosen_when_loading(tiny_llama_folder: Path, tmp_path: Path) -> None:
    load_model(tiny_llama_folder, rope_scaling=scaling_for("eabf")).save_pretrained(tmp_path)
    model = load_model(tmp_path, unscaled_layers=(2,))
    expected = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    apply_eabf(expected, unscaled_layers=(2,))
    assert torch.equal(logits(model), logits(expected))
    message = error_of(lambda: load_model(tiny_llama_folder, unscaled_layers=(2,)), InvalidConfigError)
    assert "unscaled_layers" in message


# ---- Released checkpoints ------------------------------------------------------------------------


@pytest.mark.parametrize("form", RELEASED_FORMS)
def test_a_released_checkpoint_runs_as_its_code_did_and_says_so(
    form: str, llama_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = AutoModelForCausalLM.from_pretrained(llama_copy).state_dict()
    edit_config(llama_copy, drop=ROPE_FIELDS, **RELEASED_FORMS[form])
    with caplog.at_level(logging.WARNING, logger="eabf_cli"):
        model = load_model(llama_copy)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("eabf_cli")]
    assert [("released" in line, "--unscaled-layers 0,1" in line, len(line.splitlines())) for line in said] == [
        (True, True, 1)
    ]
    scaling = describe_patch(model)
    assert scaling == RopeScalingConfig(
        factor=4,
        original_max_position_embeddings=WINDOW,
        rope_theta=500_000,
        original_rope_theta=10_000,
        unscaled_layers=(),
    )
    assert_close(logits(model), reference(weights, ()))


def test_a_released_checkpoint_can_be_read_as_the_paper_has_it(released: Path) -> None:
    model = load_model(released, unscaled_layers=(0, 1))
    weights = model.state_dict()
    assert_close(logits(model), reference(weights, (0, 1)))
    assert (logits(model) - reference(weights, ())).abs().max() > 1e-2


def test_a_released_checkpoint_is_saved_in_our_form(released: Path, tmp_path: Path) -> None:
    model = load_model(released)
    model.save_pretrained(tmp_path / "saved")
    config = read_config(tmp_path / "saved")
    assert config["model_type"] == "eabf_llama"
    assert config["rope_theta"] == 500_000.0
    assert config["max_position_embeddings"] == TARGET
    assert config["rope_scaling"]["unscaled_layers"] == []
    assert config["rope_scaling"]["original_max_position_embeddings"] == WINDOW
    assert torch.equal(logits(load_model(tmp_path / "saved")), logits(model))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert_close(logits(stock), logits(model))


def test_the_method_comes_off_a_released_checkpoint(released: Path, plain: torch.Tensor) -> None:
    model = load_model(released)
    remove_method(model)
    assert torch.equal(logits(model), plain)


# ---- What is refused -----------------------------------------------------------------------------


def test_weights_that_are_missing_are_never_made_up(llama_copy: Path) -> None:
    path = llama_copy / "model.safetensors"
    weights = load_file(path)
    missing = "model.layers.1.self_attn.q_proj.weight"
    del weights[missing]
    save_file(weights, path, metadata={"format": "pt"})
    assert missing in error_of(lambda: load_model(llama_copy), CheckpointError)


def test_weights_of_another_shape_are_refused(llama_copy: Path) -> None:
    edit_config(llama_copy, intermediate_size=64)
    message = error_of(lambda: load_model(llama_copy), CheckpointError)
    assert [word for word in ("9 weights", "mlp", "(32, 48)", "(32, 64)") if word not in message] == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "llamma"}, ["llamma", "llama"]),
        ({"model_type": None}, ["model_type", "not a transformers model"]),
        ({"hidden_size": "many"}, ["config.json", "llama", "hidden_size", "many"]),
        ({"rope_scaling": {"type": "eabf", "factor": 0.5}}, ["factor", "0.5"]),
        ({"rope_scaling": {"type": "eabf", "factor": 4, "format": 9}, "rope_theta": 5e5}, ["format", "upgrade"]),
        ({"eabf_scaling": {"type": "yarn"}}, ["no factor"]),
    ],
)
def test_a_damaged_config_is_one_clear_error(fields: dict[str, Any], said: list[str], llama_copy: Path) -> None:
    edit_config(llama_copy, **fields)
    message = error_of(lambda: load_model(llama_copy))
    assert [word for word in said if word not in message] == []


CODE_FIELDS: dict[str, Any] = {
    "auto_map": {"AutoModelForCausalLM": "somebody/model--modeling.Evil", "AutoConfig": "modeling.Evil"},
    "attn_implementation": "somebody/kernel",
    "_attn_implementation": "somebody/kernel",
    "experts_implementation": "somebody/kernel",
    "transformers_weights": "pytorch_model.bin",
    "distributed_config": {"tp_size": 2},
}


@pytest.mark.parametrize("method", [None, "eabf", "yarn"])
@pytest.mark.parametrize("field", CODE_FIELDS)
def test_a_field_that_names_other_code_or_weights_changes_nothing(
    field: str, method: str | None, llama_copy: Path, tmp_path: Path
) -> None:
    folder = llama_copy
    if method is not None:
        folder = tmp_path / "scaled"
        load_model(llama_copy, device="cpu", rope_scaling=scaling_for(method)).save_pretrained(folder)
    expected = logits(load_model(folder, device="cpu"))
    edit_config(folder, **{field: CODE_FIELDS[field]})
    model = load_model(folder, device="cpu")
    assert torch.equal(logits(model), expected)
    if method is not None:
        model.save_pretrained(tmp_path / "again")
        assert read_config(tmp_path / "again").get(field) != CODE_FIELDS[field]


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "gptq", 3, None])
def test_weights_that_are_stored_quantised_are_refused_but_for_bitsandbytes(method: Any, llama_copy: Path) -> None:
    edit_config(llama_copy, quantization_config={"quant_method": method})
    with pytest.raises(UnsupportedModelError, match="quantised"):
        load_model(llama_copy)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"vocab_size": 10**12}, "does not belong to them"),
        ({"hidden_size": 2**20, "head_dim": 2**18}, "does not belong to them"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0"),
        ({"num_attention_heads": 0}, "config"),
        ({"to_dict": 1}, "'to_dict'"),
        ({"from_pretrained": "x"}, "'from_pretrained'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, "rope_theta -1.0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta 0"),
    ],
)
def test_a_config_that_would_take_all_time_or_memory_is_refused_first(
    fields: dict[str, Any], said: str, llama_copy: Path
) -> None:
    edit_config(llama_copy, drop=("rope_theta", "rope_scaling"), **fields)
    with pytest.raises(CheckpointError) as error:
        load_model(llama_copy)
    assert said in str(error.value)


@pytest.mark.parametrize("dtype", ["int8", "load", "float8_e4m3fn", ["float32"], 32])
def test_a_stored_dtype_that_is_none_for_weights_is_refused(dtype: Any, llama_copy: Path) -> None:
    edit_config(llama_copy, dtype=dtype)
    with pytest.raises(CheckpointError, match="dtype"):
        stored_dtype(find_model(llama_copy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_stored_dtype_it_is_that_of_the_weights(dtype: torch.dtype, llama_copy: Path) -> None:
    path = llama_copy / "model.safetensors"
    save_file({name: weight.to(dtype) for name, weight in load_file(path).items()}, path, metadata={"format": "pt"})
    edit_config(llama_copy, drop=("dtype", "torch_dtype"))
    assert stored_dtype(find_model(llama_copy)) == load_model(llama_copy, device="cpu").dtype == dtype


def test_an_unknown_dtype_or_device_is_refused_with_the_known_ones() -> None:
    assert "float32" in error_of(lambda: torch_dtype("float8"), InvalidConfigError)
    for device in ("gpu", "cuda:99", "xpu", "meta", ""):
        assert "cpu" in error_of(lambda device=device: choose_device(device), InvalidConfigError)  # type: ignore[misc]
    assert choose_device("cpu") == torch.device("cpu")


# ---- Tokenizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["eabf", "native", "yarn"])
def test_a_scaled_checkpoint_s_tokenizer_needs_no_code(method: str, tiny_llama_folder: Path, tmp_path: Path) -> None:
    load_model(tiny_llama_folder, rope_scaling=scaling_for(method)).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_llama_folder / name, tmp_path / name)
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, Tokenizer)
    text = "There is an important info hidden inside."
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_a_tokenizer_that_is_not_there_or_damaged_is_one_clear_error(llama_copy: Path) -> None:
    (llama_copy / "tokenizer.json").write_text(json.dumps({"model": 1}))
    assert "tokenizer" in error_of(lambda: load_tokenizer(llama_copy), CheckpointError)
    (llama_copy / "tokenizer.json").unlink()
    assert "no tokenizer files" in error_of(lambda: load_tokenizer(llama_copy), CheckpointError)
