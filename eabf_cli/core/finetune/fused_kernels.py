"""Fused kernels for norms and MLPs while a model trains on a GPU: Liger's, put on by transformers, taken off again."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import is_liger_kernel_available

from eabf_cli.core.errors import InvalidConfigError

# A step of a 1B model on an H200 gains at 16,384 tokens, and loses at 2,048, where starting kernels takes the time.
_FUSED_FROM_TOKENS = 4096
# The loss is ours (chunked_loss.py). Rotary embeddings would be replaced for every model of the process.
_KERNELS = {
    "rms_norm": True,
    "swiglu": True,
    "geglu": True,
    "rope": False,
    "cross_entropy": False,
    "fused_linear_cross_entropy": False,
}


def has_fused_kernels(config: PretrainedConfig, device_type: str) -> bool:
    """Whether there are fused kernels for a model's family on this machine: on a GPU, with liger-kernel."""
    if device_type != "cuda" or not is_liger_kernel_available():
        return False
    # Here, since it imports Triton.
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return config.model_type in MODEL_TYPE_TO_APPLY_LIGER_FN


def pays_fused_kernels(config: PretrainedConfig, device_type: str, *, longest: int) -> bool:
    """Whether fused kernels are used unless told otherwise: where there are any, for long rows.

    Args:
        longest: tokens of the longest row.
    """
    return longest > _FUSED_FROM_TOKENS and has_fused_kernels(config, device_type)


def check_fused_kernels(config: PretrainedConfig, device_type: str) -> None:
    """Refuse fused kernels where there are none.

    Raises:
        InvalidConfigError: another device, no liger-kernel, or a family that it does not know.
    """
    if not has_fused_kernels(config, device_type):
        installed = "installed" if is_liger_kernel_available() else "not installed"
        raise InvalidConfigError(
            "--fused-kernels needs a GPU, liger-kernel (pip install 'eabf-cli[gpu]') and a family that it knows; here "
            f"is {config.model_type} on {device_type} with liger-kernel {installed}: leave it out"
        )


@contextmanager
def fused_kernels(model: PreTrainedModel) -> Iterator[None]:
    """Within the context, the model computes its norms and MLPs by Liger's kernels; other models keep theirs.

    Args:
        model: on a device that has them (`has_fused_kernels`), alone or inside PEFT.
    """
    base: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    # Liger binds methods to the modules, and puts classes of its own in place of those of the family's source.
    source = vars(sys.modules[type(base).__module__])
    source_before = dict(source)
    names_before = [(module, set(vars(module))) for module in base.modules()]
    apply_liger_kernel(base, _KERNELS)
    source.update(source_before)
    bound = [(module, set(vars(module)) - names) for module, names in names_before]
    try:
        yield
    finally:
        for module, names in bound:
            for name in names:
                vars(module).pop(name, None)
