"""The original of an extended model is what its records name, not the model with its method taken off."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from eabf_cli.core.errors import CheckpointError, InvalidConfigError
from eabf_cli.core.evals.original import find_original
from eabf_cli.core.files import read_json, write_json
from eabf_cli.core.patch_checkpoint import MethodRequest, PatchConfig, patch_checkpoint
from eabf_cli.core.sources import find_model


@pytest.fixture(scope="module")
def patched(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("patched") / "model"
    patch_checkpoint(PatchConfig(model=str(tiny_llama_folder), output=folder))
    return folder


def test_the_record_names_it(patched: Path, tiny_llama_folder: Path) -> None:
    original = find_original(find_model(patched), None)
    assert original.source.folder == tiny_llama_folder
    assert original.reason == "named by eabf_run.json"


def test_records_are_followed_to_the_first_model(patched: Path, tiny_llama_folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    patch_checkpoint(PatchConfig(model=str(patched), output=again, request=MethodRequest(method="yarn", rebase=True)))
    assert find_original(find_model(again), None).source.folder == tiny_llama_folder


def test_what_the_user_names_wins(patched: Path, tmp_path: Path, tiny_llama_folder: Path) -> None:
    other = Path(shutil.copytree(tiny_llama_folder, tmp_path / "other"))
    original = find_original(find_model(patched), str(other))
    assert (original.source.folder, original.reason) == (other, "as named with --original")
    with pytest.raises(CheckpointError, match="nowhere"):
        find_original(find_model(patched), "nowhere")


def test_a_model_without_a_record_needs_a_name(tiny_llama_folder: Path) -> None:
    with pytest.raises(InvalidConfigError, match="name that with --original"):
        find_original(find_model(tiny_llama_folder), None)


def test_a_record_of_a_model_that_is_gone_says_so(patched: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(patched, tmp_path / "moved"))
    write_json(folder / "eabf_run.json", read_json(folder / "eabf_run.json") | {"model": "/gone/model"})
    with pytest.raises(InvalidConfigError, match=r"made from '/gone/model', which cannot be had(.|\n)*--original"):
        find_original(find_model(folder), None)


def test_an_adapter_is_made_from_its_base(patched: Path) -> None:
    base = find_model(patched)
    adapter = type(base)(name="adapter", folder=patched, base=base)
    original = find_original(adapter, None)
    # The base is an extended model here, and has a record of its own.
    assert original.reason == "the base of the adapter adapter"
    assert original.source.folder != patched


def test_records_in_a_circle_end(patched: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(patched, tmp_path / "circle"))
    write_json(folder / "eabf_run.json", read_json(folder / "eabf_run.json") | {"model": str(folder)})
    assert find_original(find_model(folder), None).source.folder == folder
