"""What an adapter does to the weights of its base, told one weight at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig

from eabf_cli.core import architectures
from eabf_cli.core.adapters import check_complete
from eabf_cli.core.errors import CheckpointError
from eabf_cli.core.sources import ADAPTER_WEIGHTS, ModelSource, check_safetensors

_NAME = "default"
_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """An update W + scaling * B A, by the names of A and B in the adapter's file."""

    inner: str
    outer: str
    scaling: float


@dataclass(frozen=True, kw_only=True)
class AdapterUpdates:
    """All updates of an adapter.

    Attributes:
        low_rank: by the name of the weight in its base.
        trained: weights that take the place of the base's: its name -> the one in the adapter's file.
    """

    source: ModelSource
    low_rank: Mapping[str, LowRank]
    trained: Mapping[str, str]

    @property
    def names(self) -> set[str]:
        """The weights of the base that change."""
        return {*self.low_rank, *self.trained}

    def apply(self, name: str, weight: Tensor) -> Tensor:
        """The updated weight: float32 where something is added to it, else as it is stored.

        The sum is `core/adapters.py`'s: made in float32, to be rounded once by the caller.
        """
        if name not in self.names:
            return weight
        with safe_open(str(self.source.folder / ADAPTER_WEIGHTS), framework="pt") as file:
            if name in self.trained:
                return file.get_tensor(self.trained[name])
            update = self.low_rank[name]
            delta = file.get_tensor(update.outer).float() @ file.get_tensor(update.inner).float()
        return weight.float() + delta * update.scaling


def read_updates(source: ModelSource, config: PretrainedConfig) -> AdapterUpdates | None:
    """The updates of an adapter, worked out by PEFT on a model without weights.

    Args:
        source: an adapter's.
        config: its base's plain configuration.

    Returns:
        None for an adapter of another form than those of `eabf finetune`: it has to be merged in memory.

    Raises:
        CheckpointError: the adapter is damaged, or made for another model.
    """
    check_safetensors(source.folder / ADAPTER_WEIGHTS)
    try:
        settings = PeftConfig.from_pretrained(str(source.folder))
        if not isinstance(settings, LoraConfig):
            return None
        # PEFT warns where it differs from the model's name, which is none here.
        settings.base_model_name_or_path = None
        adapted = get_peft_model(architectures.meta_model(config), settings, low_cpu_mem_usage=True)
    # PEFT checks few of its settings before it uses them.
    except Exception as error:
        raise CheckpointError(
            f"the adapter of {source.name} cannot be put on its base model: {' '.join(str(error).split())[:300]}"
        ) from error
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    check_complete(source, set(expected))
    _check_shapes(source, expected)
    return _updates(source, adapted)


def _check_shapes(source: ModelSource, expected: Mapping[str, Tensor]) -> None:
    with safe_open(str(source.folder / ADAPTER_WEIGHTS), framework="pt") as file:
        for name, weight in expected.items():
            shape = tuple(file.get_slice(name).get_shape())
            if shape != tuple(weight.shape):
                raise CheckpointError(
                    f"the adapter of {source.name} was made for another model: {name} is {shape}, "
                    f"{tuple(weight.shape)} is expected"
                )


def _updates(source: ModelSource, adapted: PeftModel) -> AdapterUpdates | None:
    low_rank, trained = {}, {}
    tied = adapted.get_base_model().all_tied_weights_keys if adapted.active_peft_config.ensure_weight_tying else {}
    for path, module in adapted.named_modules():
        name = path.removeprefix(_PREFIX)
        if isinstance(module, LoraLayer):
            if (
                type(module) is not LoraLinear
                or module.lora_variant
                or module.fan_in_fan_out
                or any(module.lora_bias.values())
            ):
                return None
            low_rank[f"{name}.weight"] = LowRank(
                inner=f"{path}.lora_A.weight", outer=f"{path}.lora_B.weight", scaling=module.scaling[_NAME]
            )
        elif isinstance(module, ModulesToSaveWrapper):
            for parameter, _ in module.modules_to_save[_NAME].named_parameters():
                # A head that was trained as what it is tied to, the embeddings, is stored with them.
                if f"{name}.{parameter}" not in tied:
                    trained[f"{name}.{parameter}"] = f"{path}.{parameter}"
    return AdapterUpdates(source=source, low_rank=low_rank, trained=trained)
