"""Fused kernels are on a model only while it trains, and on no other one."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import MethodType, ModuleType

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.finetune import fused_kernels as module
from eabf_cli.core.finetune.fused_kernels import (
    check_fused_kernels,
    fused_kernels,
    has_fused_kernels,
    pays_fused_kernels,
)
from tests.tiny_llama import logits, tiny_llama


class OtherNorm(nn.Module):
    """What is put in place of a family's norms."""

    weight: Tensor

    def forward(self, hidden_states: Tensor) -> Tensor:
        return 2 * self.weight * hidden_states


def apply_other_norms(model: PreTrainedModel, kernels: Mapping[str, bool]) -> None:
    """Changes a model as Liger does, which needs a GPU: methods of modules, and a class of the family's source."""
    assert not any(kernels[name] for name in ("rope", "cross_entropy", "fused_linear_cross_entropy"))
    modeling_llama.LlamaRMSNorm = OtherNorm
    for norm in [model.model.norm, *(layer.input_layernorm for layer in model.model.layers)]:
        for inner in (norm, *norm.children()):
            inner.__dict__["forward"] = MethodType(OtherNorm.forward, inner)
            inner.__dict__["casting_mode"] = "llama"


@pytest.fixture(autouse=True)
def other_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "apply_liger_kernel", apply_other_norms)


def test_a_model_is_afterwards_what_it_was() -> None:
    model, other = tiny_llama(), tiny_llama()
    before = logits(model)
    names = [set(vars(part)) for part in model.modules()]
    with fused_kernels(model):
        assert not torch.equal(logits(model), before)
        assert torch.equal(logits(other), before)
        assert torch.equal(logits(tiny_llama()), before)
    assert torch.equal(logits(model), before)
    assert [set(vars(part)) for part in model.modules()] == names


def test_an_error_takes_them_off_too() -> None:
    model = tiny_llama()
    before = logits(model)
    with pytest.raises(ZeroDivisionError), fused_kernels(model):
        1 / 0  # noqa: B018
    assert torch.equal(logits(model), before)


def test_they_reach_the_model_inside_adapters() -> None:
    model = tiny_llama()
    before = logits(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with fused_kernels(adapted):
        assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("device_type", "is_installed", "model_type", "expected"),
    [
        ("cuda", True, "llama", True),
        ("cuda", True, "stablelm", False),
        ("cuda", False, "llama", False),
        ("cpu", True, "llama", False),
    ],
)
def test_where_there_are_fused_kernels(
    device_type: str, is_installed: bool, model_type: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    liger = ModuleType("liger_kernel.transformers.monkey_patch")
    liger.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}  # type: ignore[attr-defined]
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, liger.__name__, liger)
    monkeypatch.setattr(module, "is_liger_kernel_available", lambda: is_installed)
    config = tiny_llama().config
    config.model_type = model_type
    assert has_fused_kernels(config, device_type) is expected
    assert pays_fused_kernels(config, device_type, longest=16_384) is expected
    assert not pays_fused_kernels(config, device_type, longest=2048)
    if expected:
        check_fused_kernels(config, device_type)
    else:
        installed = "installed" if is_installed else "not installed"
        with pytest.raises(InvalidConfigError, match=f"{model_type} on {device_type} with liger-kernel {installed}"):
            check_fused_kernels(config, device_type)
