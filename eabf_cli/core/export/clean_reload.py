"""Loads a checkpoint as a stranger would, with torch and transformers alone, and writes down what it computes.

Run as a script, by path, with one argument: a request file that `verification` wrote. The package itself cannot be
imported in that process, so that nothing of it can help. `verification` also imports the functions below and
measures the reference model with them.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_PROBE = "logit_scale_probe"
_PACKAGE = "eabf_cli"


class _NoPackage:
    """A finder that refuses this package, wherever it is installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == _PACKAGE:
            raise ModuleNotFoundError(f"{name} must not be needed to load a checkpoint", name=name)


@torch.no_grad()
def compute_logits(model: Any, rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The logits of rows of tokens at chosen places.

    Args:
        rows: `NAME.input_ids` (1, length), `NAME.keep` (places) and, where the positions are not 0, 1, 2, ...,
            `NAME.position_ids` (1, length).

    Returns:
        `NAME.logits` (places, vocabulary), float32 on the CPU.
    """
    found = {}
    for name in sorted(key.removesuffix(".input_ids") for key in rows if key.endswith(".input_ids")):
        input_ids = rows[f"{name}.input_ids"].to(model.device)
        options: dict[str, Any] = {}
        if f"{name}.position_ids" in rows:
            options["position_ids"] = rows[f"{name}.position_ids"].to(model.device)
            # Without a mask, transformers takes positions with gaps for several sequences in one row.
            options["attention_mask"] = torch.ones_like(input_ids)
        keep = rows[f"{name}.keep"].to(model.device)
        logits = model(input_ids=input_ids, logits_to_keep=keep, use_cache=False, **options).logits[0]
        found[f"{name}.logits"] = logits.float().cpu()
    return found


@torch.no_grad()
def measure_logit_scale(model: Any, positions: list[int]) -> torch.Tensor:
    """The factor on each layer's attention logits at some positions, relative to that at position 0.

    Every token of the row is the same. Then all values are the same, so attention changes nothing, and each layer
    sees one hidden state at all positions. Rotation keeps a query's norm, hence the ratio of two norms is the ratio
    of the factors.

    Args:
        positions: from 0.

    Returns:
        float32 (layers, positions).
    """
    norms: list[torch.Tensor] = []

    def probe(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        norms.append(query[0].float().norm(dim=-1).mean(dim=0))  # (positions,), from (heads, positions, head_dim)
        return sdpa_attention_forward(module, query, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[_PROBE] = probe
    position_ids = torch.tensor([[0, *positions]], device=model.device)
    kernel = model.config._attn_implementation
    model.config._attn_implementation = _PROBE
    try:
        model(input_ids=torch.full_like(position_ids, 3), position_ids=position_ids, use_cache=False)
    finally:
        model.config._attn_implementation = kernel
        del ALL_ATTENTION_FUNCTIONS[_PROBE]
    measured = torch.stack(norms).cpu()
    return measured[:, 1:] / measured[:, :1]


def hash_weights(model: Any) -> dict[str, str]:
    """SHA-256 of every weight in the dtype that the model has."""
    return {name: hash_tensor(weight) for name, weight in model.named_parameters()}


def hash_tensor(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and values."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def rotary_frequencies(model: Any) -> dict[str, torch.Tensor]:
    """The inverse frequencies of every rotary embedding, float32 on the CPU; ask before the first forward."""
    return {
        name: buffer.detach().float().cpu().clone()
        for name, buffer in model.named_buffers()
        if name.endswith("inv_freq") and "original" not in name
    }


def describe_tokenizer(tokenizer: Any, text: str) -> dict[str, Any]:
    """What must be the same for two tokenizers to be the same, as JSON."""
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    return {
        "vocabulary": _hash_json(sorted(tokenizer.get_vocab().items())),
        "special tokens": special,
        "chat template": tokenizer.chat_template,
        "token ids": _hash_json(tokenizer(text, verbose=False)["input_ids"]),
        "model_max_length": tokenizer.model_max_length,
    }


def _hash_json(value: Iterable[Any]) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _reload(request: dict[str, Any]) -> None:
    folder = request["folder"]
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=request["trust_remote_code"], dtype="auto", use_safetensors=True
    )
    model = model.to(request["device"]).eval()
    report: dict[str, Any] = {
        "class": type(model).__name__,
        "max_position_embeddings": model.config.max_position_embeddings,
        "weights": hash_weights(model),
    }
    tensors = rotary_frequencies(model)
    if request["float32"]:
        model.float()
    tensors |= compute_logits(model, load_file(request["rows"]))
    tensors["logit_scale"] = measure_logit_scale(model, request["positions"])
    if request["text"] is not None:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=request["trust_remote_code"])
        report["tokenizer"] = describe_tokenizer(tokenizer, Path(request["text"]).read_bytes().decode())
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, request["tensors"])
    Path(request["report"]).write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    sys.meta_path.insert(0, _NoPackage())
    _reload(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
