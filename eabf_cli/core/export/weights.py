"""A checkpoint's weights, copied, converted and merged shard by shard: memory holds one shard at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from eabf_cli.core import architectures
from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.files import use_default_mode, write_json
from eabf_cli.core.sources import INDEX_FILE, ModelSource

if TYPE_CHECKING:
    from eabf_cli.core.export.merging import AdapterUpdates

# Called with the bytes that were written.
Progress = Callable[[int], None]

# Old Llama checkpoints store the frequencies, which follow from the configuration.
_STALE_BUFFER = "rotary_emb.inv_freq"


@dataclass(frozen=True, kw_only=True)
class WeightsPlan:
    """The weights of a checkpoint that is to be written.

    Attributes:
        files: by the weight's name, where it is stored.
        weights: what will be written, without contents (on the meta device), in the order of the files.
        updates: of the adapter that is merged.
    """

    files: dict[str, Path]
    weights: dict[str, Tensor]
    updates: AdapterUpdates | None = None

    @property
    def num_bytes(self) -> int:
        """Of all weights together."""
        return sum(weight.nbytes for weight in self.weights.values())

    def split(self, max_shard_bytes: int) -> StateDictSplit:
        """Which weight goes to which file; one that is larger than a shard gets a file of its own."""
        return split_torch_state_dict_into_shards(self.weights, max_shard_size=max_shard_bytes)

    def write(self, folder: Path, max_shard_bytes: int, progress: Progress | None = None) -> None:
        """Write the weight files, and their index where there are several.

        Raises:
            InvalidConfigError: a weight that the dtype cannot hold.
        """
        split = self.split(max_shard_bytes)
        for name, members in split.filename_to_tensors.items():
            shard = {member: self._made(member) for member in members}
            save_file(shard, folder / name, metadata={"format": "pt"})
            if progress is not None:
                progress(sum(weight.nbytes for weight in shard.values()))
            del shard
        use_default_mode(folder)
        if split.is_sharded:
            write_json(folder / INDEX_FILE, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})

    def _made(self, name: str) -> Tensor:
        # Opened for each weight: the pages of a file that stays open count as this process's memory.
        with safe_open(str(self.files[name]), framework="pt") as file:
            weight = file.get_tensor(name).clone()
        if self.updates is not None:
            weight = self.updates.apply(name, weight)
        dtype = self.weights[name].dtype
        if weight.dtype == dtype:
            return weight
        rounded = weight.to(dtype)
        if not rounded.isfinite().all() and weight.isfinite().all():
            raise InvalidConfigError(
                f"{name} has values that {str(dtype).removeprefix('torch.')} cannot hold: use --dtype bfloat16"
            )
        return rounded


def plan_weights(source: ModelSource, config: PretrainedConfig, dtype: str) -> WeightsPlan | None:
    """Work out what a source's weights become, from the headers of its files.

    Args:
        source: a model or an adapter.
        config: the plain configuration (`read_config`).
        dtype: "auto" keeps each weight's own.

    Returns:
        None where the weights have to be loaded for it: a GGUF file, or an adapter that cannot be merged weight by
        weight (of another kind, or onto weights that transformers renames when it loads them).

    Raises:
        CheckpointError: weights that are missing, damaged or pickled; a damaged adapter.
    """
    base = source.base or source
    if base.gguf_file is not None:
        return None
    files, weights = _stored(base)
    for alias in _copies(config, files):
        del files[alias], weights[alias]
    updates = None
    if source.base is not None:
        # It imports peft, which takes longer than many an export.
        from eabf_cli.core.export.merging import read_updates

        updates = read_updates(source, config)
        if updates is None or not updates.names <= set(files):
            return None
    if dtype != "auto":
        target = getattr(torch, dtype)
        weights = {
            name: weight.to(target) if weight.is_floating_point() else weight for name, weight in weights.items()
        }
    return WeightsPlan(files=files, weights=weights, updates=updates)


def _stored(source: ModelSource) -> tuple[dict[str, Path], dict[str, Tensor]]:
    files, weights = {}, {}
    for path in source.weight_files():
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                if not name.endswith(_STALE_BUFFER):
                    files[name] = path
                    # A view of the mapped file, of which no page is read.
                    weights[name] = file.get_tensor(name).to("meta")
    return files, weights


def _copies(config: PretrainedConfig, files: dict[str, Path]) -> list[str]:
    """Stored weights that are the same as the one they are tied to."""
    tied = architectures.meta_model(config).all_tied_weights_keys
    found = []
    for alias, name in tied.items():
        if alias in files and name in files:
            with (
                safe_open(str(files[alias]), framework="pt") as first,
                safe_open(str(files[name]), framework="pt") as second,
            ):
                if torch.equal(first.get_tensor(alias), second.get_tensor(name)):
                    found.append(alias)
    return found
