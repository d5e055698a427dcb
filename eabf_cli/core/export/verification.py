"""A written checkpoint is reloaded in a clean process and held to the model that it was made from."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from eabf_cli.core.checkpoint import has_tokenizer, read_config, stored_dtype
from eabf_cli.core.checkpoint_format import CODE_FIELDS, MODELING_FILE
from eabf_cli.core.errors import CheckpointError, VerificationError
from eabf_cli.core.export import clean_reload, comparison
from eabf_cli.core.export.comparison import Observation
from eabf_cli.core.export.reference import Reference, expected_scaling, measure_reference
from eabf_cli.core.export.writing import describe_file
from eabf_cli.core.files import read_json, write_json
from eabf_cli.core.run_record import RUN_FILE, read_run_record
from eabf_cli.core.saving import modeling_source
from eabf_cli.core.scaling_config import RopeScalingConfig
from eabf_cli.core.sources import ModelSource, find_model

logger = logging.getLogger(__name__)

# Of the environment, the clean process gets all but what steers Python, the Hub and a launcher of several processes.
_LEFT_OUT = ("HF_", "HUGGING", "TRANSFORMERS_", "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_")


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What a verification found; it exists only where every check passed.

    Attributes:
        max_logit_difference: the largest difference of a logit, over all compared positions.
        max_logit: the largest logit of the reference, by absolute value.
        tolerance: the largest difference that passes; a small part of `max_logit`.
        compute_dtype: the dtype in which both sides computed.
        lengths: rows of tokens, each from position 0.
        spread_to: the last position of the row whose positions are spread over the whole window.
        logit_scale: t as measured in the reloaded model, by 1-based position (three of them).
        checks: what was compared, each with what was found, in words.
        notes: what could not be checked, and why.
    """

    max_logit_difference: float
    max_logit: float
    tolerance: float
    compute_dtype: str
    lengths: tuple[int, ...]
    spread_to: int
    logit_scale: dict[int, float]
    checks: dict[str, str]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        result = asdict(self)
        result["logit_scale"] = {str(position): t for position, t in self.logit_scale.items()}
        return result | {"lengths": list(self.lengths), "notes": list(self.notes)}


def verify_export(
    folder: Path,
    source: ModelSource,
    *,
    scaling: RopeScalingConfig | None = None,
    tokenizer: ModelSource | None = None,
    trust_remote_code: bool = False,
    device: str = "auto",
    seed: int = 42,
) -> Verification:
    """Reload a written checkpoint without this package and compare it with its source.

    Args:
        folder: the written checkpoint.
        source: the model that it was made from, as `find_model` gives it.
        scaling: the method that the checkpoint carries where it is not the source's own (`--compat`).
        tokenizer: the model that the tokenizer was taken from; None: the source.
        trust_remote_code: let a tokenizer's own code run; the modelling file is this package's or is not run.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        seed: of the tokens.

    Raises:
        VerificationError: the two differ, or the checkpoint does not load in a clean process.
    """
    try:
        needs_code = _check_modeling_code(folder)
        if not trust_remote_code:
            _check_tokenizer_code(folder)
        return _verify(
            folder,
            source,
            scaling,
            tokenizer=tokenizer or source,
            runs_code=needs_code or trust_remote_code,
            trust_remote_code=trust_remote_code,
            device=device,
            seed=seed,
        )
    except VerificationError as error:
        raise VerificationError(f"the checkpoint in {folder} failed its verification: {error}") from error


def verify_existing(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device: str = "auto",
    seed: int = 42,
) -> dict[str, Any]:
    """Verify a folder or a Hub model that exists (`eabf export --verify`); nothing is written.

    The reference is this package's own load of the same files.

    Args:
        trust_remote_code: run a modelling file that differs from this package's, and a tokenizer's own code.

    Returns:
        `model`, `revision`, `verified` (the largest logit difference), `verification` (the details).

    Raises:
        CheckpointError: there is no such checkpoint, or it is an adapter or a GGUF file.
        VerificationError: the two differ, files are not those that were recorded, or a foreign modelling file
            would have to be run.
    """
    source = find_model(name, revision=revision)
    if source.base is not None or source.gguf_file is not None:
        kind = "an adapter" if source.base is not None else "a GGUF file"
        raise CheckpointError(f"{name} is {kind}, and only exported checkpoints can be verified: export it first")
    try:
        recorded = _check_recorded_files(source.folder)
        needs_code = trust_remote_code or _check_modeling_code(source.folder)
        if not trust_remote_code:
            _check_tokenizer_code(source.folder)
        found = _verify(
            source.folder,
            source,
            None,
            tokenizer=source,
            runs_code=needs_code,
            trust_remote_code=trust_remote_code,
            device=device,
            seed=seed,
        )
    except VerificationError as error:
        raise VerificationError(f"{name} failed its verification: {error}") from error
    details = found.to_dict()
    details["checks"] = {"files": recorded} | details["checks"]
    return {
        "model": name,
        "revision": source.revision,
        "verified": found.max_logit_difference,
        "verification": details,
    }


def _check_modeling_code(folder: Path) -> bool:
    """Whether a checkpoint is loaded through a modelling file, which is this package's.

    Raises:
        VerificationError: the file is another one, there is none, or `auto_map` names other code.
    """
    raw = read_json(folder / "config.json")
    auto_map = raw.get("auto_map")
    fetched = [name for name in CODE_FIELDS if name != "auto_map" and raw.get(name) is not None]
    if fetched:
        raise VerificationError(
            f"its config.json has {fetched[0]} ({raw[fetched[0]]!r}), by which transformers may fetch other code: it "
            "was not loaded; export the checkpoint again"
        )
    if auto_map is None:
        return False
    path = folder / MODELING_FILE
    if not path.is_file():
        raise VerificationError(f"its config.json names code, but there is no {MODELING_FILE}")
    if path.read_bytes() != modeling_source():
        raise VerificationError(
            f"its {MODELING_FILE} differs from this version's, so it was not run: read it first, then give "
            "--trust-remote-code, or export the checkpoint again"
        )
    module = MODELING_FILE.removesuffix(".py")
    names = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    foreign = [name for name in names if not str(name).startswith(f"{module}.")]
    if foreign:
        raise VerificationError(f"its auto_map names other code than {MODELING_FILE} ({foreign[0]!r}): it was not run")
    return True


def _check_tokenizer_code(folder: Path) -> None:
    """Raises VerificationError for a tokenizer that brings code of its own."""
    path = folder / "tokenizer_config.json"
    if path.is_file() and read_json(path).get("auto_map"):
        raise VerificationError(
            "its tokenizer brings code of its own, which was not run: read it first, then give --trust-remote-code"
        )


def _check_recorded_files(folder: Path) -> str:
    """Hold a folder's files to the sizes and hashes in its run file."""
    record = read_run_record(folder) or {}
    files = record.get("files")
    if not isinstance(files, list):
        return "no record of them"
    for entry in files:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or Path(name).name != name:
            raise VerificationError(f"its {RUN_FILE} lists {entry!r}, which is no file of the folder: it was damaged")
        if not (folder / name).is_file():
            raise VerificationError(f"its file {name} is missing")
        if describe_file(folder / name)["sha256"] != entry.get("sha256"):
            raise VerificationError(f"its file {name} is not the one that was exported (its SHA-256 is another)")
    return f"{len(files)} as exported (SHA-256)"


def _verify(
    folder: Path,
    source: ModelSource,
    scaling: RopeScalingConfig | None,
    *,
    tokenizer: ModelSource,
    runs_code: bool,
    trust_remote_code: bool,
    device: str,
    seed: int,
) -> Verification:
    written = find_model(str(folder))
    written.weight_files()
    found = read_config(written).resolution
    expected = expected_scaling(source, scaling)
    checks = {"method": comparison.check_scaling(found.scaling if found is not None else None, expected)}
    reference = measure_reference(
        source,
        scaling,
        stored_dtype(written),
        tokenizer=tokenizer,
        trust_remote_code=trust_remote_code,
        device=device,
        seed=seed,
    )
    reloaded = _reload(folder, reference, runs_code=runs_code)
    assert reloaded.logit_scale is not None

    seen = reference.observation
    rule = expected.entry.logit_scale if expected is not None else None
    window = expected.original_max_position_embeddings if expected is not None else None
    checks |= {
        "max_position_embeddings": comparison.check_window(
            reloaded.max_position_embeddings, seen.max_position_embeddings
        ),
        "weights": comparison.check_weights(reloaded.weights, seen.weights),
        "frequencies": comparison.check_frequencies(reloaded.frequencies, seen.frequencies),
        "logit_scale": comparison.check_logit_scale(
            reloaded.logit_scale,
            reference.positions,
            reference.scaled_layers,
            rule=rule,
            window=window or seen.max_position_embeddings,
            dtype=reference.compute_dtype,
        ),
        "tokenizer": comparison.check_tokenizer(reloaded.tokenizer, seen.tokenizer),
    }
    largest, tolerance = comparison.logit_tolerance(seen.logits, reference.compute_dtype)
    difference, checks["logits"] = comparison.check_logits(reloaded.logits, seen.logits, tolerance=tolerance)
    scaled = reloaded.logit_scale[list(reference.scaled_layers)] if reference.scaled_layers else reloaded.logit_scale
    return Verification(
        max_logit_difference=difference,
        max_logit=largest,
        tolerance=tolerance,
        compute_dtype=str(reference.compute_dtype).removeprefix("torch."),
        lengths=reference.rows.lengths,
        spread_to=reference.rows.spread_to,
        logit_scale=dict(zip(reference.positions, [round(t, 6) for t in scaled.mean(dim=0).tolist()], strict=True)),
        checks=checks,
        notes=reference.notes,
    )


def _reload(folder: Path, reference: Reference, *, runs_code: bool) -> Observation:
    """What a process without this package makes of a checkpoint.

    Raises:
        VerificationError: it cannot load or run it.
    """
    with tempfile.TemporaryDirectory(prefix="eabf-verify-") as name:
        room = Path(name)
        save_file(reference.rows.tensors, room / "rows.safetensors")
        has_text = reference.text is not None and has_tokenizer(folder)
        if has_text:
            # Bytes: a text file's line ends are not kept.
            (room / "text.txt").write_bytes((reference.text or "").encode())
        request = {
            "folder": str(folder.resolve()),
            "trust_remote_code": runs_code,
            "device": reference.device,
            "float32": str(reference.compute_dtype) == "torch.float32",
            "rows": str(room / "rows.safetensors"),
            "positions": [position - 1 for position in reference.positions],
            "text": str(room / "text.txt") if has_text else None,
            "tensors": str(room / "tensors.safetensors"),
            "report": str(room / "report.json"),
        }
        write_json(room / "request.json", request)
        _run_clean(room)
        tensors = load_file(room / "tensors.safetensors")
        report = json.loads((room / "report.json").read_text(encoding="utf-8"))
    return Observation(
        logits={name: tensor for name, tensor in tensors.items() if name.endswith(".logits")},
        frequencies={name: tensor for name, tensor in tensors.items() if name.endswith("inv_freq")},
        weights=report["weights"],
        max_position_embeddings=report["max_position_embeddings"],
        tokenizer=report.get("tokenizer"),
        logit_scale=tensors["logit_scale"],
    )


def _run_clean(room: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_LEFT_OUT)}
    # Nothing is fetched, and the copy that transformers makes of a modelling file goes with the room.
    environment |= {"HF_HOME": str(room / "home"), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    script = clean_reload.__file__
    ended = subprocess.run(
        # -P: the script's own folder stays off the import path.
        [sys.executable, "-P", script, str(room / "request.json")],
        env=environment,
        cwd=room,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    logger.debug("clean process: %s", ended.stderr)
    if ended.returncode != 0:
        lines = [line for line in ended.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit code {ended.returncode}"
        raise VerificationError(f"a process with torch and transformers alone cannot load it: {reason[:500]}")
