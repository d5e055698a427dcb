"""Time of the loss of a training step, and of its gradients: ours, and that of transformers, side by side.

    python benchmarks/loss.py --lengths 8192 --rounds 3 -o benchmarks/results/loss-cpu.json

All else in a step of `finetune.py` is the same on both sides, so this is where they can differ, and whole steps differ
by as many seconds. Both sides get the same hidden states, head and labels, and make the gradients of hidden states and
head: `plain` by the head and transformers' own loss with all logits, `eabf` in chunks. Turns go A B B A in one process;
the first round is not counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import common
import torch
from torch import Tensor
from torch.nn.functional import linear, pad
from transformers.loss.loss_utils import ForCausalLMLoss

from eabf_cli.core.finetune.chunked_loss import chunked_cross_entropy, default_chunk_tokens


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = linear(hidden, weight)
    return ForCausalLMLoss(logits[None], labels[None], weight.shape[0], num_items_in_batch=torch.tensor(len(labels)))


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    chunk_tokens = default_chunk_tokens(hidden.device.type, trains_head=True)
    shifted = pad(labels, (0, 1), value=-100)[1:]
    return chunked_cross_entropy(hidden, weight, None, shifted, chunk_tokens=chunk_tokens) / len(labels)


SIDES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"plain": plain, "eabf": chunked}


def main() -> None:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], formatter_class=formatter)
    parser.add_argument("--model", choices=common.SHAPES, default="135m")
    parser.add_argument("--lengths", type=common.number_list, default="2048,8192", metavar="LIST")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of both sides")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("-o", "--output", type=Path, help="write the report as JSON to this file")
    options = parser.parse_args()
    results = [measure(length, options) for length in options.lengths]
    settings = {name: getattr(options, name) for name in ("model", "dtype", "rounds")}
    report = {"machine": common.machine(options.device), **settings, "results": results}
    common.publish(report, options, table(report))


def measure(length: int, options: argparse.Namespace) -> dict[str, Any]:
    """One length: seconds of both sides, and how far their losses are apart."""
    shape = common.SHAPES[options.model]
    generator = torch.Generator().manual_seed(0)
    like = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    hidden = torch.randn(length, shape["hidden_size"], generator=generator).to(**like).requires_grad_()
    weight = torch.randn(shape["vocab_size"], shape["hidden_size"], generator=generator).mul_(0.02)
    weight = weight.to(**like).requires_grad_()
    labels = torch.randint(shape["vocab_size"], (length,), generator=generator).to(options.device)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    losses = {}
    for number in range(options.rounds + 1):
        for side in common.in_turn(SIDES, number):
            hidden.grad = weight.grad = None
            started = common.now()
            loss = SIDES[side](hidden, weight, labels)
            loss.backward()
            elapsed = common.now() - started
            losses[side] = loss.item()
            label = f"round {number}" if number else "not counted"
            print(f"length {length}, {label}, {side}: {elapsed:.2f} s", file=sys.stderr)
            if number:
                seconds[side].append(elapsed)
    sides = {side: {"seconds": median(found), "rounds_s": found} for side, found in seconds.items()}
    return {"length": length, "sides": sides, "difference": abs(losses["eabf"] - losses["plain"])}


def table(report: dict[str, Any]) -> str:
    """The report for a person."""
    lines = [
        common.machine_line(report["machine"]),
        f"{report['model']}, {report['dtype']}, {report['rounds']} rounds",
        f"{'length':>7} {'plain s':>8} {'eabf s':>8} {'ratio':>6}  losses differ by",
    ]
    for result in report["results"]:
        theirs, ours = (result["sides"][side]["seconds"] for side in SIDES)
        lines.append(
            f"{result['length']:>7} {theirs:>8.2f} {ours:>8.2f} {ours / theirs:>6.3f}  {result['difference']:.1e}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
