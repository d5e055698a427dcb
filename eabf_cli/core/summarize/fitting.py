"""Making a document and its request fit a window, before any weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.summarize.check import num_check_tokens
from eabf_cli.core.summarize.loading import FoundModel
from eabf_cli.core.summarize.prompts import Frame, document_ids, summary_frame
from eabf_cli.core.summarize.sections import cut_middle, split_sections
from eabf_cli.core.summarize.settings import SummarizeConfig
from eabf_cli.core.summarize.source import SourceText
from eabf_cli.core.summarize.window import PromptTooLongError, Window, choose_window, describe_excess

# Sections are read in the model's own window where this much of it is left for them: there it is at its best.
_SECTION_SHARE = 0.5
_UNLIMITED = 2**62


@dataclass(frozen=True, kw_only=True)
class FittedDocument:
    """A document as it will be read.

    Attributes:
        text: what will be read of the document.
        num_document_tokens: of the whole document, without the request.
        window: what the model is run with.
        frame: the request around the text.
        strategy: what had to be done to make it fit: "truncate-middle", "map-reduce" or None.
        sections: the parts that are read one after the other, for map-reduce.
    """

    source: SourceText
    text: str
    num_document_tokens: int
    window: Window
    frame: Frame
    strategy: str | None = None
    sections: tuple[str, ...] = ()

    def prompt_ids(self, tokenizer: Any) -> list[int]:
        """The tokens of the request with the text."""
        return self.frame.around(document_ids(tokenizer, self.text))


def fit_document(source: SourceText, found: FoundModel, config: SummarizeConfig) -> FittedDocument:
    """Count a document's tokens, choose the window, and do what the configuration says where it does not fit.

    Raises:
        PromptTooLongError: it does not fit the extended window, and nothing else is asked for.
        InvalidConfigError: the window leaves no room for any text; a check of a document that is read in sections.
    """
    tokenizer = found.tokenizer
    frame = summary_frame(tokenizer, config)
    num_tokens = len(document_ids(tokenizer, source.text))
    num_others = len(frame) + config.max_new_tokens
    if config.check:
        num_others = max(num_others, num_check_tokens(tokenizer, source.text, seed=config.seed) - num_tokens)
    window = choose_window(found.loaded, config.request, num_tokens + num_others)
    fitted = FittedDocument(source=source, text=source.text, num_document_tokens=num_tokens, window=window, frame=frame)
    if num_tokens + num_others <= window.size:
        return fitted
    _check_room(window, num_others, config)
    if config.too_long == "error":
        raise PromptTooLongError(describe_excess(source.name, num_tokens, num_others, window))
    if config.too_long == "truncate-middle":
        text = cut_middle(tokenizer, source.text, window.size - num_others)
        return replace(fitted, text=text, strategy="truncate-middle")
    if config.check:
        raise InvalidConfigError(
            f"{source.name} is too long to be read at once ({window}), and --check asks for facts all over the text: "
            "leave out --check, or give a larger --factor or --too-long truncate-middle"
        )
    window = _section_window(found, config, len(frame))
    sections = split_sections(tokenizer, source.text, section_room(window, frame, config))
    return replace(fitted, window=window, strategy="map-reduce", sections=tuple(sections))


def section_room(window: Window, frame: Frame, config: SummarizeConfig) -> int:
    """How many tokens a section may have."""
    return window.size - len(frame) - section_new_tokens(window, config)


def section_new_tokens(window: Window, config: SummarizeConfig) -> int:
    """How long the summary of a section may be: as long as the whole one, or a quarter of a small window."""
    return min(config.max_new_tokens, window.size // 4)


def _section_window(found: FoundModel, config: SummarizeConfig, num_frame_tokens: int) -> Window:
    if config.request.factor is None and config.request.max_length is None:
        plain = choose_window(found.loaded, config.request, 1)
        if plain.size - num_frame_tokens - config.max_new_tokens >= _SECTION_SHARE * plain.size:
            return plain
    return choose_window(found.loaded, config.request, _UNLIMITED)


def _check_room(window: Window, num_others: int, config: SummarizeConfig) -> None:
    # A text of fewer tokens is none.
    if window.size - num_others < 16:
        raise InvalidConfigError(
            f"the request and a summary of {config.max_new_tokens:,} tokens need {num_others:,} tokens, and the "
            f"window has {window.size:,}: no room for the text; give a smaller --max-new-tokens or a larger --factor"
        )
