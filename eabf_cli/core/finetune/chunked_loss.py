"""The loss of a causal language model without its logits: they exist for a chunk of tokens at a time.

Logits of (tokens, vocabulary) in float32, their softmax and their gradient are the largest tensors of a training
step. Here a chunk's gradient is computed with its loss, in the forward pass, so that its logits can go and nothing is
computed twice; the backward pass only multiplies by the gradient of the loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import wraps
from inspect import signature
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, pad
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from eabf_cli.core import architectures
from eabf_cli.core.architectures import LogitsTransform
from eabf_cli.core.data.sample_set import IGNORE_INDEX
from eabf_cli.core.errors import UnsupportedModelError


def default_chunk_tokens(device_type: str, *, trains_head: bool) -> int:
    """Tokens whose logits exist at a time, unless told otherwise.

    Fewer save memory until the gradient of the head's weight, read and written once a chunk, costs as much time as the
    products, which a GPU is faster at.
    """
    return 2048 if device_type == "cuda" and trains_head else 1024


NO_TRANSFORM = LogitsTransform()


@contextlib.contextmanager
def chunked_loss(model: PreTrainedModel, chunk_tokens: int | None = None) -> Iterator[None]:
    """Within the context, this model instance called with `labels` gives its loss and no logits.

    The loss is that of the stock forward: labels are shifted inside, it is the mean over labels that are not
    ignored, or their sum divided by `num_items_in_batch`; a router's balancing loss is added where the model is
    configured to. Without any label to learn from it is 0, with gradients of 0, where transformers has NaN. The
    decoder gets all other arguments. Without labels the stock forward runs.

    Enter it before a Trainer or accelerate wraps the model: their autocast goes around the forward that is there.

    Args:
        model: a model with a language-model head, alone or inside PEFT.
        chunk_tokens: tokens whose logits exist at a time; None: `default_chunk_tokens`.

    Raises:
        UnsupportedModelError: an architecture outside the supported list, or (from the forward) a head that is
            not a linear layer with floating-point weights.
    """
    base: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    architectures.check_supported(architectures.decoder(base).config)
    stock = base.forward
    names = tuple(signature(stock).parameters)

    # The signature stays the stock one: the Trainer reads it to see which columns and loss arguments are taken.
    @can_return_tuple
    @wraps(type(base).forward)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
        kwargs |= zip(names, args, strict=False)
        if kwargs.get("labels") is None:
            return stock(**kwargs)
        return _forward_with_loss(self, chunk_tokens, **kwargs)

    with _forward_replaced(base, MethodType(forward, base)):
        yield


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    chunk_tokens: int,
    transform: LogitsTransform = NO_TRANSFORM,
    weights: Tensor | None = None,
) -> Tensor:
    """The summed negative log-likelihood of labels under `softmax(transform(hidden weight^T + bias))`.

    Products are made in the dtype of the weight, or of autocast; the softmax, the loss and the sums over chunks in
    float32 at least. Gradients exist once for each call: a second backward through it is an error.

    Args:
        hidden: `(tokens, hidden_size)`, what the head is given; a row predicts the label of the same row.
        weight: `(vocabulary, hidden_size)`.
        bias: `(vocabulary,)`.
        labels: `(tokens,)`; where they are -100, nothing is computed.
        chunk_tokens: tokens whose logits exist at a time.
        transform: what the model's family does to its logits.
        weights: `(tokens,)`, what each label's loss is multiplied by; None stands for 1. No gradient flows into them.

    Returns:
        a scalar; 0 if all labels are ignored.
    """
    total: Tensor = _ChunkedCrossEntropy.apply(
        hidden, weight, bias, labels, chunk_tokens, transform, torch.is_grad_enabled(), weights
    )
    return total


class _ChunkedCrossEntropy(torch.autograd.Function):
    """`chunked_cross_entropy`, with the gradients of its first three inputs kept from the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chunk_tokens: int,
        transform: LogitsTransform,
        grad_enabled: bool,
        weights: Tensor | None,
    ) -> Tensor:
        dtype = _product_dtype(weight)
        sum_dtype = torch.promote_types(dtype, torch.float32)
        needs_hidden, needs_weight, needs_bias = (grad_enabled and needed for needed in ctx.needs_input_grad[:3])
        hidden_grad = torch.zeros_like(hidden) if needs_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=sum_dtype) if needs_weight else None
        bias_grad = torch.zeros_like(weight[:, 0], dtype=sum_dtype) if needs_bias else None
        total = torch.zeros((), dtype=sum_dtype, device=hidden.device)

        with torch.autocast(hidden.device.type, enabled=False):
            cast_weight = weight.to(dtype)
            cast_bias = None if bias is None else bias.to(dtype)
            for rows in (labels != IGNORE_INDEX).nonzero().squeeze(1).split(chunk_tokens):
                chunk = hidden[rows].to(dtype)
                loss, logits_grad = _loss_and_logits_grad(
                    linear(chunk, cast_weight, cast_bias),
                    labels[rows],
                    transform,
                    None if weights is None else weights[rows].to(sum_dtype),
                    sum_dtype,
                    in_passing=hidden.is_cuda and transform == NO_TRANSFORM,
                )
                total += loss
                if bias_grad is not None:
                    bias_grad += logits_grad.sum(0, dtype=sum_dtype)
                if hidden_grad is not None:
                    hidden_grad[rows] = (logits_grad @ cast_weight).to(hidden.dtype)
                if weight_grad is not None:
                    _add_product(weight_grad, logits_grad.t(), chunk)
                del logits_grad  # Before the logits of the next chunk are there.

        ctx.save_for_backward(
            hidden_grad,
            None if weight_grad is None else weight_grad.to(weight.dtype),
            None if bias_grad is None or bias is None else bias_grad.to(bias.dtype),
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, total_grad: Tensor) -> tuple[Tensor | None, ...]:
        # In place: the weight's gradient is too large to have twice.
        grads = (None if grad is None else grad.mul_(total_grad) for grad in ctx.saved_tensors)
        return (*grads, None, None, None, None, None)


def _product_dtype(weight: Tensor) -> torch.dtype:
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _loss_and_logits_grad(
    logits: Tensor,
    labels: Tensor,
    transform: LogitsTransform,
    weights: Tensor | None,
    sum_dtype: torch.dtype,
    *,
    in_passing: bool,
) -> tuple[Tensor, Tensor]:
    """The summed loss of logits in `sum_dtype`, and its gradient in their place, `(rows, vocabulary)`.

    The gradient is the softmax, less 1 at the label, times the slope of the transform and the label's weight. All is
    computed in `sum_dtype`.

    Args:
        in_passing: widen narrower logits, and narrow the gradient, in the operations that there are anyway. A GPU is
            spared two passes over the matrix; a CPU is slow at operations on two dtypes.
    """
    row = torch.arange(len(labels), device=labels.device)
    values = logits if in_passing else logits.to(sum_dtype)
    slope = _transform_in_place(values, transform)
    highest = values.amax(1, keepdim=True).to(sum_dtype)
    shifted = values.sub_(highest) if values.dtype == sum_dtype else values - highest
    label_logits = shifted[row, labels]
    exponentials = shifted.exp_()
    norm = exponentials.sum(1)
    label_losses = norm.log() - label_logits
    at_labels = exponentials[row, labels] / norm - 1
    each = torch.ones_like(norm) if weights is None else weights
    if isinstance(slope, Tensor):
        exponentials *= slope
        at_labels *= slope[row, labels]
    elif slope is not None:
        each = each * slope
    factors = (each / norm)[:, None]
    gradient = torch.mul(exponentials, factors, out=logits) if in_passing else logits.copy_(exponentials.mul_(factors))
    gradient[row, labels] = (at_labels * each).to(gradient.dtype)
    return label_losses.sum() if weights is None else label_losses @ weights, gradient


def _transform_in_place(logits: Tensor, transform: LogitsTransform) -> Tensor | float | None:
    """Change the logits; returns the transform's slope at each, None for 1."""
    if transform == NO_TRANSFORM:
        return None
    logits *= transform.scale
    if transform.soft_cap is None:
        return transform.scale
    logits.div_(transform.soft_cap).tanh_()
    slope = logits.square().neg_().add_(1).mul_(transform.scale)
    logits *= transform.soft_cap
    return slope


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right`, which may have a narrower dtype than the sum."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda and torch.version.cuda is not None:
        # The one kind of device (AMD's pass for it, too) whose products can have a wider dtype than their factors.
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right


def _forward_with_loss(
    model: PreTrainedModel,
    chunk_tokens: int | None,
    *,
    labels: Tensor,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    logits_to_keep: int | Tensor = 0,
    loss_weights: Tensor | None = None,
    **inputs: Any,
) -> CausalLMOutputWithPast:
    """The stock forward with labels, but for the logits (of which `logits_to_keep` would keep some).

    `shift_labels`, the labels shifted already, come from context parallelism, whose processes do not have the
    token after their last one. `loss_weights`, where the labels are and shifted with them, multiply their losses; the
    sum is still divided by the number of labels.
    """
    # None stands for what the configuration says; the decoder would take it for a no.
    if inputs.get("output_router_logits") is None:
        inputs.pop("output_router_logits", None)
    outputs = architectures.decoder(model)(**inputs)
    hidden = outputs.last_hidden_state  # (batch, sequence, hidden_size)
    if shift_labels is None:
        shift_labels = pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]
    shift_labels = shift_labels.to(hidden.device).reshape(-1)
    if loss_weights is not None:
        loss_weights = pad(loss_weights, (0, 1))[..., 1:].to(hidden.device).reshape(-1)
    num_items = (shift_labels != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
    total = _head_loss(model, hidden.flatten(0, -2), shift_labels, chunk_tokens, loss_weights)
    loss = total / torch.as_tensor(num_items, device=total.device).clamp(min=1)
    router_loss = architectures.router_loss(model, outputs, inputs.get("attention_mask"))
    if router_loss is not None:
        loss = loss + router_loss.to(loss.device)
    return CausalLMOutputWithPast(
        loss=loss,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )


def _head_loss(
    model: PreTrainedModel, hidden: Tensor, labels: Tensor, chunk_tokens: int | None, weights: Tensor | None
) -> Tensor:
    """The summed loss of `(tokens, hidden_size)` under the model's head.

    It is computed inside the head's own call, where FSDP and ZeRO have its weights together.
    """
    head = model.get_output_embeddings()
    layer = _linear_layer(head)
    transform = architectures.logits_transform(architectures.decoder(model).config)

    def forward(hidden: Tensor) -> Tensor:
        return chunked_cross_entropy(
            hidden,
            layer.weight,
            layer.bias,
            labels,
            chunk_tokens=chunk_tokens
            or default_chunk_tokens(hidden.device.type, trains_head=layer.weight.requires_grad),
            transform=transform,
            weights=weights,
        )

    with _forward_replaced(layer, forward):
        loss: Tensor = head(hidden)
        return loss


def _linear_layer(head: nn.Module) -> nn.Linear:
    """The linear layer that does the work of a head, which PEFT may have wrapped to train it whole."""
    layer: Any = head
    if hasattr(head, "modules_to_save"):
        layer = head.original_module if head.disable_adapters else head.modules_to_save[head.active_adapters[0]]
    if not isinstance(layer, nn.Linear) or not layer.weight.is_floating_point():
        raise UnsupportedModelError(
            f"the language-model head is a {type(layer).__name__}, its loss needs a linear layer with floating-point "
            "weights: leave the head out of quantisation and adapters (PEFT can train it whole: modules_to_save)"
        )
    return layer


@contextlib.contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give an instance another forward for a while; what others have put around it meanwhile goes with it."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        vars(module).pop("forward", None)
        if before is not None:
            module.forward = before
