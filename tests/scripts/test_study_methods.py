"""The study's scales and its weighted loss, against their formulas and against sums written out."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, linear
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from eabf_cli.core import attention_scale, report
from eabf_cli.core.data.samples import IGNORE_INDEX, Sample, SampleCollator, SampleSet
from eabf_cli.core.finetune.chunked_loss import chunked_cross_entropy, chunked_loss
from eabf_cli.core.finetune.recipe import Recipe
from eabf_cli.core.finetune.settings import TrainSettings
from eabf_cli.core.finetune.training import SampleTrainer, train
from eabf_cli.core.methods import METHODS
from eabf_cli.core.scaling_config import RopeScalingConfig
from tests.tiny_llama import WINDOW, tiny_llama, token_ids, write_tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "reproduction"


@pytest.fixture(autouse=True)
def study() -> Iterator[ExitStack]:
    """The study's context, which a test may close before its end."""
    sys.path.insert(0, str(SCRIPTS))
    from study_methods import study_methods

    with ExitStack() as stack:
        stack.enter_context(study_methods())
        yield stack
    sys.path.remove(str(SCRIPTS))


def extended(method: str, **fields: Any) -> PreTrainedModel:
    from study_methods import apply_study_method

    model = tiny_llama(**fields)
    apply_study_method(model, RopeScalingConfig(method=method, factor=4, unscaled_layers=()))
    return model


def rows(number: int, length: int = 24) -> SampleSet:
    found = [token_ids(length, seed=seed)[0].tolist() for seed in range(number)]
    return SampleSet(samples=tuple(Sample(row, list(row)) for row in found), num_available=number, data_hash="")


FORMULAS = {
    "positional": lambda i, c: (1 + 0.1 * math.log(max(1, i / c))) ** 2,
    "unbounded": lambda i, c: math.log(i) / math.log(c),
    "learned": lambda i, c: max(1, math.log(i) / math.log(c)),
    "eabf": lambda i, c: max(1, math.log(i) / math.log(c)),
}


@pytest.mark.parametrize("rule", FORMULAS)
@pytest.mark.parametrize("window", [WINDOW, 512])
def test_a_rule_is_its_formula_at_every_position(rule: str, window: int) -> None:
    expected = torch.tensor([FORMULAS[rule](i, window) for i in range(1, 9 * window)], dtype=torch.float64)
    found = attention_scale.logit_scale(rule, torch.arange(9 * window - 1)[None], window)[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)
    if rule != "unbounded":
        assert (found[:window] == 1).all()


def test_the_positional_scale_meets_yarns_constant_at_the_target_window() -> None:
    position = torch.tensor([4 * WINDOW - 1])
    found = attention_scale.logit_scale("positional", position, WINDOW).item()
    yarn = extended("yarn").model.rotary_emb.attention_scaling
    assert found == pytest.approx(yarn**2, rel=1e-6)


@pytest.mark.parametrize("method", ["parts+positional", "abf+learned"])
def test_attention_is_the_softmax_of_scaled_logits(method: str) -> None:
    model = extended(method)
    ids = token_ids(3 * WINDOW)
    taken: dict[int, tuple[torch.Tensor, Any]] = {}
    gains = {}
    for index, layer in enumerate(model.model.layers):
        if method == "abf+learned":
            with torch.no_grad():
                layer.self_attn.eabf_gain.copy_(torch.linspace(-2, 1 + index, 4))
            gains[index] = layer.self_attn.eabf_gain.detach().double().exp().log1p()

        def keep(module: Any, args: Any, kwargs: Any, index: int = index) -> None:
            taken[index] = (kwargs["hidden_states"], kwargs["position_embeddings"])

        layer.self_attn.register_forward_pre_hook(keep, with_kwargs=True)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    for index, layer in enumerate(model.model.layers):
        hidden, (cos, sin) = taken[index]
        module = layer.self_attn
        with torch.no_grad():
            query = module.q_proj(hidden).unflatten(-1, (4, -1)).transpose(1, 2)
            key = module.k_proj(hidden).unflatten(-1, (2, -1)).transpose(1, 2)
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
        logits = query[0].double() @ key[0].double().repeat_interleave(2, 0).transpose(1, 2) / query.shape[-1] ** 0.5
        for head in range(4):
            for position in (0, 5, WINDOW - 1, WINDOW, 2 * WINDOW, 3 * WINDOW - 1):
                t = FORMULAS["positional"](position + 1, WINDOW)
                if method == "abf+learned":
                    t = 1 + gains[index][head].item() * math.log(max(1, (position + 1) / WINDOW))
                expected = (t * logits[head, position, : position + 1]).softmax(-1)
                found = attentions[index][0, head, position, : position + 1].double()
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_learned_scale_starts_at_eabfs() -> None:
    learned, eabf = extended("abf+learned"), extended("eabf")
    ids = token_ids(3 * WINDOW)
    with torch.no_grad():
        torch.testing.assert_close(learned(ids).logits, eabf(ids).logits, rtol=1e-4, atol=1e-5)


def test_gains_learn_at_their_own_rate_without_decay_and_are_in_the_stored_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import measuring
    from study_methods import GAIN_LEARNING_RATE, GAIN_NAME
    from variants import Variant

    folder = write_tiny_llama(tmp_path / "base")
    monkeypatch.setattr(measuring, "DEMO_MODEL", str(folder))
    variant = Variant(method="parts+learned", unscaled_layers=())
    model = measuring.load_model(str(folder), dtype="float32")
    measuring._apply(model, variant)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    groups: list[dict[str, Any]] = []
    create = SampleTrainer.create_optimizer

    def recording(trainer: Any, *args: Any) -> Any:
        optimizer = create(trainer, *args)
        groups.extend({**group, "params": list(group["params"])} for group in optimizer.param_groups)
        return optimizer

    with monkeypatch.context() as patched:
        patched.setattr(SampleTrainer, "create_optimizer", recording)
        recipe = Recipe(learning_rate=3e-4, batch_size=2)
        train(model, rows(2, 2 * WINDOW), recipe, TrainSettings(), folder=tmp_path / "run", collator=SampleCollator(2))

    gains = {name: weight for name, weight in model.named_parameters() if name.endswith(GAIN_NAME)}
    ids = {id(weight) for weight in gains.values()}
    assert len(gains) == 3
    assert [(g["lr"], g["weight_decay"]) for g in groups if {id(w) for w in g["params"]} == ids] == [
        (GAIN_LEARNING_RATE, 0.0)
    ]
    others = [g for g in groups if not {id(w) for w in g["params"]} & ids]
    assert len(others) == len(groups) - 1
    assert {g["lr"] for g in others} == {3e-4}
    # Adam's first step is its learning rate, whatever the gradient; the second has half of it (cosine).
    for name, weight in model.named_parameters():
        moved = (weight - before[name]).abs().max().item()
        rate = GAIN_LEARNING_RATE if name in gains else 3e-4
        assert 0.1 * rate < moved < 2 * rate, name

    stored = measuring._as_stored(model, variant)
    assert stored.dtype == torch.bfloat16
    for name, weight in model.named_parameters():
        if name not in gains:
            weight.data = weight.data.bfloat16().float()
    # In float32 products, the rounding of the weights is all that there is between the two.
    tokens = token_ids(3 * WINDOW)
    with torch.no_grad():
        torch.testing.assert_close(stored.float()(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)


def test_leaving_the_context_restores_the_table_the_rule_and_the_optimizer(study: ExitStack) -> None:
    from study_methods import STUDY_METHODS

    from eabf_cli.modeling_eabf import logit_scale

    assert STUDY_METHODS.keys() <= METHODS.keys()
    study.close()
    assert not STUDY_METHODS.keys() & METHODS.keys()
    assert attention_scale.logit_scale is report.logit_scale is logit_scale
    assert "create_optimizer" not in vars(SampleTrainer)


# ---- LongCE --------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [20, 24, 25, 61, 64])
def test_longce_weights_are_ratios_of_probabilities_token_by_token(length: int) -> None:
    from study_loss import longce_weights

    context, stride, gamma = 16, 8, 1.5
    model = extended("abf+positional")
    ids = token_ids(length)[0]
    labels = [IGNORE_INDEX] * 5 + ids[5:].tolist()
    samples = SampleSet(samples=(Sample(ids.tolist(), labels),), num_available=1, data_hash="")
    found = longce_weights(model, samples, context=context, stride=stride, max_weight=gamma)[0]

    @torch.no_grad()
    def probability(start: int, position: int) -> float:
        return model(ids[None, start:position]).logits[0, -1].double().softmax(-1)[ids[position]].item()

    expected = torch.ones(length, dtype=torch.float64)
    for position in range(context + stride, length):
        # The window begins at a multiple of the stride, and has 16 to 23 tokens before this one.
        start = position // stride * stride - context
        expected[position] = min(probability(0, position) / probability(start, position), gamma)
    expected /= expected[5:].mean()
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)
    assert found[5:].mean().item() == pytest.approx(1, abs=1e-5)
    if length > 60:
        assert found.unique().numel() > 10


@pytest.mark.parametrize("chunk_tokens", [3, 100])
def test_weighted_losses_and_gradients_are_those_of_weighted_cross_entropy(chunk_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(10, 6, generator=generator).requires_grad_()
    weight = torch.randn(11, 6, generator=generator).requires_grad_()
    bias = torch.randn(11, generator=generator).requires_grad_()
    labels = torch.randint(11, (10,), generator=generator)
    labels[[0, 7]] = IGNORE_INDEX
    weights = 3 * torch.rand(10, generator=generator)
    found = chunked_cross_entropy(hidden, weight, bias, labels, chunk_tokens=chunk_tokens, weights=weights)
    expected = weights @ cross_entropy(linear(hidden, weight, bias), labels, reduction="none")
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(loss, (hidden, weight, bias)) for loss in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_batch_of_unequal_rows_is_weighted_where_its_labels_are() -> None:
    from study_loss import WeightedCollator

    model = extended("abf+positional")
    first, second = token_ids(12)[0], token_ids(9, seed=1)[0]
    weights = (torch.rand(12), torch.rand(9))
    samples = SampleSet(
        samples=tuple(Sample(ids.tolist(), ids.tolist()) for ids in (first, second)), num_available=2, data_hash=""
    )
    batch = WeightedCollator(2, weights)([samples[0], samples[1]])
    batch.pop("sample_index")
    with chunked_loss(model), torch.no_grad():
        found = model(**batch).loss
    with torch.no_grad():
        losses = [cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none") for ids in (first, second)]
    total = sum((w[1:] * loss).sum() for w, loss in zip(weights, losses, strict=True))
    torch.testing.assert_close(found, total / (11 + 8), rtol=1e-5, atol=1e-6)
