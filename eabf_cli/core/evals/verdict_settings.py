"""What `eabf eval --verdict` is asked for. Options read this module, so it imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.evals.settings import EvalRunConfig
from eabf_cli.core.evals.statistics import CONFIDENCE, NUM_RESAMPLES, check_statistics


@dataclass(frozen=True, kw_only=True)
class VerdictConfig:
    """An extended model against what its user would do otherwise, on the user's documents.

    Attributes:
        run: the extended model as it stands, and the documents.
        original: the model it was made from; None takes what the run record (`eabf_run.json`) of the model names.
        length: tokens that the extended model sees, BOS counted; None takes its window, or less where the documents
            end before it.
        target_tokens: tokens of a stretch that is predicted; like the two sizes below at most an eighth of the original
            window.
        num_stretches: stretches in each piece of `length` tokens, spread evenly beyond the original window.
        max_pieces: pieces at most; of more, first pieces of documents come before second ones.
        chunk_tokens: tokens of a chunk that BM25 retrieves.
        query_tokens: the last tokens before a stretch, which BM25 is asked with.
        retrieved_share: share of the original window that retrieved chunks fill; the text just before the stretch
            has the rest.
        num_resamples: bootstrap resamples.
        confidence: that the extended model has to win with, and of the intervals.

    Raises:
        InvalidConfigError: a number that makes no sense.
    """

    run: EvalRunConfig = field(default_factory=EvalRunConfig)
    original: str | None = None
    length: int | None = None
    target_tokens: int = 64
    num_stretches: int = 4
    max_pieces: int = 32
    chunk_tokens: int = 64
    query_tokens: int = 32
    retrieved_share: float = 0.5
    num_resamples: int = NUM_RESAMPLES
    confidence: float = CONFIDENCE

    def __post_init__(self) -> None:
        for name in ("target_tokens", "num_stretches", "max_pieces", "chunk_tokens", "query_tokens"):
            if getattr(self, name) < 1:
                told = "--target-tokens (target_tokens)" if name == "target_tokens" else name
                raise InvalidConfigError(f"{told} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.retrieved_share < 1:
            raise InvalidConfigError(f"retrieved_share must be above 0 and below 1, got {self.retrieved_share}")
        if self.length is not None and self.length < 4:
            raise InvalidConfigError(f"--lengths must be at least 4 tokens, got {self.length}")
        check_statistics(self.num_resamples, self.confidence)
