"""LoRA adapters: onto a model, into its weights, and on disk.

An adapter folder is what PEFT writes (`adapter_config.json` with the base model's name and revision,
`adapter_model.safetensors`) and `eabf_scaling.json`: `rope_scaling`, the method that the base model carried in
training (the Hugging Face form, null for none), and `base_weights`, the fingerprint of the base's weights. The
method is part of what was trained: an adapter on the plain base model is another model.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from transformers import PreTrainedModel

from eabf_cli.core.demo import DEMO_MODEL
from eabf_cli.core.errors import CheckpointError
from eabf_cli.core.files import use_default_mode, write_json
from eabf_cli.core.patching import describe_patch
from eabf_cli.core.sources import ADAPTER_CONFIG, ADAPTER_WEIGHTS, SCALING_FILE, ModelSource, check_safetensors

_NAME = "default"
_BASE = "_eabf_base"

_CARD = """---
{card_data}
---

# LoRA adapter for {base}

Trained with the method below applied to `{base}`, and right only on a model that carries it:

    {scaling}

```python
from eabf_cli import load_model

model = load_model("PATH")  # finds the base model, applies the method, merges the adapter
```
"""


class AdapterBase:
    """What lies below adapters; kept on the adapted model.

    Attributes:
        source: where the model came from.
        dtype: of its frozen weights (of those beside the 4-bit ones).
        is_4bit: its linear layers are quantised.
    """

    def __init__(self, model: PreTrainedModel, source: ModelSource) -> None:
        self.source = source
        self.dtype = model.dtype
        self.is_4bit = getattr(model, "is_loaded_in_4bit", False)

    @cached_property
    def weights(self) -> str:
        """The fingerprint of the base's weights, which are read once for it, not at every checkpoint."""
        return self.source.fingerprint()


def add_adapter(model: PreTrainedModel, config: LoraConfig, source: ModelSource, *, seed: int) -> PeftModel:
    """Put new adapters on a model; what is trained then is float32, all else is frozen.

    `save_pretrained` of the result, which the Trainer calls, too, writes an adapter folder (see this module).

    Args:
        source: where the model came from.
        seed: of the adapters' first weights; the generators of the process are left as they were.
    """
    base = AdapterBase(model, source)
    gpus = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    config.base_model_name_or_path = _lasting_name(source)
    config.revision = source.revision
    setattr(adapted, _BASE, base)
    adapted.save_pretrained = MethodType(save_adapter, adapted)
    return adapted


def adapter_base(model: PeftModel) -> AdapterBase:
    """What lies below adapters of `add_adapter`."""
    return getattr(model, _BASE)


def _lasting_name(source: ModelSource) -> str:
    """A name under which a model is found again from another folder."""
    if source.name == DEMO_MODEL or source.revision is not None:
        return source.name
    folder = source.folder.resolve()
    return str(folder / source.gguf_file if source.gguf_file else folder)


def save_adapter(model: PeftModel, save_directory: str | Path, **kwargs: Any) -> None:
    """Write an adapter folder; bound to the model as `save_pretrained`.

    `eabf_scaling.json` comes last: a folder without it was not written to its end.

    Args:
        kwargs: as for `PeftModel.save_pretrained`.
    """
    folder = Path(save_directory)
    (folder / SCALING_FILE).unlink(missing_ok=True)
    # Trained embeddings are saved as trained modules anyway; to find untrained ones PEFT would ask the Hub for the
    # base's configuration at every checkpoint.
    type(model).save_pretrained(model, str(folder), **kwargs | {"save_embedding_layers": False})
    if not kwargs.get("is_main_process", True):
        return
    use_default_mode(folder)
    scaling = describe_patch(model)
    base = adapter_base(model)
    # PEFT's card is a form that nobody filled in.
    card_data = ModelCardData(
        base_model=base.source.name,
        library_name="peft",
        tags=["lora", "context-extension"],
        pipeline_tag="text-generation",
    )
    text = _CARD.format(card_data=card_data.to_yaml(), base=base.source.name, scaling=scaling or "none")
    ModelCard(text).save(folder / "README.md")
    record = {
        "rope_scaling": scaling.to_dict() if scaling is not None else None,
        "base_weights": base.weights,
    }
    write_json(folder / SCALING_FILE, record)


def load_adapter(model: PreTrainedModel, source: ModelSource) -> PeftModel:
    """Put the adapter of a source onto its base model, which carries the method already.

    Raises:
        CheckpointError: the adapter is damaged, or made for another model.
    """
    check_safetensors(source.folder / ADAPTER_WEIGHTS)
    try:
        adapted = PeftModel.from_pretrained(model, str(source.folder), torch_device=str(model.device))
    # PEFT checks few of its settings before it uses them.
    except Exception as error:
        raise CheckpointError(
            f"the adapter of {source.name} cannot be put on its base model: {' '.join(str(error).split())[:300]}"
        ) from error
    check_complete(source, set(get_peft_model_state_dict(adapted, save_embedding_layers=False)))
    return adapted


def check_complete(source: ModelSource, expected: set[str]) -> None:
    """Refuse an adapter whose weights are not those that its configuration tells of.

    PEFT leaves what it does not find at its first values, with no more than a warning.

    Args:
        expected: the names in its file.

    Raises:
        CheckpointError: some are missing, or there are others.
    """
    with safe_open(str(source.folder / ADAPTER_WEIGHTS), framework="pt") as file:
        stored = set(file.keys())
    if stored != expected:
        raise CheckpointError(
            f"{source.folder / ADAPTER_WEIGHTS} does not hold what {ADAPTER_CONFIG} says (first: "
            f"{min(stored ^ expected)}): the adapter was damaged"
        )


@torch.no_grad()
def merge_adapter(model: PeftModel) -> PreTrainedModel:
    """Add the adapters to the weights below them and take PEFT off again, in place.

    Each sum W + (alpha / rank) B A is made in float32 and rounded once to the dtype of W. Trained modules (norms,
    embeddings) take the places and dtypes of the old ones.

    Args:
        model: on unquantised weights.

    Returns:
        the plain model that was below, with its method.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            weight = module.get_base_layer().weight
            weight.copy_(weight.float() + module.get_delta_weight(_NAME))
        elif isinstance(module, ModulesToSaveWrapper):
            dtype = next(module.original_module.parameters()).dtype
            for trained in module.modules_to_save[_NAME].parameters():
                trained.data = trained.data.to(dtype)
    return model.unload().requires_grad_(True)
