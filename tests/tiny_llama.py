"""A random Llama on disk, as a user would have one: weights, configurations and a tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import eabf_cli
from tests.architectures import randomize_weights

WINDOW = 64
TARGET = 4 * WINDOW
ROPE_THETA = 10_000.0
LAYERS = 3
VOCABULARY = 4096
DEMO_TOKENIZER = Path(eabf_cli.__path__[0]) / "demo" / "eabf-tiny"


def tiny_llama(*, dtype: torch.dtype = torch.float32, **fields: Any) -> PreTrainedModel:
    """The model, in eval mode; `fields` go over its configuration."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": WINDOW,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    model = AutoModelForCausalLM.from_config(LlamaConfig(**(sizes | fields)), dtype=dtype)
    randomize_weights(model)
    return model.eval()


def write_tiny_llama(folder: Path, *, max_shard_size: str = "1GB", **fields: Any) -> Path:
    """Save the model and the demo model's tokenizer in a folder; returns it."""
    model = tiny_llama(**fields)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_TOKENIZER / name, folder / name)
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's `config.json`."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def edit_config(folder: Path, *, drop: tuple[str, ...] = (), **fields: Any) -> Path:
    """Change fields of a folder's `config.json`; returns the folder."""
    config = {name: value for name, value in read_config(folder).items() if name not in drop}
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


def token_ids(length: int = 2 * TARGET // 3, *, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Random token ids `(batch, length)`, longer than the window."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """What a model says to `token_ids()`, in float32."""
    return model(token_ids()).logits.float()
