"""What a launcher's configuration of FSDP or DeepSpeed asks for, known before anything is loaded."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.processes import is_sharded, num_row_parts, uses_deepspeed

NOT_SHARDED = (
    "the launcher's configuration asks for a sharded model (FSDP or DeepSpeed), but transformers does not shard on "
    "this device and would hold the whole model in every process: use GPUs, or launch without it"
)
_BATCH_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu")


def sharding_engine() -> str | None:
    """What divides the model over the processes; None if nothing does.

    Raises:
        InvalidConfigError: the configuration of DeepSpeed cannot be read.
    """
    if uses_deepspeed():
        return f"DeepSpeed ZeRO-{_deepspeed_plugin().zero_stage}"
    return "FSDP" if is_sharded() else None


def check_sharding_config(device: torch.device) -> None:
    """Refuse a launcher's configuration that would not shard, or whose weights could not be had at the end.

    DeepSpeed's own number of accumulated steps would fail the first step, and its scheduler take the recipe's place.

    Raises:
        InvalidConfigError: FSDP on CPUs; DeepSpeed that is not installed, whose configuration cannot be read or decides
            what the recipe does, or whose ZeRO-3 would not gather the weights.
    """
    if not uses_deepspeed():
        if is_sharded() and device.type == "cpu":
            raise InvalidConfigError(NOT_SHARDED)
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise InvalidConfigError(
            "the launcher's configuration asks for DeepSpeed, which is not installed: pip install deepspeed"
        )
    plugin = _deepspeed_plugin()
    config = plugin.hf_ds_config
    decided = [
        # Left out of DeepSpeed's file, the first stands for 1, and without the second nothing is clipped.
        *(name for name in ("gradient_accumulation_steps", "gradient_clipping") if config.get_value(name) != "auto"),
        *(name for name in _BATCH_SIZES if config.get_value(name, "auto") != "auto"),
        *(name for name in ("optimizer", "scheduler") if config.get_value(name) is not None),
    ]
    if decided:
        raise InvalidConfigError(
            f"the launcher's configuration of DeepSpeed does not leave {', '.join(decided)} to the options of eabf: "
            'set numbers to "auto", and leave optimizer and scheduler out'
        )
    gathers = config.get_value("zero_optimization.stage3_gather_16bit_weights_on_model_save")
    if plugin.zero_stage == 3 and gathers is not True:
        raise InvalidConfigError(
            "the launcher's configuration would not let ZeRO-3 gather the trained weights: set "
            "zero3_save_16bit_model: true in accelerate's file (stage3_gather_16bit_weights_on_model_save: true in "
            "DeepSpeed's); float32 weights stay float32"
        )


def check_context_parallelism(*, mixed_precision: bool, packs: bool, restores: bool) -> None:
    """Refuse what cannot be trained in rows that are spread over processes.

    Its attention has kernels for bfloat16 alone where heads share keys, and is causal over the whole row; a slice of a
    row for the restoration loss would be spread as well.

    Raises:
        InvalidConfigError: context parallelism in float32, with packed rows or with a restoration loss.
    """
    if num_row_parts() == 1:
        return
    if not mixed_precision:
        raise InvalidConfigError(
            "context parallelism trains in bfloat16 alone, and this run is in float32: leave --dtype float32 out, and "
            "use GPUs that have bfloat16"
        )
    options = [name for name, is_given in (("--pack", packs), ("--restore-weight", restores)) if is_given]
    if options:
        raise InvalidConfigError(
            f"context parallelism spreads a row over processes, which {' and '.join(options)} cannot have: leave it out"
        )


def check_launched_precision(*, mixed_precision: bool) -> None:
    """Refuse a launcher's configuration whose precision is not that of the run.

    transformers takes the launcher's where a run has none, without a word; under DeepSpeed it fails the first step.

    Args:
        mixed_precision: the run trains under bfloat16 autocast.

    Raises:
        InvalidConfigError: float16 or float8, bfloat16 for a run in float32, or a file of DeepSpeed's that says so.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    is_other = asked not in ("no", "bf16") or (asked == "bf16" and not mixed_precision)
    if uses_deepspeed() and not is_other:
        config = _deepspeed_plugin().hf_ds_config
        is_other = config.get_value("fp16.enabled", "auto") not in (False, "auto")
        is_other |= config.get_value("bf16.enabled", "auto") not in (mixed_precision, "auto")
        asked = "another"
    if is_other:
        here = (
            "bfloat16" if mixed_precision else "float32 (by --dtype float32, or without fast bfloat16 on this device)"
        )
        raise InvalidConfigError(
            f"the launcher's configuration asks for {asked} precision, and this run is in {here}: set mixed_precision: "
            f"{'bf16' if mixed_precision else 'no'} in accelerate's file, and leave bf16 and fp16 out "
            "of DeepSpeed's"
        )


def gathered_weights(trainer: Trainer) -> dict[str, Tensor] | None:
    """The whole weights of a model that is divided over the processes, all of which take part.

    Under mixed precision DeepSpeed computes with bfloat16 copies, which lack most of what small steps changed: what it
    trained are the float32 weights that its optimizer holds.

    Returns:
        a state dictionary in the main process, an empty one or None in the others.
    """
    weights: dict[str, Tensor] | None = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not uses_deepspeed():
        return weights
    from deepspeed.utils import safe_get_full_fp32_param

    names: dict[Tensor, list[str]] = {}
    for name, weight in trainer.model.named_parameters(remove_duplicate=False):
        if weight.requires_grad:
            names.setdefault(weight, []).append(name)
    for weight, shared in names.items():
        trained = safe_get_full_fp32_param(weight)
        if trained is not None and weights:
            weights |= dict.fromkeys(shared, trained.cpu())
    return weights


def _deepspeed_plugin() -> Any:
    """accelerate's reading of its own variables and of DeepSpeed's file; training makes its own."""
    from accelerate import DeepSpeedPlugin

    try:
        return DeepSpeedPlugin()
    except ValueError as error:
        raise InvalidConfigError(f"the launcher's configuration of DeepSpeed cannot be used: {error}") from error
