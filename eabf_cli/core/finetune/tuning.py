"""Which weights a finetune trains: all of them, or LoRA adapters on a frozen (or 4-bit) base.

| tuning | base | trained |
|---|---|---|
| full | float32 | every weight |
| lora | frozen: bfloat16 under mixed precision, else float32 | float32: adapters, norms (, embeddings) |
| qlora | frozen: 4-bit NF4 linear layers, the rest as for lora | the same |

Order: `load_for_tuning`, then the method (`put_method`), then `make_trainable`, and `merge_tuned` after training.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from eabf_cli.core import architectures
from eabf_cli.core.adapters import adapter_base, add_adapter, merge_adapter
from eabf_cli.core.checkpoint import load_model, load_weights, read_config, stored_dtype
from eabf_cli.core.devices import choose_device
from eabf_cli.core.errors import EabfError, InvalidConfigError
from eabf_cli.core.finetune.settings import TUNINGS, LoraSettings
from eabf_cli.core.patching import apply_resolution, describe_patch, remove_method
from eabf_cli.core.resolution import Resolution
from eabf_cli.core.sources import ModelSource, find_model


def check_tuning(tuning: str, source: ModelSource, config: PretrainedConfig, *, device: str = "auto") -> None:
    """Refuse a tuning that this model or machine cannot have, before any weight is loaded.

    Args:
        config: the model's plain configuration.
        device: the command line's name of the device.

    Raises:
        InvalidConfigError: an unknown tuning, or qlora with a GGUF file, with experts that are no linear layers or on a
            device that bitsandbytes does not serve.
        EabfError: qlora without bitsandbytes.
    """
    if tuning not in TUNINGS:
        raise InvalidConfigError(f"unknown tuning {tuning!r}; known: {', '.join(TUNINGS)}")
    if tuning != "qlora":
        return
    if source.gguf_file is not None:
        raise InvalidConfigError(
            f"{source.name} is a GGUF file, which is dequantised when loaded and not quantised again: use --tuning lora"
        )
    layers = architectures.decoder(architectures.meta_model(config)).layers
    if any(weight.ndim == 3 for weight in layers.parameters()):
        raise InvalidConfigError(
            f"the experts of a {config.model_type!r} model are no linear layers, so bitsandbytes would leave most of "
            "its weights as they are: use --tuning lora, which needs no more memory"
        )
    try:
        import bitsandbytes
    except ImportError as error:
        raise EabfError(
            "bitsandbytes is not installed, and --tuning qlora needs it: pip install 'eabf-cli[gpu]', or --tuning lora"
        ) from error
    chosen = choose_device(device).type
    if chosen not in bitsandbytes.supported_torch_devices:
        raise InvalidConfigError(f"bitsandbytes has no 4-bit layers for device {chosen!r}: use --tuning lora")


def load_for_tuning(
    model: str | Path,
    *,
    revision: str | None = None,
    tuning: str,
    device: str = "auto",
    mixed_precision: bool,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Load the model that a tuning starts from, in evaluation mode, with no method but its checkpoint's own.

    Args:
        tuning: one of `TUNINGS`, checked by `check_tuning`.
        mixed_precision: training runs under bfloat16 autocast. A frozen base is bfloat16 then, whatever it is stored
            in: autocast would round it for every product.

    Raises:
        CheckpointError, UnsupportedModelError, InvalidConfigError: as `load_model`.
    """
    dtype = "bfloat16" if mixed_precision and tuning != "full" else "float32"
    if tuning == "qlora":
        return _load_4bit(
            find_model(model, revision=revision), getattr(torch, dtype), choose_device(device), attn_implementation
        )
    return load_model(model, revision=revision, dtype=dtype, device=device, attn_implementation=attn_implementation)


def _load_4bit(
    source: ModelSource, dtype: torch.dtype, device: torch.device, attn_implementation: str | None
) -> PreTrainedModel:
    """The model with its decoder's linear layers in NF4 with double quantisation; the head and the rest in `dtype`."""
    options: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation is not None else {}
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head"],
    )
    loaded = read_config(source)
    model = load_weights(
        source, loaded.config, dtype=dtype, device_map={"": device}, quantization_config=quantization, **options
    )
    for module in model.modules():
        # On a CPU with bfloat16 instructions, bitsandbytes repacks a layer for inference at its first product without
        # a gradient. There is no way back: training after an evaluation would see no gradient through that layer.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    # A method copies the configuration, and what is merged has none of this; the quantiser keeps its own.
    del model.config.quantization_config
    if loaded.resolution is not None:
        apply_resolution(model, loaded.resolution)
    return model.eval()


def put_method(model: PreTrainedModel, resolution: Resolution | None) -> None:
    """Apply a method to a model in place of the one that it carries, if any; None applies none."""
    if describe_patch(model) is not None:
        remove_method(model)
    if resolution is not None:
        apply_resolution(model, resolution)


def make_trainable(
    model: PreTrainedModel, tuning: str, *, source: ModelSource, settings: LoraSettings | None = None, seed: int = 42
) -> PreTrainedModel | PeftModel:
    """The model to give to the Trainer: for full, the same; else with adapters on it, all else frozen.

    The result's `save_pretrained`, which the Trainer calls for its checkpoints, too, writes an adapter folder
    (core/adapters.py), for full a checkpoint.

    Args:
        model: from `load_for_tuning`, with the method applied (without one for a control).
        source: where it came from; kept for merging and named in the adapter's folder.
        settings: for lora and qlora; the defaults where it is None.
        seed: of the adapters' first weights.
    """
    if tuning == "full":
        return model
    return add_adapter(model, _lora_config(model, settings or LoraSettings()), source, seed=seed)


def _lora_config(model: PreTrainedModel, settings: LoraSettings) -> LoraConfig:
    saved = _norms(model) if settings.train_norms else []
    if settings.train_embeddings:
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        saved += [name.rpartition(".")[2] for name, module in model.named_modules() if module in ends]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        # Named one by one: PEFT knows none of our model types.
        target_modules=_linear_layers(model),
        modules_to_save=saved or None,
        ensure_weight_tying=settings.train_embeddings and bool(model.config.tie_word_embeddings),
    )


def _linear_layers(model: PreTrainedModel) -> list[str]:
    """The last names of the linear layers of attention and MLP, in whatever way a family splits or fuses them."""
    layers = architectures.decoder(model).layers
    return sorted({name.rpartition(".")[2] for name, module in layers.named_modules() if isinstance(module, nn.Linear)})


def _norms(model: PreTrainedModel) -> list[str]:
    """The last names of the norms that have weights; one that holds a norm per head counts as one."""
    names: set[str] = set()
    inside: tuple[str, ...] = ()
    for name, module in architectures.decoder(model).named_modules():
        is_norm = "norm" in type(module).__name__.lower() and any(True for _ in module.parameters())
        if is_norm and not name.startswith(inside):
            names.add(name.rpartition(".")[2])
            inside = (*inside, f"{name}.")
    return sorted(names)


def merge_tuned(model: PreTrainedModel | PeftModel, dtype: torch.dtype) -> PreTrainedModel:
    """What training made, as a plain model with the method applied, its weights rounded to `dtype`.

    Adapters are added to the base as it is stored, never to a 4-bit one nor to one that was rounded for training: where
    the trained model holds such a base, the stored one is loaded again, on the CPU. Sums are made in float32, one
    weight at a time, and rounded once.

    Args:
        model: from `make_trainable`; used up, its weights become the result's where they can.
        dtype: of the checkpoint to be written (`stored_dtype` of the source, unless another was asked for).

    Returns:
        a model whose `save_pretrained` writes the checkpoint. Its weights are `dtype` tensors, or, where training went
        on float32 weights, float32 tensors with values of `dtype`: it is measured as its base was.
    """
    if not isinstance(model, PeftModel):
        return _rounded(model, dtype, keep_float32=True)
    base = adapter_base(model)
    is_float32 = base.dtype == torch.float32
    is_stored = is_float32 or base.dtype == dtype == stored_dtype(base.source)
    if base.is_4bit or not is_stored:
        # Loaded wider than `dtype` only where a sum would otherwise be rounded twice.
        wide = is_float32 or dtype != stored_dtype(base.source)
        model = _on_stored_base(model, "float32" if wide else "auto")
    return _rounded(merge_adapter(model), dtype, keep_float32=is_float32)


def _on_stored_base(model: PeftModel, dtype: str) -> PeftModel:
    """The same adapters and method on the base as it is stored, on the CPU."""
    source, below = adapter_base(model).source, model.get_base_model()
    plain = load_model(
        source.name,
        revision=source.revision,
        dtype=dtype,
        device="cpu",
        attn_implementation=below.config._attn_implementation,
    )
    patch = getattr(below, "_eabf_patch", None)
    if patch is not None:
        put_method(plain, patch.resolution)
    config = copy.deepcopy(model.active_peft_config)
    config.base_model_name_or_path = None
    result = add_adapter(plain, config, source, seed=0)
    set_peft_model_state_dict(result, get_peft_model_state_dict(model, save_embedding_layers=False))
    return result


@torch.no_grad()
def _rounded(model: PreTrainedModel, dtype: torch.dtype, *, keep_float32: bool) -> PreTrainedModel:
    """Give weights the values of a dtype, and its form as well unless it is told to keep float32.

    Casting the model would round its rotary frequencies, too, which a loaded checkpoint has in float32.
    """
    for weight in model.parameters():
        rounded = weight.data.to(dtype)
        weight.data = rounded.to(weight.dtype) if keep_float32 else rounded
    return model
