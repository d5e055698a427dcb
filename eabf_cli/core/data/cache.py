"""Finished samples kept on disk, so that the same data is tokenised once.

An entry is one safetensors file, named by a hash of everything that the samples depend on. What cannot be
read, or is not what it says, counts as absent and is written again. A cache that cannot be written is none.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from importlib.metadata import version
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from eabf_cli.core.data.sample_set import Sample, SampleSet, hash_samples
from eabf_cli.core.data.tokenization import PLAIN_CHAT_TEMPLATE

CACHE_VARIABLE = "EABF_CACHE_DIR"
MAX_ENTRIES = 20
MAX_BYTES = 2 * 2**30

# To be raised when the same data gives other samples, or an entry has another form.
_FORMAT = 2
_LIBRARIES = ("transformers", "tokenizers", "datasets", "pypdfium2")
_SUFFIX = ".samples.safetensors"
_METADATA_KEY = "eabf_samples"


def cache_folder() -> Path:
    """Where samples are kept: below `EABF_CACHE_DIR`, else below the platform's folder for caches."""
    from platformdirs import user_cache_dir

    return Path(os.environ.get(CACHE_VARIABLE) or user_cache_dir("eabf")) / "samples"


def tokenizer_identity(tokenizer: Any) -> str | None:
    """A hash of what a tokenizer makes of a text; None for one that cannot be written out (without `tokenizers`)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    parts = (
        backend.to_str(),
        getattr(tokenizer, "chat_template", None) or PLAIN_CHAT_TEMPLATE,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    )
    return _hash(parts)


def sample_key(content_hash: str, settings: Mapping[str, Any], tokenizer: str) -> str:
    """The name of an entry: a hash of the data, the settings, the tokenizer, and what turns one into another."""
    return _hash([_FORMAT, {name: version(name) for name in _LIBRARIES}, content_hash, dict(settings), tokenizer])


def read_samples(key: str) -> SampleSet | None:
    """The samples kept under a key, or None."""
    from safetensors import SafetensorError, safe_open

    path = cache_folder() / f"{key}{_SUFFIX}"
    try:
        with safe_open(path, framework="numpy") as file:
            counts = json.loads(file.metadata()[_METADATA_KEY])
            input_ids, labels, lengths = (file.get_tensor(name) for name in ("input_ids", "labels", "lengths"))
        origins = counts.pop("origins")
        ends = [0, *accumulate(lengths.tolist())]
        rows = tuple(
            Sample(input_ids[start:end].tolist(), labels[start:end].tolist(), origin=origin)
            for (start, end), origin in zip(pairwise(ends), origins, strict=True)
        )
        samples = SampleSet(samples=rows, **counts | {"notes": tuple(counts["notes"])})
        # The newest use counts when old entries go.
        os.utime(path)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    return samples if rows and hash_samples(rows) == samples.data_hash else None


def write_samples(key: str, samples: SampleSet) -> None:
    """Keep samples under a key, whole or not at all; entries beyond `MAX_ENTRIES` or `MAX_BYTES` go, oldest first."""
    import numpy as np
    from safetensors.numpy import save

    counts = {field.name: getattr(samples, field.name) for field in fields(samples) if field.name != "samples"}
    rows = samples.samples
    counts["origins"] = [row.origin for row in rows]
    data = save(
        {
            "input_ids": np.concatenate([np.asarray(row.input_ids, dtype=np.int32) for row in rows]),
            "labels": np.concatenate([np.asarray(row.labels, dtype=np.int32) for row in rows]),
            "lengths": np.asarray([len(row.input_ids) for row in rows], dtype=np.int64),
        },
        metadata={_METADATA_KEY: json.dumps(counts)},
    )
    folder = cache_folder()
    path = folder / f"{key}{_SUFFIX}"
    # Named like an entry, so that one left behind by a killed process goes as old entries do.
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        os.replace(partial, path)
        _remove_old(folder)


def _remove_old(folder: Path) -> None:
    num_bytes = 0
    entries = sorted(
        ((path.stat(), path) for path in folder.glob(f"*{_SUFFIX}*")), key=lambda entry: -entry[0].st_mtime_ns
    )
    for index, (status, path) in enumerate(entries):
        num_bytes += status.st_size
        # The newest is the one just written.
        if index and (index >= MAX_ENTRIES or num_bytes > MAX_BYTES):
            path.unlink(missing_ok=True)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
