"""`compute_attention_entropy`: the whole measurement, from a config to the result on disk."""

from __future__ import annotations

import logging
import shutil
import time
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from eabf_cli.core.device_memory import explain_long_row, out_of_memory_explained
from eabf_cli.core.devices import peak_memory_gib
from eabf_cli.core.entropy.measurement import measure_document
from eabf_cli.core.entropy.plan import EntropyPlan, plan_entropy
from eabf_cli.core.entropy.result import ARRAYS_FILE, RESULT_FILE, make_result, read_result, split_arrays
from eabf_cli.core.entropy.settings import EntropyConfig
from eabf_cli.core.entropy.store import ROWS_FILE, DocumentStore, open_store, partial_folder
from eabf_cli.core.entropy.suggestion import tried_suggestion, write_suggestion
from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.files import check_target, use_default_mode, whole_folder, write_json
from eabf_cli.core.patching import describe_patch, remove_method
from eabf_cli.core.run_record import read_run_record, run_record, write_run_record
from eabf_cli.core.subject import Subject, load_subject

logger = logging.getLogger(__name__)

__all__ = ["EntropyConfig", "compute_attention_entropy"]


def compute_attention_entropy(config: EntropyConfig) -> dict[str, Any]:
    """Measure a model's attention entropy on documents, as `eabf entropy` does.

    Entropies are Shannon entropies, in nats, of the softmax attention distribution of the query at a position over
    the keys that it sees, for every layer and head; averaged over documents after taking the entropy of each.
    Computed in float32 beside the model's own forward pass, which is unchanged.

    Returns:
        the result, ready for JSON (docs/api.md). Beside its keys: `model`, `revision`, `weights`, `method`, `factor`,
        `original_max_position_embeddings` (the pre-trained window c), `max_position_embeddings`, `dataset`,
        `num_skipped_documents`, `visible_keys[layer][position]`, `layers` (`criterion.LayerSlope`),
        `head_slope[layer][head]` (nats per unit of ln n, None where the positions do not tell), `slope_range`, `drift`
        (`from`, `to`, `nats`: the change of the mean entropy from the pre-trained window's end to the last position),
        `wall_s`, `tokens_per_s`, `peak_memory_gib`, `output`, `notes`;
        with scores `scores` (`sink[layer][head]`, `recent[layer][head]`, `by_distance[layer][head][bucket]`: attention
        mass, averaged over documents and the positions at which sink and recent tokens are apart; `distance_edges`:
        bucket b holds the distances from edge b up to edge b + 1, the query's own token being at 0);
        with compare `compare` (what the second model is, its `entropy`, `stderr` and
        `head_slope`, `difference[layer][head][position]` = second minus first, and its `difference_stderr`, paired by
        document).
        A dry run has no measured key, but `memory`.

    Raises:
        EabfError: whatever a user can put right. Nothing is left behind, unless documents were measured already:
            those stay beside `output` for `resume`.
    """
    started = time.perf_counter()
    finished = _finished(config)
    if finished is not None:
        return finished
    plan = plan_entropy(config)
    known = plan.describe() | {"output": None if config.output is None or config.dry_run else str(config.output)}
    if config.dry_run:
        memory = plan.memory.to_dict() | {"available_gib": round(plan.available_bytes / 2**30, 3)}
        return known | {"device": str(plan.device), "memory": memory}
    for note in plan.documents.notes:
        logger.info("%s", note[0].upper() + note[1:])
    with open_store(config.output, plan.settings(), resume=config.resume) as store:
        num_tokens, measuring_s = _measure_all(plan, store)
        result = make_result(plan, store, known)
        if plan.search is not None:
            with _out_of_memory_explained(plan):
                result["suggestion"] = tried_suggestion(_load_plain(plan), plan.search, result["suggestion"])
        result |= {
            "weights": plan.subject.source.fingerprint(),
            "device": str(plan.device),
            "wall_s": time.perf_counter() - started,
            "tokens_per_s": num_tokens / measuring_s if num_tokens else None,
            "peak_memory_gib": peak_memory_gib(plan.device),
        }
        if config.output is not None:
            _write(config, config.output, result, store)
    return result


# ---- Measuring ---------------------------------------------------------------------------------------


def _measure_all(plan: EntropyPlan, store: DocumentStore) -> tuple[int, float]:
    """Measure what is missing; one model is in memory at a time.

    Returns:
        how many tokens were measured, and in how many seconds.
    """
    num_tokens, seconds = 0, 0.0
    total = len(plan.subjects) * len(plan.documents)
    with tqdm(total=total, unit="document", disable=not plan.config.show_progress) as bar:
        for side, subject in plan.subjects.items():
            missing = [index for index in range(len(plan.documents)) if not store.has(side, index)]
            bar.update(len(plan.documents) - len(missing))
            if not missing:
                continue
            with _out_of_memory_explained(plan):
                model = _load(plan, subject)
                started = time.perf_counter()
                for index in missing:
                    _measure(plan, store, side, index, model)
                    bar.update()
                seconds += time.perf_counter() - started
            num_tokens += len(missing) * plan.documents.length
            del model
    return num_tokens, seconds


def _measure(plan: EntropyPlan, store: DocumentStore, side: str, index: int, model: PreTrainedModel) -> None:
    document = plan.documents.documents[index]
    recorder = measure_document(
        model,
        torch.tensor(document.input_ids)[None],
        plan.positions,
        scores=plan.config.scores and side == "model",
        rows=plan.config.rows and side == "model" and index == 0,
        name=document.origin,
    )
    store.put(side, index, recorder)


def _load_plain(plan: EntropyPlan) -> PreTrainedModel:
    """The model that is asked about, without a method."""
    model = _load(plan, plan.subject)
    if describe_patch(model) is not None:
        remove_method(model)
    return model


def _load(plan: EntropyPlan, subject: Subject) -> PreTrainedModel:
    config = plan.config
    return load_subject(
        subject,
        revision=config.revision if subject is plan.subject else None,
        dtype=config.dtype,
        device=str(plan.device),
        trust_remote_code=config.trust_remote_code,
    )


def _out_of_memory_explained(plan: EntropyPlan) -> AbstractContextManager[None]:
    ways_out = "Give a shorter --length, --dtype bfloat16, or another --device"
    return out_of_memory_explained(lambda: explain_long_row(plan.device, plan.documents.length, ways_out))


# ---- The folder --------------------------------------------------------------------------------------


def _finished(config: EntropyConfig) -> dict[str, Any] | None:
    """The result of a measurement that `resume` finds finished."""
    if not config.resume or config.output is None or not config.output.is_dir():
        return None
    record = read_run_record(config.output)
    if record is None or record.get("command") != "entropy":
        check_target(config.output, overwrite=False)
        return None
    result = read_result(config.output)
    if config.suggest is not None and "search" not in result["suggestion"]:
        raise InvalidConfigError(
            f"measurement {config.output} is finished, without a search for settings: "
            "measure again with --suggest and --overwrite, or with another -o"
        )
    logger.warning("measurement %s is finished already: nothing to resume", config.output)
    # What a process leaves that is killed between the last two steps.
    shutil.rmtree(partial_folder(config.output), ignore_errors=True)
    return result


def _write(config: EntropyConfig, output: Path, result: dict[str, Any], store: DocumentStore) -> None:
    from safetensors.torch import save_file

    # The pictures take matplotlib, which the measurement does without.
    from eabf_cli.core.entropy.page import write_page
    from eabf_cli.core.entropy.plots import write_plots

    document, arrays = split_arrays(result)
    with whole_folder(output, overwrite=config.overwrite) as folder:
        write_json(folder / RESULT_FILE, document)
        if arrays:
            save_file(arrays, folder / ARRAYS_FILE)
            use_default_mode(folder)
        if config.rows:
            shutil.copyfile(store.folder / ROWS_FILE, folder / ROWS_FILE)
        write_plots(result, folder)
        write_page(result, folder)
        if config.suggest is not None:
            write_suggestion(result, folder)
        summary = {name: value for name, value in document.items() if not isinstance(value, dict | list)}
        summary |= {name: document[name] for name in ("positions", "layers", "suggestion")}
        arguments = _jsonable(asdict(config) | {"output": str(output)})
        write_run_record(folder, run_record("entropy", arguments, summary))


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _jsonable(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value
