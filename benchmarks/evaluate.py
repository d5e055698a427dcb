"""Speed and peak memory of an evaluation: `evaluate`, and the plain way of a script.

    python benchmarks/evaluate.py --lengths 512,1024,2048,4096 --rounds 3 -o benchmarks/results/evaluate-cpu.json
    python benchmarks/evaluate.py --model PATH_TO_SMOLLM2 --lengths 4096,16384 --documents 4 --trials 10

Both measure perplexity by length, the loss on the same tokens seen with growing context, and passkey retrieval, on
the same documents. `plain` makes one forward pass of transformers for every row, with all logits, and shares nothing
between rows. Each side runs in a process of its own, in turns; loading is not timed. Peak memory is that of the process
(VmHWM, Linux), libraries included, or of the GPU's tensors. The losses of both sides are held against each other; the
passkeys are other ones, so that their accuracies agree within chance.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median
from typing import Any

import common

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
FACTOR = 4


def main() -> None:
    options = parse_arguments()
    if options.side:
        print(json.dumps(SIDES[options.side](options)))
        return
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number in range(options.rounds):
        for side in SIDES:
            runs[side].append(run_apart(side, options))
            print(f"round {number + 1}, {side}: {runs[side][-1]['seconds']:.1f} s", file=sys.stderr)
    settings = ("lengths", "documents", "trials", "target_tokens", "dtype", "device", "rounds")
    report = {
        "machine": common.machine(options.device),
        "model": Path(options.model).name,
        **{name: getattr(options, name) for name in settings},
        "sides": {side: summary(found) for side, found in runs.items()},
        "max_difference": max_difference(runs["eabf"][0], runs["plain"][0]),
    }
    common.publish(report, options, table(report))


def parse_arguments() -> argparse.Namespace:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], formatter_class=formatter)
    parser.add_argument("--model", default="eabf-tiny", help=f"as for load_model; eabf by factor {FACTOR} is applied")
    parser.add_argument("--lengths", type=common.number_list, default="512,1024,2048,4096", metavar="LIST")
    parser.add_argument("--documents", type=int, default=8, help="held-out documents of demo-long, the longest")
    parser.add_argument("--trials", type=int, default=15, help="passkeys a length")
    parser.add_argument("--target-tokens", type=int, default=256, help="scored tokens of a document")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side, in turns")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("-o", "--output", type=Path, help="write the report as JSON to this file")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    return parser.parse_args()


def run_apart(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """One side in a fresh process."""
    arguments = ["--lengths", ",".join(map(str, options.lengths))]
    names = ("model", "documents", "trials", "target_tokens", "dtype", "device")
    return common.run_apart(__file__, side, arguments, options, names)


# ---- The sides -----------------------------------------------------------------------------------


def prepare(options: argparse.Namespace) -> tuple[Any, Any, list[str]]:
    """The extended model, its tokenizer, and the documents: those with the most characters."""
    from eabf_cli import RopeScalingConfig, apply_method, load_model, load_tokenizer
    from eabf_cli.core.data.records import open_records

    model = load_model(options.model, dtype=options.dtype, device=options.device)
    apply_method(model, RopeScalingConfig(method="eabf", factor=FACTOR))
    texts = [read().text or "" for read in open_records("demo-long", split="heldout")]
    return model, load_tokenizer(options.model), sorted(texts, key=len, reverse=True)[: options.documents]


def run_eabf(options: argparse.Namespace) -> dict[str, Any]:
    from eabf_cli import EvalConfig, evaluate

    model, tokenizer, texts = prepare(options)
    config = EvalConfig(
        tasks=("perplexity", "context_gain", "passkey"),
        lengths=tuple(options.lengths),
        num_passkey_trials=options.trials,
        depths=DEPTHS,
        num_documents=options.documents,
        target_tokens=options.target_tokens,
        documents=tuple(texts),
    )
    started = common.now()
    result = evaluate(model, tokenizer, config)
    seconds = common.now() - started
    trials: dict[int, list[tuple[float, int]]] = {length: [] for length in options.lengths}
    for entry in result["passkey"]:
        trials[entry["length"]].append((entry["accuracy"], entry["num_trials"]))
    return measured(
        seconds,
        options,
        perplexity={entry["length"]: entry["perplexity"] for entry in result["perplexity"]},
        context_nll={entry["context"]: entry["nll"] for entry in result["context_gain"]},
        passkey={
            length: sum(accuracy * count for accuracy, count in found) / sum(count for _, count in found)
            for length, found in trials.items()
        },
    )


def run_plain(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from torch.nn.functional import cross_entropy

    from eabf_cli.core.needles import passkey_prompt

    model, tokenizer, texts = prepare(options)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    longest = max(options.lengths)

    def logits_and_labels(ids: list[int], num_targets: int) -> tuple[torch.Tensor, torch.Tensor]:
        row = torch.tensor([ids], device=model.device)
        logits = model(row, use_cache=False).logits[0]
        return logits[-num_targets - 1 : -1].float(), row[0, -num_targets:]

    def loss(ids: list[int], num_targets: int) -> float:
        return float(cross_entropy(*logits_and_labels(ids, num_targets)))

    with torch.inference_mode():
        started = common.now()
        documents = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
        perplexity, context_nll, passkey = {}, {}, {}
        for length in options.lengths:
            body = length - len(bos)
            num_targets = min(options.target_tokens, length // 2)
            losses = [loss([*bos, *ids[:body]], num_targets) for ids in documents if len(ids) >= body]
            perplexity[length] = math.exp(fmean(losses)) if losses else None
            end = longest - len(bos)
            num_targets = min(options.target_tokens, min(options.lengths) // 2)
            losses = [loss([*bos, *ids[end - body : end]], num_targets) for ids in documents if len(ids) >= end]
            if losses:
                context_nll[length] = fmean(losses)
            hits = []
            for trial in range(options.trials):
                prompt = passkey_prompt(tokenizer, length, DEPTHS[trial % len(DEPTHS)], seed=trial)
                logits, labels = logits_and_labels([*prompt.input_ids, *prompt.answer_ids], len(prompt.answer_ids))
                hits.append(bool((logits.argmax(-1) == labels).all()))
            passkey[length] = fmean(hits)
        seconds = common.now() - started
    return measured(seconds, options, perplexity=perplexity, context_nll=context_nll, passkey=passkey)


SIDES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"eabf": run_eabf, "plain": run_plain}


def measured(seconds: float, options: argparse.Namespace, **found: dict[int, float | None]) -> dict[str, Any]:
    import torch

    from eabf_cli.core.devices import peak_memory_gib

    by_length = {name: {str(length): value for length, value in values.items()} for name, values in found.items()}
    return {"seconds": seconds, "peak_memory_gib": peak_memory_gib(torch.device(options.device)), **by_length}


# ---- The report ----------------------------------------------------------------------------------


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One side's runs together: the median time, the largest memory, and what was measured."""
    peaks = [run["peak_memory_gib"] for run in runs]
    return runs[0] | {
        "seconds": median(run["seconds"] for run in runs),
        "rounds_s": [run["seconds"] for run in runs],
        "peak_memory_gib": None if None in peaks else max(peaks),
    }


def max_difference(first: dict[str, Any], second: dict[str, Any]) -> float:
    """Largest difference of any loss that both sides measured, in nats.

    Raises:
        ValueError: one side measured a length that the other did not.
    """
    differences = [0.0]
    for name in ("perplexity", "context_nll"):
        for (length, ours), (other, theirs) in zip(first[name].items(), second[name].items(), strict=True):
            if length != other or (ours is None) != (theirs is None):
                raise ValueError(f"{name}: one side has {length}: {ours}, the other {other}: {theirs}")
            if ours is not None and theirs is not None:
                take = math.log if name == "perplexity" else float
                differences.append(abs(take(ours) - take(theirs)))
    return max(differences)


def table(report: dict[str, Any]) -> str:
    """The report for a person."""
    plain = report["sides"]["plain"]
    lines = [
        common.machine_line(report["machine"]),
        f"{report['model']}, {report['dtype']}, lengths {', '.join(map(str, report['lengths']))}, "
        f"{report['documents']} documents, {report['trials']} passkeys a length",
        f"{'side':>6} {'seconds':>8} {'ratio':>6} {'peak GiB':>9} {'ratio':>6}",
    ]
    for name, side in report["sides"].items():
        memory, of_plain = side["peak_memory_gib"], plain["peak_memory_gib"]
        peaks = f"{'-':>9} {'-':>6}" if memory is None else f"{memory:>9.2f} {memory / of_plain:>6.2f}"
        lines.append(f"{name:>6} {side['seconds']:>8.1f} {side['seconds'] / plain['seconds']:>6.2f} {peaks}")
    lines.append(f"largest difference of the losses: {report['max_difference']:.1e} nats")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
