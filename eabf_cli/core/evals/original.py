"""Which model an extended one was made from."""

from __future__ import annotations

from dataclasses import dataclass

from eabf_cli.core.errors import CheckpointError, InvalidConfigError
from eabf_cli.core.run_record import RUN_FILE, read_run_record
from eabf_cli.core.sources import ModelSource, find_model

# A run of a run of a run: more are a circle.
_MOST_STEPS = 16


@dataclass(frozen=True, kw_only=True)
class Original:
    """The model an extended one was made from.

    Attributes:
        source: where it is.
        reason: how it was found, in words.
    """

    source: ModelSource
    reason: str


def find_original(source: ModelSource, named: str | None, *, with_weights: bool = True) -> Original:
    """Find the original of an extended model.

    An extended model with its method taken off is not the original once it was finetuned. The run record in its
    folder names the model that it was made from, and where that was made from another one, so does that one's.

    Args:
        source: the extended model.
        named: what the user says it is, which wins.

    Raises:
        InvalidConfigError: nothing names it, or a record names a model that is not there.
    """
    if named is not None:
        return Original(source=find_model(named, with_weights=with_weights), reason="as named with --original")
    found = source
    for _ in range(_MOST_STEPS):
        before = _made_from(found, with_weights)
        if before is None:
            break
        found = before
    if found is source:
        raise InvalidConfigError(
            f"{source.name} has no {RUN_FILE} that says which model it was made from: name that with --original"
        )
    reason = f"the base of the adapter {source.name}" if source.base is not None else f"named by {RUN_FILE}"
    return Original(source=found, reason=reason)


def _made_from(source: ModelSource, with_weights: bool) -> ModelSource | None:
    if source.base is not None:
        return source.base
    record = None if source.gguf_file is not None else read_run_record(source.folder)
    name = (record or {}).get("model")
    if record is None or not isinstance(name, str):
        return None
    try:
        return find_model(name, revision=record.get("revision"), with_weights=with_weights)
    except CheckpointError as error:
        raise InvalidConfigError(
            f"{source.name} was made from {name!r}, which cannot be had: {error}\nName its place with --original"
        ) from error
