"""A GGUF file is extended like the model it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from eabf_cli.core.checkpoint import load_model, load_tokenizer
from eabf_cli.core.errors import CheckpointError
from eabf_cli.core.patching import apply_method
from tests.conftest import Eabf
from tests.scalings import scaling_for
from tests.tiny_llama import DEMO_TOKENIZER, ROPE_THETA, TARGET, WINDOW, logits, read_config, tiny_llama

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def as_llama_cpp_rotates(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp pairs neighbouring dimensions, transformers the two halves of a head."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def gguf_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    weights = model.state_dict()
    tensors = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output.weight": weights["lm_head.weight"],
        "output_norm.weight": weights["model.norm.weight"],
    }
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    for layer in range(model.config.num_hidden_layers):
        for theirs, ours in LAYER_NAMES.items():
            weight = weights[f"model.layers.{layer}.{theirs}.weight"]
            if ours in heads:
                weight = as_llama_cpp_rotates(weight, heads[ours])
            tensors[f"blk.{layer}.{ours}.weight"] = weight
    return tensors


def write_gguf(model: PreTrainedModel, path: Path) -> None:
    """The model in float32, with the demo model's tokenizer (a byte-level BPE, "gpt2" to llama.cpp)."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)

    tokenizer = json.loads((DEMO_TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    merges: list[Any] = tokenizer["model"]["merges"]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    kinds = (gguf.TokenType.CONTROL, gguf.TokenType.NORMAL)
    writer.add_token_types([kinds[token not in special] for token in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for add, token in (
        (writer.add_bos_token_id, "<s>"),
        (writer.add_eos_token_id, "</s>"),
        (writer.add_unk_token_id, "<unk>"),
    ):
        add(vocabulary[token])
    for name, tensor in gguf_tensors(model).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def source() -> PreTrainedModel:
    return tiny_llama(tie_word_embeddings=False)


@pytest.fixture(scope="module")
def gguf_file(source: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(source, path)
    return path


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).abs().max() < 1e-5 * (expected.max() - expected.min())


def test_a_gguf_file_is_the_model_it_was_made_from(source: PreTrainedModel, gguf_file: Path) -> None:
    assert_close(logits(load_model(gguf_file)), logits(source))
    text = "The pass key is 12345."
    expected = AutoTokenizer.from_pretrained(DEMO_TOKENIZER)(text)["input_ids"]
    assert load_tokenizer(gguf_file)(text, add_special_tokens=False)["input_ids"] == expected


@pytest.mark.parametrize("method", ["eabf", "yarn"])
def test_a_gguf_file_is_patched_into_a_checkpoint(
    method: str, source: PreTrainedModel, gguf_file: Path, eabf: Eabf, workdir: Path
) -> None:
    paper = ["--rope-theta", "paper"] if method == "eabf" else []
    result = eabf("patch", "-m", gguf_file, "-o", "out", "--method", method, "--json", *paper)
    assert result.exit_code == 0, (result.stderr, result.exception)
    value = json.loads(result.stdout)
    assert (value["original_max_position_embeddings"], value["max_position_embeddings"]) == (WINDOW, TARGET)
    assert "quantization_config" not in read_config(workdir / "out")

    assert len({path.stat().st_mode for path in (workdir / "out").iterdir()}) == 1

    expected = tiny_llama(tie_word_embeddings=False)
    apply_method(expected, scaling_for(method))
    stock = AutoModelForCausalLM.from_pretrained(workdir / "out", trust_remote_code=method == "eabf")
    assert_close(logits(stock), logits(expected))
    assert_close(logits(load_model(workdir / "out")), logits(expected))
    tokenizer = AutoTokenizer.from_pretrained(workdir / "out")
    assert tokenizer.model_max_length == TARGET
    text = "The pass key is 12345."
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_gguf_file_is_finetuned(tuning: str, gguf_file: Path, texts_file: Path, eabf: Eabf, workdir: Path) -> None:
    data = ["--dataset", texts_file, "--samples", "4", "--batch-size", "2", "--epochs", "1", "--no-eval"]
    result = eabf("finetune", "-m", gguf_file, "-o", "run", "--tuning", tuning, "--rope-theta", "paper", *data)
    assert result.exit_code == 0, (result.stderr, result.exception)
    tuned = AutoModelForCausalLM.from_pretrained(workdir / "run", trust_remote_code=True, dtype=torch.float32)
    untrained = load_model(gguf_file, dtype="float32")
    apply_method(untrained, scaling_for("eabf"))
    assert 0 < (logits(tuned) - logits(untrained)).abs().max() < 1
    assert "quantization_config" not in read_config(workdir / "run")


def test_a_gguf_dry_run_reads_no_weights(gguf_file: Path, eabf: Eabf, workdir: Path) -> None:
    result = eabf("patch", "-m", gguf_file, "--dry-run", "--json")
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert json.loads(result.stdout)["changes"]["max_position_embeddings"] == [WINDOW, TARGET]
    assert list(workdir.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all"])
def test_a_damaged_gguf_file_is_one_clear_error(content: bytes, eabf: Eabf, workdir: Path) -> None:
    (workdir / "broken.gguf").write_bytes(content)
    result = eabf("patch", "-m", "broken.gguf", "-o", "out")
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), result.exception
    assert "broken.gguf" in result.stderr
    assert len(result.stderr.splitlines()) <= 3
    assert [path.name for path in workdir.iterdir()] == ["broken.gguf"]
    with pytest.raises(CheckpointError):
        load_model(workdir / "broken.gguf")


def test_a_truncated_gguf_file_is_one_clear_error(gguf_file: Path, eabf: Eabf, workdir: Path) -> None:
    (workdir / "cut.gguf").write_bytes(gguf_file.read_bytes()[:-1000])
    result = eabf("patch", "-m", "cut.gguf", "-o", "out")
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), result.exception
    assert "cut.gguf" in result.stderr
    assert [path.name for path in workdir.iterdir()] == ["cut.gguf"]
