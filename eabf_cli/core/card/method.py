"""The card's section on the method: what was changed, with its numbers."""

from __future__ import annotations

from eabf_cli.core.card.markdown import table
from eabf_cli.core.methods import METHODS
from eabf_cli.core.report import PatchReport

_FORMULAS = {
    "eabf": "max(1, ln i / ln c)",
    "logn": "max(1, ln i / ln c)",
    "native": "1 + ln(1 + floor((i - 1) / c)) / ln c",
}


def method_section(report: PatchReport) -> str:
    """Window, base frequency and scale of a checkpoint."""
    entry = METHODS[report.method]
    changes = table(
        ("", "before", "after"),
        [
            (
                "window (tokens)",
                f"{report.original_max_position_embeddings:,}",
                f"{report.max_position_embeddings:,}",
            ),
            ("rope_theta", f"{report.original_rope_theta:,.0f}", f"{report.rope_theta:,.0f}"),
        ],
    )
    return "\n\n".join(
        [
            "## Method",
            f"**{report.method}** ({entry.reference}), factor {report.factor:g}. {entry.summary}",
            changes,
            _scale_text(report),
            f"`rope_theta`: {report.theta_reason}.",
        ]
    )


def _scale_text(report: PatchReport) -> str:
    values = ", ".join(f"{t:.4g} at {position:,}" for position, t in report.logit_scale.items())
    if not report.scaled_layers:
        if all(t == 1 for t in report.logit_scale.values()):
            return "Attention logits are not scaled by position."
        constant = next(iter(report.logit_scale.values()))
        return (
            f"Attention logits carry one factor at every position, {constant:.4g}, which transformers itself applies."
        )
    rule = METHODS[report.method].logit_scale
    assert rule is not None
    text = (
        f"The attention logits of the query at position i (from 1) are multiplied by `{_FORMULAS[rule]}`, "
        f"c = {report.original_max_position_embeddings:,}, in {report.num_scaled_layers} layers: {values}."
    )
    unscaled = [
        f"{', '.join(map(str, layers))} ({why})"
        for why, layers in (
            ("exempt", report.unscaled_layers),
            ("sliding window", report.sliding_layers),
            ("no RoPE", report.nope_layers),
        )
        if layers
    ]
    return f"{text} Unscaled layers: {'; '.join(unscaled) or 'none'}."
