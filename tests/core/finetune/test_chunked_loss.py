"""The loss without logits: the stock loss and its gradients, for every family and every way of training."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, linear
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, PreTrainedModel, Trainer, TrainingArguments

from eabf_cli.core.architectures import LogitsTransform
from eabf_cli.core.errors import UnsupportedModelError
from eabf_cli.core.finetune.chunked_loss import (
    NO_TRANSFORM,
    _loss_and_logits_grad,
    chunked_cross_entropy,
    chunked_loss,
    default_chunk_tokens,
)
from eabf_cli.core.finetune.memory import estimate_memory
from eabf_cli.core.patching import apply_eabf
from tests.architectures import ALL_CONFIGS, build_tiny_model, random_tokens
from tests.tiny_llama import VOCABULARY, tiny_llama, token_ids

pytestmark = pytest.mark.usefixtures("one_thread")

IGNORED = -100
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "granitemoe")


def labels_of(input_ids: Tensor, *, ignored: float = 0.4) -> Tensor:
    """The tokens themselves, some of them ignored at random."""
    lost = torch.rand(input_ids.shape, generator=torch.Generator().manual_seed(1)) < ignored
    return input_ids.masked_fill(lost, IGNORED)


def loss_and_gradients(model: nn.Module, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one call, and the gradients of all parameters that have one."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Each within a part of its own norm, or of a millionth of the largest where it vanishes."""
    assert found.keys() == expected.keys()
    floor = 1e-6 * max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm()
        assert error <= tolerance * gradient.norm().clamp(min=floor), (name, error, gradient.norm())


def assert_parity(
    model: PreTrainedModel, chunk_tokens: int = 7, call: nn.Module | None = None, **inputs: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and gradients of `call` (by default the model itself) are the same with and without its logits."""
    call = call or model
    expected_loss, expected = loss_and_gradients(call, **inputs)
    with chunked_loss(model, chunk_tokens):
        loss, gradients = loss_and_gradients(call, **inputs)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert_gradients_close(gradients, expected)
    return loss, gradients


# --- The function --------------------------------------------------------------------------------------


def head(tokens: int, hidden_size: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and a weight that need gradients, and labels."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, hidden_size, generator=generator) * hidden_size**-0.5).to(dtype)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    return hidden, weight.requires_grad_(), labels


@pytest.mark.parametrize("chunk_tokens", [1, 3, 8, 20, 1000])
@pytest.mark.parametrize("transform", [{}, {"scale": 0.3}, {"soft_cap": 1.5}, {"scale": 2.0, "soft_cap": 1.5}], ids=str)
def test_it_is_cross_entropy(chunk_tokens: int, transform: dict[str, float]) -> None:
    hidden, weight, labels = head(20, 6, 11, torch.float64)
    bias = torch.linspace(-1, 1, 11, dtype=torch.float64, requires_grad=True)
    labels[[0, 4, 5, 6, 19]] = IGNORED
    logits = linear(hidden, weight, bias) * transform.get("scale", 1.0)
    if "soft_cap" in transform:
        logits = transform["soft_cap"] * torch.tanh(logits / transform["soft_cap"])
    expected = cross_entropy(logits, labels, reduction="sum")
    found = chunked_cross_entropy(
        hidden, weight, bias, labels, chunk_tokens=chunk_tokens, transform=LogitsTransform(**transform)
    )
    torch.testing.assert_close(found, expected)
    inputs = (hidden, weight, bias)
    # Scaled, as by the number of items or a loss scaler.
    torch.testing.assert_close(torch.autograd.grad(found * 0.37, inputs), torch.autograd.grad(expected * 0.37, inputs))


def test_bfloat16_loses_no_more_than_bfloat16_products_do() -> None:
    hidden, weight, labels = head(512, 48, 1024, torch.bfloat16)
    exact = [tensor.detach().float().requires_grad_() for tensor in (hidden, weight)]
    expected = cross_entropy(linear(*exact), labels, reduction="sum")
    expected_grads = torch.autograd.grad(expected, exact)
    found = chunked_cross_entropy(hidden, weight, None, labels, chunk_tokens=8)
    assert found.dtype == torch.float32
    assert abs(found - expected) / len(labels) < 3e-4
    for gradient, exact_gradient in zip(torch.autograd.grad(found, (hidden, weight)), expected_grads, strict=True):
        assert gradient.dtype == torch.bfloat16
        # 64 sums in bfloat16 would be a hundredth off.
        assert (gradient - exact_gradient).norm() < 4e-3 * exact_gradient.norm()


def test_products_are_made_in_the_dtype_of_autocast() -> None:
    hidden, weight, labels = head(20, 6, 11, torch.float32)
    expected = chunked_cross_entropy(hidden.bfloat16(), weight.bfloat16(), None, labels, chunk_tokens=8)
    with torch.autocast("cpu", torch.bfloat16):
        found = chunked_cross_entropy(hidden, weight, None, labels, chunk_tokens=8)
    assert torch.equal(found, expected)


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, labels = head(6, 4, 9, torch.float32)
    expected = cross_entropy(linear(hidden * 1e4, weight), labels, reduction="sum")
    found = chunked_cross_entropy(hidden * 1e4, weight, None, labels, chunk_tokens=4)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, weight), torch.autograd.grad(expected, weight))


def test_ignored_rows_are_never_computed() -> None:
    hidden, weight, labels = head(8, 4, 9, torch.float32)
    labels[::2] = IGNORED
    spoilt = hidden.detach().clone()
    spoilt[::2] = float("nan")
    spoilt.requires_grad_()
    total = chunked_cross_entropy(spoilt, weight, None, labels, chunk_tokens=3)
    spoilt_grads = torch.autograd.grad(total, (spoilt, weight))
    expected = torch.autograd.grad(
        chunked_cross_entropy(hidden, weight, None, labels, chunk_tokens=3), (hidden, weight)
    )
    torch.testing.assert_close(spoilt_grads, expected)


def test_a_second_backward_is_refused() -> None:
    hidden, weight, labels = head(6, 4, 9, torch.float32)
    total = chunked_cross_entropy(hidden, weight, None, labels, chunk_tokens=4)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


# --- The model's forward -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_every_family_has_its_stock_loss_and_gradients(name: str) -> None:
    model = build_tiny_model(name)
    input_ids = random_tokens(20, batch=2)
    assert_parity(model, input_ids=input_ids, labels=labels_of(input_ids))


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_a_soft_cap_is_taken_from_the_configuration(name: str, soft_cap: float | None) -> None:
    input_ids = random_tokens(20)
    assert_parity(build_tiny_model(name, final_logit_softcapping=soft_cap), input_ids=input_ids, labels=input_ids)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("given", [True, None, "nothing"])
def test_the_balancing_loss_of_a_router_is_added(name: str, given: bool | str | None) -> None:
    """Asked for by the call, or by the configuration where the call has None or nothing."""
    model = build_tiny_model(name, output_router_logits=given is not True)
    input_ids = random_tokens(20, batch=2)
    padding = torch.ones_like(input_ids)
    padding[1, 15:] = 0
    inputs = {"input_ids": input_ids, "labels": labels_of(input_ids), "attention_mask": padding}
    balanced, _ = assert_parity(model, **inputs, **({} if given == "nothing" else {"output_router_logits": given}))
    assert balanced > assert_parity(model, **inputs, output_router_logits=False)[0] + 1e-4


@pytest.mark.parametrize("chunk_tokens", [1, 16, 57, 1000])
@pytest.mark.parametrize("num_items_in_batch", [None, 31, torch.tensor(31)])
def test_the_loss_is_the_mean_or_a_share(chunk_tokens: int, num_items_in_batch: Tensor | int | None) -> None:
    input_ids = token_ids(29, batch=2)
    assert_parity(
        tiny_llama(),
        chunk_tokens,
        input_ids=input_ids,
        labels=labels_of(input_ids),
        num_items_in_batch=num_items_in_batch,
    )


def test_other_arguments_reach_the_decoder() -> None:
    """Padding, positions of two packed rows, embeddings in place of tokens, labels that are shifted already."""
    model = tiny_llama()
    input_ids = token_ids(30)
    labels = labels_of(input_ids)
    positions = torch.cat((torch.arange(12), torch.arange(18)))[None]
    padding = torch.ones_like(input_ids)
    padding[:, 25:] = 0
    plain, _ = assert_parity(model, input_ids=input_ids, labels=labels)
    packed, _ = assert_parity(model, input_ids=input_ids, labels=labels, position_ids=positions)
    padded, _ = assert_parity(model, input_ids=input_ids, labels=labels, attention_mask=padding)
    shifted, _ = assert_parity(model, input_ids=input_ids, labels=labels, shift_labels=labels)
    assert len({plain.item(), packed.item(), padded.item(), shifted.item()}) == 4
    embeddings = model.get_input_embeddings()(input_ids).detach()
    embedded, _ = assert_parity(model, inputs_embeds=embeddings, labels=labels)
    torch.testing.assert_close(embedded, plain)


@pytest.mark.parametrize("num_items_in_batch", [None, 31, torch.tensor(0)])
def test_without_labels_to_learn_from_the_loss_is_zero(num_items_in_batch: Tensor | int | None) -> None:
    input_ids = token_ids(12)
    model = tiny_llama()
    with chunked_loss(model):
        loss, gradients = loss_and_gradients(
            model,
            input_ids=input_ids,
            labels=torch.full_like(input_ids, IGNORED),
            num_items_in_batch=num_items_in_batch,
        )
    assert loss == 0
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert all((gradient == 0).all() for gradient in gradients.values())


def test_the_outputs_are_those_of_the_stock_forward_but_for_the_logits() -> None:
    model = tiny_llama()
    input_ids = token_ids(12)
    inputs = {"input_ids": input_ids, "labels": input_ids, "output_hidden_states": True, "use_cache": True}
    with torch.no_grad():
        expected = model(**inputs)
        without_labels = model(input_ids)
        with chunked_loss(model):
            found = model(**inputs)
            as_tuple = model(input_ids, labels=input_ids, return_dict=False)
            stock = model(input_ids)
    assert found.logits is None
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.hidden_states, expected.hidden_states)
    assert found.past_key_values.get_seq_length() == 12
    torch.testing.assert_close(as_tuple[0], expected.loss)
    torch.testing.assert_close(stock.logits, without_labels.logits, rtol=0, atol=0)


def test_the_forward_is_the_stock_one_again_afterwards() -> None:
    model = tiny_llama()
    before = model.forward
    with contextlib.suppress(ZeroDivisionError), chunked_loss(model):
        model.forward = MethodType(type(model).forward, model)  # as accelerate puts its own around it
        raise ZeroDivisionError
    assert "forward" not in vars(model)
    assert "forward" not in vars(model.lm_head)
    model.forward = before
    with chunked_loss(model):
        assert model.forward is not before
    assert model.forward is before


def test_an_unknown_family_and_a_head_of_another_kind_are_refused() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16))
    with pytest.raises(UnsupportedModelError, match="'gpt2' is not supported"), chunked_loss(gpt2):
        pass
    model = get_peft_model(tiny_llama(tie_word_embeddings=False), LoraConfig(target_modules=["lm_head"], r=2))
    with pytest.raises(UnsupportedModelError, match="the language-model head is a Linear"), chunked_loss(model):
        model(input_ids=token_ids(8), labels=token_ids(8))


# --- Memory --------------------------------------------------------------------------------------------


class TensorsSeen(TorchDispatchMode):
    """The shapes of all tensors that operations give, and how many of `counted_shape` were in memory at once."""

    def __init__(self, counted_shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.most_at_once = 0
        self._counted_shape = counted_shape
        self._counted: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.shapes |= {tuple(tensor.shape) for tensor in tensors}
        self._counted += [weakref.ref(tensor) for tensor in tensors if tensor.shape == self._counted_shape]
        alive = {tensor.untyped_storage().data_ptr() for ref in self._counted if (tensor := ref()) is not None}
        self.most_at_once = max(self.most_at_once, len(alive))
        return result

    @property
    def num_elements(self) -> int:
        """Those of the largest."""
        return max(torch.Size(shape).numel() for shape in self.shapes)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_no_tensor_is_as_large_as_the_logits(name: str) -> None:
    model = build_tiny_model(name, vocab_size=2000)
    input_ids = random_tokens(120)
    with TensorsSeen((120, 2000)) as plain:
        loss_and_gradients(model, input_ids=input_ids, labels=input_ids)
    with chunked_loss(model, 16), TensorsSeen((16, 2000)) as chunked:
        loss_and_gradients(model, input_ids=input_ids, labels=input_ids)
    assert plain.num_elements == 120 * 2000
    assert plain.most_at_once >= 2
    assert chunked.num_elements <= max(16, model.config.hidden_size) * 2000
    # The gradient is where the logits were; a soft cap has its slope beside it.
    assert chunked.most_at_once == (1 if name == "llama" else 2)


def test_a_frozen_head_gets_no_gradient() -> None:
    base = tiny_llama(tie_word_embeddings=False)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    inputs = {"input_ids": token_ids(30), "labels": token_ids(30)}
    with chunked_loss(model, 8), TensorsSeen() as chunked:
        loss_and_gradients(model, **inputs)
    # Its size is seen as the product's view of it, transposed; a gradient would have the shape of the weight.
    assert (VOCABULARY, 32) not in chunked.shapes
    assert (32, VOCABULARY) in chunked.shapes
    assert base.lm_head.weight.grad is None


# --- Ways of training ----------------------------------------------------------------------------------


def lora(model: PreTrainedModel, **fields: Any) -> nn.Module:
    """Adapters on queries and values that are not zero."""
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2, **fields))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    return adapted


def test_lora() -> None:
    base = tiny_llama()
    input_ids = token_ids(30)
    _, gradients = assert_parity(base, call=lora(base), input_ids=input_ids, labels=labels_of(input_ids))
    assert len(gradients) == 3 * 2 * 2
    assert all("lora" in name for name in gradients)


def test_lora_with_a_head_that_is_trained_whole() -> None:
    base = tiny_llama(tie_word_embeddings=False)
    model = lora(base, modules_to_save=["lm_head"])
    model.get_base_model().lm_head.modules_to_save["default"].weight.data.mul_(1.1)
    input_ids = token_ids(30)
    inputs = {"input_ids": input_ids, "labels": labels_of(input_ids)}
    trained, gradients = assert_parity(base, call=model, **inputs)
    assert any("lm_head" in name for name in gradients)
    with model.disable_adapter(), torch.no_grad():
        expected = model(**inputs).loss
        with chunked_loss(model):
            torch.testing.assert_close(model(**inputs).loss, expected)
    assert abs(trained - expected) > 1e-3


def test_a_patched_model_beyond_its_window() -> None:
    model = tiny_llama()
    input_ids = token_ids()
    plain, _ = assert_parity(model, 50, input_ids=input_ids, labels=input_ids)
    apply_eabf(model, factor=4.0)
    patched, _ = assert_parity(model, 50, input_ids=input_ids, labels=input_ids)
    assert abs(patched - plain) > 1e-3


def test_activation_checkpointing() -> None:
    model = tiny_llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    input_ids = token_ids(30)
    assert_parity(model, input_ids=input_ids, labels=labels_of(input_ids), use_cache=False)


def test_autocast_is_as_near_to_float32_as_the_stock_loss() -> None:
    model = tiny_llama()
    input_ids = token_ids(60)
    inputs = {"input_ids": input_ids, "labels": labels_of(input_ids)}
    exact_loss, exact = loss_and_gradients(model, **inputs)
    with torch.autocast("cpu", torch.bfloat16):
        stock_loss, stock = loss_and_gradients(model, **inputs)
        with chunked_loss(model, 7):
            loss, found = loss_and_gradients(model, **inputs)
    assert abs(loss - stock_loss) < 3e-4
    assert loss != exact_loss
    for name, gradient in exact.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - gradient).norm() < 1.1 * (stock[name] - gradient).norm(), name


@pytest.fixture
def process_group() -> Iterator[None]:
    """A group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_data_parallel() -> None:
    model = tiny_llama()
    input_ids = token_ids(30)
    assert_parity(model, call=DistributedDataParallel(model), input_ids=input_ids, labels=labels_of(input_ids))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("tied", [True, False])
def test_sharded_weights(tied: bool) -> None:
    """The head's weight is in shards outside a forward: of the head, or, where it is the embedding, of the model."""
    input_ids = token_ids(30)
    inputs = {"input_ids": input_ids, "labels": labels_of(input_ids)}
    expected_loss, expected = loss_and_gradients(tiny_llama(tie_word_embeddings=tied), **inputs)
    model = tiny_llama(tie_word_embeddings=tied)
    for part in (*model.model.layers, *([] if tied else [model.lm_head]), model):
        fully_shard(part)
    with chunked_loss(model, 7):
        loss, gradients = loss_and_gradients(model, **inputs)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert_gradients_close({name: gradient.full_tensor() for name, gradient in gradients.items()}, expected)


@pytest.mark.parametrize("mixed_precision", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_the_trainer_takes_the_same_steps(tmp_path: Path, mixed_precision: bool, adapted: bool) -> None:
    """Rows with different numbers of labels in one step: the loss is a share of the batch's, not of the row's."""

    def train(context: Callable[[PreTrainedModel], Any]) -> tuple[list[Any], PreTrainedModel]:
        base = tiny_llama()
        model = lora(base) if adapted else base
        rows = [
            {"input_ids": ids, "labels": labels_of(ids, ignored=0.2 * i)}
            for i, ids in enumerate(token_ids(30, batch=4))
        ]
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            max_steps=3,
            learning_rate=1e-2,
            bf16=mixed_precision,
            use_cpu=True,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
        )
        with context(base):
            trainer = Trainer(model, arguments, train_dataset=rows)
            assert trainer.model_accepts_loss_kwargs
            trainer.train()
        return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry], base

    expected, _ = train(contextlib.nullcontext)
    found, base = train(lambda base: chunked_loss(base, 7))
    assert found[2][0] < found[0][0]
    # In bfloat16 the gradients' last bits differ, and Adam's first steps have their signs.
    for index, tolerance in enumerate((1e-3, 3e-2) if mixed_precision else (1e-5, 1e-5)):
        pairs = zip(found, expected, strict=True)
        assert all(abs(a[index] - b[index]) <= tolerance * b[index] for a, b in pairs)
    assert "forward" not in vars(base)


def test_a_gpu_that_trains_the_head_has_larger_chunks_and_the_estimate_knows() -> None:
    assert default_chunk_tokens("cpu", trains_head=True) == default_chunk_tokens("cuda", trains_head=False)
    assert default_chunk_tokens("cuda", trains_head=True) > default_chunk_tokens("cpu", trains_head=True)
    config = LlamaConfig(vocab_size=50_000, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    for device in ("cpu", "cuda"):
        estimate = partial(
            estimate_memory,
            config,
            tuning="full",
            seq_len=8192,
            device_type=device,
            mixed_precision=True,
            checkpointing=True,
        )
        assert estimate() == estimate(chunk_tokens=default_chunk_tokens(device, trains_head=True))


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_way_of_a_gpu_gives_the_same_loss_and_gradient(dtype: torch.dtype, is_weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(30, 500, generator=generator)).to(dtype)
    labels = torch.randint(500, (30,), generator=generator)
    weights = torch.rand(30, generator=generator) if is_weighted else None
    exact = logits.double().requires_grad_()
    losses = cross_entropy(exact, labels, reduction="none")
    (losses.sum() if weights is None else losses @ weights.double()).backward()
    for in_passing in (False, True):
        loss, gradient = _loss_and_logits_grad(
            logits.clone(), labels, NO_TRANSFORM, weights, torch.float32, in_passing=in_passing
        )
        assert gradient.dtype == dtype
        assert loss.dtype == torch.float32
        # bfloat16 has 8 bits; nothing but the last step is rounded to it.
        torch.testing.assert_close(
            gradient.double(), exact.grad, rtol=2**-8 if dtype != torch.float32 else 1e-5, atol=1e-7
        )
        expected = losses.sum() if weights is None else losses @ weights.double()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
