"""What `eabf eval --verdict` is asked for. Options read this module, so it imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from eabf_cli.core.demo import DEMO_MODEL
from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.evals.statistics import CONFIDENCE, NUM_RESAMPLES, check_statistics


@dataclass(frozen=True, kw_only=True)
class VerdictConfig:
    """An extended model against what its user would do otherwise, on the user's documents.

    Attributes:
        model: the extended model.
        original: the model it was made from; None takes what the run record (`eabf_run.json`) of `model` names.
        documents: their texts; None takes the held-out part of `demo-long`.
        length: tokens that the extended model sees, BOS counted; None takes its window, or less where the documents
            end before it.
        target_tokens: tokens of a stretch that is predicted.
        num_stretches: stretches in each piece of `length` tokens, spread evenly beyond the original window.
        max_pieces: pieces at most; of more, those are taken that leave the fewest documents out.
        chunk_tokens: tokens of a chunk that BM25 retrieves.
        query_tokens: the last tokens before a stretch, which BM25 is asked with.
        retrieved_share: share of the original window that retrieved chunks fill; the text just before the stretch
            has the rest.
        batch_tokens: tokens in a forward pass, unless one row has more.
        num_resamples: bootstrap resamples.
        confidence: that the extended model has to win with, and of the intervals.

    Raises:
        InvalidConfigError: a number that makes no sense.
    """

    model: str = DEMO_MODEL
    revision: str | None = None
    original: str | None = None
    documents: tuple[str, ...] | None = None
    length: int | None = None
    target_tokens: int = 64
    num_stretches: int = 4
    max_pieces: int = 32
    chunk_tokens: int = 64
    query_tokens: int = 32
    retrieved_share: float = 0.5
    batch_tokens: int = 4096
    num_resamples: int = NUM_RESAMPLES
    confidence: float = CONFIDENCE
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    seed: int = 42
    output: Path | None = None
    overwrite: bool = False
    dry_run: bool = False
    show_progress: bool = False

    def __post_init__(self) -> None:
        for name in ("target_tokens", "num_stretches", "max_pieces", "chunk_tokens", "query_tokens", "batch_tokens"):
            if getattr(self, name) < 1:
                raise InvalidConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.retrieved_share < 1:
            raise InvalidConfigError(f"retrieved_share must be above 0 and below 1, got {self.retrieved_share}")
        if self.length is not None and self.length < 4:
            raise InvalidConfigError(f"length must be at least 4 tokens, got {self.length}")
        check_statistics(self.num_resamples, self.confidence)
