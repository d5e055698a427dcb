"""A small search for settings that do better on long text than the published ones, before any training.

What counts is measured, not derived: the loss on long documents inside the pre-trained window and at the target length,
and the loss on passkey answers at both. Half of the documents serve the search; on the other half, and on prompts of
their own, the choice is then held against the default, and has to be better there as well to be suggested.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from transformers import PreTrainedModel

from eabf_cli.core import architectures
from eabf_cli.core.errors import DataError, InvalidConfigError
from eabf_cli.core.evals.language_modeling import Document, context_rows, mean_and_stderr
from eabf_cli.core.evals.retrieval import passkey_rows
from eabf_cli.core.evals.rows import Row
from eabf_cli.core.evals.scoring import score_rows
from eabf_cli.core.methods import METHODS
from eabf_cli.core.patching import apply_method, remove_method
from eabf_cli.core.resolution import resolve_scaling
from eabf_cli.core.scaling_config import RopeScalingConfig

MIN_DOCUMENTS = 4
"""Documents of the target length that a search needs: two to search on, two to confirm."""
MAX_DOCUMENTS = 24
_TARGET_TOKENS = 256
_NUM_PASSKEYS = 6
_DEPTHS = (0.0, 0.5, 1.0)
_BATCH_TOKENS = 4096
_THETA_STEP = 2.0
_LEAST_GAIN = 0.001
"""Nats below which a step is not worth another, however sure it is."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Settings that are tried: a base frequency, and the layers whose logits are left alone."""

    rope_theta: float
    unscaled_layers: tuple[int, ...]

    def describe(self) -> dict[str, Any]:
        """JSON form."""
        return {"rope_theta": self.rope_theta, "unscaled_layers": list(self.unscaled_layers)}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a candidate reaches, in nats per token.

    Attributes:
        inside: of each document, the loss with the pre-trained window as context.
        beyond: of each document, the loss on the same tokens with the whole target length.
        retrieval: of each passkey prompt, the loss on its answer; none in a window too small for a prompt.
    """

    inside: tuple[float, ...]
    beyond: tuple[float, ...]
    retrieval: tuple[float, ...]

    @property
    def loss(self) -> float:
        """What the search lowers: the mean of both losses on text, and the loss on answers."""
        answers = fmean(self.retrieval) if self.retrieval else 0.0
        return 0.5 * fmean(self.inside) + 0.5 * fmean(self.beyond) + answers


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much lower one outcome's loss is than another's on the same documents and prompts, in nats per token.

    Attributes:
        gain, stderr: of the loss as a whole; documents and prompts are drawn independently of each other.
        parts: for "inside", "beyond" and "retrieval" the same apart.
    """

    gain: float
    stderr: float
    parts: dict[str, tuple[float, float]]

    @property
    def is_sure(self) -> bool:
        """Whether the gain is above its own standard error, and worth having."""
        return self.gain > max(self.stderr, _LEAST_GAIN)


@dataclass(kw_only=True)
class SearchResult:
    """What a search found.

    Attributes:
        default: the published settings for this model.
        chosen: what is suggested: the best of the search if it was confirmed, else the default.
        found: the best on the search's own documents.
        tried: every candidate with its loss there, in order.
        confirmed: how much better `found` is than the default on documents and prompts that the search did not see;
            None where the search found nothing better.
        num_documents: (searched on, confirmed on).
    """

    default: Candidate
    chosen: Candidate
    found: Candidate
    tried: list[tuple[Candidate, float]]
    confirmed: Difference | None
    num_documents: tuple[int, int]
    length: int


def search_settings(
    model: PreTrainedModel,
    tokenizer: Any,
    documents: Sequence[Document],
    scaling: RopeScalingConfig,
    *,
    layer_sets: Sequence[tuple[int, ...]] = (),
    rebase: bool = False,
    seed: int = 42,
    progress: Callable[[str], None] = lambda _: None,
) -> SearchResult:
    """Look for a base frequency and exempt layers that serve this model better than a method's default.

    Layers first: the default's, none, and those of `layer_sets`. Then the base, in factors of two up and down from
    the default as long as a step pays, and once in half steps around the best. A step pays if its gain, paired by
    document and prompt, is above its standard error and 0.001 nats; what does not pay is not gone on with.

    Args:
        model: without a method on it; it is left as it came.
        documents: token ids without a begin-of-sequence token. Those shorter than the target length are left out,
            and of the others at most 24 are used: every second one to search, the rest to confirm.
        scaling: a method whose base is free, with its factor; its other fields are the search's beginning.
        rebase: take the model's own scaling off first.
        seed: decides the passkey prompts.
        progress: told each candidate with its loss.

    Raises:
        DataError: fewer than 4 documents of the target length.
        InvalidConfigError: a method whose base is not free.
        AlreadyScaledError, UnsupportedModelError: see `apply_method`.
    """
    resolved = resolve_scaling(architectures.decoder(model).config, scaling, rebase=rebase).scaling
    window, length = resolved.original_max_position_embeddings, resolved.max_position_embeddings
    assert window is not None
    assert isinstance(resolved.rope_theta, float | int)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    long_enough = [document for document in documents if len(document) + len(bos) >= length][:MAX_DOCUMENTS]
    check_searchable(resolved, len(long_enough))
    trial = _Trial(model, tokenizer, resolved, rebase, window, length)
    parts = [trial.rows(long_enough[start::2], bos, seed=2 * seed + start) for start in (0, 1)]
    default = Candidate(rope_theta=float(resolved.rope_theta), unscaled_layers=resolved.unscaled_layers or ())
    search = _Search(measure=lambda candidate: trial.measure(candidate, parts[0]), progress=progress)
    layer_sets = () if scaling.entry.logit_scale is None else ((), *layer_sets)
    found = search.run(default, layer_sets, least_theta=float(resolved.original_rope_theta or 0))
    confirmed = None
    if found != default:
        confirmed = difference(trial.measure(found, parts[1]), trial.measure(default, parts[1]))
    return SearchResult(
        default=default,
        chosen=found if confirmed is not None and confirmed.is_sure else default,
        found=found,
        tried=[(candidate, outcome.loss) for candidate, outcome in search.outcomes.items()],
        confirmed=confirmed,
        num_documents=(len(long_enough[::2]), len(long_enough[1::2])),
        length=length,
    )


def check_searchable(scaling: RopeScalingConfig, num_documents: int) -> None:
    """Refuse a search that cannot be made.

    Args:
        scaling: resolved for a model.
        num_documents: how many have the target length.

    Raises:
        InvalidConfigError: a method whose base is not free.
        DataError: too few documents.
    """
    if not scaling.entry.raises_theta:
        raise InvalidConfigError(
            f"method {scaling.method!r} sets its own base frequency, so there is none to look for; "
            f"free bases have {', '.join(name for name, entry in METHODS.items() if entry.raises_theta)}"
        )
    if num_documents < MIN_DOCUMENTS:
        raise DataError(
            f"a search for factor {scaling.factor:g} needs {MIN_DOCUMENTS} stretches of "
            f"{scaling.max_position_embeddings:,} tokens, and the documents have {num_documents}: "
            "give more or longer ones, or a smaller --factor"
        )


def difference(better: Outcome, worse: Outcome) -> Difference:
    """How much lower the first outcome's losses are, paired by document and prompt."""
    pairs = {
        name: [b - a for a, b in zip(getattr(better, name), getattr(worse, name), strict=True)]
        for name in ("inside", "beyond", "retrieval")
    }
    # The two losses on a document go together.
    text = [0.5 * a + 0.5 * b for a, b in zip(pairs["inside"], pairs["beyond"], strict=True)]
    (text_gain, text_stderr), (answer_gain, answer_stderr) = _mean(text), _mean(pairs["retrieval"])
    return Difference(
        gain=text_gain + answer_gain,
        stderr=math.hypot(text_stderr, answer_stderr),
        parts={name: _mean(values) for name, values in pairs.items()},
    )


def _mean(values: Sequence[float]) -> tuple[float, float]:
    mean, stderr = mean_and_stderr(values)
    return mean or 0.0, stderr or 0.0


@dataclass(kw_only=True)
class _Search:
    """The walk over candidates; each is measured once."""

    measure: Callable[[Candidate], Outcome]
    progress: Callable[[str], None]
    outcomes: dict[Candidate, Outcome] = field(default_factory=dict)

    def run(self, default: Candidate, layer_sets: Sequence[tuple[int, ...]], *, least_theta: float) -> Candidate:
        """The best candidate on the way."""
        best = self._best_layers(default, layer_sets)
        best = self._best_theta(best, _THETA_STEP, least_theta)
        best = self._one_step(best, _steps(best, math.sqrt(_THETA_STEP), least_theta))
        # Another base may want other layers.
        return best if best.rope_theta == default.rope_theta else self._best_layers(best, layer_sets)

    def _best_layers(self, best: Candidate, layer_sets: Sequence[tuple[int, ...]]) -> Candidate:
        return self._one_step(
            best, [Candidate(rope_theta=best.rope_theta, unscaled_layers=layers) for layers in layer_sets]
        )

    def _best_theta(self, best: Candidate, step: float, least_theta: float) -> Candidate:
        while (better := self._one_step(best, _steps(best, step, least_theta))) != best:
            best = better
        return best

    def _one_step(self, best: Candidate, others: Sequence[Candidate]) -> Candidate:
        """The best of some candidates if it is surely better than what there is, else what there is."""
        found = min([best, *others], key=lambda candidate: self._outcome(candidate).loss)
        pays = found != best and difference(self._outcome(found), self._outcome(best)).is_sure
        return found if pays else best

    def _outcome(self, candidate: Candidate) -> Outcome:
        if candidate not in self.outcomes:
            outcome = self.outcomes[candidate] = self.measure(candidate)
            layers = ",".join(map(str, candidate.unscaled_layers)) or "none"
            self.progress(f"rope_theta {candidate.rope_theta:,.0f}, unscaled layers {layers}: {outcome.loss:.4f}")
        return self.outcomes[candidate]


def _steps(candidate: Candidate, step: float, least_theta: float) -> list[Candidate]:
    """The candidate with a smaller and a larger base; never below the model's own, which would shorten its reach."""
    thetas = (candidate.rope_theta / step, candidate.rope_theta * step)
    return [
        Candidate(rope_theta=theta, unscaled_layers=candidate.unscaled_layers)
        for theta in thetas
        if theta >= least_theta
    ]


@dataclass(frozen=True)
class _Trial:
    """Measures candidates on one model."""

    model: PreTrainedModel
    tokenizer: Any
    scaling: RopeScalingConfig
    rebase: bool
    window: int
    length: int

    def rows(self, documents: Sequence[Document], bos: list[int], *, seed: int) -> list[Row]:
        """What every candidate is measured on."""

        rows = context_rows(documents, bos, (self.window, self.length), _TARGET_TOKENS)
        for length in (self.window, self.length):
            with contextlib.suppress(InvalidConfigError):
                rows += passkey_rows(self.tokenizer, length, _DEPTHS, _NUM_PASSKEYS, seed)
        return rows

    def measure(self, candidate: Candidate, rows: Sequence[Row]) -> Outcome:
        """Put a candidate on, measure it, and take it off."""
        apply_method(
            self.model,
            self.scaling.replace(
                rope_theta=candidate.rope_theta, unscaled_layers=candidate.unscaled_layers, original_rope_theta=None
            ),
            rebase=self.rebase,
        )
        try:
            scores = score_rows(self.model, rows, batch_tokens=_BATCH_TOKENS)
        finally:
            remove_method(self.model)
        answers = [score for key, found in scores.items() if key[0] == "passkey" for score in found]
        return Outcome(
            inside=tuple(score.mean_nll for score in scores["context", self.window]),
            beyond=tuple(score.mean_nll for score in scores["context", self.length]),
            retrieval=tuple(score.mean_nll for score in answers),
        )
