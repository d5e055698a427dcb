"""The demo model's tokenizer and training loop: resumable, and the same after a kill as without one."""

import json
import random
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from demo_corpus import SOURCES
from demo_rows import TextMixture, draw_row
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. Learning rate: warm-up, constant, linear to 2 % over the last `decay_steps`."""

    steps: int = 6000
    warmup_steps: int = 150
    decay_steps: int = 2400
    learning_rate: float = 2e-3
    batch_size: int = 16
    seed: int = 0
    save_every: int = 100
    compile: bool = True
    bf16: bool = False


def train_tokenizer(text_dir: Path, output: Path, vocab_size: int = 4096) -> None:
    """Train a byte-level BPE on the training text; every digit is a token of its own, no prefix space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in sorted(text_dir.glob("*.train.txt"))], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(output)


def tokenize_corpus(text_dir: Path, tokenizer_dir: Path, output: Path) -> None:
    """Write every text file of the corpus as `NAME.SPLIT.npy` (uint16 token ids)."""
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    output.mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        for split in ("train", "heldout"):
            path = text_dir / f"{source.name}.{split}.txt"
            if path.exists():
                ids = tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False).ids
                np.save(output / f"{source.name}.{split}.npy", np.array(ids, dtype=np.uint16))


def new_model(vocab_size: int, seed: int, **overrides: int) -> LlamaForCausalLM:
    """A randomly initialised model of the demo's shape (5.4 million parameters, window 512)."""
    shape = {
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 688,
        "max_position_embeddings": 512,
        **overrides,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
            **shape,
        )
    )


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """The learning rate of 0-based `step`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    remaining = (config.steps - step) / max(1, config.decay_steps)
    return config.learning_rate * max(0.02, min(1.0, remaining))


def draw_batch(
    step: int, text: TextMixture, tokenizer: PreTrainedTokenizerFast, length: int, config: TrainConfig
) -> torch.Tensor:
    """The rows of one step: (batch_size, length) token ids that depend on seed and step only."""
    rngs = (random.Random(f"{config.seed}/{step}/{row}") for row in range(config.batch_size))
    return torch.tensor([draw_row(rng, text, tokenizer, length) for rng in rngs])


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    text: TextMixture,
    config: TrainConfig,
    output: Path,
) -> Iterator[dict[str, float]]:
    """Train on `text`, yielding loss, learning rate and tokens/s of each step.

    `output` receives `train-state.pt` every `save_every` steps (replaced in one move) and, at the end,
    the checkpoint. A run whose state is there goes on from it; `steps` and `decay_steps` may have changed.
    """
    output.mkdir(parents=True, exist_ok=True)
    state_path = output / "train-state.pt"
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
    )
    first_step = 0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]

    length = model.config.max_position_embeddings + 1
    device = model.device
    model.train()
    forward = torch.compile(model) if config.compile else model
    autocast = torch.autocast(device.type, torch.bfloat16) if config.bf16 else nullcontext()
    for step in range(first_step, config.steps):
        started = time.perf_counter()
        batch = draw_batch(step, text, tokenizer, length, config).to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config)
        with autocast:
            logits = forward(input_ids=batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            partial = state_path.with_suffix(".partial")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, partial)
            partial.replace(state_path)
        yield {
            "step": step + 1,
            "loss": loss.item(),
            "learning_rate": learning_rate_at(step, config),
            "tokens_per_s": batch[:, 1:].numel() / (time.perf_counter() - started),
        }
    save_checkpoint(model, config, output)


def save_checkpoint(model: LlamaForCausalLM, config: TrainConfig, output: Path) -> None:
    """Write bf16 weights and a config that transformers 4.57 and 5.x both read, and the run's settings."""
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.save_pretrained(output)
    # transformers 4.57 reads rope_theta at the top level only, transformers 5 writes rope_parameters only.
    path = output / "config.json"
    fields = json.loads(path.read_text())
    fields["rope_theta"] = fields["rope_parameters"]["rope_theta"]
    path.write_text(json.dumps(fields, indent=2) + "\n")
    (output / "train-config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
