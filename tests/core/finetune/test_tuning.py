"""What each tuning trains, what merging makes of it, and that what comes out is loaded as it was trained."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from eabf_cli.core.adapters import save_adapter
from eabf_cli.core.checkpoint import load_model, load_tokenizer, read_config, stored_dtype
from eabf_cli.core.demo import DEMO_MODEL
from eabf_cli.core.errors import AlreadyScaledError, CheckpointError, EabfError, InvalidConfigError
from eabf_cli.core.finetune.tuning import (
    LoraSettings,
    check_tuning,
    load_for_tuning,
    make_trainable,
    merge_tuned,
)
from eabf_cli.core.patch_checkpoint import MethodRequest, PatchConfig, patch_checkpoint
from eabf_cli.core.patching import apply_method, describe_patch, remove_method
from eabf_cli.core.sources import find_model
from tests.architectures import WINDOW, build_tiny_model, random_tokens
from tests.scalings import scaling_for
from tests.tiny_llama import TARGET, write_tiny_llama
from tests.tiny_llama import WINDOW as LLAMA_WINDOW

pytestmark = pytest.mark.usefixtures("one_thread")

# Fused projections, norms of query and key, a norm per head, biases, a tied head, experts, another MLP.
FAMILIES = ("llama", "llama_biased", "qwen3", "phi3", "gemma2", "granite", "stablelm", "starcoder2")
ADAPTED = ("lora", "qlora")
SETTINGS = LoraSettings(rank=4, alpha=8)
METHOD = scaling_for("eabf")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a tiny model of a family, stored in a dtype."""
    root = tmp_path_factory.mktemp("stored")

    def write(family: str, dtype: torch.dtype = torch.float32) -> Path:
        folder = root / f"{family}-{str(dtype).rpartition('.')[2]}"
        if not folder.is_dir():
            build_tiny_model(family, dtype=dtype).save_pretrained(folder)
        return folder

    return write


def tuned(folder: Path, tuning: str, settings: LoraSettings = SETTINGS, *, mixed: bool = False, seed: int = 0) -> Any:
    """The model that a run would train."""
    model = load_for_tuning(folder, tuning=tuning, device="cpu", mixed_precision=mixed)
    apply_method(model, METHOD)
    return make_trainable(model, tuning, source=find_model(folder), settings=settings, seed=seed)


def train(model: nn.Module, steps: int = 3) -> list[float]:
    """A training loop written out; leaves the model in evaluation mode, with the last gradients."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    tokens = random_tokens(2 * WINDOW)
    losses = []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(random_tokens(2 * WINDOW, seed=1)).logits.float()


def assert_same_logits(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the weights."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def trained_parts(model: PeftModel) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The updates (alpha / rank) B A by the weight they belong to, and the trained weights by their own names."""
    updates, whole = {}, {}
    weights = {name.removeprefix("base_model.model."): weight for name, weight in tensors(model).items()}
    for name, weight in weights.items():
        if ".lora_B.default" in name:
            inner = weights[name.replace("lora_B", "lora_A")]
            updates[name.replace(".lora_B.default", "")] = SETTINGS.alpha / SETTINGS.rank * (weight @ inner)
        elif ".modules_to_save.default" in name:
            whole[name.replace(".modules_to_save.default", "")] = weight
    return updates, whole


# --- What is trained ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"alpha": 0.0}, "alpha must be greater than 0, got 0"),
        ({"alpha": float("nan")}, "alpha must be greater than 0, got nan"),
        ({"dropout": 1.0}, "dropout must be from 0 to below 1, got 1"),
        ({"dropout": -0.1}, "got -0.1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidConfigError, match=said):
        LoraSettings(**fields)


def weights_by_kind(model: PreTrainedModel) -> dict[str, set[str]]:
    """A plain model's weights, told apart by name and shape alone."""
    kinds: dict[str, set[str]] = {"linear": set(), "norm": set(), "embedding": set()}
    for name, weight in model.named_parameters():
        if "norm" in name:
            kinds["norm"].add(name)
        elif "embed_tokens" in name or "lm_head" in name:
            kinds["embedding"].add(name)
        elif weight.ndim == 2 and ".gate.weight" not in name:
            kinds["linear"].add(name)
    return kinds


@pytest.mark.parametrize("train_embeddings", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "olmo", "mixtral", "qwen2_moe"])
def test_gradients_reach_the_adapters_and_the_trained_modules_alone(
    family: str, train_embeddings: bool, stored: Callable[..., Path]
) -> None:
    kinds = weights_by_kind(build_tiny_model(family))
    model = tuned(stored(family), "lora", replace(SETTINGS, train_embeddings=train_embeddings))
    before = tensors(model)
    train(model, steps=2)
    with_gradient = {name for name, weight in model.named_parameters() if weight.grad is not None}
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert with_gradient == changed == {name for name, weight in model.named_parameters() if weight.requires_grad}

    updates, whole = trained_parts(model)
    assert set(updates) == kinds["linear"]
    # A tied head is the embedding.
    assert set(whole) == kinds["norm"] | (kinds["embedding"] if train_embeddings else set())
    assert len(with_gradient) == 2 * len(updates) + len(whole)
    if train_embeddings:
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert tied == model.config.tie_word_embeddings


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_norms_can_be_left_frozen(family: str, stored: Callable[..., Path]) -> None:
    model = tuned(stored(family), "lora", replace(SETTINGS, train_norms=False))
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)


@pytest.mark.parametrize("tuning", ["full", *ADAPTED])
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_a_few_steps_lower_the_loss(family: str, tuning: str, stored: Callable[..., Path]) -> None:
    losses = train(tuned(stored(family, torch.bfloat16), tuning), steps=4)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.3


def test_full_finetuning_trains_every_weight_in_float32(stored: Callable[..., Path]) -> None:
    model = tuned(stored("llama", torch.bfloat16), "full", mixed=True)
    assert not isinstance(model, PeftModel)
    train(model, steps=1)
    assert all(weight.dtype == torch.float32 and weight.grad is not None for weight in model.parameters())


def test_new_adapters_depend_on_their_seed_alone(stored: Callable[..., Path]) -> None:
    def first_weights(seed: int) -> torch.Tensor:
        torch.manual_seed(len(created))
        created.append(tuned(stored("llama"), "lora", seed=seed))
        assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(len(created) - 1)))
        return created[-1].base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].weight

    created: list[Any] = []
    assert torch.equal(first_weights(1), first_weights(1))
    assert not torch.equal(first_weights(1), first_weights(2))


@pytest.mark.parametrize("tuning", ADAPTED)
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_under_mixed_precision_what_is_trained_is_float32_on_a_bfloat16_base(
    family: str, tuning: str, stored: Callable[..., Path]
) -> None:
    model = tuned(stored(family, torch.bfloat16), tuning, mixed=True)
    tokens = random_tokens(2 * WINDOW)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert {weight.dtype for weight in trained} == {weight.grad.dtype for weight in trained} == {torch.float32}
    frozen = {weight.dtype for weight in model.parameters() if not weight.requires_grad}
    assert frozen == ({torch.bfloat16} if tuning == "lora" else {torch.bfloat16, torch.uint8})
    assert next(model.get_decoder().rotary_emb.buffers()).dtype == torch.float32

    half = patched_float32(family, stored)
    with torch.no_grad():
        expected = half(tokens, labels=tokens).loss
    torch.testing.assert_close(loss.float(), expected.float(), rtol=0.03 if tuning == "lora" else 0.2, atol=0)


def patched_float32(family: str, stored: Callable[..., Path]) -> PreTrainedModel:
    """The patched model in float32, as a yardstick."""
    model = load_model(stored(family, torch.bfloat16), dtype="float32", device="cpu")
    apply_method(model, METHOD)
    return model


# --- The method below adapters and 4-bit layers ---------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_new_adapters_leave_the_patched_model_as_it_is(family: str, stored: Callable[..., Path]) -> None:
    plain = load_model(stored(family), device="cpu")
    unpatched = logits(plain)
    apply_method(plain, METHOD)
    model = tuned(stored(family), "lora")
    assert torch.equal(logits(model.eval()), logits(plain))
    assert describe_patch(model) == describe_patch(plain)
    assert (logits(plain) - unpatched).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_a_4bit_model_carries_the_method(family: str, stored: Callable[..., Path]) -> None:
    """The reference is a plain model with the rounded weights, patched."""
    model = tuned(stored(family), "qlora").eval()
    reference = load_model(stored(family), device="cpu")
    dequantised = dequantised_weights(model)
    assert set(dequantised) == weights_by_kind(build_tiny_model(family))["linear"] - {
        name for name, weight in reference.named_parameters() if weight.ndim == 1
    }
    with torch.no_grad():
        for name, weight in dequantised.items():
            reference.get_parameter(name).copy_(weight)
    unpatched = logits(reference)
    apply_method(reference, METHOD)
    assert_same_logits(logits(model), logits(reference), 1e-4)
    assert (logits(reference) - unpatched).abs().max() > 0.01


def dequantised_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """What the 4-bit layers stand for, by the names of the plain model."""
    import bitsandbytes

    return {
        name.removeprefix("base_model.model.").replace(".base_layer", "") + ".weight": (
            bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        )
        for name, module in model.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    }


@pytest.mark.parametrize("tuning", ADAPTED)
def test_the_method_may_come_after_the_adapters(tuning: str, stored: Callable[..., Path]) -> None:
    before = tuned(stored("llama"), tuning)
    after = load_for_tuning(stored("llama"), tuning=tuning, device="cpu", mixed_precision=False)
    after = make_trainable(after, tuning, source=find_model(stored("llama")), settings=SETTINGS, seed=0)
    apply_method(after, METHOD)
    train(before)
    train(after)
    assert torch.equal(logits(before), logits(after))


def test_an_evaluation_before_training_changes_no_gradient(stored: Callable[..., Path]) -> None:
    """On a CPU with bfloat16 instructions bitsandbytes would repack the layers for inference."""
    fresh, measured = tuned(stored("llama"), "qlora"), tuned(stored("llama"), "qlora")
    measured.eval()
    logits(measured)
    train(fresh, steps=1)
    train(measured, steps=1)
    expected = dict(fresh.named_parameters())
    for name, weight in measured.named_parameters():
        assert weight.grad is None or torch.equal(weight.grad, expected[name].grad), name


# --- Merging --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_embeddings", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "mixtral"])
def test_a_merged_lora_is_the_trained_model(family: str, train_embeddings: bool, stored: Callable[..., Path]) -> None:
    model = tuned(stored(family), "lora", replace(SETTINGS, train_embeddings=train_embeddings))
    train(model)
    expected, patch = logits(model), describe_patch(model)
    merged = merge_tuned(model, torch.float32)
    assert_same_logits(logits(merged), expected)
    assert (logits(merged) - logits(patched_float32(family, stored))).abs().max() > 0.1
    plain = build_tiny_model(family)
    assert {name: weight.shape for name, weight in merged.named_parameters()} == {
        name: weight.shape for name, weight in plain.named_parameters()
    }
    assert type(merged) is type(plain)
    assert all(weight.requires_grad for weight in merged.parameters())
    assert describe_patch(merged) == patch
    assert merged.config.tie_word_embeddings == plain.config.tie_word_embeddings


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("tuning", ADAPTED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_adapters_are_merged_into_the_stored_weights_and_rounded_once(
    family: str, dtype: torch.dtype, tuning: str, mixed: bool, stored: Callable[..., Path]
) -> None:
    folder = stored(family, dtype)
    model = tuned(folder, tuning, mixed=mixed)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        train(model)
    updates, whole = trained_parts(model)
    rounded = dequantised_weights(model) if tuning == "qlora" else {}
    merged = merge_tuned(model, dtype)
    assert {weight.dtype for weight in merged.parameters()} == {dtype if mixed else torch.float32}
    base = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, weight in merged.named_parameters():
        expected = whole[name] if name in whole else base[name].float() + updates.get(name, 0.0)
        assert torch.equal(weight.float(), expected.to(dtype).float()), name
        if name in rounded:
            of_4bit = (rounded[name] + updates[name]).to(dtype).float()
            assert (weight.float() - of_4bit).abs().max() > 100 * torch.finfo(dtype).eps * updates[name].abs().mean()
    assert set(rounded) == (set(updates) if tuning == "qlora" else set())
    assert whole.keys() >= {"model.norm.weight"}


def test_merging_after_full_finetuning_rounds_the_weights(stored: Callable[..., Path]) -> None:
    model = tuned(stored("llama", torch.bfloat16), "full")
    train(model)
    expected = {name: weight.bfloat16().float() for name, weight in tensors(model).items()}
    frequencies = model.model.rotary_emb.inv_freq.clone()
    merged = merge_tuned(model, torch.bfloat16)
    assert merged is model
    assert all(torch.equal(weight, expected[name]) for name, weight in merged.named_parameters())
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)


def test_a_checkpoint_in_another_dtype_than_the_stored_one_is_rounded_once(stored: Callable[..., Path]) -> None:
    folder = stored("llama", torch.float16)
    model = tuned(folder, "lora", mixed=True)
    with torch.autocast("cpu", torch.bfloat16):
        train(model)
    updates, _ = trained_parts(model)
    merged = merge_tuned(model, torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, update in updates.items():
        assert torch.equal(merged.get_parameter(name), (base[name].float() + update).bfloat16()), name


def test_a_control_without_a_method_is_merged_without_one(stored: Callable[..., Path]) -> None:
    folder = stored("llama")
    model = load_for_tuning(folder, tuning="qlora", device="cpu", mixed_precision=False)
    model = make_trainable(model, "qlora", source=find_model(folder), settings=SETTINGS)
    train(model)
    merged = merge_tuned(model, torch.float32)
    assert describe_patch(merged) is None
    assert merged.config.max_position_embeddings == WINDOW


# --- The adapter's folder -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer, stored in bfloat16."""
    return write_tiny_llama(tmp_path_factory.mktemp("bases") / "base", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def runs(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """For each tuning a run folder that holds only an adapter, the merged checkpoint, and what both should say."""
    made: dict[str, Any] = {}
    for tuning in ADAPTED:
        root = tmp_path_factory.mktemp(tuning)
        model = tuned(base_folder, tuning, replace(SETTINGS, train_embeddings=tuning == "lora"))
        train(model)
        model.save_pretrained(root / "run" / "adapter")
        unmerged = logits(model)
        merged = merge_tuned(model, torch.bfloat16)
        merged_logits = logits(merged)
        merged.to(torch.bfloat16).save_pretrained(root / "merged")
        made[tuning] = {"root": root, "unmerged": unmerged, "merged": merged_logits}
    return made


def test_an_adapter_s_folder_says_what_it_goes_onto(
    runs: dict[str, Any], base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = runs["lora"]["root"] / "run" / "adapter"
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "eabf_scaling.json",
    }  # fmt: skip
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base_folder.resolve())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (SETTINGS.rank, SETTINGS.alpha, "LORA")
    record = json.loads((folder / "eabf_scaling.json").read_text())
    assert record["rope_scaling"]["rope_type"] == "eabf"
    assert record["rope_scaling"]["original_max_position_embeddings"] == LLAMA_WINDOW
    assert record["base_weights"] == find_model(base_folder).fingerprint()
    assert "load_model" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "revision", "recorded"),
    [("owner/name", "0123abc", "owner/name"), (DEMO_MODEL, None, DEMO_MODEL), ("relative", None, None)],
)
def test_the_base_is_named_so_that_it_is_found_from_anywhere(
    name: str, revision: str | None, recorded: str | None, base_folder: Path, tmp_path: Path
) -> None:
    source = replace(find_model(base_folder), name=name, revision=revision)
    model = load_for_tuning(base_folder, tuning="lora", device="cpu", mixed_precision=False)
    make_trainable(model, "lora", source=source, settings=SETTINGS).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == (recorded or str(base_folder.resolve()))
    assert config["revision"] == revision


@pytest.mark.parametrize("place", ["run", "run/adapter"])
@pytest.mark.parametrize("tuning", ADAPTED)
def test_an_adapter_loads_as_the_merged_checkpoint_does(place: str, tuning: str, runs: dict[str, Any]) -> None:
    root = runs[tuning]["root"]
    loaded, merged = (load_model(root / folder, device="cpu") for folder in (place, "merged"))
    assert type(loaded) is type(merged)
    assert describe_patch(loaded) == describe_patch(merged)
    assert not loaded.training
    theirs = merged.state_dict()
    for name, weight in loaded.state_dict().items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, theirs[name]), name
    assert torch.equal(logits(loaded), logits(merged))
    merged = load_model(root / "merged", dtype="float32", device="cpu")
    assert_same_logits(logits(merged), runs[tuning]["merged"])


def test_an_adapter_loaded_in_float32_is_the_model_that_was_trained(runs: dict[str, Any], tmp_path: Path) -> None:
    loaded = load_model(runs["lora"]["root"] / "run", dtype="float32", device="cpu")
    assert_same_logits(logits(loaded), runs["lora"]["unmerged"])
    loaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load_model(tmp_path / "saved", device="cpu")), logits(loaded))


def test_the_method_comes_off_a_loaded_adapter(runs: dict[str, Any], base_folder: Path) -> None:
    loaded = load_model(runs["lora"]["root"] / "run", dtype="float32", device="cpu")
    remove_method(loaded)
    plain = load_model(base_folder, dtype="float32", device="cpu")
    assert loaded.config.max_position_embeddings == plain.config.max_position_embeddings == LLAMA_WINDOW
    assert torch.equal(loaded.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    plain.load_state_dict(loaded.state_dict())
    assert torch.equal(logits(loaded), logits(plain))


def test_exempt_layers_can_be_chosen_when_an_adapter_is_loaded(runs: dict[str, Any]) -> None:
    loaded = load_model(runs["lora"]["root"] / "run", device="cpu", unscaled_layers=())
    patch = describe_patch(loaded)
    assert patch is not None
    assert patch.unscaled_layers == ()


def test_an_adapter_brings_its_base_s_tokenizer_with_the_new_window(runs: dict[str, Any], base_folder: Path) -> None:
    tokenizer, theirs = load_tokenizer(runs["lora"]["root"] / "run"), load_tokenizer(base_folder)
    assert tokenizer("the sun was warm").input_ids == theirs("the sun was warm").input_ids
    assert tokenizer.model_max_length == TARGET


def test_an_adapter_is_known_by_its_base_and_its_own_weights(runs: dict[str, Any], base_folder: Path) -> None:
    source = find_model(runs["lora"]["root"] / "run")
    assert source.base == replace(find_model(base_folder), name=str(base_folder.resolve()))
    assert stored_dtype(source) == torch.bfloat16
    assert source.fingerprint().startswith(source.base.fingerprint())
    assert source.fingerprint() != find_model(runs["qlora"]["root"] / "run").fingerprint()
    loaded = read_config(source)
    assert loaded.resolution is not None
    assert loaded.config.max_position_embeddings == LLAMA_WINDOW
    with pytest.raises(CheckpointError, match=r"is an adapter on .* no weights of its own: merge it"):
        source.weight_files()


@pytest.mark.parametrize(("rebase", "error"), [(False, AlreadyScaledError), (True, CheckpointError)])
def test_an_adapter_is_never_patched_without_its_weights(
    rebase: bool, error: type[Exception], runs: dict[str, Any], tmp_path: Path
) -> None:
    config = PatchConfig(
        model=str(runs["lora"]["root"] / "run"),
        output=tmp_path / "patched",
        request=MethodRequest(method="abf", rebase=rebase),
    )
    with pytest.raises(error):
        patch_checkpoint(config)
    assert not (tmp_path / "patched").exists()


@pytest.fixture
def adapter_copy(runs: dict[str, Any], base_folder: Path, tmp_path: Path) -> Path:
    """A run folder with an adapter, on a base of its own (`../base`), both to be changed."""
    run = Path(shutil.copytree(runs["lora"]["root"] / "run", tmp_path / "run"))
    base = shutil.copytree(base_folder, tmp_path / "base")
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(base)
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return run


def _drop_base(run: Path) -> None:
    shutil.rmtree(run.parent / "base")


def _change_base(run: Path) -> None:
    weights = load_file(run.parent / "base" / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save_file(weights, run.parent / "base" / "model.safetensors", metadata={"format": "pt"})


def _drop_scaling(run: Path) -> None:
    (run / "adapter" / "eabf_scaling.json").unlink()


def _unfinish(run: Path) -> None:
    (run / "checkpoint-3").mkdir()


def _truncate(run: Path) -> None:
    path = run / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def _drop_a_tensor(run: Path) -> None:
    path = run / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    del weights[next(name for name in weights if "layers.1" in name and "lora_B" in name)]
    save_file(weights, path)


def _widen(run: Path) -> None:
    path = run / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": SETTINGS.rank + 1}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_drop_base, ["adapter on", "/base'", "not there any more", "adapter_config.json"]),
        (_change_base, ["adapter on", "/base'", "not those that it was trained on"]),
        (_drop_scaling, ["no eabf_scaling.json"]),
        (_unfinish, ["not finished", "--resume"]),
        (_truncate, ["adapter_model.safetensors", "truncated"]),
        (_drop_a_tensor, ["adapter_model.safetensors", "layers.1", "damaged"]),
        (_widen, ["cannot be put on its base model", "size mismatch"]),
    ],
)
def test_a_damaged_adapter_is_one_clear_error(
    damage: Callable[[Path], None], said: list[str], adapter_copy: Path
) -> None:
    load_model(adapter_copy, device="cpu")
    damage(adapter_copy)
    with pytest.raises(CheckpointError) as error:
        load_model(adapter_copy, device="cpu")
    assert all(part in str(error.value) for part in said), str(error.value)
    assert len(str(error.value).splitlines()) <= 3


def test_an_adapter_on_a_hub_model_that_cannot_be_reached_names_it(adapter_copy: Path) -> None:
    path = adapter_copy / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "owner/gone"}))
    with pytest.raises(CheckpointError, match=r"adapter on 'owner/gone', which cannot be had: .*cannot be reached"):
        load_tokenizer(adapter_copy)


def test_only_the_main_process_writes_the_scaling(stored: Callable[..., Path], tmp_path: Path) -> None:
    save_adapter(tuned(stored("llama"), "lora"), tmp_path, is_main_process=False)
    assert not (tmp_path / "eabf_scaling.json").exists()


# --- Refused before any weight is loaded ----------------------------------------------------------------


def test_a_tuning_that_cannot_be_had_is_refused_before_weights_are_loaded(
    stored: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stored("llama")
    source, config = find_model(folder), read_config(find_model(folder)).config
    for tuning in ("full", *ADAPTED):
        check_tuning(tuning, source, config, device="cpu")

    with pytest.raises(InvalidConfigError, match="unknown tuning 'lora8'; known: full, lora, qlora"):
        check_tuning("lora8", source, config)
    (tmp_path / "model.gguf").touch()
    check_tuning("lora", find_model(tmp_path / "model.gguf"), config)
    with pytest.raises(InvalidConfigError, match=r"GGUF file.* use --tuning lora"):
        check_tuning("qlora", find_model(tmp_path / "model.gguf"), config)
    with pytest.raises(InvalidConfigError, match=r"experts of a 'mixtral' model.* use --tuning lora"):
        check_tuning("qlora", source, build_tiny_model("mixtral").config)

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(EabfError, match=r"bitsandbytes is not installed.*pip install 'eabf-cli\[gpu\]'"):
        check_tuning("qlora", source, config, device="cpu")
    check_tuning("lora", source, config, device="cpu")


# --- With the Trainer -----------------------------------------------------------------------------------


def trainer(model: nn.Module, folder: Path, *, mixed: bool = False) -> Trainer:
    """Four steps with a checkpoint at the second; everything that must come back is at work."""
    rows = [{"input_ids": row, "labels": row} for row in random_tokens(WINDOW, batch=8)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=4,
        save_steps=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        bf16=mixed,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": False},
    )
    return Trainer(model=model, args=arguments, train_dataset=rows)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("tuning", ADAPTED)
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(
    tuning: str, mixed: bool, base_folder: Path, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, dropout=0.1, train_embeddings=True)
    straight = tuned(base_folder, tuning, settings, mixed=mixed)
    trainer(straight, tmp_path, mixed=mixed).train()
    half = tmp_path / "checkpoint-2"
    assert {path.name for path in half.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "eabf_scaling.json", "optimizer.pt",
        "rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin",
    }  # fmt: skip

    resumed = tuned(base_folder, tuning, settings, mixed=mixed, seed=7)
    trainer(resumed, tmp_path / "resumed", mixed=mixed).train(resume_from_checkpoint=str(half))
    expected = tensors(straight)
    at_half = load_file(half / "adapter_model.safetensors")
    for name, weight in resumed.named_parameters():
        assert torch.equal(weight, expected[name]), name
        stored_name = name.replace(".default", "").replace(".modules_to_save", "")
        assert not weight.requires_grad or not torch.equal(weight, at_half[stored_name]), name

    # The last checkpoint of a run is an adapter like any other.
    merged = merge_tuned(straight, torch.bfloat16).to(torch.bfloat16).state_dict()
    loaded = load_model(tmp_path / "checkpoint-4", device="cpu").state_dict()
    assert all(torch.equal(weight, merged[name]) for name, weight in loaded.items())


def test_norms_are_trained_without_weight_decay(base_folder: Path, tmp_path: Path) -> None:
    engine = trainer(tuned(base_folder, "lora"), tmp_path)
    decayed = engine.get_decay_parameter_names(engine.model)
    assert not [name for name in decayed if "norm" in name]
    assert [name for name in decayed if "lora_A" in name]
