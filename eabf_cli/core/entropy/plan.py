"""What a measurement will do, worked out from the models' small files and the documents alone."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from eabf_cli.core.checkpoint import load_tokenizer, stored_dtype
from eabf_cli.core.device_memory import USABLE_SHARE, available_memory
from eabf_cli.core.devices import choose_device, torch_dtype
from eabf_cli.core.entropy.documents import DocumentSet, check_same_tokens, choose_documents, local_sources
from eabf_cli.core.entropy.memory import EntropyMemory, estimate_memory, refuse_too_large
from eabf_cli.core.entropy.positions import choose_positions
from eabf_cli.core.entropy.settings import EntropyConfig
from eabf_cli.core.entropy.store import check_resumable
from eabf_cli.core.entropy.suggestion import SearchPlan, plan_search
from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.files import check_target
from eabf_cli.core.patch_checkpoint import resolve_request
from eabf_cli.core.scaling_config import RopeScalingConfig
from eabf_cli.core.subject import Subject, find_subject

logger = logging.getLogger(__name__)


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
    if config.output is not None:
        check_resumable(config.output, resume=config.resume, overwrite=config.overwrite)
    with_weights = not config.dry_run
    subjects = {
        "model": find_subject(config.model, revision=config.revision, request=config.request, with_weights=with_weights)
    }
    if config.compare is not None:
        subjects["compare"] = find_subject(config.compare, with_weights=with_weights)
        _check_comparable(subjects["model"], subjects["compare"])
    if config.output is not None:
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
