"""What messages call a setting: the option of the command line that gives it."""

from __future__ import annotations

from eabf_cli.core.errors import InvalidConfigError

# Where the option has another name than the field.
_OPTIONS = {"num_samples": "--samples"}


def option_name(field: str) -> str:
    """The option that sets a config's field: `batch_size` is `--batch-size`."""
    return _OPTIONS.get(field, f"--{field.replace('_', '-')}")


def check_at_least_one(config: object, *fields: str) -> None:
    """Refuse numbers below 1; None stands for a default.

    Raises:
        InvalidConfigError: the message names the option.
    """
    for field in fields:
        value = getattr(config, field)
        if value is not None and value < 1:
            raise InvalidConfigError(f"{option_name(field)} must be at least 1, got {value}")
