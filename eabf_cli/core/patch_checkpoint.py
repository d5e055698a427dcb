"""Writing a scaled checkpoint from a plain one without reading its weights into memory."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from eabf_cli.core import architectures
from eabf_cli.core.card.base_card import read_base_card
from eabf_cli.core.checkpoint import LoadedConfig, has_tokenizer, load_model, load_tokenizer, read_config
from eabf_cli.core.checkpoint_format import check_can_save, join_config
from eabf_cli.core.demo import DEMO_MODEL
from eabf_cli.core.errors import AlreadyScaledError, InvalidConfigError
from eabf_cli.core.files import check_space, check_target, read_json, whole_folder, write_json
from eabf_cli.core.method_request import MethodRequest
from eabf_cli.core.model_card import write_model_card
from eabf_cli.core.patching import apply_resolution
from eabf_cli.core.report import PatchReport, plan_patch
from eabf_cli.core.resolution import Resolution, original_window, refuse_scaled, resolve_scaling
from eabf_cli.core.run_record import run_record, write_run_record
from eabf_cli.core.saving import write_scaled_config
from eabf_cli.core.scaling_config import RopeScalingConfig, choose_factor
from eabf_cli.core.sources import INDEX_FILE, SINGLE_FILE, ModelSource, find_model

_TOKENIZER_CONFIG = "tokenizer_config.json"
# A tokenizer's files by the names that transformers gives them; they are copied byte for byte.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
)


@dataclass(frozen=True, kw_only=True)
class PatchConfig:
    """Arguments of `eabf patch`."""

    model: str = DEMO_MODEL
    revision: str | None = None
    output: Path | None = None
    request: MethodRequest = field(default_factory=MethodRequest)
    dtype: str = "auto"
    overwrite: bool = False
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True)
class PatchPlan:
    """A method worked out for one model, nothing written yet."""

    source: ModelSource
    loaded: LoadedConfig
    resolution: Resolution
    report: PatchReport
    joined: dict[str, Any]
    warnings: tuple[str, ...] = ()


def resolve_request(request: MethodRequest, loaded: LoadedConfig) -> Resolution:
    """Work out a request against a model's configuration.

    Raises:
        AlreadyScaledError: the model is scaled and the request does not say `rebase`.
        InvalidConfigError: numbers that disagree with each other or with the model.
    """
    config = loaded.config
    if loaded.resolution is not None and not request.rebase:
        scaling = loaded.resolution.scaling
        raise AlreadyScaledError(
            f"the model is scaled already ({scaling.method}, factor {scaling.factor:g}, window "
            f"{scaling.max_position_embeddings:,}); --rebase takes that off and starts from its original window "
            f"({scaling.original_max_position_embeddings:,} tokens)"
        )
    architectures.check_supported(config)
    if not request.rebase:
        refuse_scaled(config)
    window = request.original_length or original_window(config)
    if window is None:
        raise InvalidConfigError("the model does not tell its original window: give it with --original-length")
    scaling = RopeScalingConfig(
        method=request.method,
        factor=choose_factor(request.factor, request.max_length, window),
        original_max_position_embeddings=request.original_length,
        rope_theta=request.rope_theta,
        unscaled_layers=request.unscaled_layers,
    )
    resolution = resolve_scaling(config, scaling, rebase=request.rebase)
    if loaded.resolution is not None:
        old = loaded.resolution.scaling
        note = f"removed the checkpoint's {old.method!r} (window {old.max_position_embeddings:,}) before the new method"
        resolution = replace(resolution, notes=(note, *resolution.notes))
    return resolution


def plan_checkpoint(config: PatchConfig) -> PatchPlan:
    """Work out what `patch_checkpoint` would write, from the model's small files alone.

    Raises:
        EabfError: the model, the method or their combination is refused.
    """
    source = find_model(config.model, revision=config.revision, with_weights=not config.dry_run)
    if config.dtype != "auto" and source.gguf_file is None:
        raise InvalidConfigError(
            f"patch copies the weights of {source.name} as they are, so dtype {config.dtype!r} cannot be had: "
            "leave --dtype out (it is for GGUF files, which are dequantised)"
        )
    loaded = read_config(source)
    resolution = resolve_request(config.request, loaded)
    report = plan_patch(architectures.meta_model(resolution.base_config), resolution)
    check_can_save(resolution.base_config, resolution.scaling)
    warnings = []
    if not source.gguf_file and not has_tokenizer(source.folder):
        warnings.append(f"{source.name} has no tokenizer files: the output will have none")
    return PatchPlan(
        source=source,
        loaded=loaded,
        resolution=resolution,
        report=report,
        joined=join_config(raw_without_scaling(loaded), resolution.base_config, resolution.scaling),
        warnings=tuple(warnings),
    )


def patch_checkpoint(config: PatchConfig) -> dict[str, Any]:
    """Write a checkpoint of a model with a method applied, as `eabf patch` does.

    Weights are copied file by file, never loaded (a GGUF file is: it has to be dequantised).

    Returns:
        the result, ready for JSON (docs/api.md).

    Raises:
        EabfError: anything the user can put right; nothing is left behind.
    """
    plan = plan_checkpoint(config)
    scaling = plan.resolution.scaling
    output = config.output or default_output(plan.source.name, scaling)
    # The default folder may be there from an earlier run, which a look at the plan does not mind.
    if config.output is not None or not config.dry_run:
        check_target(output, overwrite=config.overwrite, sources=(plan.source.folder,))
    result = plan.report.to_dict() | {
        "model": plan.source.name,
        "revision": plan.source.revision,
        "output": None if config.dry_run else str(output),
        "changes": config_changes(plan),
        "warnings": list(plan.warnings),
    }
    if config.dry_run:
        return result
    with whole_folder(output, overwrite=config.overwrite) as partial:
        if plan.source.gguf_file is not None:
            _write_from_gguf(plan, config, partial)
        else:
            _copy_weights(plan.source, partial)
            copy_tokenizer(plan.source.folder, partial, scaling.max_position_embeddings)
            copy_if_there(plan.source.folder / "generation_config.json", partial)
            write_scaled_config(partial, plan.joined, plan.resolution.base_config.model_type, scaling)
        write_model_card(
            partial,
            plan.report,
            base_model=plan.source.name,
            revision=plan.source.revision,
            base_card=read_base_card(plan.source.folder),
        )
        arguments = asdict(config) | {"output": str(output)}
        record = run_record("patch", arguments, result | {"weights": plan.source.fingerprint()})
        write_run_record(partial, record)
    return result


def config_changes(plan: PatchPlan) -> dict[str, list[Any]]:
    """The `config.json` fields that differ: name -> [old, new]."""
    return changed_fields(plan.loaded.raw if plan.source.gguf_file else plan.source.config(), plan.joined)


def changed_fields(on_disk: dict[str, Any], written: dict[str, Any]) -> dict[str, list[Any]]:
    """The fields in which two `config.json` differ: name -> [old, new]."""
    old, new = _comparable(on_disk), _comparable(written)
    names = [name for name in (*new, *(name for name in old if name not in new)) if old.get(name) != new.get(name)]
    return {name: [old.get(name), new.get(name)] for name in names}


def _comparable(raw: dict[str, Any]) -> dict[str, Any]:
    """A config with its RoPE fields in the one form that both old and new files can be compared in."""
    parameters = raw.get("rope_parameters") or {}
    flat = {name: value for name, value in raw.items() if name != "rope_parameters"}
    if "full_attention" not in parameters:
        flat.setdefault("rope_theta", parameters.get("rope_theta"))
        return flat
    return raw


def raw_without_scaling(loaded: LoadedConfig) -> dict[str, Any]:
    """A plain configuration's JSON object as `join_config` takes it."""
    return {name: value for name, value in loaded.raw.items() if name != "original_max_position_embeddings"}


def default_output(model: str, scaling: RopeScalingConfig) -> Path:
    """`eabf-runs/NAME`, made from model, method and factor."""
    stem = Path(model).name.removesuffix(".gguf") or "model"
    return Path("eabf-runs") / f"{stem}-{scaling.method}-x{scaling.factor:g}"


def _copy_weights(source: ModelSource, target: Path) -> None:
    files = source.weight_files()
    check_space(target, sum(path.stat().st_size for path in files))
    for path in files:
        # A copy, not a hard link: a later save into either folder would write through a link.
        shutil.copyfile(path.resolve(), target / path.name)
    if files[0].name != SINGLE_FILE:
        shutil.copyfile(source.folder / INDEX_FILE, target / INDEX_FILE)


def copy_tokenizer(source: Path, target: Path, model_max_length: int) -> None:
    """Copy a tokenizer's files byte for byte, but for `model_max_length` in its configuration.

    A tokenizer saved again by transformers 5 would name a class that 4.57 does not have.
    """
    for path in tokenizer_files(source):
        copy_if_there(path, target)
    if (source / _TOKENIZER_CONFIG).is_file():
        settings = read_json(source / _TOKENIZER_CONFIG)
        write_json(target / _TOKENIZER_CONFIG, settings | {"model_max_length": model_max_length})
    elif has_tokenizer(source):
        write_json(target / _TOKENIZER_CONFIG, {"model_max_length": model_max_length})


def tokenizer_files(folder: Path) -> list[Path]:
    """A tokenizer's files, but for its configuration, which is written anew."""
    return [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]


def copy_if_there(path: Path, target: Path) -> None:
    """Copy a file into a folder; nothing happens where there is none."""
    if path.is_file():
        shutil.copyfile(path, target / path.name)


def _write_from_gguf(plan: PatchPlan, config: PatchConfig, target: Path) -> None:
    model = load_model(config.model, dtype=config.dtype, device="cpu")
    apply_resolution(model, plan.resolution)
    model.save_pretrained(target)
    save_tokenizer(load_tokenizer(config.model), target, plan.resolution.scaling.max_position_embeddings)


def save_tokenizer(tokenizer: Any, target: Path, model_max_length: int) -> None:
    """Write a tokenizer that exists only in memory (of a GGUF file) so that transformers 4.57 reads it, too."""
    tokenizer.model_max_length = model_max_length
    tokenizer.save_pretrained(target)
    settings = read_json(target / _TOKENIZER_CONFIG)
    # transformers 5 names a class that 4.57 does not have.
    write_json(target / _TOKENIZER_CONFIG, settings | {"tokenizer_class": "PreTrainedTokenizerFast"})
