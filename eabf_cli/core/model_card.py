"""The README.md of a checkpoint: what it is, what was measured, how to load it and where it runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from eabf_cli.core.card.base_card import CARD_FILE, BaseCard
from eabf_cli.core.card.code_files import code_section
from eabf_cli.core.card.markdown import code
from eabf_cli.core.card.metadata import card_data
from eabf_cli.core.card.method import method_section
from eabf_cli.core.card.results import checkpoint_columns, compat_section, read_run, results_section, trained_datasets
from eabf_cli.core.card.runtimes import checkpoint_form, runtimes_section
from eabf_cli.core.card.usage import usage_section
from eabf_cli.core.checkpoint_format import MODELING_FILE
from eabf_cli.core.files import read_json
from eabf_cli.core.report import PatchReport


def write_model_card(
    folder: Path,
    report: PatchReport,
    *,
    base_model: str,
    revision: str | None,
    base_card: BaseCard | None = None,
    run: Mapping[str, Any] | None = None,
    compat: Mapping[str, Any] | None = None,
    repo_id: str | None = None,
) -> None:
    """Write the card of a checkpoint folder; nothing is claimed in it that is not in the arguments or the folder.

    Args:
        folder: the checkpoint, with its `config.json` and its code.
        report: the method with its numbers.
        base_model: name or path of the model that was extended.
        revision: its commit on the Hub; None where it is not from there.
        base_card: what its own card says (`read_base_card`).
        run: the record of what made the weights (`eabf_run.json`); None where there is none.
        compat: result of `measure_compat`, for a form without the model's own scale.
        repo_id: what the loading commands name; None writes a placeholder.

    Raises:
        CheckpointError: the record of a finetune that cannot be read.
    """
    results = read_run(run)
    needs_code = (folder / MODELING_FILE).is_file()
    form = checkpoint_form(read_json(folder / "config.json"), needs_code=needs_code)
    name = Path(base_model).name
    title = f"{name} {report.method} x{report.factor:g}"
    data = card_data(
        report,
        title=title,
        base_model=base_model,
        revision=revision,
        base_card=base_card or BaseCard(),
        measured=checkpoint_columns(results, compat),
        datasets=trained_datasets(run) if run is not None and results.training else (),
    )
    window = report.max_position_embeddings
    shown = code(name if revision is None else f"{base_model}@{revision}")
    sections = [
        f"# {title}",
        f"{shown}, its context window extended from {report.original_max_position_embeddings:,} "
        f"to {window:,} tokens with `eabf-cli`. "
        "`eabf_run.json` says how it was made.",
        method_section(report),
        results_section(results, left_out=compat is not None),
        compat_section(compat) if compat is not None else "",
        usage_section(repo_id or "PATH", needs_code=needs_code, window=window),
        runtimes_section(form, left_out=compat is not None and compat["method"] == "abf"),
        code_section(folder),
    ]
    body = "\n\n".join(section for section in sections if section)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n").save(folder / CARD_FILE)
