"""`summarize`: documents in, summaries out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from eabf_cli.core.devices import peak_memory_gib
from eabf_cli.core.summarize.check import check_reading
from eabf_cli.core.summarize.fitting import FittedDocument, fit_document, section_new_tokens, section_room
from eabf_cli.core.summarize.generation import Generator, Written
from eabf_cli.core.summarize.loading import FoundModel, change_window, find_summarizer, load_summarizer
from eabf_cli.core.summarize.prompts import document_ids, summary_frame
from eabf_cli.core.summarize.sections import split_sections
from eabf_cli.core.summarize.settings import SummarizeConfig
from eabf_cli.core.summarize.source import SourceText, read_documents
from eabf_cli.core.summarize.window import PromptTooLongError

logger = logging.getLogger(__name__)

OnText = Callable[[str, str], None]
"""Called with a document's name and the next piece of its summary, an empty one at its end; joined they are it."""

# Summaries of summaries; a document that needs more levels does not get shorter by being summarized.
_MAX_LEVELS = 5


def summarize(config: SummarizeConfig, *, on_text: OnText | None = None) -> dict[str, Any]:
    """Summarize documents.

    Everything that can be refused is refused before the model's weights are loaded: documents that cannot be
    read, a model that is not there, a document that does not fit.

    Args:
        on_text: gets each summary while it is written.

    Returns:
        the result of one document, or `{"summaries": [...]}` for several: `file`,
        `summary`, `num_pages`, `num_document_tokens`, `num_prompt_tokens` (given to the model in all),
        `num_generated_tokens`, `original_max_position_embeddings`, `window`, `factor`, `method` (None: not
        extended), `truncated`, `too_long` (what was done to make it fit, or None), `num_sections`, `cut` (the
        limit of tokens came before the end), `looping` (it, or the summary of a section), `check`, `warnings`,
        `wall_s`, `prefill_tokens_per_s`, `decode_tokens_per_s`, `peak_memory_gib`, `model`.

    Raises:
        EabfError: what was refused.
    """
    return summarize_texts(read_documents(config), config, on_text=on_text)


def summarize_texts(
    sources: Sequence[SourceText], config: SummarizeConfig, *, on_text: OnText | None = None
) -> dict[str, Any]:
    """The same for documents that were read already; `config.files` is not looked at."""
    for source in sources:
        for warning in source.warnings:
            logger.warning("%s: %s", source.name, warning)
    found = find_summarizer(config)
    if found.is_default:
        logger.info("No --model given: using %s. Name another with -m ID_OR_PATH.", found.source.name)
    fitted = [fit_document(source, found, config) for source in sources]
    for document in fitted:
        logger.info("%s", _describe(document, found, config))
    if config.dry_run:
        results = [_plan_result(document, found) for document in fitted]
    else:
        generator = Generator(
            model=load_summarizer(found, config, fitted[0].window),
            tokenizer=found.tokenizer,
            sampling=config.sampling,
            seed=config.seed,
            chunk_tokens=config.chunk_tokens,
            show_progress=config.show_progress,
            compiles=config.compile,
        )
        results = [_summarize_one(document, found, generator, config, on_text) for document in fitted]
    return results[0] if len(results) == 1 else {"summaries": results}


def _summarize_one(
    document: FittedDocument,
    found: FoundModel,
    generator: Generator,
    config: SummarizeConfig,
    on_text: OnText | None,
) -> dict[str, Any]:
    started = time.perf_counter()
    generator.num_read = generator.num_written = 0
    generator.read_s = generator.write_s = 0.0
    change_window(generator.model, document.window)

    def show(piece: str) -> None:
        if on_text is not None:
            on_text(document.source.name, piece)

    parts: list[Written] = []
    if document.strategy == "map-reduce":
        written, parts = _summarize_sections(document, generator, config, show)
    else:
        prompt_ids, start = document.prompt_ids(found.tokenizer), document.frame.answer_start
        written = generator.write(prompt_ids, config.max_new_tokens, start=start, on_text=show)
    show("")
    _report(document, written)
    about_parts = _describe_parts(parts)
    for warning in about_parts:
        logger.warning("%s: %s", document.source.name, warning)
    result = _plan_result(document, found) | {
        "warnings": [*document.source.warnings, *about_parts],
        "summary": written.text,
        "num_prompt_tokens": generator.num_read,
        "num_generated_tokens": generator.num_written,
        "cut": written.is_cut,
        "looping": written.is_looping or any(part.is_looping for part in parts),
        "prefill_tokens_per_s": _rate(generator.num_read, generator.read_s),
        "decode_tokens_per_s": _rate(generator.num_written, generator.write_s),
    }
    if config.check:
        result["check"] = check_reading(generator, document.text, seed=config.seed)
    return result | {
        "wall_s": time.perf_counter() - started,
        "peak_memory_gib": peak_memory_gib(generator.model.device),
    }


def _summarize_sections(
    document: FittedDocument, generator: Generator, config: SummarizeConfig, show: Callable[[str], None]
) -> tuple[Written, list[Written]]:
    """Summaries of the sections, and of those one summary, over as many levels as it takes.

    Returns:
        the summary, and the summaries of sections of all levels.
    """
    tokenizer, window = generator.tokenizer, document.window
    joined_frame = summary_frame(tokenizer, config, of_parts=True)
    frame, sections = document.frame, list(document.sections)
    num_before = document.num_document_tokens
    all_parts: list[Written] = []
    for _ in range(_MAX_LEVELS):
        parts = []
        for number, section in enumerate(sections, start=1):
            description = f"Section {number} of {len(sections)}"
            logger.info("%s: %s", document.source.name, description.lower())
            part = generator.write(
                frame.around(document_ids(tokenizer, section)),
                section_new_tokens(window, config),
                start=frame.answer_start,
                description=description,
            )
            parts.append(part)
        all_parts += parts
        joined = "\n\n".join(part.text for part in parts if part.text)
        if not joined:
            return Written(text="", num_tokens=0, is_cut=False, is_looping=False), all_parts
        ids = document_ids(tokenizer, joined)
        if len(joined_frame) + len(ids) + config.max_new_tokens <= window.size:
            start = joined_frame.answer_start
            prompt_ids = joined_frame.around(ids)
            return generator.write(prompt_ids, config.max_new_tokens, start=start, on_text=show), all_parts
        if len(ids) > 0.9 * num_before:
            break
        num_before, frame = len(ids), joined_frame
        sections = split_sections(tokenizer, joined, section_room(window, frame, config))
    raise PromptTooLongError(
        f"{document.source.name}: its {len(document.sections)} sections' summaries do not get short enough to be "
        f"summarized in a window of {window.size:,} tokens\nGive a smaller --max-new-tokens or a larger --factor"
    )


def _plan_result(document: FittedDocument, found: FoundModel) -> dict[str, Any]:
    """What is known before the model runs; the rest is None."""
    window = document.window
    return {
        "file": document.source.name,
        "summary": None,
        "num_pages": document.source.num_pages,
        "num_document_tokens": document.num_document_tokens,
        "num_prompt_tokens": len(document.prompt_ids(found.tokenizer)),
        "num_generated_tokens": None,
        "original_max_position_embeddings": window.original,
        "window": window.size,
        "factor": window.factor,
        "method": window.method,
        "truncated": document.strategy == "truncate-middle",
        "too_long": document.strategy,
        "num_sections": len(document.sections) or None,
        "cut": None,
        "looping": None,
        "check": None,
        "warnings": list(document.source.warnings),
        "wall_s": None,
        "prefill_tokens_per_s": None,
        "decode_tokens_per_s": None,
        "peak_memory_gib": None,
        "model": found.name,
    }


def _describe(document: FittedDocument, found: FoundModel, config: SummarizeConfig) -> str:
    source = document.source
    pages = f"{source.num_pages:,} pages, " if source.num_pages else ""
    done = {
        None: "",
        "truncate-middle": f"; too long, its middle is left out (of {document.num_document_tokens:,} tokens)",
        "map-reduce": f"; too long, read in {len(document.sections)} sections",
    }[document.strategy]
    num_tokens = len(document.prompt_ids(found.tokenizer))
    request, window = config.request, document.window
    if window.method is None and (request.factor or request.max_length or request.rebase):
        done = f", which is enough: nothing is extended{done}"
    return f"{source.name}: {pages}{num_tokens:,} tokens; {window}{done}"


def _report(document: FittedDocument, written: Written) -> None:
    if written.is_looping:
        logger.warning(
            "%s: the summary went round in circles, with a repetition penalty, too: the repeats are left off; "
            "another model, --style or --temperature may help",
            document.source.name,
        )
    if not written.text:
        logger.warning("%s: the model wrote nothing", document.source.name)


def _describe_parts(parts: Sequence[Written]) -> list[str]:
    """What went wrong in the summaries of sections, of which only the summary of all is shown."""
    counts = {
        "went round in circles (their repeats are left off)": sum(part.is_looping for part in parts),
        "reached their limit of tokens": sum(part.is_cut for part in parts),
        "are empty": sum(not part.text for part in parts),
    }
    told = [f"{count} {what}" for what, count in counts.items() if count]
    return [f"of the summaries of {len(parts)} sections {', '.join(told)}"] if told else []


def _rate(num_tokens: int, seconds: float) -> float | None:
    return num_tokens / seconds if seconds else None
