"""How a finetune is carried out, beside its recipe. Options read their defaults here, so torch stays away."""

from __future__ import annotations

from dataclasses import dataclass

from eabf_cli.core.errors import InvalidConfigError

TUNINGS = ("full", "lora", "qlora")
"""What can be trained, the strongest first."""

TUNING_NAMES = ("auto", *TUNINGS)

RESTORATION_CHUNK_TOKENS = 256
"""Tokens whose predictions the restoration loss has in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a recipe is carried out; of these, only the seed and the micro-batch change the weights beyond rounding.

    Attributes:
        seed: decides the order of the samples.
        mixed_precision: bfloat16 autocast over the weights as they are.
        micro_batch_size: samples in one forward pass on one device.
        activation_checkpointing: recompute each layer in the backward pass (see `checkpoints_activations`).
        chunk_tokens: tokens whose logits exist at a time; None: `default_chunk_tokens`.
        fused_kernels: norms and MLPs by Liger's kernels (`has_fused_kernels`).
        save_steps: write `checkpoint-N/` every so many steps (the newest three are kept); None writes none.
        report_to: transformers' integrations that get the metrics (`tensorboard`, `wandb`, `trackio`, ...).
        show_progress: a live line on stderr.
    """

    seed: int = 42
    mixed_precision: bool = False
    micro_batch_size: int = 1
    activation_checkpointing: bool = False
    chunk_tokens: int | None = None
    fused_kernels: bool = False
    save_steps: int | None = None
    report_to: tuple[str, ...] = ()
    show_progress: bool = False


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """What LoRA and QLoRA train.

    LoRA alone lags behind full finetuning the more, the longer the window, at any rank; with norms and embeddings
    trained as well it comes close (LongLoRA, arXiv 2309.12307, section 3.3). Norms are a few thousand numbers and are
    trained by default. Embeddings (and the head) cost 16 bytes a number for weights, gradients and the optimizer's
    moments, 4 GB for a Llama-2-7B, so they are asked for.

    Attributes:
        rank: inner width r of B (out x r) A (r x in), on every linear layer of attention and MLP (as QLoRA does, arXiv
            2305.14314; LongLoRA takes the attention's alone, at rank 8).
        alpha: the adapter is scaled by alpha / rank; twice the rank, LongLoRA's ratio.
        dropout: on the adapter's input; LongLoRA's 0.
        train_norms: train every norm, the query's and key's among them.
        train_embeddings: train the token embeddings and the head, which stay tied where they are.

    Raises:
        InvalidConfigError: a number that makes no sense.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    train_norms: bool = True
    train_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InvalidConfigError(f"--lora-rank must be at least 1, got {self.rank}; try 16")
        if not 0 < self.alpha < float("inf"):
            raise InvalidConfigError(f"--lora-alpha must be greater than 0, got {self.alpha:g}; try twice the rank")
        if not 0 <= self.dropout < 1:
            raise InvalidConfigError(f"LoRA dropout must be from 0 to below 1, got {self.dropout:g}; try 0")


@dataclass(frozen=True, kw_only=True)
class RestorationConfig:
    """How much the original model's predictions count.

    Attributes:
        weight: a micro-batch that has the loss is trained on its own mean loss per token plus this times the
            divergence (nats per token).
        share: part of the micro-batches that have it, spread evenly.
        length: tokens of a slice, BOS counted; None takes the original window, beyond which the original model
            knows nothing.

    Raises:
        InvalidConfigError: a number that makes no sense.
    """

    weight: float = 1.0
    share: float = 0.25
    length: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise InvalidConfigError(f"--restore-weight must be a positive number, got {self.weight}")
        if not 0 < self.share <= 1:
            raise InvalidConfigError(f"--restore-share must be above 0 and at most 1, got {self.share}")
        if self.length is not None and self.length < 2:
            raise InvalidConfigError(f"restoration length must be at least 2 tokens, got {self.length}")

    def has_loss(self, micro_batch: int) -> bool:
        """Whether the micro-batch of this number, from 0, has the loss."""
        return int((micro_batch + 1) * self.share) > int(micro_batch * self.share)
