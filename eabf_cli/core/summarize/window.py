"""The window that a prompt needs: the model's own, or the smallest extension that holds it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from eabf_cli.core import architectures
from eabf_cli.core.checkpoint import LoadedConfig
from eabf_cli.core.errors import EabfError, InvalidConfigError
from eabf_cli.core.method_request import MethodRequest
from eabf_cli.core.methods import get_method
from eabf_cli.core.patch_checkpoint import resolve_request
from eabf_cli.core.resolution import Resolution, existing_scaling, original_window
from eabf_cli.core.scaling_config import MAX_FACTOR, RopeScalingConfig, choose_factor


class PromptTooLongError(EabfError):
    """A document does not fit the window; the message says by how much, and what can be done."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """How many tokens a model is run on at most, and what makes it so.

    Attributes:
        original: the pre-trained window in tokens; None where a scaled model does not tell.
        size: the window in tokens, prompt and answer together.
        method: what extends it: a method of the table, or the name of the model's own scaling; None: nothing.
        extension: the method to put on the model; None where it runs as it is.
        is_own: the scaling is the checkpoint's.
    """

    original: int | None
    size: int
    method: str | None = None
    extension: Resolution | None = None
    is_own: bool = False

    @property
    def factor(self) -> float:
        """The window divided by the original one."""
        return 1.0 if self.original is None else self.size / self.original

    def __str__(self) -> str:
        if self.method is None:
            return f"window {self.size:,}"
        if self.is_own:
            return f"window {self.size:,}, the model's own scaling {self.method}"
        return f"window {self.original:,} -> {self.size:,}, {self.method}"


def choose_window(loaded: LoadedConfig, request: MethodRequest, num_tokens: int) -> Window:
    """The smallest window that holds so many tokens, or the largest allowed one if none does.

    A plain model stays as it is where that is enough; else its window is doubled as often as needed, up to the
    default factor of the methods (4, as in METHOD's experiments), or multiplied by the factor that the request
    names. A scaled model has the window that it was made for, unless the request says `rebase`.

    Raises:
        AlreadyScaledError: the request asks for a method, and the model is scaled.
        InvalidConfigError, UnsupportedModelError: see `resolve_request`.
    """
    config = loaded.config
    scaled_by = loaded.resolution.scaling.method if loaded.resolution else existing_scaling(config)
    if scaled_by is not None and not request.rebase:
        if request != MethodRequest():
            # It refuses a scaled model, and says what takes the scaling off.
            resolve_request(request, loaded)
        return _own_window(loaded, scaled_by)
    original = request.original_length or original_window(config)
    if original is None:
        raise InvalidConfigError("the model does not tell its original window: give it with --original-length")
    is_asked = request.factor is not None or request.max_length is not None
    # What makes no sense is refused for a short document, too.
    factor = choose_factor(request.factor, request.max_length, original) if is_asked else None
    if num_tokens <= original and scaled_by is None:
        return Window(original=original, size=original)
    if factor is None:
        factor = min(doubled_factor(num_tokens, original), RopeScalingConfig.factor)
    theta = request.rope_theta
    if theta is None and get_method(request.method).raises_theta:
        # Nothing is trained here: the smallest base that reaches the window costs least.
        theta = "auto"
    resolution = resolve_request(replace(request, factor=factor, max_length=None, rope_theta=theta), loaded)
    return Window(
        original=original,
        size=resolution.scaling.max_position_embeddings,
        method=resolution.scaling.method,
        extension=resolution,
    )


def doubled_factor(num_tokens: int, original_max_position_embeddings: int) -> float:
    """The smallest of 2, 4, 8, ... with which the window holds so many tokens."""
    factor = 2.0
    while factor * original_max_position_embeddings < num_tokens:
        factor *= 2
    return factor


def describe_excess(name: str, num_document_tokens: int, num_other_tokens: int, window: Window) -> str:
    """Why a document is refused: by how much it is too long, what factor would do, what else helps.

    Args:
        num_other_tokens: of the prompt around the document, and of the summary.
    """
    num_tokens = num_document_tokens + num_other_tokens
    lines = (
        f"{name} has {num_document_tokens:,} tokens, with the request and the summary {num_tokens:,}: "
        f"{num_tokens - window.size:,} more than fit ({window})"
    )
    ways = ["--pages of a PDF", "--too-long truncate-middle", "--too-long map-reduce"]
    if window.original is not None:
        factor = doubled_factor(num_tokens, window.original)
        if factor <= MAX_FACTOR:
            ways.insert(0, f"{'--rebase ' if window.is_own else ''}--factor {factor:g}")
    return f"{lines}\nGive {', '.join(ways[:-1])} or {ways[-1]}"


def _own_window(loaded: LoadedConfig, method: str) -> Window:
    if loaded.resolution is not None:
        scaling = loaded.resolution.scaling
        return Window(
            original=scaling.original_max_position_embeddings,
            size=scaling.max_position_embeddings,
            method=method,
            is_own=True,
        )
    return Window(
        original=original_window(loaded.config), size=_stock_window(loaded.config), method=method, is_own=True
    )


def _stock_window(config: PretrainedConfig) -> int:
    window = int(config.max_position_embeddings)
    if existing_scaling(config) == "dynamic":
        # This one keeps the original window in the field.
        return round(window * architectures.rope_parameters(config)["factor"])
    return window
