"""A checkpoint folder that is quick to make: what the Hub sees of one, without a model that runs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

CARD = """---
base_model: {base}
license: apache-2.0
---

# A model
"""


def write_folder(folder: Path, *, base: str = "somebody/base", shards: int = 2, seed: int = 0) -> Path:
    """A card, a config, a run file and weights of 400 kB each, random by seed."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    for number in range(1, shards + 1):
        name = f"model-{number:05d}-of-{shards:05d}.safetensors"
        save_file({"weight": torch.randn(100_000, generator=generator)}, folder / name)
    (folder / "README.md").write_text(CARD.format(base=base))
    (folder / "config.json").write_text(json.dumps({"model_type": "eabf_llama", "seed": seed}))
    (folder / "eabf_run.json").write_text(json.dumps({"command": "export"}))
    return folder
