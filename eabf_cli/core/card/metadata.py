"""The metadata at the top of a card: what the Hub sorts and filters models by."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from eabf_cli.core.card.base_card import BaseCard
from eabf_cli.core.card.results import eval_results
from eabf_cli.core.report import PatchReport

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def card_data(
    report: PatchReport,
    *,
    title: str,
    base_model: str,
    revision: str | None,
    base_card: BaseCard,
    run: Mapping[str, Any] | None,
) -> ModelCardData:
    """The fields of a card; those that are not known are left out.

    Args:
        title: name of the model in the `model-index`.
        base_model: what was extended; it is named only with a `revision`, which a Hub model has.
    """
    results = eval_results(run)
    language = list(base_card.language)
    return ModelCardData(
        # A local path means nothing to a reader on the Hub.
        base_model=base_model if revision is not None else None,
        base_model_relation="finetune" if revision is not None else None,
        license=base_card.licence,
        license_name=base_card.licence_name,
        license_link=base_card.licence_link,
        language=language[0] if len(language) == 1 else language or None,
        datasets=_hub_datasets(run),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["long-context", "rope", "eabf", report.method],
        model_name=title if results else None,
        eval_results=results or None,
    )


def _hub_datasets(run: Mapping[str, Any] | None) -> list[str] | None:
    """The training data, if it is a dataset of the Hub."""
    if run is None or not isinstance(run.get("dataset"), str):
        return None
    name = run["dataset"].partition("@")[0]
    return [name] if _HUB_ID.fullmatch(name) and not Path(name).exists() else None
