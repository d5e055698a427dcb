"""t is computed once in a forward pass, and never taken over from another one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from eabf_cli.core import attention_scale
from eabf_cli.core.patching import apply_eabf, remove_method
from tests.architectures import WINDOW, build_tiny_model, random_tokens

LENGTH = 3 * WINDOW


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The positions for which t was computed."""
    seen: list[Tensor] = []
    plain = attention_scale.logit_scale

    def watched(rule: str, position_ids: Tensor, window: int) -> Tensor:
        seen.append(position_ids)
        return plain(rule, position_ids, window)

    monkeypatch.setattr(attention_scale, "logit_scale", watched)
    return seen


def patched(**overrides: Any) -> PreTrainedModel:
    model = build_tiny_model("llama", **overrides)
    apply_eabf(model, factor=4.0)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel, positions: Tensor) -> Tensor:
    return model(input_ids=random_tokens(LENGTH), position_ids=positions, use_cache=False).logits


def test_the_layers_of_a_pass_share_one_computation(computed: list[Tensor]) -> None:
    model = patched()
    logits(model, torch.arange(LENGTH)[None])
    assert len(computed) == 1
    logits(model, torch.arange(LENGTH)[None])
    assert len(computed) == 2


def test_positions_changed_in_place_between_two_passes_count() -> None:
    model, positions = patched(), torch.arange(LENGTH)[None]
    near = logits(model, positions)
    positions += 5 * WINDOW
    expected = logits(patched(), torch.arange(LENGTH)[None] + 5 * WINDOW)
    assert not torch.equal(near, expected)
    assert torch.equal(logits(model, positions), expected)


def test_a_pass_that_fails_leaves_nothing_behind(computed: list[Tensor]) -> None:
    model, positions = patched(), torch.arange(LENGTH)[None]
    expected = logits(model, positions)
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 4), 10**6), position_ids=positions[:, :4])
    computed.clear()
    assert torch.equal(logits(model, positions), expected)
    assert len(computed) == 1


def test_layers_of_two_dtypes_get_their_own(computed: list[Tensor]) -> None:
    model = patched()
    model.model.layers[3].self_attn.to(torch.float64)
    positions = torch.arange(LENGTH)[None]
    scale = model.model.layers[3].self_attn.eabf_scale
    scale.pass_scale.open()
    first, second = (scale.factors(positions, dtype) for dtype in (torch.float32, torch.float64))
    assert (first.dtype, second.dtype) == (torch.float32, torch.float64)
    assert torch.equal(first.double(), second)
    assert len(computed) == 2


def test_a_copy_of_a_model_has_a_pass_of_its_own(computed: list[Tensor]) -> None:
    model = patched()
    twin = copy.deepcopy(model)
    mine, theirs = (m.model.layers[3].self_attn.eabf_scale.pass_scale for m in (model, twin))
    assert mine is not theirs
    assert mine is model.model.layers[2].self_attn.eabf_scale.pass_scale
    assert theirs is twin.model.layers[2].self_attn.eabf_scale.pass_scale
    logits(twin, torch.arange(LENGTH)[None])
    assert len(computed) == 1


def test_a_recomputed_layer_gets_the_same_gradients() -> None:
    """Activation checkpointing runs layers again in the backward pass, when no pass is open."""
    gradients = []
    for checkpointing in (False, True):
        model = patched().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        tokens = random_tokens(LENGTH)
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-5, atol=1e-7)


def test_no_hook_stays_on_a_model_whose_method_was_removed() -> None:
    model = patched()
    remove_method(model)
    assert not model.model._forward_pre_hooks
    assert not model.model._forward_hooks
