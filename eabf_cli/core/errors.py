"""Errors that a user can cause. The command line turns each into exit code 1 and its message."""


class EabfError(Exception):
    """An expected failure: the message names the thing, the value and the way out."""


class UnsupportedModelError(EabfError):
    """The model's architecture, or its form, is outside what the methods can be applied to."""


class InvalidConfigError(EabfError, ValueError):
    """A setting, or a combination of settings, makes no sense."""


class AlreadyScaledError(InvalidConfigError):
    """The model carries a scaling already; a second one on top would be wrong."""


class CheckpointError(EabfError):
    """A checkpoint on disk (or on the Hub) is missing, damaged or of a form that is not read."""


class DataError(EabfError):
    """Training or evaluation data is missing, empty or malformed."""


class OutputExistsError(EabfError):
    """The target of a write exists and may not be replaced."""


class HubError(EabfError):
    """The Hub cannot be reached, refuses, or answers what cannot be right."""


class TrainingInterrupted(KeyboardInterrupt):
    """A run was asked to stop; the message says what was saved and how to go on."""


class VerificationError(EabfError):
    """A written checkpoint does not do what its source does, or does not load without this package."""


def first_line(error: BaseException) -> str:
    """The first line of another library's error, cut to what a message of ours can hold; its kind where it is empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
