"""A patched model under FSDP2, which transformers' Trainer does not use on CPUs, by torch's own `fully_shard`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from eabf_cli.core.finetune.chunked_loss import chunked_loss
from eabf_cli.core.patching import apply_method
from tests.scalings import scaling_for
from tests.tiny_llama import tiny_llama

STEPS = 3


def patched() -> PreTrainedModel:
    model = tiny_llama(num_hidden_layers=3, vocab_size=64)
    apply_method(model, scaling_for("eabf", unscaled_layers=(0,)))
    return model.train()


def rows(step: int) -> torch.Tensor:
    """Longer than the original window, so that queries are scaled; another row for each process."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(5, 64, (2, 150), generator=generator)


def train(model: PreTrainedModel, step_rows: list[torch.Tensor]) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    with chunked_loss(model, chunk_tokens=64):
        for batch in step_rows:
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def _train_sharded(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = patched()
    mesh = dist.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(weight.to_local().numel() < weight.numel() for weight in model.parameters() if weight.ndim > 1)
    losses = train(model, [rows(step)[rank : rank + 1] for step in range(STEPS)])
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    torch.save({"losses": losses, "weights": gathered}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_sharded_model_trains_as_a_whole_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_train_sharded, (str(tmp_path),), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    whole = patched()
    expected = train(whole, [rows(step) for step in range(STEPS)])
    # Each process has the loss of its own row.
    means = [sum(pair) / 2 for pair in zip(found[0]["losses"], found[1]["losses"], strict=True)]
    assert means == pytest.approx(expected, abs=1e-6)
    # What the main process gathers fits a whole model of the same make.
    plain = patched()
    plain.load_state_dict(found[0]["weights"])
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(plain.state_dict()[name], weight, atol=1e-6, rtol=1e-4)
