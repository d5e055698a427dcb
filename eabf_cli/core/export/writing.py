"""The files of an exported checkpoint, put into a folder."""

from __future__ import annotations

import hashlib
import logging
import shutil
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eabf_cli import modeling_eabf
from eabf_cli.core.card.base_card import CARD_FILE
from eabf_cli.core.checkpoint import load_model, load_tokenizer, stored_dtype
from eabf_cli.core.checkpoint_format import needs_modeling_file
from eabf_cli.core.devices import torch_dtype
from eabf_cli.core.export.plan import ExportPlan
from eabf_cli.core.export.settings import ExportConfig, shard_bytes
from eabf_cli.core.model_card import write_model_card
from eabf_cli.core.patch_checkpoint import copy_if_there, copy_tokenizer, save_tokenizer, tokenizer_files
from eabf_cli.core.patching import apply_resolution, remove_method
from eabf_cli.core.run_record import RUN_FILE
from eabf_cli.core.saving import write_scaled_config
from eabf_cli.core.sources import INDEX_FILE

logger = logging.getLogger(__name__)


def write_checkpoint(plan: ExportPlan, config: ExportConfig, folder: Path, *, compat: dict[str, Any] | None) -> None:
    """Write all files of a checkpoint but its record.

    Args:
        compat: what was measured of a compatible form (`measure_compat`), for the card.

    Raises:
        CheckpointError: weights that cannot be read.
        InvalidConfigError: a weight that the dtype cannot hold.
    """
    if plan.weights is None:
        _write_loaded(plan, config, folder)
    else:
        _write_streamed(plan, config, folder)
    if plan.tokenizer is not None:
        _write_tokenizer(plan, folder)
    for path in plan.provenance.licence_files:
        shutil.copyfile(path, folder / path.name)
    write_model_card(
        folder,
        plan.report,
        base_model=plan.provenance.base_model,
        revision=plan.provenance.revision,
        base_card=plan.provenance.card,
        run=plan.provenance.record,
        compat=compat,
        repo_id=config.hub.repo_id if config.hub is not None else None,
    )


def _write_streamed(plan: ExportPlan, config: ExportConfig, folder: Path) -> None:
    assert plan.weights is not None
    logger.info("Writing %.2f GiB of weights", plan.weights.num_bytes / 2**30)
    with tqdm(
        total=plan.weights.num_bytes, unit="B", unit_scale=True, desc="Writing", disable=not config.show_progress
    ) as bar:
        plan.weights.write(folder, shard_bytes(config.max_shard_size), bar.update)
    copy_if_there((plan.source.base or plan.source).folder / "generation_config.json", folder)
    write_scaled_config(folder, plan.joined, plan.resolution.base_config.model_type, plan.resolution.scaling)


def _write_loaded(plan: ExportPlan, config: ExportConfig, folder: Path) -> None:
    """A model that has to be in memory for it; sums are made in float32 and rounded once."""
    logger.info("Loading %s: its weights cannot be converted one by one", plan.source.name)
    dtype = stored_dtype(plan.source) if config.dtype == "auto" else torch_dtype(config.dtype)
    model = load_model(plan.source.name, revision=config.source_revision, dtype="float32", device="cpu")
    if plan.compat is not None:
        remove_method(model)
        apply_resolution(model, plan.resolution)
    # Casting the model would round its rotary frequencies, too.
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    model.save_pretrained(folder, max_shard_size=shard_bytes(config.max_shard_size))


def _write_tokenizer(plan: ExportPlan, folder: Path) -> None:
    assert plan.tokenizer is not None
    window = plan.resolution.scaling.max_position_embeddings
    if plan.tokenizer.gguf_file is None:
        copy_tokenizer(plan.tokenizer.folder, folder, window)
    else:
        save_tokenizer(load_tokenizer(plan.tokenizer.name), folder, window)


def planned_files(plan: ExportPlan, config: ExportConfig) -> list[dict[str, Any]]:
    """`name` and `bytes` of what `write_checkpoint` and the record will put into a folder.

    Weights count without their header; what is made on the way has no size yet. Of a model that has to be loaded, and
    in a dry run of a Hub model, the weight files are not known.
    """
    sizes: dict[str, int | None] = {}
    if plan.weights is not None:
        for name, members in plan.weights.split(shard_bytes(config.max_shard_size)).filename_to_tensors.items():
            sizes[name] = sum(plan.weights.weights[member].nbytes for member in members)
        if len(sizes) > 1:
            sizes[INDEX_FILE] = None
    sizes["config.json"] = None
    copied = [(plan.source.base or plan.source).folder / "generation_config.json"]
    if needs_modeling_file(plan.resolution.base_config.model_type, plan.resolution.scaling):
        copied.append(Path(modeling_eabf.__file__))
    if plan.tokenizer is not None and plan.tokenizer.gguf_file is None:
        copied += tokenizer_files(plan.tokenizer.folder)
    copied += plan.provenance.licence_files
    sizes |= {path.name: path.stat().st_size for path in copied if path.is_file()}
    if plan.tokenizer is not None:
        sizes["tokenizer_config.json"] = None
    return [{"name": name, "bytes": size} for name, size in (sizes | {CARD_FILE: None, RUN_FILE: None}).items()]


def list_files(folder: Path) -> list[dict[str, Any]]:
    """`name`, `bytes` and `sha256` of every file of a folder."""
    return [describe_file(path) for path in sorted(folder.iterdir())]


def describe_file(path: Path) -> dict[str, Any]:
    """`name`, `bytes` and `sha256` of one file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest}
