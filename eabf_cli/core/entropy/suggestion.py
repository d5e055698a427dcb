"""`--suggest`: from a measurement to settings that were tried, in a file that other commands take."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from eabf_cli.core.data.parsing import RecordReader
from eabf_cli.core.data.tokenization import encode_text
from eabf_cli.core.entropy.search import MAX_DOCUMENTS, Candidate, SearchResult, check_searchable, search_settings
from eabf_cli.core.entropy.settings import SUGGESTION_FILE
from eabf_cli.core.scaling_config import RopeScalingConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """What a search will run on, known before weights are loaded.

    Attributes:
        scaling: the extension that is wanted, with the default numbers for this model.
        rebase: the model's own scaling is taken off first.
        documents: token ids without a begin-of-sequence token, each of the target length.
    """

    scaling: RopeScalingConfig
    rebase: bool
    tokenizer: Any
    documents: tuple[list[int], ...]
    seed: int


def plan_search(
    readers: Iterable[RecordReader], tokenizer: Any, scaling: RopeScalingConfig, *, rebase: bool, seed: int
) -> SearchPlan:
    """Cut documents into stretches of the target length: the first of each document, then the second of each, ...

    Args:
        scaling: resolved for the model.

    Raises:
        DataError: too few stretches for a search.
        InvalidConfigError: a method whose base is not free.
    """
    num_bos = int(tokenizer.bos_token_id is not None)
    body = scaling.max_position_embeddings - num_bos
    stretches = [list(_stretches(reader().text or "", tokenizer, body, num_bos)) for reader in readers]
    documents = [ids for group in zip_longest(*stretches) for ids in group if ids is not None][:MAX_DOCUMENTS]
    check_searchable(scaling, len(documents))
    return SearchPlan(scaling=scaling, rebase=rebase, tokenizer=tokenizer, documents=tuple(documents), seed=seed)


def _stretches(text: str, tokenizer: Any, body: int, num_bos: int) -> Iterable[list[int]]:
    ids = encode_text(tokenizer, text, max_tokens=MAX_DOCUMENTS * body + num_bos).input_ids[num_bos:]
    return (list(ids[start : start + body]) for start in range(0, len(ids) - body + 1, body))


def tried_suggestion(model: PreTrainedModel, plan: SearchPlan, derived: dict[str, Any]) -> dict[str, Any]:
    """The suggestion that a search makes of one that was derived from the slopes.

    Args:
        model: without a method.
        derived: `criterion.suggest`'s.

    Returns:
        `derived` with the chosen `unscaled_layers` and `rope_theta` and a `reason`, and beside them `method`, `factor`
        and `search`: `default`, `found`, `is_confirmed`, `tried` (each with its `loss`), `gain` and `gain_stderr` on
        text that the search did not see (None where it found nothing better), `parts` of the gain, `length`,
        `num_documents` and `num_confirming_documents`.
    """
    layers = derived["unscaled_layers"]
    result = search_settings(
        model,
        plan.tokenizer,
        plan.documents,
        plan.scaling,
        layer_sets=[] if layers is None else [tuple(layers)],
        rebase=plan.rebase,
        seed=plan.seed,
        progress=logger.info,
    )
    confirmed = result.confirmed
    return derived | {
        **result.chosen.describe(),
        "reason": f"{_reason(result)} By the slopes alone: {derived['reason']}.",
        "method": plan.scaling.method,
        "factor": plan.scaling.factor,
        "search": {
            "default": result.default.describe(),
            "found": result.found.describe(),
            "is_confirmed": result.chosen != result.default,
            "tried": [candidate.describe() | {"loss": loss} for candidate, loss in result.tried],
            "gain": None if confirmed is None else confirmed.gain,
            "gain_stderr": None if confirmed is None else confirmed.stderr,
            "parts": None
            if confirmed is None
            else {name: {"gain": gain, "stderr": stderr} for name, (gain, stderr) in confirmed.parts.items()},
            "length": result.length,
            "num_documents": result.num_documents[0],
            "num_confirming_documents": result.num_documents[1],
        },
    }


def _reason(result: SearchResult) -> str:
    num_tried, confirmed = len(result.tried) - 1, result.confirmed
    if confirmed is None:
        return (
            f"None of {num_tried} other settings is surely better than the default at {result.length:,} tokens, "
            "without training."
        )
    gain = f"{confirmed.gain:+.3f} ± {confirmed.stderr:.3f} nats"
    parts = ", ".join(f"{name} {gain:+.3f}" for name, (gain, _) in confirmed.parts.items())
    seen = f"on {result.num_documents[1]} documents and prompts that the search did not see"
    if result.chosen == result.default:
        return (
            f"The default stays: the best of {num_tried} other settings ({_settings(result.found)}) gains {gain} "
            f"{seen}, which is not surely more than nothing."
        )
    return (
        f"The best of {num_tried} other settings gains {gain} over the default ({_settings(result.default)}) at "
        f"{result.length:,} tokens, without training, {seen} ({parts})."
    )


def _settings(candidate: Candidate) -> str:
    layers = ",".join(map(str, candidate.unscaled_layers)) or "none"
    return f"rope_theta {candidate.rope_theta:,.0f}, unscaled layers {layers}"


def write_suggestion(result: dict[str, Any], folder: Path) -> Path:
    """Write what `eabf patch`, `finetune` and `eval` take with `--config`.

    Args:
        result: of a measurement whose suggestion was tried.
    """
    suggestion = result["suggestion"]
    values = {name: suggestion[name] for name in ("method", "factor", "rope_theta", "unscaled_layers")}
    if RopeScalingConfig(method=suggestion["method"]).entry.logit_scale is None:
        del values["unscaled_layers"]
    # JSON's numbers, strings and lists of numbers are TOML as well.
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    path = folder / SUGGESTION_FILE
    path.write_text("\n".join(["# From eabf entropy --suggest, for the model in entropy.json.", *lines, ""]))
    return path
