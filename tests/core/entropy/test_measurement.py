"""The measured entropies against brute force: whole attention matrices, softmax once, -sum p ln p in float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from eabf_cli.core.entropy.measurement import measure_document
from eabf_cli.core.entropy.positions import choose_positions
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
        torch.testing.assert_close(
            measured.entropy[0].double(), expected[..., at(positions)], atol=TOLERANCE, rtol=0
        )
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


@pytest.mark.parametrize("is_patched", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_left_padding_and_chunks_with_a_cache(name: str, is_patched: bool) -> None:
    if is_patched and name not in PATCHABLE:
        pytest.skip("no layer to scale")
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
