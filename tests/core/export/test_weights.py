"""Weights that are written shard by shard are those of the model in memory, to the bit, at a shard's memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from eabf_cli.core.adapters import add_adapter
from eabf_cli.core.checkpoint import load_model, read_config
from eabf_cli.core.errors import CheckpointError, InvalidConfigError
from eabf_cli.core.export.weights import WeightsPlan, plan_weights
from eabf_cli.core.finetune.tuning import LoraSettings, load_for_tuning, make_trainable
from eabf_cli.core.patching import apply_method
from eabf_cli.core.sources import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEX_FILE, find_model
from tests.architectures import build_tiny_model
from tests.scalings import scaling_for

LARGE = 10**9
# Tied and untied heads, biases, norms of query and key, fused projections, layers without RoPE, experts.
FAMILIES = ("llama", "llama_biased", "mistral", "qwen3", "smollm3", "granite", "phi3", "gemma2", "olmo2")
EXPERTS = ("mixtral", "qwen3_moe")


def write_model(folder: Path, family: str, dtype: torch.dtype, **overrides: Any) -> Path:
    build_tiny_model(family, dtype=dtype, **overrides).save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@torch.no_grad()
def disturb(model: torch.nn.Module, seed: int = 1) -> None:
    """What training would do: every trained weight moves (B begins at zero)."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))


def write_adapter(folder: Path, base: Path, settings: LoraSettings | None = None, method: str = "abf") -> Path:
    """An adapter as a run writes it, on a base with a method."""
    model = load_for_tuning(base, tuning="lora", device="cpu", mixed_precision=False)
    apply_method(model, scaling_for(method))
    tuned = make_trainable(model, "lora", source=find_model(base), settings=settings or LoraSettings(rank=4))
    disturb(tuned)
    tuned.save_pretrained(folder)
    return folder


def plan(source: Path, dtype: str = "auto") -> WeightsPlan | None:
    found = find_model(source)
    return plan_weights(found, read_config(found).config, dtype)


def write(source: Path, folder: Path, *, dtype: str = "auto", max_shard_bytes: int = LARGE) -> dict[str, Tensor]:
    """Write the weights of a source, and read them back."""
    folder.mkdir()
    weights = plan(source, dtype)
    assert weights is not None
    weights.write(folder, max_shard_bytes)
    return read(folder)


def read(folder: Path) -> dict[str, Tensor]:
    return {name: weight for path in folder.glob("*.safetensors") for name, weight in load_file(path).items()}


def saved(source: Path, folder: Path, dtype: str = "auto") -> dict[str, Tensor]:
    """The weights that the model in memory would be saved with."""
    load_model(source, dtype=dtype, device="cpu").save_pretrained(folder)
    return read(folder)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert set(actual) == set(expected)
    for name, weight in expected.items():
        assert actual[name].dtype == weight.dtype, name
        assert torch.equal(actual[name], weight), name


# ---- Merging -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_by_shards_is_the_merge_in_memory(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", write_model(tmp_path / "base", family, dtype))
    merged = write(adapter, tmp_path / "out")
    assert_same(merged, saved(adapter, tmp_path / "expected"))
    untouched = read(tmp_path / "base")
    assert any(not torch.equal(untouched[name], weight) for name, weight in merged.items())


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # its head is its own; it is the embeddings
def test_trained_embeddings_take_the_place_of_the_base_s(family: str, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", family, torch.bfloat16)
    adapter = write_adapter(tmp_path / "adapter", base, LoraSettings(rank=4, train_embeddings=True))
    merged = write(adapter, tmp_path / "out")
    assert_same(merged, saved(adapter, tmp_path / "expected"))
    assert not torch.equal(merged["model.embed_tokens.weight"], read(base)["model.embed_tokens.weight"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_merged_weight_is_rounded_once(dtype: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", write_model(tmp_path / "base", "llama", torch.bfloat16))
    exact = saved(adapter, tmp_path / "expected", dtype="float32")
    expected = {name: weight.to(getattr(torch, dtype)) for name, weight in exact.items()}
    assert_same(write(adapter, tmp_path / "out", dtype=dtype), expected)


def write_other_adapter(folder: Path, base: Path, **settings: Any) -> Path:
    """An adapter of a form that `eabf finetune` does not make."""
    model = load_for_tuning(base, tuning="lora", device="cpu", mixed_precision=False)
    apply_method(model, scaling_for("abf"))
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], **settings)
    tuned = add_adapter(model, config, find_model(base), seed=0)
    disturb(tuned)
    tuned.save_pretrained(folder)
    return folder


def test_other_scalings_of_the_update_are_peft_s(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "llama", torch.float32)
    settings = {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 3}}
    adapter = write_other_adapter(tmp_path / "adapter", base, **settings)
    assert_same(write(adapter, tmp_path / "out"), saved(adapter, tmp_path / "expected"))


def test_an_update_that_is_no_sum_is_left_to_peft(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "llama", torch.float32)
    assert plan(write_other_adapter(tmp_path / "dora", base, use_dora=True)) is None


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_that_transformers_joins_when_loading_are_copied_as_they_are_stored(
    family: str, tmp_path: Path
) -> None:
    base = write_model(tmp_path / "base", family, torch.bfloat16)
    assert_same(write(base, tmp_path / "out"), read(base))
    adapter = write_adapter(tmp_path / "adapter", base)
    assert_same(write(adapter, tmp_path / "merged"), saved(adapter, tmp_path / "expected"))


# ---- Damaged adapters ----------------------------------------------------------------------------


def damage(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / ADAPTER_WEIGHTS)
    change(weights)
    save_file(weights, folder / ADAPTER_WEIGHTS)


INNER = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weights: weights.pop(INNER), "does not hold what adapter_config.json says"),
        (lambda weights: weights.update(extra=torch.zeros(2)), "does not hold what adapter_config.json says"),
        (lambda weights: weights.update({INNER: torch.zeros(4, 3)}), "was made for another model"),
    ],
)
def test_a_damaged_adapter_is_refused(change: Callable[[Any], object], said: str, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", write_model(tmp_path / "base", "llama", torch.float32))
    damage(adapter, change)
    with pytest.raises(CheckpointError, match=said):
        plan(adapter)


def test_an_adapter_s_configuration_that_is_none_is_refused(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", write_model(tmp_path / "base", "llama", torch.float32))
    settings = json.loads((adapter / ADAPTER_CONFIG).read_text())
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(settings | {"target_modules": ["no_such_layer"]}))
    with pytest.raises(CheckpointError, match="cannot be put on its base model"):
        plan(adapter)


# ---- Copying and converting ----------------------------------------------------------------------


def test_weights_are_copied_to_the_bit_each_in_its_own_dtype(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "llama", torch.bfloat16)
    path = next(path for path in base.glob("*.safetensors") if "model.norm.weight" in load_file(path))
    weights = load_file(path)
    weights["model.norm.weight"] = weights["model.norm.weight"].float() + 1e-5
    save_file(weights, path, metadata={"format": "pt"})
    assert_same(write(base, tmp_path / "out"), read(base))


def test_a_dtype_that_cannot_hold_a_weight_is_refused(tmp_path: Path) -> None:
    model = build_tiny_model("llama")
    model.model.norm.weight.data[3] = 1e6
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(InvalidConfigError, match=r"model\.norm\.weight .* float16 cannot hold: use --dtype bfloat16"):
        write(tmp_path / "base", tmp_path / "out", dtype="float16")


@pytest.mark.parametrize("max_shard_bytes", [30_000, 100_000])
def test_shards_are_of_the_size_asked_for_and_load(max_shard_bytes: int, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "llama", torch.float32)
    weights = write(base, tmp_path / "out", max_shard_bytes=max_shard_bytes)
    assert_same(weights, read(base))
    shards = {path.name: load_file(path) for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(shards) > 1
    for shard in shards.values():
        assert len(shard) == 1 or sum(weight.nbytes for weight in shard.values()) <= max_shard_bytes
    index = json.loads((tmp_path / "out" / INDEX_FILE).read_text())
    assert index["weight_map"] == {name: path for path, shard in shards.items() for name in shard}
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in weights.values())
    (tmp_path / "out" / "config.json").write_bytes((base / "config.json").read_bytes())
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_one_file_has_no_index(tmp_path: Path) -> None:
    write(write_model(tmp_path / "base", "llama", torch.float32), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_a_stored_copy_of_a_tied_weight_is_left_out_and_another_one_stays(tmp_path: Path) -> None:
    base = tmp_path / "base"
    build_tiny_model("gemma2").save_pretrained(base)
    weights = load_file(base / "model.safetensors")
    embeddings = weights["model.embed_tokens.weight"]
    save_file(weights | {"lm_head.weight": embeddings.clone()}, base / "model.safetensors")
    assert_same(write(base, tmp_path / "copy"), weights)
    save_file(weights | {"lm_head.weight": embeddings + 1}, base / "model.safetensors")
    assert_same(write(base, tmp_path / "other"), weights | {"lm_head.weight": embeddings + 1})


def test_stored_frequencies_of_the_old_base_are_left_out(tmp_path: Path) -> None:
    base = tmp_path / "base"
    build_tiny_model("llama").save_pretrained(base)
    weights = load_file(base / "model.safetensors")
    stale = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(weights | stale, base / "model.safetensors")
    assert_same(write(base, tmp_path / "out"), weights)


# ---- Memory --------------------------------------------------------------------------------------

MEASURE = """
import json, sys
from pathlib import Path
from eabf_cli.core.checkpoint import read_config
from eabf_cli.core.export.weights import plan_weights
from eabf_cli.core.sources import find_model

def status(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024

source = find_model(sys.argv[1])
plan = plan_weights(source, read_config(source).config, "auto")
plan.write(Path(sys.argv[2]), int(sys.argv[3]))  # libraries load their kernels at their first use
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = status("VmRSS")
plan.write(Path(sys.argv[2]), int(sys.argv[3]))
print(json.dumps({"peak_mib": status("VmHWM") - before, "total_mib": plan.num_bytes / 2**20}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is measured through Linux's /proc")
def test_a_merge_needs_the_memory_of_about_one_shard(tmp_path: Path) -> None:
    shard_mib = 8
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=24,
        num_attention_heads=4,
        max_position_embeddings=32,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base", max_shard_size=f"{shard_mib}MB")
    adapter = write_adapter(tmp_path / "adapter", tmp_path / "base", method="eabf")
    (tmp_path / "out").mkdir()
    arguments = [str(adapter), str(tmp_path / "out"), str(shard_mib * 2**20)]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        # What is freed goes back to the system, and is not there for the second time.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    measured = json.loads(done.stdout)
    assert measured["total_mib"] > 12 * shard_mib
    # The shard that is written, and one sum in the making.
    assert measured["peak_mib"] < 2 * shard_mib
