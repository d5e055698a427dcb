"""What a measurement will do, worked out from the models' small files and the documents alone."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from eabf_cli.core import architectures
from eabf_cli.core.checkpoint import LoadedConfig, load_tokenizer, read_config, stored_dtype
from eabf_cli.core.devices import choose_device, torch_dtype
from eabf_cli.core.entropy.documents import DocumentSet, check_same_tokens, choose_documents, local_sources
from eabf_cli.core.entropy.memory import EntropyMemory, estimate_memory, refuse_too_large
from eabf_cli.core.entropy.positions import choose_positions
from eabf_cli.core.entropy.settings import EntropyConfig
from eabf_cli.core.entropy.store import check_resumable
from eabf_cli.core.entropy.suggestion import SearchPlan, plan_search
from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.files import check_target
from eabf_cli.core.finetune.memory_plan import USABLE_SHARE, available_memory
from eabf_cli.core.patch_checkpoint import MethodRequest, resolve_request
from eabf_cli.core.report import plan_patch
from eabf_cli.core.resolution import Resolution, existing_scaling, original_window
from eabf_cli.core.scaling_config import RopeScalingConfig
from eabf_cli.core.sources import ModelSource, find_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """What a layer is: `kind` "full", "sliding" or "no_rope", and whether its logits are scaled by position."""

    kind: str
    scaled: bool


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to measure.

    Attributes:
        loaded: its configuration, and the method that its checkpoint carries.
        resolution: the method that it is measured under; None as a plain model.
        is_requested: the method is one that was asked for, and not the checkpoint's own.
    """

    source: ModelSource
    loaded: LoadedConfig
    resolution: Resolution | None
    is_requested: bool = False

    @property
    def method(self) -> str | None:
        """The method's name; of a model that transformers scales by itself, what it calls that."""
        return existing_scaling(self.loaded.config) if self.resolution is None else self.resolution.scaling.method

    @property
    def factor(self) -> float | None:
        """The method's factor, where there is a method of ours."""
        return None if self.resolution is None else self.resolution.scaling.factor

    @property
    def window(self) -> int:
        """The pre-trained window in tokens; the whole window of a scaled model that does not tell."""
        if self.resolution is not None:
            return self.resolution.base_config.max_position_embeddings
        return original_window(self.loaded.config) or self.loaded.config.max_position_embeddings

    @property
    def target_window(self) -> int:
        """The window that the model stands under, in tokens."""
        if self.resolution is not None:
            return self.resolution.scaling.max_position_embeddings
        return self.loaded.config.max_position_embeddings

    def layer_kinds(self) -> list[LayerKind]:
        """What each layer is, in order."""
        config = self.loaded.config if self.resolution is None else self.resolution.base_config
        model = architectures.meta_model(config)
        scaled = () if self.resolution is None else plan_patch(model, self.resolution).scaled_layers
        return [
            LayerKind(
                kind="sliding" if layer.is_sliding else "full" if layer.uses_rope else "no_rope",
                scaled=layer.index in scaled,
            )
            for layer in architectures.attention_layers(model)
        ]

    def describe(self) -> dict[str, Any]:
        """What a result says about it."""
        return {
            "model": self.source.name,
            "revision": self.source.revision,
            "method": self.method,
            "factor": self.factor,
            "original_max_position_embeddings": self.window,
            "max_position_embeddings": self.target_window,
        }


@dataclass(frozen=True, kw_only=True)
class EntropyPlan:
    """Everything that is known before weights are loaded."""

    config: EntropyConfig
    subjects: dict[str, Subject]
    documents: DocumentSet
    positions: tuple[int, ...]
    memory: EntropyMemory
    device: torch.device
    available_bytes: int
    search: SearchPlan | None = None

    @property
    def subject(self) -> Subject:
        """The model that is asked about."""
        return self.subjects["model"]

    def describe(self) -> dict[str, Any]:
        """The part of a result that is known already."""
        documents = self.documents
        return self.subject.describe() | {
            "dataset": documents.source,
            "data_hash": documents.data_hash,
            "num_documents": len(documents),
            "num_skipped_documents": documents.num_skipped,
            "length": documents.length,
            "positions": list(self.positions),
            "notes": list(documents.notes),
        }

    def settings(self) -> dict[str, Any]:
        """What decides the numbers, as JSON has it."""
        config = self.config
        fingerprints = {
            f"{side}_{name}": value
            for side, subject in self.subjects.items()
            for name, value in (
                ("weights", subject.source.fingerprint()),
                ("scaling", None if subject.resolution is None else subject.resolution.scaling.to_dict()),
            )
        }
        return fingerprints | {
            "compare": config.compare,
            "documents": self.documents.data_hash,
            "num_documents": len(self.documents),
            "length": self.documents.length,
            "positions": list(self.positions),
            "dtype": config.dtype,
            "scores": config.scores,
            "rows": config.rows,
        }


def plan_entropy(config: EntropyConfig) -> EntropyPlan:
    """Find the models, choose documents, length and positions, and estimate the memory.

    Raises:
        EabfError: whatever a user can put right.
    """
    if config.output is not None and not config.dry_run:
        check_resumable(config.output, resume=config.resume, overwrite=config.overwrite)
    subjects = {"model": _subject(config, config.model, revision=config.revision, request=config.request)}
    if config.compare is not None:
        subjects["compare"] = _subject(config, config.compare)
        _check_comparable(subjects["model"], subjects["compare"])
    if config.output is not None and not config.dry_run:
        folders = tuple((subject.source.base or subject.source).folder for subject in subjects.values())
        check_target(config.output, overwrite=config.overwrite, sources=(*folders, *local_sources(config)))
    wanted = None
    if config.suggest is not None:
        wanted = resolve_request(config.suggest, subjects["model"].loaded)
    device = choose_device(config.device)
    available = available_memory(device)

    def estimate(length: int) -> EntropyMemory:
        return _estimate(config, subjects, length, device)

    subject = subjects["model"]
    tokenizer = load_tokenizer(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)
    documents = choose_documents(
        config,
        tokenizer,
        window=subject.window,
        target=subject.target_window,
        fits=lambda length: estimate(length).total <= USABLE_SHARE * available,
    )
    if config.compare is not None:
        other = load_tokenizer(config.compare, trust_remote_code=config.trust_remote_code)
        check_same_tokens(documents, other, config.compare)
    search = None
    if config.suggest is not None and wanted is not None:
        readers = [document.read for document in documents.documents]
        search = plan_search(readers, tokenizer, wanted.scaling, rebase=config.suggest.rebase, seed=config.seed)
    memory = estimate(documents.length)
    refuse_too_large(memory, available, length=documents.length, device=str(device))
    return EntropyPlan(
        config=config,
        subjects=subjects,
        documents=documents,
        positions=choose_positions(config.positions, documents.length),
        memory=memory,
        device=device,
        available_bytes=available,
        search=search,
    )


def _subject(
    config: EntropyConfig, model: str, *, revision: str | None = None, request: MethodRequest | None = None
) -> Subject:
    source = find_model(model, revision=revision, with_weights=not config.dry_run)
    loaded = read_config(source)
    architectures.check_supported(loaded.config)
    if request is None:
        return Subject(source=source, loaded=loaded, resolution=loaded.resolution)
    resolution = resolve_request(request, loaded)
    # It refuses a method that would find nothing to scale.
    plan_patch(architectures.meta_model(resolution.base_config), resolution)
    return Subject(source=source, loaded=loaded, resolution=resolution, is_requested=True)


def _check_comparable(first: Subject, second: Subject) -> None:
    for field, words in (("num_hidden_layers", "layers"), ("num_attention_heads", "heads")):
        ours, theirs = getattr(first.loaded.config, field), getattr(second.loaded.config, field)
        if ours != theirs:
            raise InvalidConfigError(
                f"{first.source.name} has {ours} {words} and {second.source.name} {theirs}, so their entropies have no "
                "difference: --compare takes a model of the same shape"
            )


def _estimate(config: EntropyConfig, subjects: dict[str, Subject], length: int, device: torch.device) -> EntropyMemory:
    # A list of positions may go beyond a length that is only tried here; how many it has is all that counts.
    rule = config.positions
    try:
        num_positions = len(choose_positions(rule, length))
    except InvalidConfigError:
        num_positions = len(rule)
    dtype = torch_dtype(config.dtype)
    estimates = [
        estimate_memory(
            subject.loaded.config,
            length=length,
            num_positions=num_positions,
            dtype=stored_dtype(subject.source) if isinstance(dtype, str) else dtype,
            device_type=device.type,
            rows=config.rows,
            num_models=len(subjects),
        )
        for subject in subjects.values()
    ]
    return max(estimates, key=lambda memory: memory.total)


def suggested_factor(subject: Subject) -> float:
    """The factor that a suggestion is for: the model's own, else the default one."""
    return subject.factor or RopeScalingConfig.factor
