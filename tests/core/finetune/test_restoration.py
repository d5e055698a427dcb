"""The restoration loss: its value, its gradient, its memory, the teachers, and what it adds to a training run."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, kl_div
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, set_seed

from eabf_cli.core.data.samples import IGNORE_INDEX, Sample, SampleCollator, SampleSet
from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.finetune.chunked_loss import chunked_loss
from eabf_cli.core.finetune.recipe import Recipe
from eabf_cli.core.finetune.restoration import (
    AdapterTeacher,
    FrozenTeacher,
    Restoration,
    RestorationConfig,
    head_logits,
    restoration_loss,
    row_lengths,
)
from eabf_cli.core.finetune.settings import TrainSettings
from eabf_cli.core.finetune.training import train
from eabf_cli.core.finetune.tuning import put_method
from eabf_cli.core.patching import apply_method, apply_resolution
from eabf_cli.core.resolution import Resolution, resolve_scaling
from tests.architectures import ALL_CONFIGS, build_tiny_model, random_tokens
from tests.scalings import scaling_for
from tests.tiny_llama import WINDOW, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 64
BOS = 1


# --- The loss --------------------------------------------------------------------------------------------


def hidden_and_heads(
    tokens: int = 11, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, nn.Linear, nn.Linear]:
    """A student and a teacher of different widths."""
    generator = torch.Generator().manual_seed(tokens)
    student = torch.randn(2, tokens, 16, generator=generator).to(dtype).requires_grad_()
    teacher = torch.randn(2, tokens, 24, generator=generator).to(dtype).requires_grad_()
    torch.manual_seed(0)
    return student, teacher, nn.Linear(16, VOCABULARY, dtype=dtype), nn.Linear(24, VOCABULARY, dtype=dtype)


def whole_kl(student: Tensor, teacher: Tensor, student_head: nn.Linear, teacher_head: nn.Linear) -> Tensor:
    """The same by torch's kl_div, on whole logits."""
    log_q = student_head(student).float().log_softmax(-1).flatten(0, -2)
    log_p = teacher_head(teacher).float().log_softmax(-1).flatten(0, -2).detach()
    return kl_div(log_q, log_p, reduction="batchmean", log_target=True)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 22, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_are_those_of_whole_logits(chunk_tokens: int, dtype: torch.dtype) -> None:
    results = []
    for loss_of in (whole_kl, lambda *given: restoration_loss(*given, chunk_tokens=chunk_tokens)):
        student, teacher, student_head, teacher_head = hidden_and_heads(dtype=dtype)
        loss = loss_of(student, teacher, student_head, teacher_head)
        assert loss.dtype == torch.float32
        loss.backward()
        results.append((loss.detach(), student.grad, student_head.weight.grad, student_head.bias.grad))
        assert teacher.grad is None
        assert teacher_head.weight.grad is None
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_bfloat16_is_summed_in_float32() -> None:
    student, teacher, student_head, teacher_head = hidden_and_heads(300, dtype=torch.bfloat16)
    ours = restoration_loss(student, teacher, student_head, teacher_head, chunk_tokens=7)
    assert ours.item() == pytest.approx(whole_kl(student, teacher, student_head, teacher_head).item(), rel=1e-5)


@given(st.integers(0, 10**6))
def test_it_is_never_negative_and_zero_only_for_equal_predictions(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(8, 20)
    a, b = torch.randn(2, 3, 8, generator=generator)
    assert restoration_loss(a, b, head, head) > 0
    same = a.clone().requires_grad_()
    loss = restoration_loss(same, a, head, head)
    loss.backward()
    assert loss.abs() < 1e-6
    assert same.grad is not None
    assert same.grad.abs().max() < 1e-6


def test_whole_logits_exist_neither_forward_nor_backward() -> None:
    student, teacher, student_head, teacher_head = hidden_and_heads(50)
    asked: list[int] = []
    for head in (student_head, teacher_head):
        head.register_forward_hook(lambda _, __, output: asked.append(len(output)))
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        loss = restoration_loss(student, teacher, student_head, teacher_head, chunk_tokens=8)
    loss.backward()
    assert max(asked) == 8
    # 13 chunks of both models, in each direction.
    assert len(asked) == 2 * 2 * 13
    assert not [shape for shape in saved if shape[-1:] == (VOCABULARY,)]


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_the_head_is_that_of_every_family(name: str) -> None:
    model = build_tiny_model(name)
    with torch.no_grad():
        outputs = model(random_tokens(10), output_hidden_states=True, use_cache=False)
        hidden = model.get_decoder()(random_tokens(10), use_cache=False).last_hidden_state
        torch.testing.assert_close(head_logits(model, hidden), outputs.logits)


# --- The teachers ----------------------------------------------------------------------------------------


def ids(length: int = 30, batch: int = 2) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))


def llama(**fields: Any) -> PreTrainedModel:
    return tiny_llama(num_hidden_layers=2, vocab_size=VOCABULARY, **fields)


def resolution_for(model: PreTrainedModel) -> Resolution:
    return resolve_scaling(model.config, scaling_for("eabf", unscaled_layers=(0,)), rebase=False)


def with_lora(model: PreTrainedModel, **fields: Any) -> PeftModel:
    """LoRA on every linear layer, norms trained whole, both away from where they start."""
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"],
        modules_to_save=["input_layernorm", "norm"],
        init_lora_weights=False,
        **fields,
    )
    tuned = get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "modules_to_save" in name:
                weight.mul_(1.3)
    return tuned


def test_a_frozen_teacher_is_the_model_before_method_and_training() -> None:
    model = llama()
    with torch.no_grad():
        expected = model(ids()).logits
    teacher = FrozenTeacher(model, torch.float32)
    apply_resolution(model, resolution_for(model))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1.0)
    hidden = teacher.hidden_states(ids())
    assert not hidden.requires_grad
    torch.testing.assert_close(teacher.logits(hidden), expected, atol=0, rtol=0)
    assert not any(weight.requires_grad for weight in teacher.model.parameters())
    assert all(weight.requires_grad for weight in model.parameters())


def test_a_frozen_teacher_keeps_its_weights_in_its_dtype_and_its_frequencies_in_float32() -> None:
    model = llama()
    teacher = FrozenTeacher(model, torch.bfloat16)
    assert {weight.dtype for weight in teacher.model.parameters()} == {torch.bfloat16}
    assert model.dtype == torch.float32
    rotary = teacher.model.model.rotary_emb
    assert torch.equal(rotary.inv_freq, model.model.rotary_emb.inv_freq)
    assert teacher.model.lm_head.weight is teacher.model.model.embed_tokens.weight


def _lora_head(model: PreTrainedModel) -> PeftModel:
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    return get_peft_model(model, config)


def _saved_head(model: PreTrainedModel) -> PeftModel:
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    tuned = get_peft_model(model, config)
    with torch.no_grad():
        tuned.get_output_embeddings().modules_to_save["default"].weight.mul_(2.0)
    return tuned


@pytest.mark.parametrize("tune", [with_lora, _lora_head, _saved_head])
def test_an_adapter_teacher_is_the_base_without_adapters_and_method(
    tune: Callable[[PreTrainedModel], PeftModel],
) -> None:
    base = llama(tie_word_embeddings=False)
    with torch.no_grad():
        expected = base(ids()).logits
    resolution = resolution_for(base)
    apply_resolution(base, resolution)
    tuned = tune(base)
    tuned.train()
    long = ids(2 * WINDOW)
    with torch.no_grad():
        before = tuned(long).logits
    trained = [name for name, weight in tuned.named_parameters() if weight.requires_grad]

    teacher = AdapterTeacher(tuned, resolution)
    hidden = teacher.hidden_states(ids())
    with torch.no_grad():
        torch.testing.assert_close(teacher.logits(hidden), expected, atol=1e-6, rtol=1e-6)
        # Method, adapters and mode are back, bit for bit.
        assert torch.equal(tuned(long).logits, before)
    assert tuned.training
    assert [name for name, weight in tuned.named_parameters() if weight.requires_grad] == trained
    assert not torch.allclose(before[:, :30], expected, atol=1e-2)


def test_an_adapter_teacher_of_a_rebased_model_is_that_model_as_it_was_loaded() -> None:
    base = llama()
    stored, resolution = resolution_for(base), resolve_scaling(base.config, scaling_for("abf", factor=2.0))
    apply_resolution(base, stored)
    long = ids(2 * WINDOW)
    with torch.no_grad():
        expected = base(long).logits
    put_method(base, resolution)
    tuned = with_lora(base)
    with torch.no_grad():
        before = tuned(long).logits
    teacher = AdapterTeacher(tuned, resolution, stored)
    with torch.no_grad():
        assert torch.equal(teacher.logits(teacher.hidden_states(long)), expected)
        assert torch.equal(tuned(long).logits, before)
    assert not torch.allclose(before, expected, atol=1e-2)


# --- In training -----------------------------------------------------------------------------------------


def restoration_for(model: PreTrainedModel, teacher: Any = None, **fields: Any) -> Restoration:
    return Restoration(
        RestorationConfig(**({"share": 1.0} | fields)),
        model=model,
        teacher=teacher or FrozenTeacher(llama(), torch.float32),
        window=WINDOW,
        bos_token_id=BOS,
        seed=5,
    )


def trained_model(seed: int = 1) -> PreTrainedModel:
    """A patched model that has moved away from the original."""
    model = llama()
    apply_method(model, scaling_for("eabf", unscaled_layers=(0,)))
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    return model.train()


@given(st.floats(0.01, 1.0), st.integers(1, 400))
def test_the_share_is_spread_evenly(share: float, count: int) -> None:
    config = RestorationConfig(share=share)
    chosen = [config.has_loss(number) for number in range(count)]
    assert abs(sum(chosen) - share * count) <= 1
    half = count // 2
    assert abs(sum(chosen[:half]) - share * half) <= 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"weight": 0.0}, ["weight", "0.0"]),
        ({"weight": float("nan")}, ["weight", "nan"]),
        ({"weight": float("inf")}, ["weight", "inf"]),
        ({"share": 0.0}, ["share", "0.0"]),
        ({"share": 1.5}, ["share", "1.5"]),
        ({"length": 1}, ["length", "1"]),
    ],
)
def test_nonsense_is_refused(fields: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(InvalidConfigError) as error:
        RestorationConfig(**fields)
    assert not [word for word in said if word not in str(error.value)]


@functools.cache
def _unused_model() -> PreTrainedModel:
    return llama()


@given(
    lengths=st.lists(st.integers(2, 200), min_size=1, max_size=4),
    length=st.none() | st.integers(2, 300),
    number=st.integers(0, 1000),
    has_bos=st.booleans(),
)
def test_slices_are_pieces_of_the_rows_inside_the_window(
    lengths: list[int], length: int | None, number: int, has_bos: bool
) -> None:
    longest = max(lengths)
    rows = []
    for row_length in lengths:
        row = [BOS if has_bos else 99, *range(100, 99 + row_length)]
        rows.append(row + [0] * (longest - row_length))
    restoration = restoration_for(_unused_model(), FrozenTeacher(_unused_model(), torch.float32), length=length)
    slices = restoration.slices(torch.tensor(rows), lengths, number)
    assert torch.equal(slices, restoration.slices(torch.tensor(rows), lengths, number))
    assert slices.shape == (len(rows), min(WINDOW, length or WINDOW, *lengths))
    for taken in slices.tolist():
        assert (taken[0] == BOS) == has_bos
        body = taken[has_bos:]
        assert body == list(range(body[0], body[0] + len(body)))
        assert 0 not in taken


@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=4), is_packed=st.booleans())
def test_pads_are_no_part_of_a_row(lengths: list[int], is_packed: bool) -> None:
    samples = [
        {"input_ids": [7] * length, "labels": [IGNORE_INDEX] * (length // 2) + [7] * (length - length // 2)}
        | ({"position_ids": list(range(length))} if is_packed else {})
        for length in lengths
    ]
    batch = SampleCollator(pad_token_id=7)(samples)
    assert ("attention_mask" in batch) != is_packed
    assert row_lengths(batch["labels"], batch.get("attention_mask")) == lengths


def test_the_forward_adds_weight_times_the_divergence_of_the_slice() -> None:
    model = trained_model()
    restoration = restoration_for(model, weight=0.7, length=20)
    rows = ids(100)
    labels = rows.clone()
    labels[0, :60] = IGNORE_INDEX
    num_items = 500
    with restoration.attached(first_micro_batch=3):
        loss = model(input_ids=rows, labels=labels, num_items_in_batch=num_items, use_cache=False).loss
        loss.backward()
    gradient = [weight.grad.clone() for weight in model.parameters()]
    assert "forward" not in vars(model)

    model.zero_grad()
    outputs = model(input_ids=rows, use_cache=False).logits[:, :-1].reshape(-1, VOCABULARY)
    own = cross_entropy(outputs, labels[:, 1:].reshape(-1), reduction="sum") / num_items
    piece = restoration.slices(rows, [100, 100], 3)
    with torch.no_grad():
        original = llama()(piece).logits.log_softmax(-1).flatten(0, 1)
    predicted = model(input_ids=piece, use_cache=False).logits.log_softmax(-1).flatten(0, 1)
    divergence = kl_div(predicted, original, reduction="batchmean", log_target=True)
    num_predicted = (labels[:, 1:] != IGNORE_INDEX).sum()
    expected = own + 0.7 * divergence * num_predicted / num_items
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert divergence > 0.01
    assert restoration.take_mean() == pytest.approx(divergence.item(), rel=1e-4)
    assert restoration.take_mean() is None
    for ours, weight in zip(gradient, model.parameters(), strict=True):
        torch.testing.assert_close(ours, weight.grad, atol=1e-5, rtol=1e-3)


def test_only_training_forwards_with_labels_are_counted() -> None:
    model = trained_model()
    restoration = restoration_for(model, share=0.5)
    rows = ids()
    with torch.no_grad():
        plain = model(input_ids=rows, labels=rows).loss
        with restoration.attached():
            model(input_ids=rows)
            assert torch.equal(model.eval()(input_ids=rows, labels=rows).loss, plain)
            model.train()
            assert [bool(model(input_ids=rows, labels=rows).loss > plain + 1e-3) for _ in range(4)] == [
                False,
                True,
                False,
                True,
            ]


def sample_set(number: int, length: int = 90) -> SampleSet:
    rows = [[BOS, *(5 + (7 * index + offset) % 50 for offset in range(length - 1))] for index in range(number)]
    return SampleSet(samples=tuple(Sample(row, list(row)) for row in rows), num_available=number, data_hash="")


def finetuned(
    folder: Path, *, weight: float | None = None, resume_from: Path | None = None, share: float = 0.5
) -> PreTrainedModel:
    """Eight steps of two micro-batches, with the loss on every second one if there is a weight."""
    set_seed(42)
    model = llama()
    teacher = FrozenTeacher(model, torch.float32)
    apply_method(model, scaling_for("eabf", unscaled_layers=(0,)))
    recipe = Recipe(learning_rate=5e-3, epochs=2, batch_size=2)
    restoration = None if weight is None else restoration_for(model, teacher, weight=weight, share=share)
    train(
        model,
        sample_set(8),
        recipe,
        TrainSettings(save_steps=6),
        folder=folder,
        collator=SampleCollator(2),
        restoration=restoration,
        resume_from=resume_from,
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(("restoration_loss" in line) == (weight is not None) for line in lines)
    return model


def test_a_run_stays_nearer_to_the_original_and_resumes_exactly(tmp_path: Path) -> None:
    plain = finetuned(tmp_path / "plain")
    restored = finetuned(tmp_path / "restored", weight=5.0)
    rows = torch.tensor([sample.input_ids[:WINDOW] for sample in sample_set(8).samples])
    with torch.no_grad():
        apart, near = (restoration_for(model).divergence(rows) for model in (plain, restored))
    assert near < 0.7 * apart
    resumed = finetuned(tmp_path / "resumed", weight=5.0, resume_from=tmp_path / "restored" / "checkpoint-6")
    for ours, theirs in zip(resumed.parameters(), restored.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_lora_trains_its_adapters_only_and_agrees_with_a_frozen_teacher() -> None:
    base = llama()
    frozen = FrozenTeacher(base, torch.float32)
    resolution = resolution_for(base)
    apply_resolution(base, resolution)
    tuned = with_lora(base)
    tuned.train()
    rows = ids(100)
    results = []
    for teacher in (AdapterTeacher(tuned, resolution), frozen):
        tuned.zero_grad()
        with restoration_for(base, teacher, weight=2.0).attached():
            loss = tuned(input_ids=rows, labels=rows).loss
            loss.backward()
        gradient = {name: weight.grad.clone() for name, weight in tuned.named_parameters() if weight.grad is not None}
        results.append((loss.detach(), gradient))
    assert all("lora_" in name or "modules_to_save" in name for name in results[0][1])
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)


def test_activation_checkpointing_changes_nothing() -> None:
    rows, results = ids(100), []
    for is_checkpointed in (False, True):
        model = trained_model()
        if is_checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        with restoration_for(model).attached():
            model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        results.append([weight.grad for weight in model.parameters()])
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)


def test_the_chunked_loss_and_the_restoration_loss_go_together() -> None:
    rows, results = ids(100), []
    for around in (nullcontext, chunked_loss):
        model = trained_model()
        with around(model), restoration_for(model).attached():
            outputs = model(input_ids=rows, labels=rows, num_items_in_batch=400, use_cache=False)
            outputs.loss.backward()
        results.append([outputs.loss.detach(), *(weight.grad for weight in model.parameters())])
    assert outputs.logits is None
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-4)


def _shard(model: nn.Module) -> nn.Module:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _tuned_model() -> tuple[nn.Module, PreTrainedModel, Any]:
    base = llama()
    resolution = resolution_for(base)
    apply_resolution(base, resolution)
    torch.manual_seed(0)
    tuned = with_lora(base).train()
    return tuned, base, AdapterTeacher(tuned, resolution)


def _full_model() -> tuple[nn.Module, PreTrainedModel, Any]:
    model = trained_model()
    return model, model, None


def _compare_with_one_process(rank: int, store: str) -> None:
    """Both processes have the same rows, so the mean over them is what one process has."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    rows = ids(100)
    for make, wrap in ((_full_model, DistributedDataParallel), (_full_model, _shard), (_tuned_model, _shard)):
        results = []
        for wrapper in (lambda model: model, wrap):
            outer, inner, teacher = make()
            outer = wrapper(outer)
            with restoration_for(inner, teacher, weight=2.0).attached():
                loss = outer(input_ids=rows, labels=rows, use_cache=False).loss
                loss.backward()
            gradient = [weight.grad for weight in inner.parameters() if weight.grad is not None]
            whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradient]
            results.append((loss.detach(), whole))
        torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)
    dist.destroy_process_group()


@pytest.mark.slow
def test_data_parallel_and_sharded_models_give_what_one_process_gives(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_compare_with_one_process, (str(tmp_path / "store"),), nprocs=2)
