"""`run_evaluation`: a whole evaluation, from a config to the result on disk."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from eabf_cli.core import architectures
from eabf_cli.core.checkpoint import load_tokenizer, stored_dtype
from eabf_cli.core.data.tokenization import encode_text
from eabf_cli.core.devices import choose_device, has_fast_bfloat16, peak_memory_gib, torch_dtype
from eabf_cli.core.errors import DataError
from eabf_cli.core.evals.lengths import (
    EvalMemory,
    choose_lengths,
    estimate_memory,
    estimate_seconds,
    fits_memory,
    refuse_too_long,
)
from eabf_cli.core.evals.settings import EvalConfig, EvalRunConfig
from eabf_cli.core.evals.table import format_evaluation
from eabf_cli.core.evals.texts import TextSet, read_texts
from eabf_cli.core.evaluation import Measured, evaluate_scores
from eabf_cli.core.files import check_target, whole_folder, write_json, write_text
from eabf_cli.core.finetune.memory_plan import InsufficientMemoryError, available_memory, is_out_of_memory
from eabf_cli.core.resolution import scaled_config
from eabf_cli.core.run_record import run_record, write_run_record
from eabf_cli.core.subject import Subject, find_subject, load_subject

if TYPE_CHECKING:
    from eabf_cli.core.evals.suites import SuiteConfig

logger = logging.getLogger(__name__)

RESULT_FILE = "eval.json"
TABLE_FILE = "table.txt"
_ON_TEXT = ("perplexity", "context_gain", "perplexity_by_position")
"""The tasks that need documents of a length; the others repeat a text where it is too short."""


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """Everything that is known before weights are loaded.

    Attributes:
        evaluation: with lengths and documents filled in.
        memory: of the longest length.
        seconds: roughly how long it takes; None where that is not known (not a CPU).
    """

    config: EvalRunConfig
    subject: Subject
    tokenizer: Any
    evaluation: EvalConfig
    texts: TextSet
    dtype: str
    device: torch.device
    memory: EvalMemory
    available_bytes: int
    seconds: float | None
    notes: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """The part of a result that is known already."""
        return self.subject.describe() | {
            "dataset": self.texts.source,
            "data_hash": self.texts.content_hash,
            "lengths": list(self.evaluation.lengths or ()),
            "tasks": list(self.evaluation.tasks),
            "depths": list(self.evaluation.depths),
            "seed": self.evaluation.seed,
            "dtype": self.dtype,
            "device": str(self.device),
            "notes": list(self.notes),
        }


def run_evaluation(
    config: EvalRunConfig, *, suites: SuiteConfig | None = None, has_own_tasks: bool = True
) -> dict[str, Any]:
    """Measure what a model does with its window, as `eabf eval` does.

    Args:
        suites: tasks of lm-eval to run, too.
        has_own_tasks: off, only those are run.

    Returns:
        the JSON document of DESIGN.md section 5 (see `evaluate`). Beside its keys: `model`, `revision`, `weights`,
        `factor`, `dataset`, `data_hash`, `tasks`, `seed`, `dtype`, `device`, `memory` (estimated, by part),
        `peak_memory_gib`, `tokens_per_s`, `wall_s`, `output`; with suites those of `run_suites`.
        A dry run has no measured key, but `available_gib` and `expected_s`.

    Raises:
        EabfError: whatever a user can put right. Nothing is left behind.
    """
    from eabf_cli.core.evals.suites import Suites

    started = time.perf_counter()
    # It refuses unknown tasks before a model is looked for.
    asked = None if suites is None else Suites(suites)
    plan = plan_evaluation(config)
    known = plan.describe() | {"output": None if config.output is None or config.dry_run else str(config.output)}
    known["memory"] = plan.memory.to_dict()
    if config.dry_run:
        available = round(plan.available_bytes / 2**30, 3)
        return known | {"available_gib": available, "expected_s": plan.seconds}
    for note in plan.notes:
        logger.info("%s", note[0].upper() + note[1:])
    with _out_of_memory_explained(plan):
        model = load_subject(
            plan.subject,
            revision=config.revision,
            dtype=plan.dtype,
            device=str(plan.device),
            trust_remote_code=config.trust_remote_code,
        )
        result = known
        if has_own_tasks:
            measured = measure(plan, model)
            # A scaling that the checkpoint carries is told by it, too, and better.
            result = measured.result | known | {"notes": [*plan.notes, *measured.result["notes"]]}
            result["tokens_per_s"] = measured.result["num_tokens"] / measured.result["wall_s"]
        if asked is not None:
            told = asked.run(model, plan.tokenizer)
            result |= told | {"notes": [*result["notes"], *told["notes"]]}
    result |= {
        "weights": plan.subject.source.fingerprint(),
        "wall_s": time.perf_counter() - started,
        "peak_memory_gib": peak_memory_gib(plan.device),
    }
    if config.output is not None:
        _write(config, config.output, result)
    return result


def measure(plan: EvaluationPlan, model: Any, **options: Any) -> Measured:
    """`evaluate_scores` under a plan, with a bar on stderr where that is wanted."""
    with tqdm(total=None, unit="tok", unit_scale=True, disable=not plan.config.show_progress) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return evaluate_scores(model, plan.tokenizer, plan.evaluation, progress=show, **options)


def plan_evaluation(config: EvalRunConfig) -> EvaluationPlan:
    """Find the model, choose lengths and documents, and estimate the memory.

    Raises:
        EabfError: whatever a user can put right.
    """
    if config.output is not None and not config.dry_run:
        check_target(config.output, overwrite=config.overwrite)
    texts = read_texts(config)
    subject = find_subject(
        config.model, revision=config.revision, request=config.request, with_weights=not config.dry_run
    )
    if config.output is not None and not config.dry_run:
        source = subject.source.base or subject.source
        check_target(config.output, overwrite=config.overwrite, sources=(source.folder, *texts.files))
    tokenizer = load_tokenizer(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)
    device = choose_device(config.device)
    dtype = measuring_dtype(subject, config.dtype, device)
    available = available_memory(device)
    resolution = subject.resolution
    shape = architectures.meta_model(subject.loaded.config if resolution is None else resolution.base_config)
    running = subject.loaded.config if resolution is None else scaled_config(resolution.base_config, resolution.scaling)
    follows_length = architectures.follows_length(running)

    def estimate(length: int) -> EvalMemory:
        return estimate_memory(
            shape,
            length=length,
            follows_length=follows_length,
            batch_tokens=config.evaluation.batch_tokens,
            dtype=getattr(torch, dtype),
            device_type=device.type,
        )

    def takes_s(lengths: Any) -> float:
        if device.type != "cpu":
            return 0.0
        return estimate_seconds(shape, lengths, config.evaluation, num_threads=torch.get_num_threads())

    notes = list(texts.notes)
    lengths = config.evaluation.lengths
    if lengths is None:
        lengths, note = choose_lengths(
            subject.window, fits=lambda length: fits_memory(estimate(length), available), takes_s=takes_s
        )
        notes.append(note)
    else:
        refuse_too_long(lengths, estimate, available, device=str(device))
    evaluation = config.evaluation.replace(lengths=lengths)
    documents, more_notes = _choose_documents(evaluation, tokenizer, texts)
    return EvaluationPlan(
        config=config,
        subject=subject,
        tokenizer=tokenizer,
        evaluation=evaluation.replace(documents=documents),
        texts=texts,
        dtype=dtype,
        device=device,
        memory=estimate(max(lengths)),
        available_bytes=available,
        seconds=takes_s(lengths) or None,
        notes=(*notes, *more_notes),
    )


def measuring_dtype(subject: Subject, dtype: str, device: torch.device) -> str:
    """The name of the dtype to measure in: as stored, but float32 on a CPU that would only emulate another."""
    if torch_dtype(dtype) != "auto":
        return dtype
    stored = str(stored_dtype(subject.source)).removeprefix("torch.")
    return "float32" if device.type == "cpu" and not has_fast_bfloat16(device) else stored


def _choose_documents(evaluation: EvalConfig, tokenizer: Any, texts: TextSet) -> tuple[tuple[str, ...], list[str]]:
    """The longest documents, as many as are wanted, and what to say about those that are short.

    Raises:
        DataError: no document has the tokens of the shortest length.
    """
    assert evaluation.lengths is not None
    shortest, longest = min(evaluation.lengths), max(evaluation.lengths)
    counts = [min(longest, len(encode_text(tokenizer, text, max_tokens=longest).input_ids)) for text in texts.texts]
    order = sorted(range(len(counts)), key=lambda index: -counts[index])
    if not set(evaluation.tasks) & set(_ON_TEXT):
        return tuple(texts.texts[index] for index in order[: evaluation.num_documents]), []
    fitting = [index for index in order if counts[index] >= shortest]
    if not fitting:
        best = order[0]
        raise DataError(
            f"no document has {shortest:,} tokens, the shortest length: the longest, {texts.names[best]}, has "
            f"{counts[best]:,}\nGive longer documents with --text or --dataset, or shorter --lengths"
        )
    notes = []
    num_short = len(counts) - len(fitting)
    if num_short:
        notes.append(f"left out for having fewer than {shortest:,} tokens: {_count_documents(num_short)}")
    chosen = fitting[: evaluation.num_documents]
    num_cut_off = sum(counts[index] < longest for index in chosen)
    if num_cut_off:
        notes.append(
            f"{num_cut_off:,} of {_count_documents(len(chosen))} have fewer than {longest:,} tokens: "
            "they are measured at the lengths that they have"
        )
    return tuple(texts.texts[index] for index in chosen), notes


def _count_documents(count: int) -> str:
    return f"{count:,} document{'' if count == 1 else 's'}"


@contextmanager
def _out_of_memory_explained(plan: EvaluationPlan) -> Iterator[None]:
    """Turn a refused allocation into an error with a way out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise InsufficientMemoryError(
            f"out of memory on {plan.device} at {max(plan.evaluation.lengths or (0,)):,} tokens: the process held "
            f"{peak_memory_gib(plan.device):.1f} GiB of {available_memory(plan.device) / 2**30:.1f} GiB\n"
            "Give shorter --lengths, --dtype bfloat16, or another --device"
        ) from error


def _write(config: EvalRunConfig, output: Path, result: dict[str, Any]) -> None:
    # The pictures take matplotlib, which the measurement does without.
    from eabf_cli.core.evals.report import write_report

    with whole_folder(output, overwrite=config.overwrite) as folder:
        write_json(folder / RESULT_FILE, result)
        write_text(folder / TABLE_FILE, format_evaluation(result) + "\n")
        write_report(result, folder)
        arguments = _jsonable(asdict(config) | {"output": str(output)})
        # The texts themselves would make the record as long as they are.
        arguments["evaluation"].pop("documents")
        write_run_record(folder, run_record("eval", arguments, result))


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _jsonable(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value
