"""Peak memory of a training step, by part, from a configuration alone.

The parts follow what autograd keeps alive. A step has these moments at which memory can be highest, the second with a
restoration loss only, whose backward pass comes first:

| moment | alive beside weights and moments of AdamW |
|---|---|
| loss | what all layers kept, autocast's bfloat16 copies of the weights, one chunk's logits, the head's gradient |
| restoration | the same but for the logits; what all layers kept of a slice, one chunk's predictions of both models |
| last layer | what all layers kept, the working set of the last one, which is differentiated first, head gradient |
| first layer | the gradients of all weights, the input and the working set of the first layer |
| embeddings | the gradients of all weights, and one more the size of the embeddings |

From the second micro-batch of an optimizer step on, the gradients of all weights are there at each of them. The
optimizer's step itself adds nothing: fused AdamW works in place. Logits of (sequence, vocabulary) appear nowhere: the
loss is computed in chunks. Nor do matrices of (sequence, sequence), except where attention is eager or needs a mask
that `is_causal` does not express.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from eabf_cli.core import architectures
from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.finetune.chunked_loss import default_chunk_tokens
from eabf_cli.core.finetune.settings import RESTORATION_CHUNK_TOKENS, TUNINGS, LoraSettings

GIB = 2**30
_MIB = 2**20

Shard = Literal["replicate", "shard"]

OPTIMIZER_BYTES = {
    # Two float32 moments.
    "adamw": 8.0,
    # Two moments of a byte, and a float32 for each 256 of them.
    "adamw-8bit": 2 * (1 + 4 / 256),
    "paged-adamw-8bit": 2 * (1 + 4 / 256),
}
"""Bytes of optimizer state for each trained weight."""

# NF4 with double quantisation: half a byte, a byte for each 64 weights, a float32 for each 256 of those (arXiv
# 2305.14314, section 3).
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)

PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations kept",
    "working_set": "one layer's working set",
    "loss": "loss chunk",
    "restoration": "restoration loss",
    "overhead": "process and allocator",
}
"""Field of a `MemoryEstimate` -> its name for people."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Peak memory of training on one device, in bytes; each part is as large as it is at the moment of the peak.

    Attributes:
        seq_len: tokens of the longest sample.
        moment: of the peak: "loss", "restoration", "last layer", "first layer" or "embeddings".
        weights: also autocast's copies of them, where the peak has them.
        gradients: of trained weights.
        optimizer: AdamW's moments.
        activations: what the layers keep for the backward pass (under checkpointing, each layer's input).
        working_set: what one layer holds while it is differentiated, and attention masks.
        loss: hidden states at the head with their gradient, one chunk's logits.
        restoration: the original model beside one whose weights all change, and what the loss holds at its moment.
        overhead: the process without a model, and freed memory that the allocator does not give back.
        lengths: of the overhead, what rows of one length alone would not take.
    """

    tuning: str
    seq_len: int
    micro_batch: int
    moment: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    working_set: int
    loss: int
    restoration: int
    overhead: int
    lengths: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part, in the order of `PARTS`."""
        return {name: getattr(self, name) for name in PARTS}

    @property
    def total(self) -> int:
        """The sum of the parts, in bytes."""
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """For JSON: every part, `lengths` and the total in GiB, and the moment of the peak."""
        sizes = self.parts | {"lengths": self.lengths, "total": self.total}
        return {f"{name}_gib": round(num_bytes / GIB, 3) for name, num_bytes in sizes.items()} | {"moment": self.moment}


def estimate_memory(
    config: PretrainedConfig,
    *,
    tuning: str,
    seq_len: int,
    micro_batch: int = 1,
    device_type: str,
    mixed_precision: bool,
    checkpointing: bool,
    optimizer: str = "adamw",
    chunk_tokens: int | None = None,
    accumulates: bool = True,
    lora: LoraSettings | None = None,
    restored_tokens: int = 0,
    teacher_dtype: torch.dtype = torch.float32,
    num_lengths: int = 1,
    num_processes: int = 1,
    shard: Shard = "replicate",
) -> MemoryEstimate:
    """Peak memory of training on one device, from the model's configuration.

    Args:
        config: the model's plain configuration; no weights are needed.
        tuning: "full", "lora" or "qlora", each with what `load_for_tuning` loads for it: float32 weights for full, else
            a frozen base, in bfloat16 under mixed precision and in float32 without.
        seq_len: tokens of the longest sample.
        micro_batch: samples of one forward on one device.
        device_type: "cpu", "cuda" or "mps".
        mixed_precision: bfloat16 autocast.
        checkpointing: layers are computed again in the backward pass.
        optimizer: one of `OPTIMIZER_BYTES`.
        chunk_tokens: tokens whose logits exist at a time; None: `default_chunk_tokens`.
        accumulates: an optimizer step has more than one micro-batch on a device.
        lora: what lora and qlora train; the defaults where it is None.
        restored_tokens: tokens of a sample's slice under the restoration loss; 0 for none.
        teacher_dtype: of the weights of the original model that it compares with under full tuning (`FrozenTeacher`).
        num_lengths: how many different lengths rows have.
        num_processes: devices over which `shard` divides.
        shard: "replicate" (data parallel: every device holds all) or "shard" (FSDP2, ZeRO-3: weights, gradients and
            moments are divided, a layer's weights are gathered while it works).

    Raises:
        InvalidConfigError, UnsupportedModelError: an unknown tuning, optimizer or architecture.
    """
    if tuning not in TUNINGS:
        raise InvalidConfigError(f"unknown tuning {tuning!r}; known: {', '.join(TUNINGS)}")
    if optimizer not in OPTIMIZER_BYTES:
        raise InvalidConfigError(f"unknown optimizer {optimizer!r}; known: {', '.join(OPTIMIZER_BYTES)}")
    architectures.check_supported(config)
    lora = lora or LoraSettings()
    shape = _shape_of(config)
    weights = _weights_of(shape, tuning, mixed_precision=mixed_precision, lora=lora)
    if chunk_tokens is None:
        chunk_tokens = default_chunk_tokens(device_type, trains_head=weights.trained_head > 0)
    step = _Step(
        shape=shape,
        weights=weights,
        tuning=tuning,
        mixed_precision=mixed_precision,
        tokens=micro_batch * seq_len,
        chunk_tokens=min(chunk_tokens, micro_batch * seq_len),
        checkpointing=checkpointing,
        accumulates=accumulates,
        mask_bytes=_mask_bytes(shape, seq_len, micro_batch, 2 if mixed_precision else 4),
        pairs=micro_batch * seq_len**2,
        restored_tokens=micro_batch * min(restored_tokens, seq_len),
    )
    teacher = shape.parameters * teacher_dtype.itemsize if restored_tokens and tuning == "full" else 0
    divisor = num_processes if shard == "shard" else 1
    peak = max((moment.divided(divisor) for moment in step.moments()), key=lambda moment: moment.total)
    gathered = _gathered_bytes(shape, weights) if divisor > 1 else 0
    lengths = _overhead_of_lengths(step, peak, device_type, num_lengths)
    return MemoryEstimate(
        tuning=tuning,
        seq_len=seq_len,
        micro_batch=micro_batch,
        moment=peak.name,
        weights=math.ceil(weights.num_bytes / divisor) + gathered + peak.weight_copies,
        gradients=peak.gradients,
        optimizer=math.ceil(_optimizer_bytes(optimizer, device_type) * weights.trained / divisor),
        activations=peak.activations,
        working_set=peak.working_set,
        loss=peak.loss,
        restoration=teacher + peak.restoration,
        overhead=_overhead(step, device_type) + lengths,
        lengths=lengths,
    )


# --- The model's shape ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """Widths and numbers of weights.

    Attributes:
        intermediate: width of the MLP for one token, over all experts that it is sent to.
        query, key_value: width of all heads together.
        parameters: all weights, tied ones once.
        embeddings: weights of the embeddings; the head has as many.
        linear: weights of the decoder's linear layers.
        norms: weights of the decoder's norms.
        further_norms: width of what a layer's norms are applied to, without two of the hidden size.
        is_gated: the MLP has a gate beside its up projection.
        adapter_width: numbers in LoRA adapters of rank 1 on all linear layers.
    """

    num_layers: int
    num_heads: int
    hidden: int
    intermediate: int
    query: int
    key_value: int
    vocabulary: int
    parameters: int
    embeddings: int
    is_tied: bool
    largest_layer: int
    linear: int
    norms: int
    further_norms: int
    is_gated: bool
    adapter_width: int
    is_eager: bool
    sliding_window: int | None
    has_soft_cap: bool


def _shape_of(config: PretrainedConfig) -> _Shape:
    return _shape_from_json(config.model_type, config.to_json_string(use_diff=False))


@lru_cache(maxsize=16)
def _shape_from_json(model_type: str, config_json: str) -> _Shape:
    # A plan asks for every tuning of one model, whose layers take a second to lay out.
    config = architectures.config_class(model_type).from_dict(json.loads(config_json))
    model = architectures.meta_model(config)
    decoder = architectures.decoder(model)
    linears = [module for module in decoder.layers.modules() if isinstance(module, nn.Linear)]
    norms = [module for module in decoder.modules() if "norm" in type(module).__name__.lower()]
    embeddings = model.get_input_embeddings().weight
    num_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    num_groups = getattr(config, "num_key_value_heads", None) or num_heads
    return _Shape(
        num_layers=config.num_hidden_layers,
        num_heads=num_heads,
        hidden=config.hidden_size,
        intermediate=_intermediate(config),
        query=num_heads * head_dim,
        key_value=num_groups * head_dim,
        vocabulary=config.vocab_size,
        parameters=_count(model.parameters()),
        embeddings=embeddings.numel(),
        is_tied=bool(config.tie_word_embeddings),
        largest_layer=max(_count(layer.parameters()) for layer in decoder.layers),
        linear=_count(module.weight for module in linears),
        norms=_count(weight for norm in norms for weight in norm.parameters(recurse=False)),
        further_norms=_further_norms(
            decoder.layers[-1], config, heads=num_heads * head_dim, groups=num_groups * head_dim
        ),
        is_gated=any("gate" in name for name, _ in decoder.layers.named_parameters()),
        adapter_width=sum(module.in_features + module.out_features for module in linears),
        is_eager=model.config._attn_implementation == "eager",
        sliding_window=_sliding_window(model),
        has_soft_cap=architectures.logits_transform(config).soft_cap is not None,
    )


def _further_norms(layer: nn.Module, config: PretrainedConfig, *, heads: int, groups: int) -> int:
    widths = {"q_norm": heads, "k_norm": groups}
    norms = [
        name.rpartition(".")[2]
        for name, module in layer.named_modules()
        if "norm" in type(module).__name__.lower() and not list(module.children())
    ]
    return max(0, sum(widths.get(name, config.hidden_size) for name in norms) - 2 * config.hidden_size)


def _count(weights: Iterable[torch.Tensor]) -> int:
    return sum(weight.numel() for weight in weights)


def _intermediate(config: PretrainedConfig) -> int:
    dense: int = config.intermediate_size
    num_experts = getattr(config, "num_experts_per_tok", None)
    if num_experts is None:
        return dense
    expert = getattr(config, "moe_intermediate_size", None) or dense
    shared = getattr(config, "shared_expert_intermediate_size", None) or 0
    return max(dense, num_experts * expert + shared)


def _sliding_window(model: PreTrainedModel) -> int | None:
    slides = any(layer.is_sliding for layer in architectures.attention_layers(model))
    return architectures.decoder(model).config.sliding_window if slides else None


def _mask_bytes(shape: _Shape, seq_len: int, micro_batch: int, product_bytes: int) -> int:
    """Bytes of a mask of (sequence, sequence), which `is_causal` makes unnecessary in most cases.

    Rows padded to one length, and windows shorter than the sequence, need one of booleans, which the fused kernel turns
    into numbers.
    """
    needs_mask = micro_batch > 1 or (shape.sliding_window is not None and seq_len >= shape.sliding_window)
    return micro_batch * seq_len**2 * (1 + product_bytes) if needs_mask or shape.is_eager else 0


# --- Weights --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Weights:
    """Weights of a tuning.

    Attributes:
        num_bytes: of all that are held, trained or not.
        trained: how many are trained, all of them float32.
        trained_head: how many of these the head has, or the embeddings that it is tied to.
        base_bytes_each: bytes of a weight of a layer when it is gathered.
        copied: weights of which autocast keeps bfloat16 copies during a forward, but for the head.
    """

    num_bytes: int
    trained: int
    trained_head: int
    base_bytes_each: int
    copied: int


def _weights_of(shape: _Shape, tuning: str, *, mixed_precision: bool, lora: LoraSettings) -> _Weights:
    if tuning == "full":
        return _Weights(
            num_bytes=4 * shape.parameters,
            trained=shape.parameters,
            trained_head=shape.embeddings,
            base_bytes_each=4,
            copied=shape.linear if mixed_precision else 0,
        )
    adapters = lora.rank * shape.adapter_width
    base_bytes = 2 if mixed_precision else 4
    linear_bytes = _NF4_BYTES if tuning == "qlora" else base_bytes
    ends = shape.embeddings * (1 if shape.is_tied else 2)
    # PEFT trains copies of norms and embeddings and keeps the frozen ones beside them.
    trained = adapters + (shape.norms if lora.train_norms else 0) + (ends if lora.train_embeddings else 0)
    return _Weights(
        num_bytes=math.ceil(linear_bytes * shape.linear) + base_bytes * (shape.parameters - shape.linear) + 4 * trained,
        trained=trained,
        trained_head=shape.embeddings if lora.train_embeddings else 0,
        base_bytes_each=base_bytes,
        copied=adapters if mixed_precision else 0,
    )


def _gathered_bytes(shape: _Shape, weights: _Weights) -> int:
    """What one device holds whole of divided weights: a layer's while the next one's are fetched, and both ends."""
    return weights.base_bytes_each * (2 * shape.largest_layer + shape.embeddings * (1 if shape.is_tied else 2))


def _optimizer_bytes(optimizer: str, device_type: str) -> float:
    # A paged optimizer's state lives in the host's memory where the device has one of its own.
    return 0.0 if optimizer.startswith("paged") and device_type == "cuda" else OPTIMIZER_BYTES[optimizer]


# --- The step -------------------------------------------------------------------------------------------


class _TokenBytes(NamedTuple):
    """Bytes for each token, as multiples of the widths of a layer."""

    intermediate: int
    hidden: int
    query: int
    key_value: int

    def of(self, shape: _Shape) -> int:
        # Of the six tensors of that width, two are the gate's.
        intermediate = shape.intermediate if shape.is_gated else shape.intermediate * 2 // 3
        return (
            self.intermediate * intermediate
            + self.hidden * shape.hidden
            + self.query * shape.query
            + self.key_value * shape.key_value
            + _NORM_BYTES * shape.further_norms
        )


# What one layer holds at its peak, which lies in the backward pass of its MLP: the list of live tensors there.
#
# float32: gate, up, activation and their product, and two gradients of that width (6 intermediate); of each of two
# norms the normed input and the output, the residual between them and the gradient that arrives (6 hidden); rotated
# query and attention output; rotated key and value.
# full under autocast: MLP and attention are bfloat16. The residual stream and the norms stay float32 (4 hidden), and
# each of the five products behind a norm keeps a cast input of its own (5 hidden of 2 bytes).
# lora under autocast: the stream is bfloat16. Adapters keep cast inputs of their own (9 hidden of 2 bytes), and PEFT
# casts an adapter's input to float32 in passing.
# qlora under autocast: bitsandbytes returns float32 for the float32 that norms give it, so the MLP is float32.
_NUM_MLP_TENSORS = 6
_FLOAT32_WORKING_SET = _TokenBytes(intermediate=24, hidden=24, query=8, key_value=8)
_AUTOCAST_WORKING_SET = {
    "full": _TokenBytes(intermediate=12, hidden=26, query=4, key_value=4),
    "lora": _TokenBytes(intermediate=14, hidden=36, query=4, key_value=4),
    "qlora": _TokenBytes(intermediate=24, hidden=28, query=4, key_value=4),
}

# The part of it that a layer keeps from its forward to its backward pass: without gradients and casts in passing.
_FLOAT32_KEPT = _TokenBytes(intermediate=16, hidden=24, query=8, key_value=8)
_AUTOCAST_KEPT = {
    "full": _TokenBytes(intermediate=8, hidden=26, query=4, key_value=4),
    "lora": _TokenBytes(intermediate=8, hidden=24, query=4, key_value=4),
    "qlora": _TokenBytes(intermediate=14, hidden=28, query=4, key_value=4),
}

# A norm more than the two of a layer keeps its normed input and its output, whatever the dtype of products.
_NORM_BYTES = 8

# Bytes for each pair of tokens and each head, where attention is eager: the softmax, and scores that are capped (as
# Gemma-2's are); in the backward pass their gradients as well.
_EAGER_KEPT = 8
_EAGER_WORKING_SET = 11

# Bytes for each prediction of a chunk of the restoration loss in its backward pass: five float32 numbers, among them
# the logarithms of both models' probabilities.
_DIVERGENCE_BYTES = 20


class _Moment(NamedTuple):
    """Bytes at one moment of a step, beside weights and optimizer."""

    name: str
    gradients: int
    weight_copies: int = 0
    activations: int = 0
    working_set: int = 0
    loss: int = 0
    restoration: int = 0

    @property
    def total(self) -> int:
        return self.gradients + self.weight_copies + self.activations + self.working_set + self.loss + self.restoration

    def divided(self, divisor: int) -> _Moment:
        """The same on one of several devices that divide the weights: gathered ones are cast, and not kept."""
        if divisor == 1:
            return self
        return self._replace(gradients=math.ceil(self.gradients / divisor), weight_copies=0)


@dataclass(frozen=True, kw_only=True)
class _Step:
    """One micro-batch, from forward to backward."""

    shape: _Shape
    weights: _Weights
    tuning: str
    mixed_precision: bool
    tokens: int
    chunk_tokens: int
    checkpointing: bool
    accumulates: bool
    mask_bytes: int
    pairs: int
    restored_tokens: int

    def moments(self) -> tuple[_Moment, ...]:
        return (*self._moments_of_loss(), *self._moments_of_restoration())

    def _moments_of_loss(self) -> tuple[_Moment, ...]:
        all_gradients = 4 * self.weights.trained
        head = 4 * self.weights.trained_head
        before = all_gradients if self.accumulates else 0
        # A head's gradient is added to what earlier micro-batches left, but for a tied one, which waits for that of
        # the embeddings to come.
        waiting = head if self.shape.is_tied and self.accumulates else 0
        kept, working_set = self._kept_bytes, self._working_set
        return (
            _Moment(
                "loss",
                before + head,
                weight_copies=self._weight_copies,
                activations=kept * self.shape.num_layers,
                loss=self._loss_bytes,
                working_set=self.mask_bytes,
            ),
            _Moment(
                "last layer",
                (before + waiting if self.accumulates else head) + self._restored_gradients,
                weight_copies=0 if self.checkpointing else 2 * self.weights.copied,
                activations=kept * self.shape.num_layers,
                working_set=working_set,
            ),
            _Moment("first layer", all_gradients + waiting, activations=kept, working_set=working_set),
            _Moment(
                "embeddings",
                all_gradients + waiting + (head if self.shape.is_tied or self.accumulates else 0),
                working_set=self.tokens * 4 * self.shape.hidden,
            ),
        )

    def _moments_of_restoration(self) -> tuple[_Moment, ...]:
        if not self.restored_tokens:
            return ()
        slices = replace(
            self, tokens=self.restored_tokens, pairs=self.pairs * self.restored_tokens**2 // self.tokens**2
        )
        predictions = min(RESTORATION_CHUNK_TOKENS, self.restored_tokens) * self.shape.vocabulary
        return (
            _Moment(
                "restoration",
                4 * ((self.weights.trained if self.accumulates else 0) + self.weights.trained_head),
                weight_copies=self._weight_copies,
                activations=self._kept_bytes * self.shape.num_layers,
                loss=self._head_bytes,
                restoration=slices._kept_bytes * self.shape.num_layers + _DIVERGENCE_BYTES * predictions,
            ),
        )

    @property
    def _restored_gradients(self) -> int:
        """The restoration loss's gradients, which autograd holds until those of the samples' loss are added to them.

        Under autocast they are those of the bfloat16 copies, which both passes share.
        """
        if not self.restored_tokens:
            return 0
        copied = self.weights.copied if self.mixed_precision else 0
        return 4 * (self.weights.trained - copied) + 2 * copied

    @property
    def stream_bytes(self) -> int:
        """The residual stream after one layer: bfloat16 only where embeddings and adapted layers are."""
        each = 2 if self.tuning == "lora" and self.mixed_precision else 4
        return self.tokens * each * self.shape.hidden

    @property
    def widths(self) -> _TokenBytes:
        """Bytes of a layer's working set for each token."""
        return _AUTOCAST_WORKING_SET[self.tuning] if self.mixed_precision else _FLOAT32_WORKING_SET

    @property
    def _layer_kept(self) -> int:
        kept = _AUTOCAST_KEPT[self.tuning] if self.mixed_precision else _FLOAT32_KEPT
        return self.tokens * kept.of(self.shape) + self._scores_bytes(_EAGER_KEPT)

    @property
    def _kept_bytes(self) -> int:
        return self.stream_bytes if self.checkpointing else self._layer_kept

    def _scores_bytes(self, bytes_each: int) -> int:
        return bytes_each * self.pairs * self.shape.num_heads if self.shape.is_eager else 0

    @property
    def _working_set(self) -> int:
        """What a layer needs beside what was kept of it."""
        whole = self.tokens * self.widths.of(self.shape) + self._scores_bytes(_EAGER_WORKING_SET) + self.mask_bytes
        # The layer's input is among what was kept; the working set has the gradient of its output instead.
        return whole if self.checkpointing else whole + self.stream_bytes - self._layer_kept

    @property
    def _weight_copies(self) -> int:
        if not self.mixed_precision:
            return 0
        casts_head = self.tuning == "full" or self.weights.trained_head > 0
        return 2 * (self.weights.copied + (self.shape.embeddings if casts_head else 0))

    @property
    def _loss_bytes(self) -> int:
        """At the head: the stream, the final norm's normed input and output, its gradient; one chunk's logits.

        A chunk has float32 logits, which become their own gradient, and under autocast the bfloat16 ones they come
        from; under a soft cap its slope as well.
        """
        logit_bytes = 4 + (2 if self.mixed_precision else 0) + (4 if self.shape.has_soft_cap else 0)
        return self._head_bytes + logit_bytes * self.chunk_tokens * self.shape.vocabulary

    @property
    def _head_bytes(self) -> int:
        return 4 * 4 * self.tokens * self.shape.hidden


# --- What a process has beside tensors ------------------------------------------------------------------

# Measured: PyTorch, transformers, PEFT and the Trainer resident on Linux; on a GPU, a CUDA context with its libraries.
_LIBRARIES = {"cpu": 535 * _MIB, "mps": 535 * _MIB, "cuda": GIB}
_BITSANDBYTES = 115 * _MIB
_TOKENIZER_BYTES_PER_TOKEN = 700

# glibc takes blocks up to this size from its heap (the largest that its M_MMAP_THRESHOLD grows to); larger ones are
# mapped, and go back whole.
_HEAP_BLOCK = 32 * _MIB
# Measured on models of 5 to 360 million weights (benchmarks/memory.py), in tensors of the MLP for each layer.
# bitsandbytes makes more of them: its dequantised weights come and go as well.
_HOLES_PER_LAYER = {"full": 0.45, "lora": 0.42, "qlora": 0.68}
# Without checkpointing: an adapter's output, the same scaled and the sum with the base's come and go in every layer.
_HOLES_PER_WHOLE_LAYER = _HOLES_PER_LAYER | {"lora": 1.0}

# Rows of other lengths do not fit into each other's holes, and their bfloat16 products have kernels of their own, of
# which core/allocator.py limits the number. Fitted to 21 runs on one CPU, of the demo model and of random Llamas of 28
# and 40 million weights, rows of 600 to 2,000 tokens, 4 to 100 lengths, all weights and adapters, whole layers and
# checkpoints, freed memory given back after every row: estimate by peak is 0.88 to 1.13, of five more 0.92 to 1.00.
_HOLES_OF_LENGTHS = {"activations": 0.25, "loss": 0.7}
_KERNELS_OF_A_LENGTH = 8 * _MIB
_MOST_LENGTHS_WITH_KERNELS = 45


def _overhead(step: _Step, device_type: str) -> int:
    """Libraries, tokenizer, and freed memory that the allocator keeps.

    In a CPU's heap, a layer's kept input comes to lie behind the MLP's tensors, the largest that come and go. When
    these are freed, smaller blocks settle in their place, the next layer's find no hole that is wide enough, and the
    heap grows: for each layer by a share of them.
    """
    num_bytes = _LIBRARIES[device_type] + _TOKENIZER_BYTES_PER_TOKEN * step.shape.vocabulary
    if step.tuning == "qlora":
        num_bytes += _BITSANDBYTES
    tensor = step.tokens * step.widths.intermediate * step.shape.intermediate / _NUM_MLP_TENSORS
    if device_type != "cuda" and tensor < _HEAP_BLOCK:
        holes = _HOLES_PER_LAYER if step.checkpointing else _HOLES_PER_WHOLE_LAYER
        num_bytes += round(holes[step.tuning] * step.shape.num_layers * _NUM_MLP_TENSORS * tensor)
    return num_bytes


def _overhead_of_lengths(step: _Step, peak: _Moment, device_type: str, num_lengths: int) -> int:
    """What rows of one length alone would not take."""
    if num_lengths == 1 or device_type == "cuda":
        return 0
    if not step.mixed_precision:
        return round(_HOLES_OF_LENGTHS["activations"] * peak.activations)
    kernels = _KERNELS_OF_A_LENGTH * min(num_lengths, _MOST_LENGTHS_WITH_KERNELS)
    return kernels + round(_HOLES_OF_LENGTHS["loss"] * step._loss_bytes)
