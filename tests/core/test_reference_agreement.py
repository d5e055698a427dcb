"""Patched models against the slow float64 decoder of `tests/reference`, written from the formulas alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from eabf_cli.core.methods import METHODS
from eabf_cli.core.patching import apply_method
from tests.architectures import (
    ALL_CONFIGS,
    ALREADY_SCALED_CONFIGS,
    ARCHITECTURE_CONFIGS,
    ROPE_THETA,
    VARIANT_CONFIGS,
    WINDOW,
    build_tiny_config,
    build_tiny_model,
    random_tokens,
)
from tests.reference import Extension, reference_forward
from tests.reference.extension import PAPER_THETA, Array
from tests.scalings import FACTOR, SCALED_METHODS, scaling_for

LENGTH = 5 * WINDOW // 2
TOKENS = random_tokens(LENGTH)
# Of the logits' range. float32 rounding is below 2e-6 here; the smallest real difference is 1e-3.
TOLERANCE = 1e-5

PATCHABLE = [*ARCHITECTURE_CONFIGS, *VARIANT_CONFIGS]


def extension_for(method: str, unscaled_layers: tuple[int, ...] | None = None) -> Extension:
    if unscaled_layers is None:
        unscaled_layers = (0, 1) if method == "eabf" else ()
    return Extension(method=method, factor=FACTOR, window=WINDOW, unscaled_layers=unscaled_layers)


def model_logits(model: PreTrainedModel, tokens: torch.Tensor = TOKENS) -> Array:
    """`(length, vocabulary)`."""
    with torch.no_grad():
        return model(tokens).logits[0].double().numpy()


def reference_logits(name: str, model: PreTrainedModel, extension: Extension | None) -> Array:
    return reference_forward(build_tiny_config(name), model.state_dict(), TOKENS[0].tolist(), extension).logits


def assert_agrees(actual: Array, expected: Array) -> None:
    error = np.abs(actual - expected) / np.ptp(expected)
    position = int(error.max(axis=-1).argmax())
    assert error.max() < TOLERANCE, (
        f"off by {error.max():.1e} of the range at position {position} (window {WINDOW}); "
        f"inside the window {error[:WINDOW].max():.1e}"
    )


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_the_reference_is_right_about_the_stock_model(name: str) -> None:
    model = build_tiny_model(name)
    assert_agrees(model_logits(model), reference_logits(name, model, extension=None))


@pytest.mark.parametrize(
    ("theta", "dim", "window", "factor"),
    [(1e4, 128, 4096, 4.0), (1e4, 64, 512, 8.0), (1e6, 80, 32768, 2.5), (5e5, 16, 8192, 16.0)],
)
@pytest.mark.parametrize("method", ["linear", "dynamic", "yarn"])
def test_the_reference_has_the_frequencies_of_transformers(
    method: str, theta: float, dim: int, window: int, factor: float
) -> None:
    rope_parameters = {
        "rope_type": method,
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": window,
    }
    config = build_tiny_config("llama", head_dim=dim, max_position_embeddings=window, rope_parameters=rope_parameters)
    length = 3 * window
    frequencies, gain = ROPE_INIT_FUNCTIONS[method](config, torch.device("cpu"), seq_len=length)
    extension = Extension(method=method, factor=factor, window=window)
    expected = extension.inverse_frequencies(theta, dim, length)
    np.testing.assert_allclose(frequencies.numpy(), expected, rtol=2e-5)
    assert gain == pytest.approx(extension.rotation_gain())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PATCHABLE)
def test_a_patched_model_follows_the_formulas(name: str, method: str) -> None:
    model = build_tiny_model(name)
    apply_method(model, scaling_for(method))
    assert_agrees(model_logits(model), reference_logits(name, model, extension_for(method)))


@pytest.mark.parametrize("name", PATCHABLE)
def test_the_agreement_can_tell_scaled_from_unscaled(name: str) -> None:
    model = build_tiny_model(name)
    scaled, unscaled = (reference_logits(name, model, extension_for(method)) for method in ("eabf", "abf"))
    difference = np.abs(scaled - unscaled).max(axis=-1) / np.ptp(scaled)
    assert difference[:WINDOW].max() == 0
    assert difference[WINDOW:].max() > 100 * TOLERANCE


@pytest.mark.parametrize("unscaled_layers", [(), (0,), (1, 3), (2,), (0, 1, 3)])
@pytest.mark.parametrize("name", ["llama", "phi3", "qwen3", "smollm3", "gemma3_text", "mixtral"])
@pytest.mark.parametrize("method", SCALED_METHODS)
def test_the_exempt_layers_are_those_asked_for(method: str, name: str, unscaled_layers: tuple[int, ...]) -> None:
    model = build_tiny_model(name)
    apply_method(model, scaling_for(method, unscaled_layers=unscaled_layers))
    assert_agrees(model_logits(model), reference_logits(name, model, extension_for(method, unscaled_layers)))


@pytest.mark.parametrize("factor", [1.5, 16.0])
@pytest.mark.parametrize("method", METHODS)
def test_other_factors_and_windows(method: str, factor: float) -> None:
    window = WINDOW // 2 + 3
    model = build_tiny_model("llama")
    apply_method(model, scaling_for(method, factor=factor, original_max_position_embeddings=window))
    exempt = (0, 1) if method == "eabf" else ()
    extension = Extension(method=method, factor=factor, window=window, unscaled_layers=exempt)
    assert_agrees(model_logits(model), reference_logits("llama", model, extension))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ALREADY_SCALED_CONFIGS)
def test_rebase_replaces_the_models_own_temperature(name: str, method: str) -> None:
    model = build_tiny_model(name)
    apply_method(model, scaling_for(method), rebase=True)
    assert_agrees(model_logits(model), reference_logits("ministral3", model, extension_for(method)))


@pytest.mark.parametrize("method", METHODS)
def test_rebase_replaces_yarn(method: str) -> None:
    own = {
        "rope_type": "yarn",
        "rope_theta": ROPE_THETA,
        "factor": 2.0,
        "original_max_position_embeddings": WINDOW,
    }
    model = build_tiny_model("llama", rope_parameters=own, max_position_embeddings=2 * WINDOW)
    apply_method(model, scaling_for(method), rebase=True)
    assert_agrees(model_logits(model), reference_logits("llama", model, extension_for(method)))


def test_native_is_what_stock_ministral3_runs() -> None:
    patched = build_tiny_model("llama")
    apply_method(patched, scaling_for("native"))
    stock_parameters = {
        "rope_type": "default",
        "rope_theta": PAPER_THETA,
        "llama_4_scaling_beta": 1 / math.log(WINDOW),
        "original_max_position_embeddings": WINDOW,
    }
    stock = build_tiny_model("ministral3", rope_parameters=stock_parameters, rms_norm_eps=1e-6)
    stock.load_state_dict(patched.state_dict())
    assert_agrees(model_logits(patched), model_logits(stock))
