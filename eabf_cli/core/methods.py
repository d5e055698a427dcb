"""The table of methods: the one list that options, checkpoints, docs and tests are made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eabf_cli.core import frequencies
from eabf_cli.core.errors import InvalidConfigError

if TYPE_CHECKING:
    from eabf_cli.core.scaling_config import RopeScalingConfig


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to extend a RoPE model's window.

    Attributes:
        name: what a checkpoint and the command line call it.
        summary: one line for help and docs.
        reference: arXiv number or other source.
        theta: (factor, original theta, rotary dimension) -> new theta; None where it follows `raises_theta`.
        raises_theta: the base frequency is free: "paper", "auto" or a number (`frequencies.choose_theta`).
        rope_parameters: the resolved config -> what transformers' own RoPE functions take.
        logit_scale: rule of `modeling_eabf.logit_scale` for the attention logits; None: they are not scaled.
        unscaled_layers: layers that the method leaves unscaled unless told otherwise.
        keeps_window_on_disk: `max_position_embeddings` in config.json stays the original window.
        aliases: other names accepted on the command line.
    """

    name: str
    summary: str
    reference: str
    rope_parameters: Callable[[RopeScalingConfig], dict[str, Any]]
    theta: Callable[[float, float, int], float] | None = None
    raises_theta: bool = False
    logit_scale: str | None = None
    unscaled_layers: tuple[int, ...] = ()
    keeps_window_on_disk: bool = False
    aliases: tuple[str, ...] = ()


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="linear",
            summary="Position interpolation: positions divided by the factor.",
            reference="arXiv 2306.15595",
            rope_parameters=frequencies.linear,
            theta=frequencies.keep_theta,
            aliases=("pi",),
        ),
        Method(
            name="ntk",
            summary="NTK-aware base: theta x factor^(d/(d-2)).",
            reference="NTK-aware scaled RoPE (2023); section 3.1 of arXiv 2309.00071",
            rope_parameters=frequencies.default,
            theta=frequencies.ntk_theta,
        ),
        Method(
            name="ntk-by-parts",
            summary="YaRN's frequencies without its temperature.",
            reference="arXiv 2309.00071, section 3.2",
            rope_parameters=frequencies.ntk_by_parts,
            theta=frequencies.keep_theta,
        ),
        Method(
            name="dynamic",
            summary="NTK base that grows with the current length (cache on and off differ).",
            reference="Dynamic NTK (2023); section 3.3 of arXiv 2309.00071",
            rope_parameters=frequencies.dynamic,
            theta=frequencies.keep_theta,
            # transformers takes this field as the base window of the growth.
            keeps_window_on_disk=True,
        ),
        Method(
            name="yarn",
            summary="NTK-by-parts with a constant logit temperature.",
            reference="arXiv 2309.00071",
            rope_parameters=frequencies.yarn,
            theta=frequencies.keep_theta,
        ),
        Method(
            name="abf",
            summary="Adjusted base frequency: theta raised to 500,000.",
            reference="arXiv 2309.16039",
            rope_parameters=frequencies.default,
            raises_theta=True,
        ),
        Method(
            name="eabf",
            summary="ABF with attention logits scaled by max(1, log_c i), but for the first two layers.",
            reference="arXiv 2401.07004",
            rope_parameters=frequencies.default,
            raises_theta=True,
            logit_scale="eabf",
            unscaled_layers=(0, 1),
        ),
        Method(
            name="logn",
            summary="Frequencies unchanged, logits of every layer scaled by max(1, log_c i).",
            reference="Qwen-7B technical memo (2023)",
            rope_parameters=frequencies.default,
            theta=frequencies.keep_theta,
            logit_scale="logn",
        ),
        Method(
            name="native",
            summary="ABF with the stepwise temperature that stock runtimes apply (llama_4_scaling_beta).",
            reference="arXiv 2401.07004 in the form of Llama 4 and Ministral 3",
            rope_parameters=frequencies.default,
            raises_theta=True,
            logit_scale="native",
        ),
    )
}
"""Every method by its name."""

_BY_ALIAS = {alias: method for method in METHODS.values() for alias in method.aliases}


def get_method(name: str) -> Method:
    """The entry of a method's name or alias.

    Raises:
        InvalidConfigError: no such method; the message lists the table.
    """
    method = METHODS.get(name) or _BY_ALIAS.get(name) if isinstance(name, str) else None
    if method is None:
        raise InvalidConfigError(f"unknown method {name!r}; known: {', '.join((*METHODS, *_BY_ALIAS))}")
    return method
