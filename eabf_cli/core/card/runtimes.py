"""Which software applies a checkpoint's method, which only a part of it, and which refuses it: by checkpoint form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from eabf_cli.core.card.markdown import table

Form = Literal["own", "native", "base", "rope"]
"""`own`: a model type of ours with its code; `native`: stock ministral3; `base`: a stock model with another base
frequency; `rope`: a stock model with a `rope_scaling` of transformers."""

ALL = "all of it"
BASE = "the base frequency only"
REFUSES = "refuses"
UNKNOWN = "not known"
TESTED = "tested"
SOURCE = "by its source, not run here"


class Runtime(NamedTuple):
    """One row: a piece of software, what it applies, and how that is known."""

    name: str
    applies: str
    evidence: str
    note: str = ""


_TGI = Runtime(
    "TGI", UNKNOWN, "not tried", "its makers have put it into maintenance mode and name vLLM and SGLang instead"
)

RUNTIMES: dict[Form, tuple[Runtime, ...]] = {
    "own": (
        Runtime("transformers 5.23, `trust_remote_code=True`", ALL, TESTED),
        Runtime("transformers 4.57, `trust_remote_code=True`", ALL, TESTED),
        Runtime("transformers without it", REFUSES, TESTED),
        Runtime(
            "vLLM, `--trust-remote-code`",
            ALL,
            "not run here; what its Transformers backend asks of the code is tested",
        ),
        Runtime("SGLang, `--trust-remote-code`", ALL, SOURCE, "through its Transformers backend"),
        Runtime("llama.cpp", REFUSES, SOURCE, "the converter does not know the architecture"),
        Runtime("mlx-lm", REFUSES, SOURCE, "it has no such model type"),
        _TGI,
    ),
    "native": (
        Runtime("transformers 5.23", ALL, TESTED),
        Runtime("transformers 4.57", REFUSES, TESTED, "it has no `ministral3`"),
        Runtime("vLLM", ALL, SOURCE, "its class reads `llama_4_scaling`"),
        Runtime("SGLang", ALL, SOURCE, "its class reads `original_max_position_embeddings`"),
        Runtime("llama.cpp", ALL, SOURCE),
        Runtime("mlx-lm", ALL, SOURCE),
        _TGI,
    ),
    "base": (
        Runtime("transformers 5.23 and 4.57", ALL, TESTED),
        Runtime("vLLM, SGLang, llama.cpp, mlx-lm", ALL, SOURCE, "they read `rope_theta`"),
        _TGI,
    ),
    "rope": (
        Runtime("transformers 5.23 and 4.57", ALL, TESTED),
        Runtime("vLLM, SGLang, llama.cpp, mlx-lm, TGI", UNKNOWN, "not tried", "each has its own list of `rope_type`s"),
    ),
}


def checkpoint_form(config: dict[str, Any], *, needs_code: bool) -> Form:
    """The form of a written checkpoint, from its `config.json`."""
    if needs_code:
        return "own"
    if config.get("model_type") == "ministral3":
        return "native"
    return "rope" if config.get("rope_scaling") else "base"


def runtimes_table(rows: Sequence[Runtime]) -> str:
    """The rows as Markdown."""
    return table(
        ("runtime", "applies", "how that is known"),
        [(row.name, f"{row.applies} ({row.note})" if row.note else row.applies, row.evidence) for row in rows],
    )


def runtimes_section(form: Form, *, left_out: bool = False) -> str:
    """The card's section on where a checkpoint runs.

    Args:
        left_out: the model was trained with a scale that this form does not have.
    """
    rows = RUNTIMES[form]
    if left_out:
        rows = tuple(row._replace(applies=BASE if row.applies == ALL else row.applies) for row in rows)
    return f"## Where it runs\n\n{runtimes_table(rows)}"
