"""What a verdict compares, worked out before any weight is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from eabf_cli.core import architectures
from eabf_cli.core.checkpoint import LoadedConfig, load_tokenizer, read_config
from eabf_cli.core.data.tokenization import encode_text
from eabf_cli.core.device_memory import available_memory
from eabf_cli.core.devices import choose_device
from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.evals.lengths import estimate_memory, refuse_too_long
from eabf_cli.core.evals.original import Original, find_original
from eabf_cli.core.evals.run import measuring_dtype
from eabf_cli.core.evals.texts import read_texts
from eabf_cli.core.evals.verdict_rows import Stretch, cut_stretches
from eabf_cli.core.evals.verdict_settings import VerdictConfig
from eabf_cli.core.files import check_target
from eabf_cli.core.method_request import MethodRequest
from eabf_cli.core.patch_checkpoint import resolve_request
from eabf_cli.core.resolution import Resolution
from eabf_cli.core.subject import Subject, find_subject


@dataclass(frozen=True, kw_only=True)
class VerdictPlan:
    """The models, and the stretches of text that they are to predict.

    Attributes:
        subject: the extended model.
        yarn: YaRN on the original model, for the extended model's window.
        bos: what begins every row.
        window: the original model's window, in tokens.
        max_length: the extended model's.
        length: tokens of a piece of a document, BOS counted.
        dataset, data_hash: where the documents come from, and their hash.
        target_tokens, chunk_tokens, query_tokens: as configured, at most an eighth of the original window each.
        notes: what the user should know about the documents.
    """

    config: VerdictConfig
    subject: Subject
    original: Original
    yarn: Resolution
    tokenizer: Any
    bos: tuple[int, ...]
    device: torch.device
    dtype: str
    window: int
    max_length: int
    length: int
    dataset: str
    data_hash: str
    target_tokens: int
    chunk_tokens: int
    query_tokens: int
    stretches: tuple[Stretch, ...]
    notes: tuple[str, ...]

    @property
    def room(self) -> int:
        """Tokens of the original window that are left for what is before the targets."""
        return self.window - len(self.bos) - self.target_tokens

    def describe(self) -> dict[str, Any]:
        """The keys of the result that need no measurement."""
        run = self.config.run
        return {
            "model": self.subject.source.name,
            "revision": self.subject.source.revision,
            "method": self.subject.method,
            "original": self.original.source.name,
            "original_reason": self.original.reason,
            "original_max_position_embeddings": self.window,
            "max_position_embeddings": self.max_length,
            "length": self.length,
            "target_tokens": self.target_tokens,
            "dataset": self.dataset,
            "data_hash": self.data_hash,
            "seed": run.seed,
            "num_documents": len({stretch.document for stretch in self.stretches}),
            "num_stretches": len(self.stretches),
            "notes": list(self.notes),
            "device": str(self.device),
            "dtype": self.dtype,
            "output": None if run.output is None or run.dry_run else str(run.output),
        }


def make_plan(config: VerdictConfig) -> VerdictPlan:
    """Find both models and cut the documents.

    Raises:
        EabfError: a model, its original or the documents are not what a verdict needs.
    """
    run = config.run
    device = choose_device(run.device)
    if run.request is not None:
        raise InvalidConfigError(
            "a verdict is about an extended model as it stands: leave --method out, or write the extended model first "
            "(eabf patch)"
        )
    texts = read_texts(run)
    if run.output is not None:
        check_target(run.output, overwrite=run.overwrite, sources=texts.files)
    subject = find_subject(run.model, revision=run.revision, with_weights=not run.dry_run)
    source, max_length = subject.source, subject.target_window
    original = find_original(source, config.original, with_weights=not run.dry_run)
    original_loaded = read_config(original.source)
    window = _window(original_loaded)
    if max_length <= window:
        raise InvalidConfigError(
            f"{source.name} has a window of {max_length:,} tokens, which is not longer than the {window:,} of its "
            f"original {original.source.name}: there is nothing to compare; --original names another"
        )
    tokenizer = load_tokenizer(source.name, revision=run.revision, trust_remote_code=run.trust_remote_code)
    bos = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    documents = _encode(tokenizer, texts.texts)
    other = load_tokenizer(original.source.name, revision=original.source.revision)
    if _encode(other, texts.texts) != documents:
        raise InvalidConfigError(
            f"{source.name} and {original.source.name} read the documents as other tokens, so their losses cannot be "
            "compared: --original takes the model that the extended one was made from"
        )
    eighth = max(1, window // 8)
    target_tokens = min(config.target_tokens, eighth)
    length, notes = _choose_length(config, documents, len(bos), window, max_length, target_tokens)
    if target_tokens < config.target_tokens:
        notes.append(
            f"stretches of {target_tokens:,} tokens are predicted, not of {config.target_tokens:,}: an eighth of the "
            f"original window of {window:,} at most"
        )
    dtype = measuring_dtype(subject, run.dtype, device)
    _check_memory(config, subject, length, dtype, device)
    longest = sorted(range(len(documents)), key=lambda number: -len(documents[number]))
    stretches = cut_stretches(
        [documents[number] for number in sorted(longest[: run.evaluation.num_documents])],
        num_bos=len(bos),
        window=window,
        length=length,
        target_tokens=target_tokens,
        num_stretches=config.num_stretches,
        max_pieces=config.max_pieces,
    )
    num_left_out = len(documents) - len({stretch.document for stretch in stretches})
    if num_left_out:
        notes.append(
            f"{num_left_out:,} of {len(documents):,} documents are left out: they end inside the original window, or "
            f"others are longer (measured are {run.evaluation.num_documents:,} documents and {config.max_pieces:,} "
            "pieces at most)"
        )
    request = MethodRequest(method="yarn", max_length=max_length, rebase=True)
    return VerdictPlan(
        config=config,
        subject=subject,
        original=original,
        yarn=resolve_request(request, original_loaded),
        tokenizer=tokenizer,
        bos=bos,
        device=device,
        dtype=dtype,
        window=window,
        max_length=max_length,
        length=length,
        dataset=texts.source,
        data_hash=texts.content_hash,
        target_tokens=target_tokens,
        chunk_tokens=min(config.chunk_tokens, eighth),
        query_tokens=min(config.query_tokens, eighth),
        stretches=tuple(stretches),
        notes=(*texts.notes, *notes),
    )


def _window(loaded: LoadedConfig) -> int:
    """Tokens that a model is made for."""
    if loaded.resolution is not None:
        return loaded.resolution.scaling.max_position_embeddings
    window: int = loaded.config.max_position_embeddings
    return window


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Each text's tokens without BOS."""
    num_bos = 0 if tokenizer.bos_token_id is None else 1
    return [encode_text(tokenizer, text).input_ids[num_bos:] for text in texts]


def _check_memory(config: VerdictConfig, subject: Subject, length: int, dtype: str, device: torch.device) -> None:
    resolution = subject.resolution
    shape = architectures.meta_model(subject.loaded.config if resolution is None else resolution.base_config)
    refuse_too_long(
        (length,),
        lambda tokens: estimate_memory(
            shape,
            length=tokens,
            follows_length=subject.method == "dynamic",
            batch_tokens=config.run.evaluation.batch_tokens,
            dtype=getattr(torch, dtype),
            device_type=device.type,
        ),
        available_memory(device),
        device=str(device),
        dtype=getattr(torch, dtype),
    )


def _choose_length(
    config: VerdictConfig,
    documents: Sequence[Sequence[int]],
    num_bos: int,
    window: int,
    max_length: int,
    target_tokens: int,
) -> tuple[int, list[str]]:
    """Tokens of a piece, BOS counted, and what is to be said about it."""
    longest = max(map(len, documents), default=0) + num_bos
    length, notes = config.length, []
    if length is None:
        length = min(max_length, max(longest, window + target_tokens))
        if length < max_length:
            notes.append(f"the longest document has {longest:,} tokens, the extended window {max_length:,}")
    elif length < window + target_tokens:
        raise InvalidConfigError(
            f"--lengths {length} has no {target_tokens} tokens beyond the original window of {window:,}: "
            f"give up to {max_length:,}"
        )
    elif length > max_length:
        notes.append(f"length {length:,} is beyond the extended window of {max_length:,}")
    return length, notes
