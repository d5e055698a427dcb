"""The measured entropies against brute force: whole attention matrices, softmax once, -sum p ln p in float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from eabf_cli.core.architectures import attention_layers
from eabf_cli.core.entropy.measurement import chunk_size, measure_document
from eabf_cli.core.entropy.positions import choose_positions
from eabf_cli.core.entropy.recorder import NotANumberError
from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.patching import apply_method
from tests.architectures import (
    ALL_CONFIGS,
    ARCHITECTURE_CONFIGS,
    SLIDING_WINDOW,
    VARIANT_CONFIGS,
    WINDOW,
    build_tiny_config,
    build_tiny_model,
    random_tokens,
)
from tests.reference import Extension, reference_forward
from tests.reference.family import is_sliding
from tests.scalings import FACTOR, scaling_for

LENGTH = 5 * WINDOW // 2
TOKENS = random_tokens(LENGTH)
TOLERANCE = 1e-4
EVERYWHERE = choose_positions("all", LENGTH)
CHOSEN = choose_positions("log:17", LENGTH)
SPREAD = choose_positions("linear:17", LENGTH)
PATCHABLE = [*ARCHITECTURE_CONFIGS, *VARIANT_CONFIGS]


def entropies(attentions: list[np.ndarray]) -> Tensor:
    """-sum p ln p of every row, `(layers, heads, queries)`."""
    weights = torch.from_numpy(np.stack(attentions)).double()
    return torch.special.entr(weights).sum(-1)


def reference_entropies(name: str, model: PreTrainedModel, extension: Extension | None) -> Tensor:
    """From the float64 model of `tests/reference`, which shares no code with transformers."""
    output = reference_forward(build_tiny_config(name), model.state_dict(), TOKENS[0].tolist(), extension)
    return entropies(output.attentions)


def eager_entropies(model: PreTrainedModel, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """From the attention weights that a copy of the model gives under the eager kernel, `(batch, layers, ...)`."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        output = eager(tokens, attention_mask=mask, output_attentions=True, use_cache=False)
    return torch.stack([torch.special.entr(weights.double()).sum(-1) for weights in output.attentions], 1)


def at(positions: tuple[int, ...]) -> Tensor:
    return torch.tensor(positions) - 1


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_a_model_as_it_stands(name: str) -> None:
    model = build_tiny_model(name)
    expected = reference_entropies(name, model, None)
    for positions in (CHOSEN, EVERYWHERE):
        measured = measure_document(model, TOKENS, positions)
        torch.testing.assert_close(measured.entropy[0].double(), expected[..., at(positions)], atol=TOLERANCE, rtol=0)
        slides = [is_sliding(build_tiny_config(name), layer) for layer in range(len(expected))]
        seen = [[min(p, SLIDING_WINDOW) if slid else p for p in positions] for slid in slides]
        assert measured.visible_keys.tolist() == seen


@pytest.mark.parametrize("name", PATCHABLE)
def test_a_patched_model_whose_scale_counts(name: str) -> None:
    model = build_tiny_model(name)
    plain = measure_document(model, TOKENS, CHOSEN).entropy[0].double()
    extension = Extension(method="eabf", factor=FACTOR, window=WINDOW, unscaled_layers=(0, 1))
    apply_method(model, scaling_for("eabf"))
    expected = reference_entropies(name, model, extension)
    for positions in (CHOSEN, EVERYWHERE):
        measured = measure_document(model, TOKENS, positions).entropy[0].double()
        torch.testing.assert_close(measured, expected[..., at(positions)], atol=TOLERANCE, rtol=0)
    assert (expected[..., at(CHOSEN)] - plain).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("name", "is_patched"), [*((name, False) for name in ALL_CONFIGS), *((name, True) for name in PATCHABLE)]
)
def test_left_padding_and_chunks_with_a_cache(name: str, is_patched: bool) -> None:
    model = build_tiny_model(name)
    if is_patched:
        apply_method(model, scaling_for("eabf"))
    tokens = random_tokens(LENGTH, batch=2)
    mask = torch.ones_like(tokens)
    mask[1, :19] = 0
    expected = eager_entropies(model, tokens, mask)
    is_real = mask[:, None, None].bool()
    for chunk_tokens in (LENGTH, 23):
        measured = measure_document(model, tokens, EVERYWHERE, attention_mask=mask, chunk_tokens=chunk_tokens)
        difference = (measured.entropy.double() - expected).abs()
        assert difference.where(is_real, 0.0).max() < TOLERANCE


def test_chunks_without_a_mask_give_the_same() -> None:
    model = build_tiny_model("llama")
    whole = measure_document(model, TOKENS, EVERYWHERE)
    chunked = measure_document(model, TOKENS, EVERYWHERE, chunk_tokens=31)
    torch.testing.assert_close(chunked.entropy, whole.entropy, atol=TOLERANCE, rtol=0)
    assert torch.equal(chunked.visible_keys, whole.visible_keys)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_sliding", "ministral3"])
@pytest.mark.parametrize("is_patched", [False, True], ids=["plain", "patched"])
def test_the_model_is_what_it_was_bit_for_bit(name: str, is_patched: bool) -> None:
    model = build_tiny_model(name)
    if is_patched:
        apply_method(model, scaling_for("eabf"))
    layers = attention_layers(model)
    before = [(layer.module.config, dict(vars(layer.module))) for layer in layers]
    with torch.no_grad():
        logits = model(TOKENS).logits
        measure_document(model, TOKENS, CHOSEN)
        assert torch.equal(model(TOKENS).logits, logits)
    for layer, (config, attributes) in zip(layers, before, strict=True):
        assert layer.module.config is config
        assert vars(layer.module).keys() == attributes.keys()
        assert all(vars(layer.module)[name] is value for name, value in attributes.items())


def test_the_pass_that_is_measured_is_the_models_own() -> None:
    model = build_tiny_model("llama")
    apply_method(model, scaling_for("eabf"))
    hidden = []
    with torch.no_grad():
        expected = model.model(TOKENS, use_cache=False).last_hidden_state
        with model.model.norm.register_forward_hook(lambda *call: hidden.append(call[-1])):
            measure_document(model, TOKENS, EVERYWHERE)
    assert torch.equal(hidden[0], expected)


def test_dynamic_frequencies_do_not_remember_a_longer_document() -> None:
    model = build_tiny_model("llama")
    apply_method(model, scaling_for("dynamic"))
    expected = measure_document(model, TOKENS, CHOSEN).entropy
    with torch.no_grad():
        model(random_tokens(4 * LENGTH))
    assert torch.equal(measure_document(model, TOKENS, CHOSEN).entropy, expected)


@pytest.mark.parametrize("chunk_tokens", [LENGTH, 23])
@pytest.mark.parametrize("name", ["llama", "qwen3_sliding", "gemma2"])
def test_rows_and_scores_are_those_of_the_attention_weights(name: str, chunk_tokens: int) -> None:
    model = build_tiny_model(name)
    output = reference_forward(build_tiny_config(name), model.state_dict(), TOKENS[0].tolist(), None)
    weights = torch.from_numpy(np.stack(output.attentions))  # (layers, heads, queries, keys)
    measured = measure_document(model, TOKENS, SPREAD, scores=True, rows=True, chunk_tokens=chunk_tokens)
    assert measured.rows is not None
    torch.testing.assert_close(measured.rows[0].double(), weights[:, :, at(SPREAD)], atol=1e-5, rtol=0)

    mass = measured.scores
    assert mass is not None
    # Those whose last 64 tokens are apart from the first 4.
    counted = [position for position in SPREAD if position > 68]
    assert len(counted) > 1
    edges = [0, 1, 2, 4, 8, 16, 32, 64, 128]
    assert mass.edges == edges
    assert mass.num_queries.tolist() == [len(counted)] * len(weights)
    sink = recent = 0.0
    buckets = torch.zeros(*weights.shape[:2], len(edges) - 1, dtype=torch.float64)
    for position in counted:
        row = weights[:, :, position - 1, :position]
        sink = sink + row[..., :4].sum(-1)
        recent = recent + row[..., position - 64 :].sum(-1)
        for bucket in range(len(edges) - 1):
            for distance in range(edges[bucket], min(edges[bucket + 1], position)):
                buckets[..., bucket] += row[..., position - 1 - distance]
    torch.testing.assert_close(mass.sink, sink, atol=1e-5, rtol=0)
    torch.testing.assert_close(mass.recent, recent, atol=1e-5, rtol=0)
    torch.testing.assert_close(mass.by_distance, buckets, atol=1e-5, rtol=0)


def test_of_all_positions_the_scores_are_those_of_64() -> None:
    model = build_tiny_model("qwen3_sliding")
    everywhere, chosen = (
        measure_document(model, TOKENS, choose_positions(rule, LENGTH), scores=True).scores for rule in ("all", "log")
    )
    assert everywhere is not None
    assert chosen is not None
    for name in ("num_queries", "sink", "recent", "by_distance"):
        torch.testing.assert_close(getattr(everywhere, name), getattr(chosen, name))


@pytest.mark.parametrize("positions", [CHOSEN, EVERYWHERE], ids=["chosen", "all"])
def test_not_a_number_is_told_with_layer_head_and_position(positions: tuple[int, ...]) -> None:
    model = build_tiny_model("llama")
    layer = model.model.layers[2].self_attn
    with torch.no_grad():
        layer.q_proj.weight[3 * layer.head_dim] = torch.nan
    with pytest.raises(NotANumberError, match=r"layer 2, head 3 is not a number at position 1 of book\.txt"):
        measure_document(model, TOKENS, positions, name="book.txt")
    model = build_tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[TOKENS[0, 40]] = torch.nan
    first = min(position for position in positions if TOKENS[0, 40] in TOKENS[0, :position])
    with pytest.raises(NotANumberError, match=f"layer 0, head 0 is not a number at position {first} of"):
        measure_document(model, TOKENS, positions)
    assert not hasattr(model.model.layers[0].self_attn, "entropy_probe")


def test_flex_attention_is_refused() -> None:
    model = build_tiny_model("llama", attn_implementation="flex_attention")
    with pytest.raises(InvalidConfigError, match="set_attn_implementation"):
        measure_document(model, TOKENS, CHOSEN)


def test_what_grows_with_the_square_of_the_length_is_cut_into_chunks() -> None:
    assert chunk_size(build_tiny_model("llama"), 100_000) == 100_000
    assert chunk_size(build_tiny_model("gemma2"), LENGTH) == LENGTH
    heads, length = 4, 16_384
    assert 12 * heads * length * chunk_size(build_tiny_model("gemma2"), length) <= 2**28
    assert chunk_size(build_tiny_model("gemma2"), length) > 300
    assert 5 * length * chunk_size(build_tiny_model("qwen3_sliding"), length) <= 2**28
    dynamic = build_tiny_model("llama", attn_implementation="eager")
    apply_method(dynamic, scaling_for("dynamic"))
    # Its frequencies follow the length of a call.
    assert chunk_size(dynamic, length) == length
