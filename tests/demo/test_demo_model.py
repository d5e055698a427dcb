"""The demo model poses the problem for real: it retrieves inside its window, and not at all beyond it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

import eabf_cli
from eabf_cli.core.needles import TEMPLATES, needle_prompt

FOLDER = Path(eabf_cli.__path__[0]) / "demo" / "eabf-tiny"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER, model_max_length=1_000_000)


@torch.inference_mode()
def retrieval(model, tokenizer, template: str, length: int, trials: int = 8) -> float:
    """Share of prompts whose whole answer greedy decoding gives, by plain generate."""
    right = 0
    for trial in range(trials):
        prompt = needle_prompt(tokenizer, TEMPLATES[template], length, trial / (trials - 1), seed=trial)
        ids = torch.tensor([prompt.input_ids])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=len(prompt.answer_ids),
            do_sample=False,
        )
        right += output[0, ids.shape[1] :].tolist() == prompt.answer_ids
    return right / trials


def test_passkey_inside_the_window(model, tokenizer):
    assert retrieval(model, tokenizer, "passkey", 512) >= 0.95


def test_no_passkey_beyond_the_window(model, tokenizer):
    assert retrieval(model, tokenizer, "passkey", 1_024, trials=5) == 0


def test_a_wording_it_never_saw(model, tokenizer):
    assert retrieval(model, tokenizer, "locker", 384) >= 0.75


def test_config_reads_in_old_and_new_transformers():
    """transformers 4.57 takes theta from the top level, 5.x from `rope_parameters`."""
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10_000.0
    assert config["model_type"] == "llama"
    assert config["max_position_embeddings"] == 512
