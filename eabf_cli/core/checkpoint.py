"""Loading models and tokenizers: plain ones, GGUF files, our checkpoints and the released ones."""

from __future__ import annotations

import logging
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from eabf_cli.core import architectures
from eabf_cli.core.checkpoint_format import SplitConfig, split_config
from eabf_cli.core.devices import choose_device, torch_dtype
from eabf_cli.core.errors import CheckpointError, EabfError, InvalidConfigError, UnsupportedModelError, first_line
from eabf_cli.core.files import read_json
from eabf_cli.core.patching import apply_method, apply_resolution
from eabf_cli.core.resolution import Resolution, resolve_scaling
from eabf_cli.core.scaling_config import MAX_WINDOW, RopeScalingConfig
from eabf_cli.core.sources import SCALING_FILE, ModelSource, find_model

logger = logging.getLogger(__name__)

# As safetensors and torch call them.
_STORED_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
# Far more than any language model has; each is built, if without weights, before it is looked at.
_MOST_LAYERS = 2000
# Weights, so that the smallest models are not judged by what their headers take.
_SLACK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class LoadedConfig:
    """A checkpoint's configuration as transformers reads it, and the method on it.

    Attributes:
        config: the plain configuration, without a method of ours.
        raw: the same as the JSON object it came from.
        resolution: the method that the checkpoint carries, or None.
    """

    config: PretrainedConfig
    raw: dict[str, Any]
    resolution: Resolution | None
    note: str | None = None


def read_config(source: ModelSource, *, unscaled_layers: tuple[int, ...] | None = None) -> LoadedConfig:
    """Read a model's configuration without its weights.

    Args:
        unscaled_layers: read a scaled checkpoint with these layers exempt instead of what it says.

    Raises:
        CheckpointError, UnsupportedModelError, InvalidConfigError: damaged or outside what is supported.
    """
    if source.base is not None:
        return _read_adapted(source, source.base, unscaled_layers)
    if source.gguf_file is not None:
        config = _gguf_config(source)
        return LoadedConfig(config=config, raw=config.to_dict(), resolution=None)
    split = split_config(source.config())
    config = _config_from(split, source)
    if split.scaling is None:
        if unscaled_layers is not None:
            raise InvalidConfigError(f"{source.name} carries no scaling, so unscaled_layers has no meaning for it")
        return LoadedConfig(config=config, raw=split.plain, resolution=None)
    scaling = split.scaling if unscaled_layers is None else split.scaling.replace(unscaled_layers=unscaled_layers)
    resolution = resolve_scaling(config, scaling)
    resolution = replace(resolution, theta_reason=f"from the checkpoint {source.name}", notes=())
    return LoadedConfig(config=config, raw=split.plain, resolution=resolution, note=split.note)


def _read_adapted(adapter: ModelSource, base: ModelSource, unscaled_layers: tuple[int, ...] | None) -> LoadedConfig:
    """The base model's configuration, and the method that the adapter was trained under."""
    loaded = read_config(base)
    recorded = read_json(adapter.folder / SCALING_FILE).get("rope_scaling")
    if recorded is None:
        return loaded
    scaling = RopeScalingConfig.from_dict(recorded)
    if unscaled_layers is not None:
        scaling = scaling.replace(unscaled_layers=unscaled_layers)
    resolution = resolve_scaling(loaded.config, scaling, rebase=True)
    resolution = replace(resolution, theta_reason=f"from the adapter {adapter.name}", notes=())
    return replace(loaded, resolution=resolution)


def _config_from(split: SplitConfig, source: ModelSource) -> PretrainedConfig:
    path = source.folder / "config.json"
    model_type = split.plain.get("model_type")
    if not model_type:
        raise CheckpointError(f"{path} has no model_type: it is not a transformers model")
    kind = architectures.config_class(model_type)
    methods = [name for name in split.plain if callable(getattr(kind, name, None))]
    if methods:
        raise CheckpointError(f"{path} has a field {methods[0]!r}, which no {model_type!r} config has: it was damaged")
    try:
        config = kind.from_dict(dict(split.plain))
    # Any field may hold anything, and transformers checks some of them by using them.
    except Exception as error:
        raise CheckpointError(f"{path} is not a valid {model_type!r} config: {' '.join(str(error).split())}") from error
    _check_numbers(config, path)
    return config


def _check_numbers(config: PretrainedConfig, path: Path) -> None:
    """Refuse values that transformers would take and then never come back from, or give no numbers with."""
    num_layers = getattr(config, "num_hidden_layers", 1)
    if not isinstance(num_layers, int) or not 1 <= num_layers <= _MOST_LAYERS:
        raise CheckpointError(f"{path} has num_hidden_layers {num_layers!r}, 1 to {_MOST_LAYERS} can be read")
    window = getattr(config, "max_position_embeddings", None)
    if window is not None and not (isinstance(window, int) and 1 <= window <= MAX_WINDOW):
        raise CheckpointError(f"{path} has max_position_embeddings {window!r}, 1 to {MAX_WINDOW:,} can be read")
    parameters = getattr(config, "rope_parameters", None) or {}
    for entry in parameters.values() if architectures.is_nested_rope(config) else [parameters]:
        theta = entry.get("rope_theta", 1.0)
        if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta <= sys.float_info.max:
            raise CheckpointError(f"{path} has rope_theta {theta!r}, a positive number is expected")


def _gguf_config(source: ModelSource) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(source.folder, gguf_file=source.gguf_file)
    except (ValueError, OSError, KeyError, IndexError, struct.error) as error:
        raise CheckpointError(f"{source.name} cannot be read as a GGUF model: {str(error).splitlines()[0]}") from error


def load_model(
    model: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    rope_scaling: RopeScalingConfig | Mapping[str, Any] | None = None,
    unscaled_layers: tuple[int, ...] | None = None,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Load a model in evaluation mode, with the method that its checkpoint carries applied.

    Nothing is registered with transformers, and code from the checkpoint is never run: our own
    checkpoints are stock models to which their method is applied.

    Args:
        model: the demo alias `eabf-tiny`, a folder (also of a finetune run), a GGUF file or a Hub id. A
            folder with an adapter gives its base model with the adapter merged in float32.
        revision: branch, tag or commit of a Hub model.
        dtype: "auto" (as stored; float32 for GGUF), "bfloat16", "float16" or "float32".
        device: "auto" (CUDA, else MPS, else the CPU), "cpu", "cuda", "cuda:N" or "mps".
        trust_remote_code: accepted for symmetry; no supported architecture needs it.
        rope_scaling: a method to apply to an unscaled model, as a config or a `rope_scaling` dictionary.
        unscaled_layers: read a scaled checkpoint with these layers exempt instead of what it says.
        attn_implementation: as for `from_pretrained`.

    Raises:
        CheckpointError: not found, damaged, pickled, or of an unreadable form.
        UnsupportedModelError: an architecture without support.
        InvalidConfigError: an unknown dtype or device, or a scaling that makes no sense.
    """
    target = choose_device(device)
    source = find_model(model, revision=revision)
    loaded = read_config(source, unscaled_layers=unscaled_layers)
    options: dict[str, Any] = {"dtype": torch_dtype(dtype)}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    result = load_weights(source.base or source, loaded.config, **options)
    if loaded.note is not None:
        logger.warning("%s: %s", source.name, loaded.note)
    result = result.to(target).eval()
    if loaded.resolution is not None:
        apply_resolution(result, loaded.resolution)
    if source.base is not None:
        # It imports peft, which takes longer than many a model.
        from eabf_cli.core.adapters import load_adapter, merge_adapter

        result = merge_adapter(load_adapter(result, source)).eval()
    if rope_scaling is not None:
        apply_method(result, rope_scaling)
    return result


def load_weights(source: ModelSource, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """The plain model of a source, no method applied.

    Args:
        config: its plain configuration (`read_config`).
        options: as for `from_pretrained`.

    Raises:
        CheckpointError: weights that are missing, damaged, pickled or of another shape.
    """
    if source.gguf_file is not None:
        # With its configuration, so that the file is not parsed once more for it.
        result = AutoModelForCausalLM.from_pretrained(
            source.folder, gguf_file=source.gguf_file, config=config, **options
        )
        # The weights are dequantised by now; what is left of the quantizer forbids to save and to train them.
        for name in ("hf_quantizer", "is_quantized", "quantization_method"):
            vars(result).pop(name, None)
        vars(result.config).pop("quantization_config", None)
        return result
    _check_quantization(source, config)
    _check_amount(source, config)
    try:
        result, info = AutoModelForCausalLM.from_pretrained(
            source.folder,
            config=config,
            use_safetensors=True,
            output_loading_info=True,
            # They are refused below, with their names.
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            **options,
        )
    except (torch.OutOfMemoryError, MemoryError):
        raise
    # Whole files may still hold what no model can be made of.
    except Exception as error:
        raise CheckpointError(f"the weights of {source.name} cannot be loaded: {first_line(error)}") from error
    misshapen = sorted(info["mismatched_keys"])
    if misshapen:
        name, stored, expected = misshapen[0]
        raise CheckpointError(
            f"{source.name} has {len(misshapen)} weights of another shape than its config.json says "
            f"(first: {name}, {tuple(stored)} instead of {tuple(expected)}): fetch it again"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{source.name} lacks {len(missing)} weights of its architecture (first: {missing[0]}): fetch it again"
        )
    return result


def _check_quantization(source: ModelSource, config: PretrainedConfig) -> None:
    """Refuse stored forms whose kernels transformers fetches from the Hub."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    if method != "bitsandbytes":
        raise UnsupportedModelError(
            f"the weights of {source.name} are stored quantised ({method!r}), which is not read: "
            "take the model with its unquantised weights"
        )


def _check_amount(source: ModelSource, config: PretrainedConfig) -> None:
    """Refuse a config that asks for far more weights than there are: they would be made up, in memory."""
    stored = sum(path.stat().st_size for path in source.weight_files())
    num_parameters = architectures.meta_model(config).num_parameters()
    # 4-bit weights have half a byte, and a tied embedding is stored once.
    if num_parameters > 4 * stored + _SLACK:
        raise CheckpointError(
            f"{source.folder / 'config.json'} describes {num_parameters:.3g} weights, the files hold "
            f"{stored / 1e6:,.1f} MB: it does not belong to them"
        )


def stored_dtype(source: ModelSource) -> torch.dtype:
    """The dtype that a model's weights are stored in; float32 for GGUF, which is dequantised.

    Raises:
        CheckpointError: the configuration names another kind.
    """
    source = source.base or source
    if source.gguf_file is not None:
        return torch.float32
    raw = source.config()
    name = raw.get("dtype") or raw.get("torch_dtype") or _dtype_in_files(source)
    if name not in _STORED_DTYPES.values():
        raise CheckpointError(f"{source.folder / 'config.json'} has dtype {name!r}, which is not read")
    return getattr(torch, name)


def _dtype_in_files(source: ModelSource) -> str:
    """The first floating one, which transformers takes, too, where the configuration has none."""
    for path in source.weight_files():
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dictionary)
                dtype = file.get_slice(name).get_dtype()
                if dtype in _STORED_DTYPES:
                    return _STORED_DTYPES[dtype]
    return "float32"


def load_tokenizer(model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Tokenizer:
    """Load the tokenizer of a model (same names as `load_model`).

    Raises:
        CheckpointError: the model has none, or it cannot be read.
    """
    source = find_model(model, revision=revision, with_weights=False)
    if source.base is not None:
        # As beside a merged checkpoint: the base's tokenizer with the window of the method.
        tokenizer = load_tokenizer(source.base.name, revision=source.base.revision)
        resolution = read_config(source).resolution
        if resolution is not None:
            tokenizer.model_max_length = resolution.scaling.max_position_embeddings
        return tokenizer
    options: dict[str, Any] = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    if not source.gguf_file and not has_tokenizer(source.folder):
        raise CheckpointError(f"model {source.name} has no tokenizer files: copy the base model's into its folder")
    try:
        # A config of ours names code that is not needed here: the plain one is given instead.
        if not source.gguf_file:
            options["config"] = read_config(source).config
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=trust_remote_code, **options)
    except EabfError:
        raise
    # The tokenizers library raises plain exceptions.
    except Exception as error:
        raise CheckpointError(f"the tokenizer of {source.name} cannot be read: {first_line(error)}") from error


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer that transformers can load."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
