"""Speed and peak memory of summarizing: ours, transformers' generate(), the official way, and llama.cpp, side by side.

    python benchmarks/summarize.py --lengths 8192 --new-tokens 200 --rounds 3 -o benchmarks/results/summarize-cpu.json
    python benchmarks/summarize.py --model PATH.gguf --lengths 512 --new-tokens 8 --rounds 1

Every side continues the same prompt, of the bundled demo texts repeated, greedily by the same number of tokens, with
the same model under eabf, in a process of its own, in turns (A B A B ...).

eabf      `Generator.write`: prefill in chunks into a cache that is allocated once.
compiled  the same with a compiled step (`--compile`); the second text in a process is timed, and what the first took
          beyond it is given as compile_s.
generate  transformers' generate() with its own cache, the whole prompt in one forward pass.
official  the whole prompt at once and no cache: every token costs the whole prompt. A few tokens are timed and the rest
          is extrapolated: tokens x median seconds of one, which is low, since the text grows meanwhile.
llama.cpp the same GGUF file, in its own quantisation and without eabf, if xllamacpp is installed.

The end of a text is not looked for, so that all sides make the same number of tokens; where ours stops for a loop and
tries again, its decoding time is brought to that number. Peak memory is that of the process (VmHWM, Linux), libraries
included, or of the GPU's tensors.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import common

from eabf_cli.core.summarize.settings import CHUNK_TOKENS

OFFICIAL_TOKENS = 2


def main() -> None:
    options = parse_arguments()
    if options.side:
        print(json.dumps(SIDES[options.side](options)))
        return
    names = [name for name in options.sides if name != "llama.cpp"]
    if (
        "llama.cpp" in options.sides
        and options.model.endswith(".gguf")
        and importlib.util.find_spec("xllamacpp") is not None
    ):
        names.append("llama.cpp")
    results = []
    for length in options.lengths:
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for number in range(options.rounds):
            for name in names:
                # The slow side is extrapolated anyway: once is enough.
                if name == "official" and number:
                    continue
                runs[name].append(run_apart(name, length, options))
                print(
                    f"length {length}, round {number + 1}, {name}: {runs[name][-1]['total_s']:.1f} s", file=sys.stderr
                )
        results.append({"length": length, "sides": {name: summary(found) for name, found in runs.items()}})
    settings = {name: getattr(options, name) for name in ("new_tokens", "rounds", "dtype", "device")}
    report = {
        "machine": common.machine(options.device),
        "model": Path(options.model).name,
        **settings,
        "results": results,
    }
    common.publish(report, options, table(report))


def parse_arguments() -> argparse.Namespace:
    from eabf_cli.core.summarize.default_model import default_model

    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], formatter_class=formatter)
    parser.add_argument("--model", default=default_model(), help="as for eabf summarize -m")
    parser.add_argument("--lengths", type=common.number_list, default="8192")
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side, in turns")
    parser.add_argument("--chunk-tokens", type=int, default=CHUNK_TOKENS)
    parser.add_argument(
        "--sides",
        type=lambda text: text.split(","),
        default="eabf,generate,official,llama.cpp",
        metavar="LIST",
        help=f"of {', '.join(SIDES)}",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("-o", "--output", type=Path, help="write the report as JSON to this file")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    return parser.parse_args()


def run_apart(side: str, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """One side in a fresh process."""
    arguments = ["--lengths", str(length)]
    names = ("model", "new_tokens", "chunk_tokens", "dtype", "device")
    return common.run_apart(__file__, side, arguments, options, names)


# ---- The sides -----------------------------------------------------------------------------------


def prepare(options: argparse.Namespace) -> tuple[Any, Any, list[int]]:
    """The model extended as far as the prompt needs it, its tokenizer, and the prompt's tokens."""
    from eabf_cli import RopeScalingConfig, apply_method, load_model, load_tokenizer
    from eabf_cli.core.data.records import open_records
    from eabf_cli.core.summarize.prompts import document_ids
    from eabf_cli.core.summarize.window import doubled_factor

    tokenizer = load_tokenizer(options.model)
    model = load_model(options.model, dtype=options.dtype, device=options.device)
    (length,) = options.lengths
    window = model.config.max_position_embeddings
    if length + options.new_tokens > window:
        factor = doubled_factor(length + options.new_tokens, window)
        apply_method(model, RopeScalingConfig(method="eabf", factor=factor))
    # No text ends before its time.
    model.generation_config.eos_token_id = None
    if options.device == "cuda":
        # What a GPU does once in a process is no side's own.
        model.generate(common.random_tokens(model, 512), max_new_tokens=4, do_sample=False, pad_token_id=0)
    ids: list[int] = []
    while len(ids) < length:
        for read in open_records("demo-long", split="heldout"):
            ids += document_ids(tokenizer, (read().text or "") + "\n\n")
            if len(ids) >= length:
                break
    return model, tokenizer, ids[:length]


def run_eabf(options: argparse.Namespace) -> dict[str, Any]:
    from eabf_cli.core.summarize.generation import Generator

    model, tokenizer, ids = prepare(options)
    tokenizer.eos_token = None
    generator = Generator(model=model, tokenizer=tokenizer, chunk_tokens=options.chunk_tokens)
    written = generator.write(ids, options.new_tokens)
    write_s = generator.write_s * options.new_tokens / written.num_tokens
    return measured(options, generator.read_s, write_s, written.num_tokens)


def run_compiled(options: argparse.Namespace) -> dict[str, Any]:
    from eabf_cli.core.summarize.generation import Generator

    model, tokenizer, ids = prepare(options)
    tokenizer.eos_token = None
    generators = [
        Generator(model=model, tokenizer=tokenizer, chunk_tokens=options.chunk_tokens, compiles=True) for _ in range(2)
    ]
    written = [generator.write(ids, options.new_tokens) for generator in generators]
    first, second = (
        generator.write_s * options.new_tokens / text.num_tokens
        for generator, text in zip(generators, written, strict=True)
    )
    result = measured(options, generators[1].read_s, second, written[1].num_tokens)
    return result | {"compile_s": first - second}


def run_generate(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    model, _, ids = prepare(options)

    class Times(StoppingCriteria):
        """When each token was there."""

        def __init__(self) -> None:
            self.at: list[float] = []

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            self.at.append(time.perf_counter())
            return torch.zeros(1, dtype=torch.bool, device=input_ids.device)

    times = Times()
    row = torch.tensor([ids], device=model.device)
    started = time.perf_counter()
    model.generate(
        row,
        attention_mask=torch.ones_like(row),
        max_new_tokens=options.new_tokens,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([times]),
    )
    return measured(options, times.at[0] - started, time.perf_counter() - times.at[0], len(times.at))


def run_official(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    model, _, ids = prepare(options)
    row = torch.tensor([ids], device=model.device)
    step_s = []
    with torch.no_grad():
        for _ in range(OFFICIAL_TOKENS):
            started = common.now()
            # All logits, as generate() of its transformers version computes them.
            token = model(row, use_cache=False).logits[:, -1:].argmax(-1)
            step_s.append(common.now() - started)
            row = torch.cat([row, token], dim=1)
    per_token = median(step_s)
    result = measured(options, per_token, per_token * (options.new_tokens - 1), options.new_tokens)
    return result | {"is_extrapolated_from": step_s}


def run_llama_cpp(options: argparse.Namespace) -> dict[str, Any]:
    import xllamacpp

    from eabf_cli import load_tokenizer
    from eabf_cli.core.data.records import open_records

    (length,) = options.lengths
    tokenizer = load_tokenizer(options.model)
    text = "\n\n".join(read().text or "" for read in open_records("demo-long", split="heldout"))
    ids = (tokenizer(text, add_special_tokens=False)["input_ids"] * 8)[:length]
    parameters = xllamacpp.CommonParams()
    parameters.model.path = options.model
    parameters.n_ctx = length + options.new_tokens
    parameters.n_batch = options.chunk_tokens
    parameters.cpuparams.n_threads = os.cpu_count() or 1
    parameters.verbosity = 0
    server = xllamacpp.Server(parameters)
    request = {
        "prompt": ids,
        "n_predict": options.new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
    }
    answer = server.handle_completions(request)
    if "timings" not in answer:
        sys.exit(f"llama.cpp: {answer}")
    timings = answer["timings"]
    return measured(options, timings["prompt_ms"] / 1e3, timings["predicted_ms"] / 1e3, timings["predicted_n"])


SIDES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "eabf": run_eabf,
    "compiled": run_compiled,
    "generate": run_generate,
    "official": run_official,
    "llama.cpp": run_llama_cpp,
}


def measured(options: argparse.Namespace, read_s: float, write_s: float, num_tokens: int) -> dict[str, Any]:
    import torch

    from eabf_cli.core.devices import peak_memory_gib

    return {
        "total_s": read_s + write_s,
        "prefill_s": read_s,
        "decode_s": write_s,
        "num_tokens": num_tokens,
        "peak_memory_gib": peak_memory_gib(torch.device(options.device)),
    }


# ---- The report ----------------------------------------------------------------------------------


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One side's runs together: medians of the times, the largest memory."""
    times = {name: median(run[name] for run in runs) for name in ("total_s", "prefill_s", "decode_s")}
    return times | {"peak_memory_gib": max(run["peak_memory_gib"] for run in runs), "runs": runs}


def table(report: dict[str, Any]) -> str:
    """The report for a person."""
    lines = [
        common.machine_line(report["machine"]),
        f"{report['model']}, {report['dtype']}, {report['new_tokens']} new tokens",
        f"{'length':>7} {'side':>9} {'total s':>8} {'ratio':>6} {'prefill':>8} {'decode':>8} "
        f"{'peak GiB':>9} {'ratio':>6}",
    ]
    for result in report["results"]:
        ours = result["sides"]["eabf"]
        for name, side in result["sides"].items():
            memory = side["peak_memory_gib"]
            lines.append(
                f"{result['length']:>7} {name:>9} {side['total_s']:>8.1f} {side['total_s'] / ours['total_s']:>6.2f} "
                f"{side['prefill_s']:>8.1f} {side['decode_s']:>8.1f} {memory:>9.2f} "
                f"{memory / ours['peak_memory_gib']:>6.2f}"
            )
    lines.append(f"ratio: to eabf. official: extrapolated from {OFFICIAL_TOKENS} tokens.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
