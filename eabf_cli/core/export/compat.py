"""A checkpoint in a form that stock software runs, and what leaving out the scale costs, measured."""

from __future__ import annotations

import math
from typing import Any

from eabf_cli.core.architectures import TEMPERED
from eabf_cli.core.checkpoint import load_model, load_tokenizer
from eabf_cli.core.devices import choose_device, has_fast_bfloat16
from eabf_cli.core.errors import InvalidConfigError, UnsupportedModelError
from eabf_cli.core.evaluation import EvalConfig, Progress, evaluate
from eabf_cli.core.frequencies import doublings
from eabf_cli.core.patching import apply_method, remove_method
from eabf_cli.core.scaling_config import RopeScalingConfig
from eabf_cli.core.sources import ModelSource

_TASKS = ("perplexity", "passkey", "needles")


def compat_scaling(scaling: RopeScalingConfig, method: str, model_type: str) -> RopeScalingConfig:
    """The scaling of the compatible form: the same base frequency and window under another method.

    Args:
        scaling: what the source carries, resolved.
        method: "abf" (the scale is left out) or "native" (the stepwise scale of stock software).
        model_type: of the plain model.

    Raises:
        InvalidConfigError: the source has no scale to leave out, or has that form already.
        UnsupportedModelError: no stock form of this family has a scale.
    """
    if scaling.entry.logit_scale is None or scaling.method == method:
        raise InvalidConfigError(
            f"the source carries the method {scaling.method!r}, which stock software runs as it is: "
            f"leave out --compat {method}"
        )
    if method == "native" and model_type not in ("llama", TEMPERED):
        raise UnsupportedModelError(
            f"stock software has no form of a {model_type!r} model with a scale on its attention logits (only of "
            "'llama'): --compat abf leaves the scale out"
        )
    return RopeScalingConfig(
        method=method,
        factor=scaling.factor,
        original_max_position_embeddings=scaling.original_max_position_embeddings,
        rope_theta=scaling.rope_theta,
    )


def measure_compat(
    source: ModelSource,
    scaling: RopeScalingConfig,
    *,
    tokenizer: ModelSource | None = None,
    device: str = "auto",
    seed: int = 42,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Perplexity and retrieval of a source as it was trained and in its compatible form, on the same prompts.

    No folder is needed: `verify_export` holds the folder to the same weights and method.

    Args:
        source: the model, as `find_model` gives it.
        scaling: of the compatible form (`compat_scaling`).
        tokenizer: the model that the tokenizer is taken from; None: the source.
        progress: called for each of the two in turn.

    Returns:
        `method`, `as_trained` and `compat` (each an `evaluate` result), `differences` (by length; compat minus as
        trained), `summary` (a sentence or two).

    Raises:
        CheckpointError: the source has no tokenizer.
    """
    # Where it is slow, float32 is both faster and closer to what a GPU gives.
    dtype = "auto" if has_fast_bfloat16(choose_device(device)) else "float32"
    owner = tokenizer or source
    tokens = load_tokenizer(owner.name, revision=owner.revision)
    model = load_model(source.name, revision=source.revision, dtype=dtype, device=device)
    config = EvalConfig.quick(tasks=_TASKS, lengths=_lengths(scaling), seed=seed)
    as_trained = evaluate(model, tokens, config, progress=progress)
    remove_method(model)
    apply_method(model, scaling, rebase=True)
    compat = evaluate(model, tokens, config, progress=progress)
    differences = _differences(as_trained, compat)
    return {
        "method": scaling.method,
        "as_trained": as_trained,
        "compat": compat,
        "differences": differences,
        "summary": _summary(differences, scaling),
    }


def _lengths(scaling: RopeScalingConfig) -> tuple[int, ...]:
    """Half the original window, its doublings, and the target."""
    window, target = scaling.original_max_position_embeddings, scaling.max_position_embeddings
    assert window is not None
    return tuple(sorted({window // 2, *doublings(window, target), target}))


def _differences(as_trained: dict[str, Any], compat: dict[str, Any]) -> list[dict[str, Any]]:
    """What each length gives on both sides; what was not measured is None.

    Both sides saw the same documents, so the standard error of the difference, which takes them for independent, is
    an upper bound.
    """
    rows = []
    for length in as_trained["lengths"]:
        losses = [_entry(side["perplexity"], length) for side in (as_trained, compat)]
        answers = [_entry(side["retrieval"], length) for side in (as_trained, compat)]
        errors = [found.get("stderr") for found in losses]
        rows.append(
            {
                "length": length,
                "perplexity": [found.get("perplexity") for found in losses],
                "perplexity_difference": _difference(losses, "perplexity"),
                "perplexity_stderr": None if None in errors else math.hypot(*filter(None, errors)),
                "retrieval": [found.get("accuracy") for found in answers],
                "retrieval_difference": _difference(answers, "accuracy"),
                "num_trials": answers[0].get("num_trials", 0),
            }
        )
    return rows


def _entry(results: list[dict[str, Any]], length: int) -> dict[str, Any]:
    return next((found for found in results if found["length"] == length), {})


def _difference(found: list[dict[str, Any]], name: str) -> float | None:
    before, after = (entry.get(name) for entry in found)
    return None if before is None or after is None else after - before


def _summary(differences: list[dict[str, Any]], scaling: RopeScalingConfig) -> str:
    window = scaling.original_max_position_embeddings
    shown = [next(row for row in differences if row["length"] == window), differences[-1]]
    return "As trained and in this form: " + "; ".join(_shown(row) for row in shown) + "."


def _shown(row: dict[str, Any]) -> str:
    parts = []
    if row["perplexity_difference"] is not None:
        before, after = row["perplexity"]
        error = "" if row["perplexity_stderr"] is None else f" (standard error at most {row['perplexity_stderr']:.2g})"
        parts.append(f"perplexity {before:.4g} and {after:.4g}{error}")
    if row["retrieval_difference"] is not None:
        before, after = row["retrieval"]
        parts.append(f"retrieval {before:.0%} and {after:.0%} of {row['num_trials']}")
    return f"at {row['length']:,} tokens " + (", ".join(parts) or "nothing could be measured")
