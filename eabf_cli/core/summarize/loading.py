"""The model that summarizes: its small files first, its weights when all else is known to be right."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from eabf_cli.core import architectures
from eabf_cli.core.checkpoint import LoadedConfig, load_model, load_tokenizer, load_weights, read_config, stored_dtype
from eabf_cli.core.devices import choose_device, has_fast_bfloat16
from eabf_cli.core.errors import CheckpointError, InvalidConfigError
from eabf_cli.core.patching import apply_resolution, describe_patch, remove_method
from eabf_cli.core.sources import ModelSource, find_model
from eabf_cli.core.summarize.compiling import check_compilable
from eabf_cli.core.summarize.default_model import HUB_MODEL, default_model, describe_absence
from eabf_cli.core.summarize.settings import SummarizeConfig
from eabf_cli.core.summarize.window import Window

# Parameters from which a model on a CPU is kept in half precision, where the CPU is good at it.
_LARGE = 1_000_000_000


# What bitsandbytes packs for a CPU are blocks of this many rows, and of as many columns as share a scale.
_PACKED_ROWS = 32
_PACKED_COLUMNS = 64


@dataclass(frozen=True, kw_only=True)
class FoundModel:
    """A model of which the small files are here: its name, configuration and tokenizer."""

    name: str
    source: ModelSource
    loaded: LoadedConfig
    tokenizer: Any
    is_default: bool = False


def find_summarizer(config: SummarizeConfig) -> FoundModel:
    """Look up the model that the configuration names, or the default one, without its weights.

    Raises:
        CheckpointError: it is not there; for the default model the message names both ways to it.
        InvalidConfigError: what it cannot do is asked for.
    """
    name = default_model() if config.model is None else config.model
    try:
        source = find_model(name, revision=config.revision, with_weights=False)
    except CheckpointError as error:
        if config.model is None and name == HUB_MODEL:
            raise CheckpointError(describe_absence()) from error
        raise
    choose_device(config.device)
    if config.load_in_4bit:
        _check_4bit(source)
    loaded = read_config(source)
    if config.compile:
        check_compilable(loaded.config, str(name))
    return FoundModel(
        name=(source.gguf_file or name) if config.model is None else str(name),
        source=source,
        loaded=loaded,
        tokenizer=load_tokenizer(name, revision=config.revision, trust_remote_code=config.trust_remote_code),
        is_default=config.model is None,
    )


def load_summarizer(found: FoundModel, config: SummarizeConfig, window: Window) -> PreTrainedModel:
    """Load the weights, and extend the model to a window.

    Raises:
        CheckpointError, UnsupportedModelError: see `load_model`.
    """
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, found.source, found.loaded.config, device)
    options: dict[str, Any] = {"dtype": dtype}
    if config.load_in_4bit:
        # Linear layers in NF4 with double quantisation, the head and the rest in `dtype`.
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["lm_head"],
        )
        options |= {"device_map": {"": device}, "quantization_config": quantization}
    if found.source.base is not None:
        # An adapter is merged, which needs more than its weights.
        model = load_model(
            found.source.name, revision=config.revision, dtype=str(dtype).removeprefix("torch."), device=str(device)
        )
    else:
        # Not `load_model`, which would parse a GGUF file again for its configuration; and now with the weights.
        source = find_model(found.source.name, revision=config.revision)
        model = load_weights(source, found.loaded.config, **options).eval()
        if config.load_in_4bit:
            _keep_unpackable(model)
        else:
            model = model.to(device)
        if found.loaded.resolution is not None:
            apply_resolution(model, found.loaded.resolution)
    change_window(model, window)
    return model


def _keep_unpackable(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from packing 4-bit weights for a CPU's bfloat16 instructions where their sizes forbid it.

    It would do so at the first product, and stop at an assertion; the weights as they are give the same, slower.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            is_packable = module.out_features % _PACKED_ROWS == 0 and module.in_features % _PACKED_COLUMNS == 0
            module.support_avx512bf16_for_cpu = is_packable


def change_window(model: PreTrainedModel, window: Window) -> None:
    """Put a window's method on a model, in place of another that is on it; a checkpoint's own stays."""
    if window.is_own:
        return
    if describe_patch(model) is not None:
        remove_method(model)
    if window.extension is not None:
        apply_resolution(model, window.extension)


def choose_dtype(dtype: str, source: ModelSource, config: PretrainedConfig, device: torch.device) -> torch.dtype:
    """The dtype of the weights: as asked for; "auto" is what they are stored in, on a CPU float32 for small models.

    Behind 15,000 tokens, a CPU with instructions for bfloat16 took 0.61 s for a token of a 135M model in bfloat16
    and 0.18 s in float32; where weights are most of what is read, half of them is less. A GGUF file holds fewer
    bits than bfloat16 anyway.
    """
    if dtype != "auto":
        return getattr(torch, dtype)
    stored = torch.bfloat16 if source.gguf_file is not None else stored_dtype(source)
    if device.type == "cpu":
        is_small = architectures.meta_model(config).num_parameters() < _LARGE
        return torch.float32 if is_small or not has_fast_bfloat16(device) else stored
    if device.type == "cuda" and stored == torch.bfloat16 and not has_fast_bfloat16(device):
        return torch.float16
    return stored


def _check_4bit(source: ModelSource) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InvalidConfigError("--load-in-4bit needs bitsandbytes, which is not installed: pip install bitsandbytes")
    if source.gguf_file is not None or source.base is not None:
        kind = "an adapter" if source.base is not None else "a GGUF file, whose weights are quantised already"
        raise InvalidConfigError(
            f"--load-in-4bit takes a checkpoint in safetensors, but {source.name} is {kind}: leave the option out"
        )
