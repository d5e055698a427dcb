"""What an export will write, worked out from the small files: every refusal that needs no weights is made here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eabf_cli.core import architectures
from eabf_cli.core.checkpoint import LoadedConfig, has_tokenizer, read_config
from eabf_cli.core.checkpoint_format import check_can_save, join_config
from eabf_cli.core.errors import CheckpointError, InvalidConfigError, UnsupportedModelError
from eabf_cli.core.export.compat import compat_scaling
from eabf_cli.core.export.provenance import Provenance, find_provenance
from eabf_cli.core.export.runs import default_output, newest_run
from eabf_cli.core.export.settings import ExportConfig
from eabf_cli.core.export.weights import WeightsPlan, plan_weights
from eabf_cli.core.patch_checkpoint import raw_without_scaling
from eabf_cli.core.report import PatchReport, plan_patch
from eabf_cli.core.resolution import Resolution, resolve_scaling
from eabf_cli.core.scaling_config import RopeScalingConfig
from eabf_cli.core.sources import ModelSource, find_model


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """An export, nothing written yet.

    Attributes:
        resolution: the method that the written checkpoint carries.
        compat: the same where it is not the source's own (`ExportConfig.compat`).
        joined: the `config.json` to write.
        weights: None where the model has to be loaded for them, and in a dry run of a Hub source.
        tokenizer: the model whose tokenizer files are copied; None where there are none to copy.
    """

    source: ModelSource
    loaded: LoadedConfig
    resolution: Resolution
    compat: RopeScalingConfig | None
    report: PatchReport
    joined: dict[str, Any]
    weights: WeightsPlan | None
    tokenizer: ModelSource | None
    provenance: Provenance
    output: Path
    warnings: tuple[str, ...]


def make_plan(config: ExportConfig) -> ExportPlan:
    """Work out what `export_checkpoint` would write.

    Raises:
        EabfError: the source, its form or the combination of settings is refused.
    """
    name = config.source or newest_run()
    # A dry run fetches no weights.
    source = find_model(name, revision=config.source_revision, with_weights=not config.dry_run)
    _refuse_quantised(source)
    loaded = read_config(source)
    if loaded.resolution is None:
        raise UnsupportedModelError(
            f"{source.name} carries no method, so there is nothing that an export would keep: extend it first with "
            f"eabf finetune -m {source.name} (or, without training, eabf patch -m {source.name})"
        )
    compat, resolution = None, loaded.resolution
    if config.compat is not None:
        compat = compat_scaling(resolution.scaling, config.compat, resolution.base_config.model_type)
        resolution = resolve_scaling(resolution.base_config, compat)
    check_can_save(resolution.base_config, resolution.scaling)
    joined = join_config(raw_without_scaling(loaded), resolution.base_config, resolution.scaling)
    if config.dtype != "auto":
        # Older transformers read the other name.
        joined |= {name: config.dtype for name in ("dtype", "torch_dtype") if name in joined or name == "dtype"}
    provenance = find_provenance(source)
    report = plan_patch(architectures.meta_model(resolution.base_config), _with_reason(resolution, provenance))
    tokenizer = _tokenizer_source(source, provenance)
    warnings = [loaded.note] if loaded.note is not None else []
    if tokenizer is None:
        warnings.append(f"{source.name} has no tokenizer files: the output will have none")
    return ExportPlan(
        source=source,
        loaded=loaded,
        resolution=resolution,
        compat=compat,
        report=report,
        joined=joined,
        weights=_weights(source, loaded, config),
        tokenizer=tokenizer,
        provenance=provenance,
        output=config.output or default_output(name, config.compat),
        warnings=tuple(warnings),
    )


def _with_reason(resolution: Resolution, provenance: Provenance) -> Resolution:
    """The same, with the reason for its base frequency that was given when the method was applied."""
    reason = (provenance.record or {}).get("theta_reason")
    return replace(resolution, theta_reason=reason) if isinstance(reason, str) else resolution


def _refuse_quantised(source: ModelSource) -> None:
    base = source.base or source
    if base.gguf_file is None and base.config().get("quantization_config"):
        raise InvalidConfigError(
            f"the weights of {base.name} are stored quantised (quantization_config in its config.json), and are "
            "neither merged nor converted: export from the unquantised model"
        )


def _weights(source: ModelSource, loaded: LoadedConfig, config: ExportConfig) -> WeightsPlan | None:
    is_fetched = not config.dry_run or (source.base or source).revision is None
    return plan_weights(source, loaded.config, config.dtype) if is_fetched else None


def _tokenizer_source(source: ModelSource, provenance: Provenance) -> ModelSource | None:
    """The model that the tokenizer comes from: the source, or what it was made from where it has none."""
    own = source.base or source
    if own.gguf_file is not None or has_tokenizer(own.folder):
        return own
    if provenance.base_model == source.name:
        return None
    try:
        base = find_model(provenance.base_model, revision=provenance.revision, with_weights=False)
    except CheckpointError:
        return None
    return base if base.gguf_file is not None or has_tokenizer(base.folder) else None
