"""Whether a base model's licence lets a changed copy of it be published, and on what conditions."""

from __future__ import annotations

import re
from dataclasses import dataclass

from eabf_cli.core.errors import HubError

# Identifiers as the Hub writes them: https://huggingface.co/docs/hub/repositories-licenses
_OPEN = re.compile(
    r"apache-2\.0|mit|bsd(-.+)?|isc|zlib|unlicense|wtfpl|ncsa|postgresql|ms-pl|bsl-1\.0|ofl-1\.1|cc0-1\.0|pddl"
    r"|cc-by-[234]\.\d|cc-by-sa-[34]\.0|(a|l)?gpl(-.+)?|mpl-2\.0|epl-[12]\.0|eupl-1\.[12]|ecl-2\.0|osl-3\.0"
    r"|artistic-2\.0|afl-3\.0|odc-by|odbl|lppl-1\.3c|etalab-2\.0|openmdw-1\.0"
)


@dataclass(frozen=True)
class _Conditions:
    """What a licence asks of someone who publishes a changed copy."""

    ids: str
    name: str
    demands: str


_CONDITIONAL = (
    _Conditions(
        "llama2",
        "the Llama 2 Community License",
        "the licence text and Meta's notice go with the model, and its use policy binds everyone who gets it",
    ),
    _Conditions(
        "llama3",
        "the Meta Llama 3 Community License",
        'the licence text and Meta\'s notice go with the model, "Built with Meta Llama 3" is shown, and the '
        'model\'s name begins with "Llama 3"',
    ),
    _Conditions(
        r"llama3\.\d|llama4",
        "a Llama Community License",
        "the licence text and Meta's notice go with the model, \"Built with Llama\" is shown, and the model's name "
        'begins with "Llama"',
    ),
    _Conditions(
        "gemma",
        "the Gemma Terms of Use",
        "the terms with their use restrictions and Google's notice go with the model, and changed files say so",
    ),
    _Conditions(
        r"cc-by(-nc)?(-sa)?-nd-.+",
        "a Creative Commons licence without derivatives (ND)",
        "changed copies may not be shared at all, unless the owner allows it",
    ),
    _Conditions(
        r"cc-by-nc.*|.*noncommercial.*|.*non-commercial.*|apple-amlr|apple-ascl|intel-research|deepfloyd-if-license",
        "a licence for research or non-commercial use",
        "the same limits bind everyone who gets the model",
    ),
    _Conditions(
        r".*openrail.*|bigscience-.*",
        "a RAIL licence",
        "its use restrictions bind everyone who gets the model, and the licence text goes with it",
    ),
    _Conditions(".+", "a licence that eabf does not know", "what it allows stands in the base model's repository"),
)
# Where a model's card names no licence, its name may tell: an openly licensed OpenLLaMA ("llama_3b") is no Llama 3.
_NAMES = (
    ("llama2", re.compile(r"llama[-_]?2(?![\d.b])")),
    ("llama3", re.compile(r"llama[-_]?3(?![\d.b])")),
    ("llama3.1", re.compile(r"llama[-_]?3\.\d")),
    ("llama4", re.compile(r"llama[-_]?4(?![\d.b])")),
    ("gemma", re.compile(r"gemma(?![-_]?4)")),
)


def check_licence(licence: str | None, base_model: str | None, *, accepted: bool) -> list[str]:
    """Refuse to publish under conditions that the user has not accepted.

    Args:
        licence: of the base model, as the Hub writes it; None where it is not known.
        base_model: its name, which tells the licence of the best-known families.
        accepted: the user accepts the conditions.

    Returns:
        Warnings for the user.

    Raises:
        HubError: names the licence, what it asks for and the option that accepts it.
    """
    base = f"the base model {base_model}" if base_model else "the base model"
    known = _normal(licence) or _guess(base_model)
    if known is None:
        return [f"the licence of {base} is not known: see to it that you may share a changed copy"]
    if _OPEN.fullmatch(known):
        return []
    conditions = next(entry for entry in _CONDITIONAL if re.fullmatch(entry.ids, known))
    source = f" ({known})" if _normal(licence) else " (by its name; its card names no licence)"
    stated = f"{base} is under {conditions.name}{source}: {conditions.demands}"
    if accepted:
        return [stated]
    raise HubError(f"{stated}.\nGive --accept-license if you may publish it and keep to that")


def _normal(licence: str | None) -> str | None:
    name = (licence or "").strip().lower()
    return None if name in ("", "unknown", "none") else name


def _guess(base_model: str | None) -> str | None:
    name = (base_model or "").lower()
    return next((licence for licence, pattern in _NAMES if pattern.search(name)), None)
