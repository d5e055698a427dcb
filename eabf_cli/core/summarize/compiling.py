"""Writing with a compiled step: transformers compiles it itself, where the cache's shapes stay (caches.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import CompileConfig, PretrainedConfig

from eabf_cli.core.caches import can_be_fixed
from eabf_cli.core.errors import InvalidConfigError, UnsupportedModelError


def check_compilable(config: PretrainedConfig, name: str) -> None:
    """Refuse a model of which no cache of fixed shape can be made and cut back.

    Raises:
        InvalidConfigError: some of its layers see a sliding window.
    """
    if not can_be_fixed(config):
        raise InvalidConfigError(
            f"--compile needs layers that see all tokens, and some of {name} see a sliding window: leave it out"
        )


def compile_config() -> CompileConfig:
    """The settings with which `generate` compiles: transformers' own, on a CPU, too."""
    config = CompileConfig()
    config._compile_all_devices = True
    return config


@contextmanager
def failures_told() -> Iterator[None]:
    """Around `generate`: a compiler that is missing, or fails, becomes one message.

    Raises:
        UnsupportedModelError: in its place.
    """
    # Here, since it takes longer than the rest of this package's imports.
    from torch._dynamo.exc import BackendCompilerFailed

    try:
        yield
    except BackendCompilerFailed as error:
        cause = error.inner_exception
        reason = f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}"
        raise UnsupportedModelError(f"the model cannot be compiled here: {reason}\nLeave --compile out") from error
