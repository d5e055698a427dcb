"""The metadata at the top of a card: what the Hub sorts and filters models by."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from eabf_cli.core.card.base_card import BaseCard
from eabf_cli.core.card.results import eval_results
from eabf_cli.core.evals.table import Column
from eabf_cli.core.report import PatchReport

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def card_data(
    report: PatchReport,
    *,
    title: str,
    base_model: str,
    revision: str | None,
    base_card: BaseCard,
    measured: Sequence[Column],
    datasets: Sequence[str],
) -> ModelCardData:
    """The fields of a card; those that are not known are left out.

    Args:
        title: name of the model in the `model-index`.
        base_model: what was extended; it is named only with a `revision`, which a Hub model has.
        measured: the checkpoint's own measurements.
        datasets: what it was trained on.
    """
    model_index = eval_results(measured)
    language = list(base_card.language)
    return ModelCardData(
        # A local path means nothing to a reader on the Hub.
        base_model=base_model if revision is not None else None,
        base_model_relation="finetune" if revision is not None else None,
        license=base_card.licence,
        license_name=base_card.licence_name,
        license_link=base_card.licence_link,
        language=language[0] if len(language) == 1 else language or None,
        datasets=_hub_datasets(datasets),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["long-context", "rope", "eabf", report.method],
        model_name=title if model_index else None,
        eval_results=model_index or None,
    )


def _hub_datasets(datasets: Sequence[str]) -> list[str] | None:
    """Those of the training data that are datasets of the Hub."""
    names = [dataset.partition("@")[0] for dataset in datasets]
    return [name for name in names if _HUB_ID.fullmatch(name) and not Path(name).exists()] or None
