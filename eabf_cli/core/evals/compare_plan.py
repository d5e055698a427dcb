"""What a comparison measures, worked out before any weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from eabf_cli.core import architectures
from eabf_cli.core.checkpoint import read_config
from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.evals.compare_settings import CompareConfig
from eabf_cli.core.evals.run import EvaluationPlan, plan_evaluation
from eabf_cli.core.method_request import MethodRequest
from eabf_cli.core.methods import METHODS
from eabf_cli.core.patch_checkpoint import resolve_request
from eabf_cli.core.report import plan_patch
from eabf_cli.core.resolution import Resolution, original_window
from eabf_cli.core.sources import ModelSource, find_model

ORIGINAL, CUT_CONTROL, LONG_CONTROL = "original", "control-cut", "control-long"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One row of a comparison.

    Attributes:
        name: its key in the result: a method's, or that of a control.
        title: what it is, in words.
        kind: "original", "control" or "method".
        request: what it is finetuned with; of controls that is a method that changes nothing.
        resolution: what is put on the model; None for the model as it stands.
        is_cut: its training samples are cut to the original window.
    """

    name: str
    title: str
    kind: str
    request: MethodRequest | None = None
    resolution: Resolution | None = None
    is_cut: bool = False


@dataclass(frozen=True, kw_only=True)
class ComparePlan:
    """The contenders and what they are measured on.

    Attributes:
        window, target_window: the pre-trained window and the extended one, in tokens.
        measuring: lengths, documents and dtype, planned for the method that needs the most memory.
    """

    config: CompareConfig
    source: ModelSource
    window: int
    target_window: int
    measuring: EvaluationPlan
    contenders: tuple[Contender, ...]

    @property
    def compares_key_tokens(self) -> bool:
        """Whether the original can choose them: from two contexts inside its window, as gains beyond it are noise."""
        return sum(length <= self.window for length in self.measuring.evaluation.lengths or ()) > 1

    def describe(self) -> dict[str, Any]:
        """The keys of the result that need no measurement."""
        config, measuring = self.config, self.measuring
        # Every method starts from the model without its old scaling; what is said about that is said once.
        found = [note for contender in self.contenders if contender.resolution for note in contender.resolution.notes]
        notes = [*dict.fromkeys(found), *measuring.notes]
        if "context_gain" in measuring.evaluation.tasks and not self.compares_key_tokens:
            notes.append("key tokens are not compared: to choose them takes two lengths inside the original window")
        result: dict[str, Any] = {
            "model": self.source.name,
            "revision": self.source.revision,
            "original_max_position_embeddings": self.window,
            "max_position_embeddings": self.target_window,
            "factor": self.target_window / self.window,
            "lengths": list(measuring.evaluation.lengths or ()),
            "tasks": list(measuring.evaluation.tasks),
            "methods": list(config.methods),
            "reference": config.reference_method,
            "confidence": config.confidence,
            "dataset": measuring.texts.source,
            "data_hash": measuring.texts.content_hash,
            "finetuned": config.finetune,
            "seed": config.run.seed,
            "seeds": list(config.seeds) if config.finetune else [],
            "notes": notes,
            "device": str(measuring.device),
            "dtype": measuring.dtype,
        }
        if config.finetune:
            datasets = config.train_source
            named = ", ".join(datasets) if isinstance(datasets, tuple) else str(datasets)
            result |= {"train_dataset": named, "num_samples": config.samples, "too_long": config.too_long}
        return result

    def needs(self) -> dict[str, Any]:
        """Memory and time as `EvaluationPlan.needs`, of all measurements; training is not in them."""
        needs = self.measuring.needs()
        num_models = 1 + (len(self.contenders) - 1) * (len(self.config.seeds) if self.config.finetune else 1)
        if needs["expected_s"] is not None:
            needs["expected_s"] *= num_models
        return needs


def make_plan(config: CompareConfig) -> ComparePlan:
    """Work out every method for the model, and the lengths.

    Raises:
        EabfError: the model, a method or the lengths are refused.
    """
    run = config.run
    source = find_model(run.model, revision=run.revision, with_weights=not run.dry_run)
    loaded = read_config(source)
    request = run.request or MethodRequest()
    _check_request(config, request)
    window = request.original_length or original_window(loaded.config)
    if window is None:
        raise InvalidConfigError(f"{source.name} does not tell its original window: give it with --original-length")
    request = _with_target(config, request, window)
    requests = {name: _request_for(name, request) for name in config.methods}
    resolutions = {name: resolve_request(found, loaded) for name, found in requests.items()}
    for resolution in resolutions.values():
        # It refuses a method that would find nothing to scale.
        plan_patch(architectures.meta_model(resolution.base_config), resolution)
    # A method whose frequencies follow the length of a call reads each text in one piece, which takes the most memory.
    heaviest = "dynamic" if "dynamic" in requests else config.methods[0]
    return ComparePlan(
        config=config,
        source=source,
        window=window,
        target_window=resolutions[heaviest].scaling.max_position_embeddings,
        measuring=plan_evaluation(replace(run, request=requests[heaviest], output=None)),
        contenders=_contenders(config, request, requests, resolutions),
    )


def _check_request(config: CompareConfig, request: MethodRequest) -> None:
    entries = [METHODS[name] for name in config.methods]
    if request.rope_theta is not None and not any(entry.raises_theta for entry in entries):
        raise InvalidConfigError(f"none of {', '.join(config.methods)} has a free base: leave --rope-theta out")
    if request.unscaled_layers is not None and not any(entry.logit_scale for entry in entries):
        raise InvalidConfigError(f"none of {', '.join(config.methods)} scales logits: leave --unscaled-layers out")


def _with_target(config: CompareConfig, request: MethodRequest, window: int) -> MethodRequest:
    """The request with a target window: without factor and maximal length, the longest length."""
    lengths = config.run.evaluation.lengths
    if request.factor is not None or request.max_length is not None or lengths is None:
        return request
    if max(lengths) <= window:
        raise InvalidConfigError(
            f"lengths {', '.join(f'{length:,}' for length in lengths)} lie inside the model's window of {window:,} "
            "tokens, where no method has anything to do: add a longer one, or give --factor"
        )
    return replace(request, max_length=max(lengths))


def _request_for(method: str, request: MethodRequest) -> MethodRequest:
    """What the shared numbers come to for one method."""
    entry = METHODS[method]
    return replace(
        request,
        method=method,
        rope_theta=request.rope_theta if entry.raises_theta else None,
        unscaled_layers=request.unscaled_layers if entry.logit_scale else None,
    )


def _contenders(
    config: CompareConfig,
    request: MethodRequest,
    requests: Mapping[str, MethodRequest],
    resolutions: Mapping[str, Resolution],
) -> tuple[Contender, ...]:
    found = [Contender(name=ORIGINAL, title="the model as it stands", kind="original")]
    if config.finetune:
        own_theta = resolutions[config.methods[0]].scaling.original_rope_theta
        # A base frequency "adjusted" to the model's own is no method at all, and a window that finetune can train on.
        # With `rebase` it is the base that the model had before its old scaling, which is taken off.
        nothing = replace(request, method="abf", rope_theta=own_theta, unscaled_layers=None)
        found += [
            Contender(
                name=CUT_CONTROL,
                title="no method, the same samples cut to the original window",
                kind="control",
                request=nothing,
                is_cut=True,
            ),
            Contender(name=LONG_CONTROL, title="no method, the same long samples", kind="control", request=nothing),
        ]
    found += [
        Contender(
            name=name, title=METHODS[name].summary, kind="method", request=requests[name], resolution=resolutions[name]
        )
        for name in config.methods
    ]
    return tuple(found)
