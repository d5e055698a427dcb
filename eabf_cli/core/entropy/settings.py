"""What `eabf entropy` is asked for. Options read this module, so it imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eabf_cli.core.demo import DEMO_MODEL
from eabf_cli.core.entropy.positions import check_positions, largest_position
from eabf_cli.core.errors import InvalidConfigError

if TYPE_CHECKING:
    from eabf_cli.core.patch_checkpoint import MethodRequest

SUGGESTION_FILE = "suggestion.toml"


@dataclass(frozen=True, kw_only=True)
class EntropyConfig:
    """Which model to look into, on which documents, and where in them.

    Attributes:
        request: a method to apply first; None measures the model as it stands.
        text: text or PDF files (.txt, .md, .pdf), each one document.
        dataset: more documents: JSONL or other files, a folder, a Hub dataset, or a list of these. With neither
            `text` nor `dataset`, the held-out documents of `demo-long`.
        dataset_split: split of a Hub dataset (default `train`).
        num_documents: how many documents to measure at most; of a dataset with more, `seed` draws them.
        length: tokens of a document that are read; shorter documents are skipped. None chooses
            (`eabf_cli.core.entropy.documents.default_length`).
        positions: query positions (`eabf_cli.core.entropy.positions.choose_positions`).
        scores: also measure where attention goes: to the first tokens, the last ones, by distance.
        rows: also keep the attention distributions of the first document, in `rows.safetensors`.
        compare: a second model with the same tokenizer and numbers of layers and heads, measured as it stands on the
            same documents.
        suggest: also search for better settings than the default of this extension (`core.entropy.search`); its
            method's base must be free. None only derives a suggestion from what was measured.
        output: folder for the result; None writes nothing.
        resume: go on with the unfinished measurement in `output`.
        dry_run: choose the documents and estimate the memory, and stop there.

    Raises:
        InvalidConfigError: a number below its least value, or a combination without meaning.
    """

    model: str = DEMO_MODEL
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 42
    trust_remote_code: bool = False
    request: MethodRequest | None = None
    text: str | Path | tuple[str | Path, ...] = ()
    dataset: str | Path | tuple[str | Path, ...] = ()
    dataset_split: str | None = None
    num_documents: int = 128
    length: int | None = None
    positions: str | tuple[int, ...] = "log"
    scores: bool = False
    rows: bool = False
    compare: str | None = None
    suggest: MethodRequest | None = None
    output: Path | None = None
    overwrite: bool = False
    resume: bool = False
    dry_run: bool = False
    show_progress: bool = False

    def __post_init__(self) -> None:
        if self.num_documents < 1:
            raise InvalidConfigError(f"num_documents must be at least 1, got {self.num_documents}")
        if self.length is not None and self.length < 2:
            raise InvalidConfigError(f"length must be at least 2 tokens, got {self.length}")
        check_positions(self.positions)
        last = largest_position(self.positions)
        if self.length is not None and last is not None and last > self.length:
            raise InvalidConfigError(
                f"position {last:,} is beyond the length of {self.length:,} tokens: give a larger --length, "
                "or smaller --positions"
            )
        if self.rows and self.output is None:
            raise InvalidConfigError("rows are written to a file: name a folder with -o")
        if self.resume and self.output is None:
            raise InvalidConfigError("resume goes on with a measurement in a folder: name it with -o")
        if self.resume and self.overwrite:
            raise InvalidConfigError("resume keeps what was measured and overwrite throws it away: give one of them")

    @property
    def texts(self) -> tuple[Path, ...]:
        """`text` as a list of files."""
        return tuple(map(Path, _as_tuple(self.text)))

    @property
    def datasets(self) -> tuple[str | Path, ...]:
        """`dataset` as a list of sources."""
        return _as_tuple(self.dataset)


def _as_tuple(value: str | Path | tuple[str | Path, ...]) -> tuple[str | Path, ...]:
    return (value,) if isinstance(value, str | Path) else tuple(value)
