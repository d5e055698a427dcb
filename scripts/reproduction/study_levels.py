"""What each level of the study's factors is, for a reader of its document."""

from __future__ import annotations

from variants import GAIN_LEARNING_RATE, LONGCE_MAX_WEIGHT, MEASURED_THETA

LEVELS = (
    ("frequencies `abf`", "base 500,000, as published (arXiv 2309.16039)"),
    (
        "frequencies `abf-measured`",
        f"base {MEASURED_THETA:,.0f}, which `eabf entropy --suggest` found for this model ([entropy.md](entropy.md)) "
        "on the held-out documents. Those of both splits are among them, so that its effects are in part measured on "
        "what chose it",
    ),
    ("frequencies `parts`", "NTK-by-parts: the base kept, slow dimensions interpolated (arXiv 2309.00071)"),
    ("scale `none`", "1 everywhere"),
    ("scale `eabf`", "t(i) = ln i / ln c beyond the window c, 1 inside; i counts from 1 (arXiv 2401.07004)"),
    (
        "scale `positional`",
        "t(i) = (1 + 0.1 ln max(1, i / c))^2: 1 inside, and YaRN's constant at i = factor x c",
    ),
    (
        "scale `learned`",
        "t(i) = 1 + softplus(a) ln max(1, i / c), with an a for each head that starts at EABF's scale and is trained "
        f"at a rate of its own, {GAIN_LEARNING_RATE:g}",
    ),
    ("loss `plain`", "cross-entropy of every token"),
    (
        "loss `restoration`",
        "the same, and in every step the divergence from the original model's predictions on short slices of the "
        "samples, with weight 1 ([finetuning.md](finetuning.md))",
    ),
    (
        "loss `longce`",
        "cross-entropy weighted by how much likelier the whole context makes a token than a short one, at most "
        f"{LONGCE_MAX_WEIGHT:g} times (LongCE, arXiv 2410.23771), with weights that are computed once, before training",
    ),
)
"""Each level and its formula or source."""
