"""Hundreds of damaged checkpoints: each is read as what it says, or refused in words; none writes, hangs or crashes.

A case is one checkpoint with one file damaged, drawn from a seed. It goes through every reader: finding, the
configuration, the tokenizer, the plan of an export, the model.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eabf_cli.core.checkpoint import load_model, load_tokenizer, read_config
from eabf_cli.core.errors import EabfError
from eabf_cli.core.export.plan import make_plan
from eabf_cli.core.export.settings import ExportConfig
from eabf_cli.core.method_request import MethodRequest
from eabf_cli.core.patch_checkpoint import PatchConfig, patch_checkpoint
from eabf_cli.core.sources import INDEX_FILE, SINGLE_FILE, find_model
from tests.core.export.test_exporting import write_adapter
from tests.tiny_llama import edit_config, write_tiny_llama

_SECONDS_FOR_A_CASE = 20

JUNK: list[Any] = [
    None, True, False, -1, 0, 1, 2, 63, 2**31, 2**63, 10**400, 0.5, -1.5, 1e-320, 1e308, float("nan"), float("inf"),
    "", "x", "0", "\x00", "\ud800", "é" * 3000, "../../../etc/passwd", "/etc/passwd", "owner/model",
    "model-00001-of-00002.safetensors", "config.json", "default", "yarn", "eabf", "llama3", "float64", "int8", "load",
    "full_attention", "sliding_attention", "flash_attention_2", "kernels-community/flash-attn",
    [], [[]], [None], [0, 1], [10**9], ["full_attention"], {}, {"": None}, {"rope_type": "eabf"}, {"full_attention": 3},
    {"rope_type": "yarn", "factor": 4.0}, {"quant_method": "fp8"}, {"AutoConfig": "modeling.Evil"},
]  # fmt: skip

NAMES = [
    "model_type", "architectures", "auto_map", "attn_implementation", "_attn_implementation", "quantization_config",
    "transformers_weights", "rope_scaling", "rope_parameters", "rope_theta", "eabf_scaling", "max_position_embeddings",
    "num_hidden_layers", "hidden_size", "head_dim", "vocab_size", "num_attention_heads", "num_key_value_heads",
    "layer_types", "sliding_window", "dtype", "torch_dtype", "to_dict", "get_text_config", "attribute_map",
    "sub_configs", "hidden_act", "tie_word_embeddings", "pad_token_id", "text_config", "unscaled_layers", "factor",
    "original_max_position_embeddings", "base_model_type", "weight_map", "metadata", "tokenizer_class",
    "chat_template", "added_tokens_decoder", "extra_special_tokens", "model_max_length", "per_layer_config",
]  # fmt: skip


def deep(depth: int = 100_000) -> str:
    return "[" * depth + "]" * depth


def containers(value: Any) -> Iterator[Any]:
    """Every non-empty object and list in a JSON value."""
    if isinstance(value, dict | list) and value:
        yield value
        for part in value.values() if isinstance(value, dict) else value:
            yield from containers(part)


def mutate_json(content: bytes, rng: random.Random) -> bytes:
    """Change one place of a JSON document, or the document itself."""
    value = json.loads(content)
    kind = rng.choice(["replace", "replace", "replace", "add", "add", "drop", "swap", "whole", "deep", "cut", "bytes"])
    if kind == "cut":
        return content[: rng.randrange(len(content))]
    if kind == "bytes":
        return flip_bytes(content, rng)
    if kind == "deep":
        return json.dumps(value).replace('": ', '": ' + deep() + ', "x": ', 1).encode()
    if kind == "whole":
        return json.dumps(rng.choice(JUNK)).encode()
    # The top level is what readers use most.
    place = value if rng.random() < 0.5 else rng.choice(list(containers(value)))
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    key = rng.choice(keys)
    if kind == "drop":
        del place[key]
    elif kind == "swap":
        other = rng.choice(keys)
        place[key], place[other] = place[other], place[key]
    elif kind == "add" and isinstance(place, dict):
        place[rng.choice(NAMES)] = rng.choice(JUNK)
    else:
        place[key] = rng.choice(JUNK)
    return json.dumps(value).encode()


def flip_bytes(content: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    return bytes(damaged)


def mutate_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Change the header of a safetensors file, its length, or the file's."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    kind = rng.choice(["json", "json", "json", "length", "cut", "longer", "flip", "tensor", "tensor", "tensor"])
    if kind == "length":
        return struct.pack("<Q", rng.choice([0, 1, length - 1, length + 1, 2**27, 2**40, 2**64 - 1])) + content[8:]
    if kind == "cut":
        return content[: rng.choice([0, 4, 8, 20, length, len(content) - 1])]
    if kind == "longer":
        return content + b"\0" * rng.randint(1, 64)
    if kind == "flip":
        header = flip_bytes(header, rng)
    elif kind == "json":
        header = mutate_json(header, rng)
    else:
        tensors = json.loads(header)
        name = rng.choice([name for name in tensors if name != "__metadata__"])
        entry = tensors[name]
        change = rng.choice(["dtype", "shape", "offsets", "name", "turn"])
        if change == "dtype":
            entry["dtype"] = rng.choice(["F16", "BF16", "F64", "I32", "I64", "U8", "BOOL", "F8_E4M3", "X", ""])
        elif change == "shape":
            entry["shape"] = rng.choice([[], [0], [-1], [2**62, 4], [1, *entry["shape"]], entry["shape"][:1], ["a"]])
        elif change == "offsets":
            entry["data_offsets"] = rng.choice(
                [[0, 0], [8, 4], [0, 2**63], [-1, 4], [], [0], entry["data_offsets"] * 2]
            )
        elif change == "name":
            tensors[
                rng.choice(["lm_head.weight", "x", "", "__metadata__", "model.layers.99.input_layernorm.weight"])
            ] = tensors.pop(name)
        else:
            entry["shape"] = entry["shape"][::-1]
        header = json.dumps(tensors).encode()
    return struct.pack("<Q", len(header)) + header + data


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": mutate_json,
    ".safetensors": mutate_safetensors,
}


def write_forms(folder: Path) -> dict[str, Path]:
    """A checkpoint of each form that is read, small and whole."""
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    plain = write_tiny_llama(folder / "plain", max_shard_size="200KB", **sizes)
    assert (plain / INDEX_FILE).is_file()
    forms = {}
    for method in ("eabf", "native", "yarn"):
        request = MethodRequest(method=method)
        patch_checkpoint(PatchConfig(model=str(plain), output=folder / method, request=request))
        forms[method] = folder / method
    released = folder / "released"
    shutil.copytree(write_tiny_llama(folder / "single", **sizes), released)
    edit_config(released, drop=("rope_theta", "rope_parameters"), rope_scaling={"type": "eabf", "factor": 4.0})
    return forms | {"released": released}


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_forms(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="module")
def adapter(forms: dict[str, Path]) -> Path:
    """An adapter on the first form's plain model."""
    root = forms["eabf"].parent
    return write_adapter(root / "adapter", root / "plain")


@contextmanager
def damaged(path: Path, content: bytes) -> Iterator[None]:
    """A file has other content for a while."""
    right = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(right)


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def files_below(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def is_read_or_refused(read: Callable[[], Any]) -> bool:
    """Whether something came back; if not, it was refused in one to three lines that can be printed."""
    try:
        read()
    except EabfError as error:
        message = str(error)
        assert 1 <= len(message.splitlines()) <= 3
        assert len(message) < 10_000
        message.encode()
        return False
    return True


def check_model(folder: Path) -> None:
    """The model's weights are those of its files, bit by bit: none was made up, none left out."""
    source = find_model(folder)
    model = load_model(folder, device="cpu")
    assert torch.get_default_dtype() == torch.float32
    stored = {name: weight for path in source.weight_files() for name, weight in load_file(path).items()}
    tied = {"lm_head.weight", "model.embed_tokens.weight"} if model.config.tie_word_embeddings else set()
    for name, weight in model.named_parameters():
        names = stored.keys() & ({name} | (tied if name in tied else set()))
        assert any(torch.equal(weight, stored[name].to(weight.dtype)) for name in names), name


def read_everything(folder: Path, check: Callable[[Path], Any]) -> int:
    """How many of the readers gave something."""
    return sum(
        map(
            is_read_or_refused,
            (
                lambda: read_config(find_model(folder, with_weights=False)),
                lambda: load_tokenizer(folder),
                lambda: make_plan(ExportConfig(source=str(folder), dry_run=True)),
                lambda: check(folder),
            ),
        )
    )


@pytest.mark.parametrize(
    ("file", "num_cases"),
    [
        ("config.json", 200),
        (INDEX_FILE, 50),
        ("*.safetensors", 100),
        ("tokenizer_config.json", 30),
        ("tokenizer.json", 20),
        ("generation_config.json", 20),
        ("eabf_run.json", 20),
    ],
)
def test_a_damaged_checkpoint_is_read_or_refused(
    file: str, num_cases: int, forms: dict[str, Path], workdir: Path
) -> None:
    outcomes = check_cases(file, num_cases, list(forms.values()), check_model)
    assert min(outcomes.values()) > 0, outcomes


@pytest.mark.parametrize(
    ("file", "num_cases"), [("adapter_config.json", 50), ("eabf_scaling.json", 20), ("*.safetensors", 40)]
)
def test_a_damaged_adapter_is_read_or_refused(file: str, num_cases: int, adapter: Path, workdir: Path) -> None:
    outcomes = check_cases(file, num_cases, [adapter], lambda folder: load_model(folder, device="cpu"))
    assert outcomes["refused"] > 0


def check_cases(file: str, num_cases: int, folders: list[Path], check: Callable[[Path], Any]) -> dict[str, int]:
    """Damage a file of one of the folders again and again, and read everything each time.

    Returns:
        how many cases were read as a whole, and of how many something was refused.
    """
    outcomes = {"read": 0, "refused": 0}
    for seed in range(num_cases):
        rng = random.Random(f"{file}/{seed}")
        folder = rng.choice(folders)
        paths = sorted(folder.glob(file))
        if not paths:
            continue
        path = rng.choice(paths)
        content = MUTATIONS[path.suffix](path.read_bytes(), rng)
        with damaged(path, content), time_limit(_SECONDS_FOR_A_CASE):
            before = files_below(folder.parent)
            try:
                num_read = read_everything(folder, check)
            except BaseException as error:
                error.add_note(f"seed {file}/{seed}, {path}")
                raise
            outcomes["read" if num_read == 4 else "refused"] += 1
            assert files_below(folder.parent) == before
    assert os.listdir() == []
    return outcomes


def test_whole_checkpoints_are_read(forms: dict[str, Path], adapter: Path) -> None:
    assert {name: read_everything(folder, check_model) for name, folder in forms.items()} == dict.fromkeys(forms, 4)
    assert read_everything(adapter, lambda folder: load_model(folder, device="cpu")) == 4
    assert not (forms["released"] / INDEX_FILE).exists()
    assert (forms["released"] / SINGLE_FILE).exists()
