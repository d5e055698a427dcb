"""Checkpoints cross between transformers 5 and 4.57, in both directions.

The other interpreter, one with torch and transformers 4.57, is named by EABF_TRANSFORMERS_457_PYTHON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from eabf_cli.modeling_eabf import FAMILIES
from tests.transformers_457 import needs_457, run_457

pytestmark = needs_457
WINDOW = 16
ONLY_ROPE_PARAMETERS = "llama-rope-parameters"

# In each folder: loads 5/ with the code beside it, records its outputs, saves it to 457/. Last, what comes of
# loading the first one without its code.
SCRIPT_457 = """
import sys
import torch, transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

assert transformers.__version__.startswith("4.57."), transformers.__version__
for folder in sys.argv[1:]:
    tensors = load_file(f"{folder}/inputs.safetensors")
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/5", trust_remote_code=True).eval()
    with torch.no_grad():
        logits = model(tensors["input_ids"]).logits
        padded = model(tensors["padded_ids"], attention_mask=tensors["padded_mask"]).logits
        generated = {
            cache: model.generate(tensors["input_ids"][:, :12], max_new_tokens=12, do_sample=False,
                                  cache_implementation=cache, pad_token_id=0)
            for cache in ("dynamic", "static")
        }
    model.save_pretrained(f"{folder}/457")
    save_file({"logits": logits, "padded": padded.contiguous(), **generated}, f"{folder}/outputs.safetensors")

for load in (AutoModelForCausalLM, LlamaForCausalLM):
    try:
        load.from_pretrained(f"{sys.argv[1]}/5")
    except Exception as error:
        print(f"{load.__name__}: {type(error).__name__}: {error}")
    else:
        print(f"{load.__name__}: loaded")
"""


def write_checkpoint(family: str, folder: Path) -> Any:
    """Saves a random model of `family` in `folder`, as transformers 5 does; returns it."""
    torch.manual_seed(0)
    scaling = {"rope_type": "eabf", "factor": 4.0, "original_max_position_embeddings": WINDOW}
    config = FAMILIES[family].config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=4 * WINDOW,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=family in ("llama", "qwen3"),  # against the family's default
        rope_theta=500_000.0,
        rope_scaling={**scaling, "unscaled_layers": [0, 1], "original_rope_theta": 10_000.0, "format": 1},
        **({"sliding_window": None} if family == "mistral" else {}),
    )
    model = FAMILIES[family].causal_lm(config).eval()
    model.save_pretrained(folder)
    return model


def keep_only_rope_parameters(config_file: Path) -> None:
    """Rewrites a config as a plain save by transformers 5 would have it."""
    fields = json.loads(config_file.read_text())
    fields["rope_parameters"] = {**fields.pop("rope_scaling"), "rope_theta": fields.pop("rope_theta")}
    config_file.write_text(json.dumps(fields))


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    input_ids = torch.randint(3, 64, (1, 40), generator=torch.Generator().manual_seed(1))
    pads = torch.zeros(1, 7, dtype=torch.long)
    return {
        "input_ids": input_ids,
        "padded_ids": torch.cat([pads, input_ids], dim=1),
        "padded_mask": torch.cat([pads, torch.ones_like(input_ids)], dim=1),
    }


@pytest.fixture(scope="module")
def crossed(tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """name -> (the model written by 5.x, its folder after 4.57 has read and saved it); "" -> 4.57's last words."""
    root = tmp_path_factory.mktemp("crossed")
    models = {}
    for name in (*FAMILIES, ONLY_ROPE_PARAMETERS):
        (root / name).mkdir()
        models[name] = write_checkpoint(name.partition("-")[0], root / name / "5")
        save_file(inputs, root / name / "inputs.safetensors")
    keep_only_rope_parameters(root / ONLY_ROPE_PARAMETERS / "5/config.json")

    said = run_457(SCRIPT_457, root, *(str(root / name) for name in models))
    return {"": said, **{name: (model, root / name) for name, model in models.items()}}


@pytest.fixture(autouse=True)
def _modules_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path_factory.getbasetemp() / "hf_modules_457"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(cache))
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.parametrize("name", [*FAMILIES, ONLY_ROPE_PARAMETERS])
@torch.no_grad()
def test_457_computes_the_same(name: str, crossed: dict[str, Any], inputs: dict[str, torch.Tensor]) -> None:
    model, folder = crossed[name]
    outputs = load_file(folder / "outputs.safetensors")
    expected = model(inputs["input_ids"]).logits
    torch.testing.assert_close(outputs["logits"], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs["padded"][:, 7:], expected, atol=1e-4, rtol=1e-5)
    generated = model.generate(inputs["input_ids"][:, :12], max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(outputs["dynamic"], generated)
    assert torch.equal(outputs["static"], generated)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_457_saves_reads_back_equal(family: str, crossed: dict[str, Any], inputs: dict[str, torch.Tensor]) -> None:
    model, folder = crossed[family]
    before, after = (json.loads((folder / name / "config.json").read_text()) for name in ("5", "457"))
    shared = ("model_type", "architectures", "auto_map", "rope_theta", "rope_scaling", "max_position_embeddings")
    assert {key: after[key] for key in shared} == {key: before[key] for key in shared}
    assert (folder / "457/modeling_eabf.py").read_bytes() == (folder / "5/modeling_eabf.py").read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(folder / "457", trust_remote_code=True)
    assert torch.equal(loaded(inputs["input_ids"]).logits, model(inputs["input_ids"]).logits)


def test_457_completes_a_config_that_has_only_rope_parameters(crossed: dict[str, Any]) -> None:
    _, folder = crossed[ONLY_ROPE_PARAMETERS]
    written = json.loads((folder / "457/config.json").read_text())
    assert written["rope_theta"] == 500_000.0
    assert written["rope_scaling"]["rope_type"] == "eabf"
    assert "rope_parameters" not in written


def test_457_fails_loudly_without_the_code(crossed: dict[str, Any]) -> None:
    said = crossed[""].strip()
    assert "AutoModelForCausalLM: ValueError: " in said
    assert "trust_remote_code=True" in said
    assert said.splitlines()[-1] == "LlamaForCausalLM: KeyError: 'eabf'"
