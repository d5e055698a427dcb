"""Which software applies a checkpoint's method, which only a part of it, and which refuses it: by checkpoint form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from eabf_cli.core.card.markdown import table

ALL = "all of it"
BASE = "the base frequency only"
REFUSES = "refuses"
UNKNOWN = "not known"
TESTED = "eabf-cli's tests"
RUN = "run with eabf-cli's demo model"
SOURCE = "its source; not run"


class Runtime(NamedTuple):
    """One row: a piece of software, what it applies, and how that is known."""

    name: str
    applies: str
    evidence: str
    note: str = ""


_TRANSFORMERS = Runtime("transformers 5.23 and 4.57", ALL, TESTED)
_MLX = "mlx-lm 0.32"
_LLAMA_CPP = "llama.cpp (October 2026)"
_SERVERS = "vLLM and SGLang"
_TGI = Runtime("TGI", UNKNOWN, "not tried", "in maintenance mode; its makers name vLLM and SGLang instead")
_TEMPERATURE = "the frequencies, with YaRN's temperature, which the method leaves out"

RUNTIMES: dict[str, tuple[Runtime, ...]] = {
    "own": (
        Runtime("transformers 5.23 and 4.57, `trust_remote_code=True`", ALL, TESTED),
        Runtime("transformers without it", REFUSES, TESTED),
        Runtime(
            f"{_SERVERS}, `--trust-remote-code`",
            ALL,
            "eabf-cli's tests of what their Transformers backends ask of the code; not run",
        ),
        Runtime(_LLAMA_CPP, REFUSES, RUN, "its converter does not know the architecture"),
        Runtime(_MLX, REFUSES, RUN, "it has no such model type"),
        _TGI,
    ),
    "native": (
        Runtime("transformers 5.23", ALL, TESTED),
        Runtime("transformers 4.57", REFUSES, TESTED, "it has no `ministral3`"),
        Runtime("vLLM", ALL, SOURCE, "its class reads `llama_4_scaling`"),
        Runtime("SGLang", ALL, SOURCE, "its class reads `original_max_position_embeddings`"),
        Runtime(_LLAMA_CPP, ALL, RUN, "its converter wants another `rope_type`: see docs/export.md of eabf-cli"),
        Runtime(_MLX, ALL, RUN),
        _TGI,
    ),
    "base": (
        _TRANSFORMERS,
        Runtime(_LLAMA_CPP, ALL, RUN),
        Runtime(_MLX, ALL, RUN),
        Runtime(_SERVERS, ALL, SOURCE),
        _TGI,
    ),
    "linear": (
        _TRANSFORMERS,
        Runtime(_LLAMA_CPP, ALL, RUN),
        Runtime(_MLX, ALL, RUN),
        Runtime(_SERVERS, ALL, SOURCE),
        _TGI,
    ),
    "yarn": (
        _TRANSFORMERS,
        Runtime(_LLAMA_CPP, ALL, RUN),
        Runtime(_MLX, ALL, RUN),
        Runtime(_SERVERS, ALL, SOURCE),
        _TGI,
    ),
    "ntk-by-parts": (
        _TRANSFORMERS,
        Runtime(_LLAMA_CPP, _TEMPERATURE, RUN),
        Runtime(_MLX, _TEMPERATURE, RUN),
        Runtime(_SERVERS, _TEMPERATURE, SOURCE),
        _TGI,
    ),
    "dynamic": (
        _TRANSFORMERS,
        Runtime(_LLAMA_CPP, "nothing: its converter leaves it out", RUN),
        Runtime(_MLX, ALL, RUN),
        Runtime(_SERVERS, "one base for every length", SOURCE),
        _TGI,
    ),
}
"""Form of a checkpoint -> what runs it. `own`: a model type of ours with its code; `native`: stock ministral3; `base`:
a stock model with another base frequency; the others: a stock model with that `rope_scaling`."""


def checkpoint_form(config: dict[str, Any], *, needs_code: bool) -> str:
    """The form of a written checkpoint, from its `config.json`; a key of `RUNTIMES`."""
    if needs_code:
        return "own"
    if config.get("model_type") == "ministral3":
        return "native"
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", "base")
    return "ntk-by-parts" if kind == "yarn" and scaling.get("attention_factor") == 1 else kind


def runtimes_table(rows: Sequence[Runtime]) -> str:
    """The rows as Markdown."""
    return table(
        ("runtime", "applies", "how that is known"),
        [(row.name, f"{row.applies} ({row.note})" if row.note else row.applies, row.evidence) for row in rows],
    )


def runtimes_section(form: str, *, left_out: bool = False) -> str:
    """The card's section on where a checkpoint runs; empty for a form that the table does not have.

    Args:
        left_out: the model has a scale that this form does not have.
    """
    rows = RUNTIMES.get(form, ())
    if left_out:
        rows = tuple(row._replace(applies=BASE if row.applies == ALL else row.applies) for row in rows)
    return f"## Where it runs\n\n{runtimes_table(rows)}" if rows else ""
