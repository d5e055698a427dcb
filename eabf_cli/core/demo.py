"""The demo model and its data, which ship inside the package."""

from __future__ import annotations

from pathlib import Path

DEMO_MODEL = "eabf-tiny"
DEMO_DATASET = "demo-long"
_FOLDER = Path(__file__).parent.parent / "demo"


def demo_model_path() -> Path:
    """The folder of the demo model `eabf-tiny`."""
    return _FOLDER / DEMO_MODEL


def demo_dataset_path() -> Path:
    """The folder of the demo data set `demo-long` (`train.jsonl`, `heldout.jsonl`)."""
    return _FOLDER / DEMO_DATASET
