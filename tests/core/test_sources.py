"""A model is found under each of its names, and a damaged one is known before its weights are read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub import errors as hub
from safetensors.torch import save_file

from eabf_cli.core import sources
from eabf_cli.core.errors import CheckpointError
from eabf_cli.core.sources import INDEX_FILE, SINGLE_FILE, check_safetensors, find_model, hash_files
from tests.tiny_llama import DEMO_TOKENIZER, write_tiny_llama


def message_of(call: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as error:
        call()
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two files of one tensor each, and their index."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    weight_map = {}
    for number in (1, 2):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file({f"weight{number}": torch.ones(8)}, folder / name)
        weight_map[f"weight{number}"] = name
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


def test_the_demo_alias_a_folder_and_a_gguf_file(
    tmp_path: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_model("eabf-tiny").folder == DEMO_TOKENIZER
    assert find_model(tiny_llama_folder).folder == tiny_llama_folder
    assert find_model(str(tiny_llama_folder)).config()["model_type"] == "llama"

    gguf = tmp_path / "m.GGUF"
    gguf.touch()
    found = find_model(gguf)
    assert (found.folder, found.gguf_file) == (tmp_path, "m.GGUF")

    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(tiny_llama_folder, tmp_path / "home-model")
    assert find_model("~/home-model").folder == tmp_path / "home-model"


def test_the_weight_files_are_the_single_one_or_the_index_s(sharded: Path, tiny_llama_folder: Path) -> None:
    assert [path.name for path in find_model(tiny_llama_folder).weight_files()] == [SINGLE_FILE]
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert [path.name for path in find_model(sharded).weight_files()] == names


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("eabf-tinny", ["'eabf-tinny'", "not found", "eabf-tiny"]),
        ("./no/such/model", ["no/such/model", "not found"]),
        ("/no/such", ["/no/such", "not found"]),
        ("a/b/c", ["a/b/c", "not found"]),
        ("owner/no-such-model", ["owner/no-such-model", "cannot be reached", "spelling"]),
        ("owner/na me", ["owner/na me", "valid Hub id"]),
    ],
)
def test_a_misspelt_name_is_repeated(name: str, said: list[str], workdir: Path) -> None:
    message = message_of(lambda: find_model(name))
    assert [word for word in said if word not in message] == []


def test_a_folder_that_is_no_model_says_what_it_is(tmp_path: Path) -> None:
    assert "not a model folder" in message_of(lambda: find_model(tmp_path))
    (tmp_path / "checkpoint-3").mkdir()
    assert "--resume" in message_of(lambda: find_model(tmp_path))
    (tmp_path / "b.gguf").touch()
    (tmp_path / "a.gguf").touch()
    assert str(tmp_path / "a.gguf") in message_of(lambda: find_model(tmp_path))


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert "no .gguf" in message_of(lambda: find_model(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (hub.GatedRepoError, ["gated", "hf auth login"]),
        (hub.RepositoryNotFoundError, ["neither a folder here nor a model on the Hub", "spelling"]),
        (hub.RevisionNotFoundError, ["no revision", "'v9'"]),
        (hub.EntryNotFoundError, ["no config.json"]),
        (hub.LocalEntryNotFoundError, ["Hub cannot be reached", "HF_HUB_OFFLINE"]),
        (hub.HfHubHTTPError, ["could not be read from the Hub", "503"]),
        (ConnectionError, ["could not be read from the Hub", "503"]),
    ],
)
def test_each_refusal_of_the_hub_is_one_sentence(
    error: type[Exception], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> str:
        if issubclass(error, hub.HfHubHTTPError):
            raise error("503 from the Hub\nRequest id 1", response=Mock(headers={}))
        raise error("503 from the Hub\nRequest id 1")

    monkeypatch.setattr(sources, "hf_hub_download", refuse)
    message = message_of(lambda: find_model("owner/model", revision="v9"))
    assert [word for word in ["owner/model", *said] if word not in message] == []


def test_a_hub_model_is_its_commit_s_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = tmp_path / "snapshots" / "abc123"
    commit.mkdir(parents=True)
    (commit / "config.json").write_text("{}")
    asked = []
    monkeypatch.setattr(sources, "hf_hub_download", Mock(return_value=str(commit / "config.json")))

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, "*.safetensors" in allow_patterns, "*.json" in allow_patterns))
        assert not {"*.bin", "*.pt", "*.py"} & set(allow_patterns)
        return str(commit)

    monkeypatch.setattr(sources, "snapshot_download", download)
    found = find_model("owner/model", revision="main")
    assert (found.folder, found.revision, found.fingerprint()) == (commit, "abc123", "abc123")
    assert asked == [("owner/model", "main", True, True)]
    find_model("owner/model", with_weights=False)
    assert asked[1:] == [("owner/model", None, False, True)]


def damage_missing(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def damage_truncated(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def damage_cut_in_the_header(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:5])


def damage_html(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").write_text("<html>Not found</html>")


def damage_outside(folder: Path) -> None:
    save_file({"w": torch.ones(1)}, folder.parent / "outside.safetensors")
    write_index(folder, {"w": "../outside.safetensors"})


def damage_absolute(folder: Path) -> None:
    save_file({"w": torch.ones(1)}, folder.parent / "outside.safetensors")
    write_index(folder, {"w": str(folder.parent / "outside.safetensors")})


def damage_parent(folder: Path) -> None:
    write_index(folder, {"w": ".."})


def damage_pickle_in_index(folder: Path) -> None:
    (folder / "pytorch_model.bin").touch()
    write_index(folder, {"w": "pytorch_model.bin"})


def damage_empty_index(folder: Path) -> None:
    write_index(folder, {})


def damage_list_in_index(folder: Path) -> None:
    write_index(folder, ["model-00001-of-00002.safetensors"])


def damage_index_json(folder: Path) -> None:
    (folder / INDEX_FILE).write_text('{"weight_map": {')


def damage_no_weights(folder: Path) -> None:
    (folder / INDEX_FILE).unlink()


def damage_only_pickles(folder: Path) -> None:
    (folder / INDEX_FILE).unlink()
    (folder / "pytorch_model.bin").touch()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_missing, ["model-00002-of-00002.safetensors", "missing"]),
        (damage_truncated, ["model-00002-of-00002.safetensors", "truncated"]),
        (damage_cut_in_the_header, ["model-00002-of-00002.safetensors", "truncated"]),
        (damage_html, ["model-00002-of-00002.safetensors", "no safetensors"]),
        (damage_outside, ["'../outside.safetensors'", "outside the folder"]),
        (damage_absolute, ["outside the folder"]),
        (damage_parent, ["'..'", "outside the folder"]),
        (damage_pickle_in_index, ["pytorch_model.bin", "no safetensors"]),
        (damage_empty_index, [INDEX_FILE, "no weight_map"]),
        (damage_list_in_index, [INDEX_FILE, "no weight_map"]),
        (damage_index_json, [INDEX_FILE, "not readable JSON"]),
        (damage_no_weights, ["no weights", SINGLE_FILE]),
        (damage_only_pickles, ["pytorch_model.bin", "can run code", "convert"]),
    ],
)
def test_damage_is_named(damage: Callable[[Path], None], said: list[str], sharded: Path) -> None:
    damage(sharded)
    message = message_of(lambda: find_model(sharded).weight_files())
    assert [word for word in said if word not in message] == []


def test_a_whole_file_passes_and_its_tensors_are_not_read(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1000)}, tmp_path / "whole.safetensors")
    check_safetensors(tmp_path / "whole.safetensors")


def test_the_fingerprint_is_a_hash_of_names_sizes_and_contents(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "model")
    content = (folder / SINGLE_FILE).read_bytes()
    head = json.dumps([SINGLE_FILE, len(content)]).encode()
    expected = hashlib.sha256(head + content).hexdigest()
    assert find_model(folder).fingerprint() == f"sha256:{expected}"
    assert hash_files([folder / SINGLE_FILE]) == expected

    (folder / SINGLE_FILE).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert find_model(folder).fingerprint() != f"sha256:{expected}"


def test_the_fingerprint_of_a_gguf_model_is_its_file_s(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert find_model(tmp_path / "m.gguf").fingerprint() == "sha256:" + hash_files([tmp_path / "m.gguf"])


# --- Files that are not what they seem ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["config.json", SINGLE_FILE, "tokenizer.json", "modeling_eabf.py", "eabf_run.json", "LICENSE"]
)
def test_a_link_out_of_the_folder_is_not_followed(name: str, llama_copy: Path, tmp_path: Path) -> None:
    outside = tmp_path / f"outside-{name}"
    if (llama_copy / name).is_file():
        (llama_copy / name).rename(outside)
    else:
        outside.touch()
    (llama_copy / name).symlink_to(outside)
    message = message_of(lambda: find_model(llama_copy))
    assert [word for word in (name, str(outside), "link") if word not in message] == []


def test_a_link_inside_the_folder_and_a_link_to_the_folder_are_followed(llama_copy: Path, tmp_path: Path) -> None:
    (llama_copy / SINGLE_FILE).rename(llama_copy / "real")
    (llama_copy / SINGLE_FILE).symlink_to("real")
    (tmp_path / "name").symlink_to(llama_copy)
    assert [path.name for path in find_model(tmp_path / "name").weight_files()] == [SINGLE_FILE]


def hub_cache(model: Path, root: Path) -> Path:
    """The model as huggingface_hub keeps it: a snapshot of links to blobs."""
    snapshot = root / "models--owner--model" / "snapshots" / "abc123"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    return snapshot


def test_the_links_of_the_hub_cache_are_followed_and_no_others(tiny_llama_folder: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(tiny_llama_folder, tmp_path)
    assert [path.name for path in find_model(snapshot).weight_files()] == [SINGLE_FILE]
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main.json").write_text("{}")
    (snapshot / "extra.json").symlink_to("../../refs/main.json")
    assert "outside its folder" in message_of(lambda: find_model(snapshot))


def test_a_link_chain_that_leaves_the_hub_cache_is_not_followed(tiny_llama_folder: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(tiny_llama_folder, tmp_path)
    blob = (snapshot / "config.json").resolve()
    blob.rename(tmp_path / "outside.json")
    blob.symlink_to(tmp_path / "outside.json")
    assert "outside its folder" in message_of(lambda: find_model(snapshot))


def test_what_is_no_regular_file_is_not_opened(llama_copy: Path) -> None:
    os.mkfifo(llama_copy / "generation_config_2.json")
    assert "no regular file" in message_of(lambda: find_model(llama_copy))


def test_a_model_and_an_adapter_in_one_folder_are_refused(llama_copy: Path) -> None:
    (llama_copy / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/model"}))
    assert "both a model" in message_of(lambda: find_model(llama_copy))


def write_adapter_settings(folder: Path, settings: object) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "eabf_scaling.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    "settings",
    [{}, {"base_model_name_or_path": None}, {"base_model_name_or_path": ["a"]}, {"base_model_name_or_path": 3}]
    + [{"base_model_name_or_path": "owner/model", "revision": revision} for revision in (1, ["main"], {})],
)
def test_an_adapter_that_names_no_base_is_damaged(settings: object, tmp_path: Path) -> None:
    folder = write_adapter_settings(tmp_path / "adapter", settings)
    assert "does not name a base model" in message_of(lambda: find_model(folder))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"megatron_config": {}, "megatron_core": "some.module"}, "megatron_config"),
        ({"r": 10**9}, "rank 1000000000"),
        ({"r": "8"}, "rank '8'"),
        ({"rank_pattern": {"q_proj": 10**9}}, "rank 1000000000"),
        ({"rank_pattern": [8]}, r"rank \[8\]"),
    ],
)
def test_an_adapter_that_would_import_code_or_never_end_is_not_read(
    settings: dict[str, object], said: str, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    whole = {"peft_type": "LORA", "r": 8, "base_model_name_or_path": str(tiny_llama_folder)}
    folder = write_adapter_settings(tmp_path / "adapter", whole | settings)
    with pytest.raises(CheckpointError, match=said):
        find_model(folder)


def test_an_adapter_on_itself_is_refused(tmp_path: Path) -> None:
    settings = {"peft_type": "LORA", "r": 8, "base_model_name_or_path": str(tmp_path / "adapter")}
    folder = write_adapter_settings(tmp_path / "adapter", settings)
    with pytest.raises(CheckpointError, match="is an adapter itself"):
        find_model(folder)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "~nobody-of-that-name/model", "/" + "x" * 5000, "a/\0", "\0/\0"])
def test_a_name_that_can_be_no_file_is_not_found(name: str, workdir: Path) -> None:
    message_of(lambda: find_model(name))


@pytest.mark.parametrize(
    "name", ["x" * 300 + ".safetensors", "\0.safetensors", "\ud800.safetensors", "a\nb.safetensors", ".safetensors"]
)
def test_an_index_with_an_impossible_name_is_refused_in_one_printable_line(name: str, sharded: Path) -> None:
    write_index(sharded, {"w": name})
    message_of(lambda: find_model(sharded).weight_files()).encode()


@pytest.mark.parametrize("length", [2**27, 2**40, 2**63, 2**64 - 1])
def test_a_header_larger_than_any_is_not_read(length: int, tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{")
    if length == 2**27:
        # Sparse: as long as it says.
        os.truncate(path, length + 8)
    assert str(path) in message_of(lambda: check_safetensors(path))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_config_with_a_number_that_is_not_finite_is_refused(number: str, llama_copy: Path) -> None:
    config = (llama_copy / "config.json").read_text().replace('"rope_theta": 10000.0', f'"rope_theta": {number}')
    (llama_copy / "config.json").write_text(config)
    message = message_of(lambda: find_model(llama_copy).config())
    assert "not finite" in message
    assert "rope_theta" in message
