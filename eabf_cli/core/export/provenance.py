"""Where a checkpoint comes from: its base model, licence and training, from its own records and cards."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from eabf_cli.core.card.base_card import CARD_FILE, BaseCard, read_base_card
from eabf_cli.core.demo import DEMO_MODEL, demo_model_path
from eabf_cli.core.files import read_json
from eabf_cli.core.run_record import RUN_FILE
from eabf_cli.core.run_settings import SETTINGS_FILE
from eabf_cli.core.sources import ADAPTER_FOLDER, ModelSource

_LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "COPYING*")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The origin of a checkpoint, as far as it is on record.

    Attributes:
        base_model: the model that was extended, by its Hub id where that is known.
        revision: its commit.
        record: of the finetune (or patch) that made the checkpoint; None for one of other software.
        card: the licence and the languages, of the checkpoint's own card or its base model's.
        licence_files: texts that go with the weights.
    """

    base_model: str
    revision: str | None
    record: dict[str, Any] | None
    card: BaseCard
    licence_files: tuple[Path, ...]


def find_provenance(source: ModelSource) -> Provenance:
    """Follow a checkpoint's records back to the model that it was made from, and read that model's card.

    Raises:
        CheckpointError: a record that is damaged.
    """
    record = _record(source.folder)
    base_model, revision = _base(source, record)
    folders = [source.folder, *([source.base.folder] if source.base is not None else [])]
    # A base that is a folder of ours has a record of its own. What comes from the Hub names none of this machine's.
    while source.revision is None and (folder := _local(base_model)) is not None and folder not in folders:
        folders.append(folder)
        inner = _record(folder)
        if inner is None or not isinstance(inner.get("model"), str):
            break
        base_model, revision = inner["model"], inner.get("revision")
    return Provenance(
        base_model=base_model,
        revision=revision,
        record=record,
        card=_card([*folders, *_hub_folder(base_model, revision)]),
        licence_files=tuple(_licence_files(folders)),
    )


def _record(folder: Path) -> dict[str, Any] | None:
    """What made a folder: its own record, or its run's for an adapter and a checkpoint on the way."""
    places = [folder / RUN_FILE]
    if folder.name == ADAPTER_FOLDER or folder.name.startswith("checkpoint-"):
        places += [folder.parent / RUN_FILE, folder.parent / SETTINGS_FILE]
    found = next((path for path in places if path.is_file()), None)
    record = read_json(found) if found is not None else None
    if record is not None and record.get("command") == "export":
        # An export hands on the record of what it exported.
        return record.get("run") if isinstance(record.get("run"), dict) else None
    return record


def _base(source: ModelSource, record: dict[str, Any] | None) -> tuple[str, str | None]:
    if source.base is not None:
        return source.base.name, source.base.revision
    if record is not None and isinstance(record.get("model"), str):
        return record["model"], record.get("revision")
    return source.name, source.revision


def _local(model: str) -> Path | None:
    """The folder that a name stands for; None for one on the Hub or a GGUF file."""
    folder = demo_model_path() if model == DEMO_MODEL else Path(model).expanduser()
    return folder.resolve() if folder.is_dir() else None


def _hub_folder(model: str, revision: str | None) -> Iterator[Path]:
    """The folder in the Hub's cache that holds a model's card; nothing where it cannot be had."""
    if _HUB_ID.fullmatch(model) and _local(model) is None:
        try:
            yield Path(hf_hub_download(model, CARD_FILE, revision=revision)).parent
        except (HfHubHTTPError, HFValidationError, OSError):
            return


def _card(folders: list[Path]) -> BaseCard:
    """The first licence, and the first languages, that the cards name."""
    cards = [read_base_card(folder) for folder in folders]
    licensed = next((card for card in cards if card.licence is not None), BaseCard())
    return replace(licensed, language=next((card.language for card in cards if card.language), ()))


def _licence_files(folders: list[Path]) -> Iterator[Path]:
    seen = set()
    for folder in folders:
        # The Hub's cache is made of links; elsewhere one may lead anywhere.
        may_link = folder.parent.name == "snapshots"
        for pattern in _LICENCE_FILES:
            for path in sorted(folder.glob(pattern)):
                if path.is_file() and (may_link or not path.is_symlink()) and path.name not in seen:
                    seen.add(path.name)
                    yield path
