"""`run_evaluation`: a whole evaluation, from a config to the result on disk."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from eabf_cli.core import architectures
from eabf_cli.core.checkpoint import load_tokenizer, stored_dtype
from eabf_cli.core.data.tokenization import encode_text
from eabf_cli.core.device_memory import available_memory, explain_long_row, out_of_memory_explained
from eabf_cli.core.devices import choose_device, has_fast_bfloat16, peak_memory_gib, torch_dtype
from eabf_cli.core.errors import DataError
from eabf_cli.core.evals.language_modeling import longest_filled
from eabf_cli.core.evals.lengths import (
    EvalMemory,
    choose_lengths,
    estimate_memory,
    estimate_seconds,
    fits_memory,
    refuse_too_long,
    ways_to_fit,
)
from eabf_cli.core.evals.settings import EvalConfig, EvalRunConfig
from eabf_cli.core.evals.suite_results import format_suites
from eabf_cli.core.evals.table import format_evaluation
from eabf_cli.core.evals.texts import TextSet, read_texts
from eabf_cli.core.evaluation import Measured, evaluate_scores
from eabf_cli.core.files import check_target, whole_folder, write_json, write_text
from eabf_cli.core.resolution import scaled_config
from eabf_cli.core.run_record import run_record, write_run_record
from eabf_cli.core.subject import Subject, find_subject, load_subject

if TYPE_CHECKING:
    from eabf_cli.core.evals.suites import SuiteConfig

logger = logging.getLogger(__name__)

TABLE_FILE = "table.txt"
_ON_TEXT = ("perplexity", "context_gain", "perplexity_by_position")
"""The tasks that need documents of a length; the others repeat a text where it is too short."""


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """Everything that is known before weights are loaded.

    Attributes:
        evaluation: with lengths and documents filled in.
        texts: what the documents were chosen from; none where no task of ours is measured.
        memory: of the longest length.
        seconds: roughly how long it takes; None where that is not known (not a CPU, or tasks of lm-eval alone).
        has_own_tasks: off where only tasks of lm-eval are run.
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
    has_own_tasks: bool

    def describe(self) -> dict[str, Any]:
        """The part of a result that is known already."""
        return self.subject.describe() | {
            "dataset": self.texts.source or None,
            "data_hash": self.texts.content_hash if self.texts.texts else None,
            "lengths": list(self.evaluation.lengths or ()),
            "tasks": list(self.evaluation.tasks) if self.has_own_tasks else [],
            "depths": list(self.evaluation.depths) if self.has_own_tasks else [],
            "seed": self.evaluation.seed if self.has_own_tasks else None,
            "dtype": self.dtype,
            "device": str(self.device),
            "notes": list(self.notes),
        }

    def needs(self) -> dict[str, Any]:
        """Memory and time, as a dry run tells them: `memory`, `available_gib`, `expected_s`."""
        return {
            "memory": self.memory.to_dict(),
            "available_gib": round(self.available_bytes / 2**30, 3),
            "expected_s": self.seconds,
        }


def run_evaluation(
    config: EvalRunConfig, *, suites: SuiteConfig | None = None, has_own_tasks: bool = True
) -> dict[str, Any]:
    """Measure what a model does with its window, as `eabf eval` does.

    Args:
        suites: tasks of lm-eval to run, too.
        has_own_tasks: off, only those are run.

    Returns:
        the JSON document of docs/api.md (see `evaluate`). Beside its keys: `model`, `revision`, `weights`,
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
    plan = plan_evaluation(config, has_own_tasks=has_own_tasks)
    if asked is not None:
        asked.check(plan.tokenizer)
    known = plan.describe() | {"output": None if config.output is None or config.dry_run else str(config.output)}
    known["memory"] = plan.memory.to_dict()
    known["tasks"] += [] if suites is None else suites.tasks
    if config.dry_run:
        return known | plan.needs()
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


def result_table(result: dict[str, Any]) -> str:
    """A result as plain text: our tasks, then those of lm-eval."""
    parts = [format_evaluation(result)]
    if "suites" in result:
        parts.append(format_suites(result["suites"]))
    return "\n\n".join(part for part in parts if part)


def measure(plan: EvaluationPlan, model: Any, **options: Any) -> Measured:
    """`evaluate_scores` under a plan, with a bar on stderr where that is wanted."""
    with tqdm(total=None, unit="tok", unit_scale=True, disable=not plan.config.show_progress) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return evaluate_scores(model, plan.tokenizer, plan.evaluation, progress=show, **options)


def plan_evaluation(config: EvalRunConfig, *, has_own_tasks: bool = True) -> EvaluationPlan:
    """Find the model, choose lengths and documents, and estimate the memory.

    Raises:
        EabfError: whatever a user can put right.
    """
    if config.output is not None:
        check_target(config.output, overwrite=config.overwrite)
    reads_texts = has_own_tasks and set(config.evaluation.tasks) != {"passkey"}
    texts = read_texts(config) if reads_texts else TextSet(source="", texts=(), names=())
    subject = find_subject(
        config.model, revision=config.revision, request=config.request, with_weights=not config.dry_run
    )
    if config.output is not None:
        source = subject.source.base or subject.source
        check_target(config.output, overwrite=config.overwrite, sources=(source.folder, *texts.files))
    tokenizer = load_tokenizer(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)
    device = choose_device(config.device)
    dtype = measuring_dtype(subject, config.dtype, device)
    needs = _Needs(config, subject, dtype=getattr(torch, dtype), device=device)
    notes = list(texts.notes)
    lengths = config.evaluation.lengths
    if lengths is not None:
        refuse_too_long(lengths, needs.memory, needs.available_bytes, device=str(device), dtype=needs.dtype)
    elif not has_own_tasks:
        # lm-eval cuts to it; most of its inputs are far shorter.
        lengths = (subject.target_window,)
    else:
        lengths, note = choose_lengths(
            subject.window,
            fits=lambda length: fits_memory(needs.memory(length), needs.available_bytes),
            takes_s=needs.seconds,
            dtype=needs.dtype,
        )
        notes.append(note)
    evaluation = config.evaluation.replace(lengths=lengths)
    if reads_texts:
        is_bundled = not config.text and not config.dataset and config.evaluation.documents is None
        evaluation, more_notes = _with_documents(evaluation, tokenizer, texts, is_bundled=is_bundled)
        notes += more_notes
    return EvaluationPlan(
        config=config,
        subject=subject,
        tokenizer=tokenizer,
        evaluation=evaluation,
        texts=texts,
        dtype=dtype,
        device=device,
        memory=needs.memory(max(lengths)),
        available_bytes=needs.available_bytes,
        seconds=needs.seconds(lengths) or None if has_own_tasks else None,
        notes=tuple(notes),
        has_own_tasks=has_own_tasks,
    )


class _Needs:
    """What a length takes of a device, for one model."""

    def __init__(self, config: EvalRunConfig, subject: Subject, *, dtype: torch.dtype, device: torch.device) -> None:
        resolution = subject.resolution
        base = subject.loaded.config if resolution is None else resolution.base_config
        running = base if resolution is None else scaled_config(base, resolution.scaling)
        self.evaluation = config.evaluation
        self.shape = architectures.meta_model(base)
        self.follows_length = architectures.follows_length(running)
        self.dtype = dtype
        self.device = device
        self.available_bytes = available_memory(device)

    def memory(self, length: int) -> EvalMemory:
        """The peak memory at a length."""
        return estimate_memory(
            self.shape,
            length=length,
            follows_length=self.follows_length,
            batch_tokens=self.evaluation.batch_tokens,
            dtype=self.dtype,
            device_type=self.device.type,
        )

    def seconds(self, lengths: Sequence[int]) -> float:
        """Roughly how long some lengths take; 0 on what is not a CPU."""
        if self.device.type != "cpu":
            return 0.0
        return estimate_seconds(self.shape, lengths, self.evaluation, num_threads=torch.get_num_threads())


def measuring_dtype(subject: Subject, dtype: str, device: torch.device) -> str:
    """The name of the dtype to measure in: as stored, but float32 on a CPU that would only emulate another."""
    if torch_dtype(dtype) != "auto":
        return dtype
    stored = str(stored_dtype(subject.source)).removeprefix("torch.")
    return "float32" if device.type == "cpu" and not has_fast_bfloat16(device) else stored


def _with_documents(
    evaluation: EvalConfig, tokenizer: Any, texts: TextSet, *, is_bundled: bool
) -> tuple[EvalConfig, list[str]]:
    """The evaluation with the longest documents, as many as are wanted, and what to say about those that are short.

    Without documents of the shortest length the tasks that need them are left out if nobody named any.

    Raises:
        DataError: no document that was named has the tokens of the shortest length.
    """
    assert evaluation.lengths is not None
    shortest, longest = min(evaluation.lengths), max(evaluation.lengths)
    counts = [min(longest, len(encode_text(tokenizer, text, max_tokens=longest).input_ids)) for text in texts.texts]
    order = sorted(range(len(counts)), key=lambda index: -counts[index])
    others = tuple(task for task in evaluation.tasks if task not in _ON_TEXT)
    fitting = [index for index in order if counts[index] >= shortest]
    notes = []
    if len(others) == len(evaluation.tasks):
        fitting = order
    elif not fitting and is_bundled and others:
        left_out = ", ".join(task for task in evaluation.tasks if task in _ON_TEXT)
        notes.append(
            f"{left_out} left out: the bundled documents have {counts[order[0]]:,} tokens at most, and the shortest "
            f"length is {shortest:,}; give longer ones with --text or --dataset"
        )
        evaluation, fitting = evaluation.replace(tasks=others), order
    elif not fitting:
        longest_name = texts.names[order[0]]
        raise DataError(
            f"no document has {shortest:,} tokens, the shortest length: the longest, {longest_name}, has "
            f"{counts[order[0]]:,}\nGive longer documents with --text or --dataset, or shorter --lengths"
        )
    else:
        num_left_out = sum(count < shortest for count in counts)
        if num_left_out:
            notes.append(f"left out for having fewer than {shortest:,} tokens: {_count_documents(num_left_out)}")
        notes += _on_short_documents([counts[index] for index in fitting[: evaluation.num_documents]], evaluation)
    documents = tuple(texts.texts[index] for index in fitting[: evaluation.num_documents])
    return evaluation.replace(documents=documents), notes


def _on_short_documents(counts: Sequence[int], evaluation: EvalConfig) -> Iterator[str]:
    """What becomes of documents that are shorter than the longest length.

    Args:
        counts: tokens of each document that is measured on, BOS counted.
    """
    lengths = evaluation.lengths or ()
    longest, filled = max(lengths), longest_filled(counts, lengths)
    num_short = sum(count < longest for count in counts)
    if num_short and {"perplexity", "perplexity_by_position"} & set(evaluation.tasks):
        yield (
            f"{num_short:,} of {_count_documents(len(counts))} have fewer than {longest:,} tokens: "
            "they are measured at the lengths that they have"
        )
    if "context_gain" not in evaluation.tasks or filled is None:
        return
    if filled < longest:
        yield f"the loss by context ends at {filled:,} tokens: no document has {longest:,}"
    num_filling = sum(count >= filled for count in counts)
    if num_filling < len(counts):
        yield (
            f"the loss by context is from {num_filling:,} of {_count_documents(len(counts))}, those with "
            f"{filled:,} tokens, since it reads the same tokens at every context: shorter --lengths take more of them"
        )


def _count_documents(count: int) -> str:
    return f"{count:,} document{'' if count == 1 else 's'}"


def _out_of_memory_explained(plan: EvaluationPlan) -> AbstractContextManager[None]:
    ways_out = ways_to_fit(getattr(torch, plan.dtype))
    return out_of_memory_explained(
        lambda: explain_long_row(plan.device, max(plan.evaluation.lengths or (0,)), ways_out[0].upper() + ways_out[1:])
    )


def _write(config: EvalRunConfig, output: Path, result: dict[str, Any]) -> None:
    # The pictures take matplotlib, which the measurement does without.
    from eabf_cli.core.evals.report import RESULT_FILE, write_report

    with whole_folder(output, overwrite=config.overwrite) as folder:
        write_json(folder / RESULT_FILE, result)
        write_text(folder / TABLE_FILE, result_table(result) + "\n")
        write_report(result, folder)
        arguments = json.loads(json.dumps(asdict(config) | {"output": str(output)}, default=str))
        # The texts themselves would be the larger part of the record.
        arguments["evaluation"]["documents"] = None
        write_run_record(folder, run_record("eval", arguments, result))
