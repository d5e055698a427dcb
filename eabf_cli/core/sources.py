"""Finding a model: the demo alias, a folder, a GGUF file or a Hub id, checked before its weights are read."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

from eabf_cli.core.demo import DEMO_MODEL, demo_model_path
from eabf_cli.core.errors import CheckpointError, first_line
from eabf_cli.core.files import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FOLDER = "adapter"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Beside PEFT's own files: the scaling of the base model, and which weights that base has.
SCALING_FILE = "eabf_scaling.json"
# A full matrix of the largest models has no higher one.
_LARGEST_RANK = 2**15
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# What a model's folder needs beside the weights; pickles and other frameworks' files stay away.
_SMALL_FILES = (
    *("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"),
    # The card and the licence go along with what is made from a model.
    *("README.md", "LICENSE*", "NOTICE*", "USE_POLICY*"),
)
_READ_FILES = (*_SMALL_FILES, "*.safetensors", "*.py")


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model that was found.

    Attributes:
        name: what the user called it.
        folder: where its files are.
        gguf_file: the file's name inside the folder, for a GGUF model.
        revision: the resolved commit of a Hub model.
        base: the model that the adapter in `folder` goes onto; None where `folder` holds a model itself.
    """

    name: str
    folder: Path
    gguf_file: str | None = None
    revision: str | None = None
    base: ModelSource | None = None

    def config(self) -> dict[str, Any]:
        """The model's `config.json` as it stands, an adapter's is its base's (not for GGUF).

        Raises:
            CheckpointError: it is missing or damaged, or has a number that is not finite.
        """
        if self.base is not None:
            return self.base.config()
        raw = read_json(self.folder / "config.json")
        field = _not_finite(raw)
        if field is not None:
            raise CheckpointError(f"{self.folder / 'config.json'} has a number that is not finite: {field}")
        return raw

    def weight_files(self) -> list[Path]:
        """The safetensors files, each checked to be whole.

        Raises:
            CheckpointError: none, a missing or truncated one, a pickle instead, an index that names a
                file outside the folder, or an adapter.
        """
        if self.base is not None:
            raise CheckpointError(
                f"{self.name} is an adapter on {self.base.name} and has no weights of its own: "
                f"merge it first with load_model({self.name!r}).save_pretrained(FOLDER)"
            )
        files = list(_shards(self.folder))
        for path in files:
            check_safetensors(path)
        return files

    def fingerprint(self) -> str:
        """The Hub commit, or the SHA-256 of the weight files; an adapter's is its base's and its own."""
        if self.base is not None:
            return f"{self.base.fingerprint()} adapter sha256:{hash_files([self.folder / ADAPTER_WEIGHTS])}"
        if self.revision is not None:
            return self.revision
        paths = [self.folder / self.gguf_file] if self.gguf_file else list(_shards(self.folder))
        return "sha256:" + hash_files(paths)


def find_model(model: str | Path, *, revision: str | None = None, with_weights: bool = True) -> ModelSource:
    """Find a model by demo alias, folder, GGUF file or Hub id.

    A folder may also hold an adapter (its own folder, or a run folder without merged weights): its base
    model is found, too.

    Args:
        with_weights: download a Hub model's weights too, and hold an adapter's base to the weights that it
            was trained on; without them only the small files are read.

    Raises:
        CheckpointError: nothing of that name, here or on the Hub, or the Hub cannot be reached; an adapter
            whose base is not there, or has other weights by now.
    """
    return _find(str(model), revision, with_weights, is_base=False)


def _find(name: str, revision: str | None, with_weights: bool, *, is_base: bool) -> ModelSource:
    if name == DEMO_MODEL:
        return ModelSource(name=name, folder=demo_model_path())
    path = Path(os.path.expanduser(name))
    # os.path's forms take a name that cannot be one of a file (too long, a NUL in it) for one that is not there.
    if os.path.isdir(path):
        return _from_folder(name, path, with_weights, is_base=is_base)
    if os.path.isfile(path):
        if path.suffix.lower() != ".gguf":
            raise CheckpointError(f"model {name} is a file but no .gguf: give a folder, a Hub id or a GGUF file")
        return ModelSource(name=name, folder=path.parent, gguf_file=path.name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"model {name!r} was not found: it is no folder, no GGUF file, no Hub id (owner/name) and not "
            f"{DEMO_MODEL!r}; give one of these, or leave out -m for the command's default"
        )
    return _from_hub(name, revision, with_weights)


def _from_folder(name: str, path: Path, with_weights: bool, *, is_base: bool) -> ModelSource:
    _check_files(path)
    if (path / "config.json").is_file():
        _check_alone(name, path)
        return ModelSource(name=name, folder=path)
    adapter = _adapter_folder(path)
    if adapter is None:
        raise CheckpointError(_no_config(path))
    if is_base:
        # It may even be the same one.
        raise CheckpointError(f"{path} is an adapter itself")
    _check_files(adapter)
    return ModelSource(name=name, folder=adapter, base=_adapter_base(name, adapter, with_weights))


def _check_alone(name: str, folder: Path) -> None:
    """Refuse an adapter beside a model: transformers would put it on the model without a word."""
    if (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{name} holds both a model (config.json) and an adapter ({ADAPTER_CONFIG}): "
            "put one of them into a folder of its own"
        )


def _check_files(folder: Path) -> None:
    """Refuse links that lead out of a folder, and what is no file at all, under the names that are read.

    The Hub cache is made of links, into the folder `blobs` beside its snapshots.

    Raises:
        CheckpointError: there is one.
    """
    inside = [folder.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append((inside[0].parent.parent / "blobs").resolve())
    for path in sorted(path for pattern in _READ_FILES for path in folder.glob(pattern)):
        if path.is_file():
            if not any(path.resolve().is_relative_to(place) for place in inside):
                raise CheckpointError(
                    f"{path} is a link to {path.resolve()}, outside its folder: it will not be read; put the file "
                    "itself there, or name the folder that it lies in"
                )
        elif path.exists() and not path.is_dir():
            raise CheckpointError(f"{path} is no regular file: it will not be read")


def _not_finite(value: Any, name: str = "") -> str | None:
    """Where a JSON value has a number that is not finite, in words; None where it has none."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{name} is {value}"
    if isinstance(value, dict):
        parts: Iterable[tuple[str, Any]] = ((f"{name}.{key}" if name else key, part) for key, part in value.items())
    elif isinstance(value, list):
        parts = ((name, part) for part in value)
    else:
        return None
    return next((found for key, part in parts if (found := _not_finite(part, key)) is not None), None)


def _adapter_folder(path: Path) -> Path | None:
    """The adapter that a folder stands for: itself, or a finished run's."""
    # While a run has checkpoints it is not finished, whatever lies beside them.
    found = [path] if any(path.glob("checkpoint-*")) else [path, path / ADAPTER_FOLDER]
    return next((folder for folder in found if os.path.isfile(folder / ADAPTER_CONFIG)), None)


def _adapter_base(name: str, adapter: Path, with_weights: bool) -> ModelSource:
    settings = read_json(adapter / ADAPTER_CONFIG)
    base_name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(base_name, str) or not isinstance(revision, str | None):
        raise CheckpointError(
            f"{adapter / ADAPTER_CONFIG} does not name a base model (base_model_name_or_path {base_name!r}, revision "
            f"{revision!r}): the adapter was damaged"
        )
    _check_adapter_form(adapter, settings)
    if not (adapter / SCALING_FILE).is_file():
        raise CheckpointError(
            f"adapter {adapter} has no {SCALING_FILE}, so the scaling of its base model {base_name!r} is not known: "
            "it was written by other software, or not to its end"
        )
    try:
        base = _find(base_name, revision, with_weights, is_base=True)
    except CheckpointError as error:
        is_gone = os.path.isabs(base_name) and not os.path.exists(base_name)
        reason = "which is not there any more" if is_gone else f"which cannot be had: {error}"
        raise CheckpointError(
            f"{name} is an adapter on {base_name!r}, {reason}\n"
            f"Put that model back, or name the place where it is now in {adapter / ADAPTER_CONFIG}"
        ) from error
    # A commit of the Hub stays what it is; a folder may be overwritten.
    if with_weights and base.revision is None:
        recorded = read_json(adapter / SCALING_FILE).get("base_weights")
        if recorded != base.fingerprint():
            raise CheckpointError(
                f"{name} is an adapter on {base_name!r}, whose weights are not those that it was trained on: "
                f"put the old ones back ({recorded}), or train anew"
            )
    return base


def _check_adapter_form(adapter: Path, settings: dict[str, Any]) -> None:
    """Refuse an adapter of another form than `eabf finetune` writes, and what PEFT would import or never end with."""
    kind, megatron = settings.get("peft_type"), settings.get("megatron_config")
    if kind != "LORA" or megatron is not None:
        found = f"peft_type {kind!r}" if kind != "LORA" else "megatron_config"
        raise CheckpointError(f"{adapter / ADAPTER_CONFIG} has {found}, which is not read: only LoRA adapters are")
    patterns = settings.get("rank_pattern") or {}
    for rank in (settings.get("r"), *(patterns.values() if isinstance(patterns, dict) else [patterns])):
        if not isinstance(rank, int) or not 1 <= rank <= _LARGEST_RANK:
            raise CheckpointError(f"{adapter / ADAPTER_CONFIG} has the rank {rank!r}, 1 to {_LARGEST_RANK} can be read")


def _no_config(path: Path) -> str:
    ggufs = sorted(path.glob("*.gguf"))
    if ggufs:
        return f"folder {path} has no config.json but GGUF files: name one, for example {ggufs[0]}"
    checkpoints = sorted(path.glob("checkpoint-*"))
    if checkpoints:
        return f"run folder {path} is not finished: go on with eabf finetune --resume, or name {checkpoints[-1]}"
    return f"folder {path} has no config.json: it is not a model folder"


def _from_hub(name: str, revision: str | None, with_weights: bool) -> ModelSource:
    try:
        # First alone: a repository without it is no model, and nothing else need be fetched.
        hf_hub_download(name, "config.json", revision=revision)
        wanted = [*_SMALL_FILES, "*.safetensors"] if with_weights else [*_SMALL_FILES]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except GatedRepoError as error:
        raise CheckpointError(
            f"model {name!r} is gated: accept its terms on its Hub page, then log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"model {name!r} has no revision {revision!r}: see its branches on the Hub") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"model {name!r} is neither a folder here nor a model on the Hub: check the spelling "
            "(a private one needs `hf auth login`)"
        ) from error
    except HFValidationError as error:
        raise CheckpointError(f"model {name!r} is neither a folder here nor a valid Hub id (owner/name)") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"model {name!r} is no folder here, is not in the Hub cache, and the Hub cannot be reached: "
            "check the spelling and the connection (HF_HUB_OFFLINE, HF_ENDPOINT), or use a local folder"
        ) from error
    except EntryNotFoundError as error:
        raise CheckpointError(f"model {name!r} has no config.json: it is not a transformers model") from error
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"model {name!r} could not be read from the Hub: {first_line(error)}") from error
    _check_alone(name, folder)
    # Folders in the Hub cache are named after the commit.
    return ModelSource(name=name, folder=folder, revision=folder.name)


def _shards(folder: Path) -> Iterable[Path]:
    index_path = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file():
        yield folder / SINGLE_FILE
        return
    if not index_path.is_file():
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"model folder {folder} has only pickled weights ({pickles[0]}), which can run code when read: "
                "convert them to safetensors first (load with transformers in a place you trust, then save_pretrained)"
            )
        raise CheckpointError(f"model folder {folder} has no weights: no {SINGLE_FILE} and no {INDEX_FILE}")
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path} has no weight_map: the index is damaged")
    for name in sorted(set(map(str, weight_map.values()))):
        if Path(name).name != name or name in (".", ".."):
            raise CheckpointError(f"{index_path} names {name!r}, which lies outside the folder: it will not be read")
        if not name.endswith(".safetensors"):
            raise CheckpointError(f"{index_path} names {name!r}, which is no safetensors file: it will not be read")
        if not os.path.isfile(folder / name):
            raise CheckpointError(f"shard {name!r} of {folder} is missing: download the model again")
        yield folder / name


def check_safetensors(path: Path) -> None:
    """Read a safetensors header and compare it with the file's size (the tensors are not read).

    Raises:
        CheckpointError: truncated, a header of more than 100 MB, or not safetensors.
    """
    try:
        with safe_open(str(path), framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or no safetensors file ({first_line(error)}): fetch it again"
        ) from error


def hash_files(paths: Iterable[Path]) -> str:
    """SHA-256 over the names and contents of files, in hex."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(json.dumps([path.name, path.stat().st_size]).encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
