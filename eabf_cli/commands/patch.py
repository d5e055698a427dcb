"""`eabf patch`: write a checkpoint with a longer window, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from eabf_cli import options, output


@click.command()
@options.model_options
@options.method_options
@options.compute_options
@options.output_options
@options.common_options
def patch(model: str | None, as_json: bool, **values: Any) -> None:
    """Apply a method to a model and write the checkpoint, without training.

    Weights are copied, not loaded. The folder loads in transformers, for eabf with
    trust_remote_code=True.

    \b
    Examples:
      eabf patch --factor 4 --dry-run
      eabf patch -m HuggingFaceTB/SmolLM2-135M-Instruct --factor 4 -o smollm2-32k
      eabf patch -m ./my-llama --method yarn --max-length 32768 -o my-llama-32k
    """
    output.quiet_libraries()
    from eabf_cli.core.devices import choose_device
    from eabf_cli.core.patch_checkpoint import PatchConfig, patch_checkpoint

    choose_device(values["device"])
    request = options.method_request(values)
    for unused in ("seed", "device", "trust_remote_code"):
        values.pop(unused)
    result = patch_checkpoint(PatchConfig(model=options.model_or_demo(model), request=request, **values))
    for message in result["warnings"] + result["notes"]:
        output.warn(message)
    output.result(result, _text(result), as_json=as_json)


def _text(result: dict[str, Any]) -> str:
    lines = [
        f"{result['model']}: {result['method']}, window {result['original_max_position_embeddings']:,} -> "
        f"{result['max_position_embeddings']:,} tokens (factor {result['factor']:g})",
        f"rope_theta {result['original_rope_theta']:,.0f} -> {result['rope_theta']:,.0f}: {result['theta_reason']}",
        f"logit scale on {result['num_scaled_layers']} layers: "
        + ", ".join(f"t({int(position):,}) = {t:.4g}" for position, t in result["logit_scale"].items()),
    ]
    for name, reason in (("unscaled", "exempt"), ("sliding", "sliding window"), ("nope", "no RoPE")):
        if result[f"{name}_layers"]:
            lines.append(f"left unscaled ({reason}): layers {', '.join(map(str, result[f'{name}_layers']))}")
    if result["output"] is not None:
        return "\n".join([*lines, f"Written to {Path(result['output'])}"])
    width = max(map(len, result["changes"]), default=0)
    changes = [f"  {name:<{width}}  {_short(old)} -> {_short(new)}" for name, (old, new) in result["changes"].items()]
    return "\n".join([*lines, "config.json would change:", *changes, "Nothing was written (--dry-run)."])


def _short(value: Any) -> str:
    return "(absent)" if value is None else str(value)
