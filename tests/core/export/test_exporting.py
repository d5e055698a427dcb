"""What `export_checkpoint` makes of each kind of source, what it refuses, and what is left when it fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from eabf_cli import modeling_eabf
from eabf_cli.core.checkpoint import load_model, load_tokenizer
from eabf_cli.core.errors import EabfError, HubError, VerificationError
from eabf_cli.core.export import exporting
from eabf_cli.core.export.exporting import export_checkpoint
from eabf_cli.core.export.hub_target import HubTarget
from eabf_cli.core.export.settings import ExportConfig
from eabf_cli.core.export.verification import Verification
from eabf_cli.core.export.weights import WeightsPlan
from eabf_cli.core.finetune.tuning import LoraSettings, load_for_tuning, make_trainable
from eabf_cli.core.method_request import MethodRequest
from eabf_cli.core.patch_checkpoint import PatchConfig, patch_checkpoint
from eabf_cli.core.patching import apply_method
from eabf_cli.core.sources import find_model
from tests.core.export.test_weights import disturb
from tests.core.test_gguf import write_gguf
from tests.scalings import scaling_for
from tests.tiny_llama import TARGET, WINDOW, edit_config, logits, read_config, tiny_llama, write_tiny_llama
from tests.unverified import NOTHING_COMPARED

TOKEN = "hf_not_to_be_seen_anywhere"
HUB = HubTarget(repo_id="owner/name", token=TOKEN)


def export(source: Path | str | None, **settings: Any) -> dict[str, Any]:
    return export_checkpoint(
        ExportConfig(
            source=None if source is None else str(source), device="cpu", **({"output": Path("out")} | settings)
        )
    )


def patched(model: Path, output: Path, method: str = "eabf") -> Path:
    patch_checkpoint(PatchConfig(model=str(model), output=output, request=MethodRequest(method=method, factor=4.0)))
    return output


def write_adapter(folder: Path, base: Path) -> Path:
    """An adapter for EABF on a base, as a run leaves it."""
    model = load_for_tuning(base, tuning="lora", device="cpu", mixed_precision=False)
    apply_method(model, scaling_for("eabf"))
    tuned = make_trainable(model, "lora", source=find_model(base), settings=LoraSettings(rank=4))
    disturb(tuned)
    tuned.save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: weight for path in folder.glob("*.safetensors") for name, weight in load_file(path).items()}


@pytest.fixture
def without_verification(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """For tests of other things: no clean process; gives the folders that would have been verified."""
    asked: list[Path] = []

    def verify(folder: Path, source: object, **settings: object) -> Verification:
        asked.append(folder)
        return NOTHING_COMPARED

    monkeypatch.setattr(exporting, "verify_export", verify)
    return asked


# ---- Sources, verified ---------------------------------------------------------------------------


def released(tmp_path: Path) -> Path:
    folder = write_tiny_llama(tmp_path / "released", max_shard_size="300KB", dtype=torch.float16)
    return edit_config(
        folder, drop=("rope_theta", "rope_parameters"), rope_scaling={"type": "eabf", "factor": 4.0}, dtype="float16"
    )


def lora(tmp_path: Path) -> Path:
    """A run folder with nothing but the adapter (`--no-merge`)."""
    write_adapter(tmp_path / "run" / "adapter", write_tiny_llama(tmp_path / "base", dtype=torch.bfloat16))
    return tmp_path / "run"


def lora_on_gguf(tmp_path: Path) -> Path:
    write_gguf(tiny_llama(tie_word_embeddings=False), tmp_path / "tiny.gguf")
    return write_adapter(tmp_path / "adapter", tmp_path / "tiny.gguf")


def native(tmp_path: Path) -> Path:
    return patched(write_tiny_llama(tmp_path / "base"), tmp_path / "native", "native")


@pytest.mark.usefixtures("workdir", "without_verification")
@pytest.mark.parametrize(("source", "unscaled_layers"), [(released, []), (lora, [0, 1]), (lora_on_gguf, [0, 1])])
def test_a_source_becomes_a_checkpoint_in_our_form_with_its_logits(
    source: Callable[[Path], Path], unscaled_layers: list[int], tmp_path: Path
) -> None:
    path = source(tmp_path)
    export(path)
    config = read_config(Path("out"))
    assert config["model_type"] == "eabf_llama"
    assert config["max_position_embeddings"] == TARGET
    assert config["rope_theta"] == 500_000.0
    assert config["rope_scaling"]["original_max_position_embeddings"] == WINDOW
    assert config["rope_scaling"]["unscaled_layers"] == unscaled_layers
    assert Path("out/modeling_eabf.py").read_bytes() == Path(modeling_eabf.__file__).read_bytes()
    assert load_tokenizer("out").model_max_length == TARGET
    assert torch.equal(logits(load_model("out", device="cpu")), logits(load_model(path, device="cpu")))


@pytest.mark.usefixtures("workdir", "without_verification")
def test_a_native_model_is_exported_as_stock_ministral3(tmp_path: Path) -> None:
    path = native(tmp_path)
    export(path)
    assert not Path("out/modeling_eabf.py").exists()
    stock = AutoModelForCausalLM.from_pretrained("out")
    assert stock.config.model_type == "ministral3"
    torch.testing.assert_close(logits(stock), logits(load_model(path, device="cpu")), rtol=0, atol=2e-5)


@pytest.mark.usefixtures("workdir")
def test_a_released_checkpoint_is_verified_in_its_new_form(tmp_path: Path) -> None:
    result = export(released(tmp_path))
    assert result["verified"] <= result["verification"]["tolerance"]
    assert any("every layer scaled" in warning for warning in result["warnings"])


@pytest.mark.usefixtures("workdir")
def test_a_checkpoint_that_differs_from_its_source_is_not_put_in_place(
    llama_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = patched(llama_copy, tmp_path / "patched")
    made = WeightsPlan._made

    def made_wrongly(self: WeightsPlan, name: str) -> Tensor:
        return made(self, name) * (1.001 if name == "model.layers.2.mlp.up_proj.weight" else 1)

    monkeypatch.setattr(WeightsPlan, "_made", made_wrongly)
    with pytest.raises(VerificationError):
        export(source)
    assert list(Path().iterdir()) == []


# ---- What is written -----------------------------------------------------------------------------


@pytest.mark.usefixtures("workdir", "without_verification")
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_config_and_weights_agree_on_the_dtype(dtype: str, llama_copy: Path, tmp_path: Path) -> None:
    export(patched(llama_copy, tmp_path / "patched"), dtype=dtype)
    expected = "float32" if dtype == "auto" else dtype
    assert read_config(Path("out"))["dtype"] == expected
    assert {weight.dtype for weight in weights(Path("out")).values()} == {getattr(torch, expected)}


@pytest.mark.usefixtures("workdir", "without_verification")
def test_the_result_lists_every_file_and_the_record_says_where_it_comes_from(llama_copy: Path, tmp_path: Path) -> None:
    source = patched(llama_copy, tmp_path / "patched")
    result = export(source, max_shard_size="300KB")
    assert {file["name"] for file in result["files"]} == set(contents(Path("out")))
    assert {file["name"]: file["bytes"] for file in result["files"]} == {
        name: len(content) for name, content in contents(Path("out")).items()
    }
    assert sum(file["name"].endswith(".safetensors") for file in result["files"]) > 1
    record = json.loads(Path("out/eabf_run.json").read_text())
    assert record["command"] == "export"
    assert record["model"] == str(llama_copy)
    assert record["run"]["command"] == "patch"
    assert record["weights"] == find_model(source).fingerprint()
    assert len({path.stat().st_mode for path in Path("out").iterdir()}) == 1
    assert result["theta_reason"] == record["run"]["theta_reason"]
    # Once more from the export: the origin is still known.
    again = export("out", output=Path("again"))
    assert again["model"] == str(llama_copy)
    assert json.loads(Path("again/eabf_run.json").read_text())["run"] == record["run"]


@pytest.mark.usefixtures("workdir", "without_verification")
def test_the_base_s_licence_and_its_text_go_along(llama_copy: Path, tmp_path: Path) -> None:
    (llama_copy / "README.md").write_text("---\nlicense: llama2\nlanguage: en\n---\n# A base\n")
    (llama_copy / "LICENSE.txt").write_text("the terms")
    (llama_copy / "USE_POLICY.md").write_text("the policy")
    source = patched(llama_copy, tmp_path / "patched")
    (source / "README.md").unlink()
    result = export(source)
    assert result["licence"] == "llama2"
    assert Path("out/LICENSE.txt").read_text() == "the terms"
    assert Path("out/USE_POLICY.md").read_text() == "the policy"
    assert "license: llama2" in Path("out/README.md").read_text()


@pytest.mark.usefixtures("workdir", "without_verification")
def test_a_checkpoint_of_an_unfinished_run_gets_its_base_s_tokenizer(llama_copy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    patched(llama_copy, run / "checkpoint-4")
    for name in ("tokenizer.json", "tokenizer_config.json", "eabf_run.json"):
        (run / "checkpoint-4" / name).unlink()
    for name in ("optimizer.pt", "trainer_state.json"):
        (run / "checkpoint-4" / name).write_text("{}")
    (run / "eabf_settings.json").write_text(json.dumps({"model": str(llama_copy), "revision": None}))
    result = export(run / "checkpoint-4")
    assert result["model"] == str(llama_copy)
    assert Path("out/tokenizer.json").read_bytes() == (llama_copy / "tokenizer.json").read_bytes()
    assert not {"optimizer.pt", "trainer_state.json"} & set(contents(Path("out")))


@pytest.mark.usefixtures("workdir", "without_verification")
def test_the_compatible_form_has_the_same_weights_and_no_scale(
    llama_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = patched(llama_copy, tmp_path / "patched")
    measured = {"method": "abf", "summary": "measured", "as_trained": {}, "compat": {}, "differences": []}
    monkeypatch.setattr(exporting, "measure_compat", lambda *_, **__: measured)
    result = export(source, compat="abf")
    assert result["compat"] == measured
    config = read_config(Path("out"))
    assert (config["model_type"], config["rope_scaling"]) == ("llama", None)
    assert config["rope_theta"] == read_config(source)["rope_theta"]
    assert config["max_position_embeddings"] == TARGET
    stored = weights(source)
    assert all(torch.equal(weight, stored[name]) for name, weight in weights(Path("out")).items())


# ---- Refusals ------------------------------------------------------------------------------------


def plain(folder: Path, tmp_path: Path) -> Path:
    return folder


def quantised(folder: Path, tmp_path: Path) -> Path:
    return edit_config(patched(folder, tmp_path / "patched"), quantization_config={"quant_method": "bitsandbytes"})


def only_pickled(folder: Path, tmp_path: Path) -> Path:
    source = patched(folder, tmp_path / "patched")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    return source


def scaled_by_stock(folder: Path, tmp_path: Path) -> Path:
    return patched(folder, tmp_path / "patched", "yarn")


@pytest.mark.usefixtures("without_verification")
@pytest.mark.parametrize(
    ("source", "settings", "said"),
    [
        (plain, {}, r"carries no method.*\n?.*eabf finetune -m .*eabf patch -m"),
        (quantised, {}, "stored quantised"),
        (only_pickled, {}, "only pickled weights"),
        (scaled_by_stock, {"compat": "abf"}, "leave out --compat abf"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_nothing_is_written(
    source: Callable[[Path, Path], Path],
    settings: dict[str, Any],
    said: str,
    llama_copy: Path,
    tmp_path: Path,
    workdir: Path,
) -> None:
    path = source(llama_copy, tmp_path)
    with pytest.raises(EabfError, match=said) as error:
        export(path, **settings)
    assert len(str(error.value).splitlines()) <= 3
    assert list(workdir.iterdir()) == []


@pytest.mark.usefixtures("workdir", "without_verification")
def test_the_target_is_refused_before_any_work(llama_copy: Path, tmp_path: Path) -> None:
    source = patched(llama_copy, tmp_path / "patched")
    before = contents(source)
    for target in (source, tmp_path):
        with pytest.raises(EabfError, match="holds the source"):
            export(source, output=target, overwrite=True)
    assert contents(source) == before
    export(source)
    with pytest.raises(EabfError, match="--overwrite"):
        export(source)
    Path("out/stale").touch()
    export(source, overwrite=True)
    assert not Path("out/stale").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"compat": "gguf"}, "compat must be one of abf, native, got 'gguf'"),
        ({"max_shard_size": "5 apples"}, "such as 5GB or 200MB, got '5 apples'"),
        ({"max_shard_size": "0GB"}, "got '0GB'"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(EabfError, match=said):
        ExportConfig(**settings)


# ---- Dry run and publishing ----------------------------------------------------------------------


@pytest.mark.usefixtures("workdir")
def test_a_dry_run_tells_the_weight_files_and_writes_nothing(
    tmp_path: Path, without_verification: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = released(tmp_path)
    before = contents(tmp_path)
    told = export(source, dry_run=True, max_shard_size="300KB")
    assert contents(tmp_path) == before
    assert without_verification == []
    assert (told["output"], told["planned_output"]) == (None, "out")
    assert told["changes"]["model_type"] == ["llama", "eabf_llama"]
    assert told["changes"]["max_position_embeddings"] == [WINDOW, TARGET]
    export(source, max_shard_size="300KB")
    sizes = {file["name"]: file["bytes"] for file in told["files"]}
    assert set(sizes) == set(contents(Path("out")))
    written = {path.name: load_file(path) for path in Path("out").glob("*.safetensors")}
    for name, content in contents(Path("out")).items():
        expected = sum(weight.nbytes for weight in written[name].values()) if name in written else len(content)
        assert sizes[name] in (expected, None)
    assert None not in [sizes[name] for name in written]


@pytest.fixture
def hub_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A Hub that takes everything; the calls in order."""
    calls: list[str] = []

    def check(target: HubTarget, **origin: Any) -> list[str]:
        calls.append(f"check {origin['licence']}")
        return ["the Hub warns"]

    def push(folder: Path, target: HubTarget, **settings: Any) -> dict[str, Any]:
        assert (folder / "eabf_run.json").is_file()
        calls.append(f"push {folder}")
        return {"repo_id": target.repo_id, "commit_url": "https://hub/commit/1", "files": []}

    monkeypatch.setattr(exporting, "check_hub", check)
    monkeypatch.setattr(exporting, "push_folder", push)
    return calls


@pytest.mark.usefixtures("workdir", "without_verification")
def test_the_hub_is_asked_first_and_gets_the_finished_folder(
    llama_copy: Path, tmp_path: Path, hub_calls: list[str]
) -> None:
    source = patched(llama_copy, tmp_path / "patched")
    result = export(source, hub=HUB, output=None)
    assert hub_calls == ["check None", "push eabf-runs/patched-export"]
    assert (result["repo_id"], result["commit_url"]) == ("owner/name", "https://hub/commit/1")
    assert "the Hub warns" in result["warnings"]
    assert [name for name, content in contents(Path()).items() if TOKEN.encode() in content] == []
    assert TOKEN not in json.dumps(result, default=str)
    assert (
        json.loads(Path("eabf-runs/patched-export/eabf_run.json").read_text())["arguments"]["hub"]["private"] is False
    )


@pytest.mark.usefixtures("workdir", "without_verification")
def test_a_refusal_of_the_hub_comes_before_anything_is_written(
    llama_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **settings: Any) -> list[str]:
        raise HubError("no token")

    monkeypatch.setattr(exporting, "check_hub", refuse)
    with pytest.raises(HubError, match="no token"):
        export(patched(llama_copy, tmp_path / "patched"), hub=HUB)
    assert list(Path().iterdir()) == []


def fail(*_: Any, **__: Any) -> dict[str, Any]:
    raise HubError("the connection broke")


@pytest.mark.usefixtures("workdir", "without_verification", "hub_calls")
def test_after_a_failed_upload_the_folder_stays_and_the_error_says_so(
    llama_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "push_folder", fail)
    with pytest.raises(HubError, match="the connection broke\nThe verified export stays in out"):
        export(patched(llama_copy, tmp_path / "patched"), hub=HUB)
    shutil.rmtree(tmp_path / "patched")
    assert load_model("out", device="cpu").config.max_position_embeddings == TARGET


@pytest.mark.usefixtures("workdir")
def test_the_same_command_after_a_failed_upload_publishes_what_is_there(
    llama_copy: Path,
    tmp_path: Path,
    without_verification: list[Path],
    hub_calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = patched(llama_copy, tmp_path / "patched")
    with monkeypatch.context() as broken:
        broken.setattr(exporting, "push_folder", fail)
        with pytest.raises(HubError):
            export(source, hub=HUB)
    before = contents(Path("out"))
    result = export(source, hub=HUB)
    assert contents(Path("out")) == before
    assert len(without_verification) == 1
    assert hub_calls[-1] == "push out"
    assert {file["name"] for file in result["files"]} == set(before)
    assert result["verified"] == 0.0


@pytest.mark.usefixtures("workdir", "without_verification", "hub_calls")
@pytest.mark.parametrize("change", ["settings", "file", "source"])
def test_another_export_is_not_taken_for_the_one_that_is_there(change: str, llama_copy: Path, tmp_path: Path) -> None:
    source = patched(llama_copy, tmp_path / "patched")
    export(source, hub=HUB)
    settings = {"dtype": "bfloat16"} if change == "settings" else {}
    if change == "file":
        Path("out/README.md").write_text("another card")
    if change == "source":
        shutil.rmtree(source)
        patched(write_tiny_llama(tmp_path / "other", vocab_size=4100), source)
    with pytest.raises(EabfError, match="--overwrite"):
        export(source, hub=HUB, **settings)
