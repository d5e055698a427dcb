"""The prompt, the window it needs, and what is done where it does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eabf_cli.core.checkpoint import read_config
from eabf_cli.core.errors import AlreadyScaledError, DataError, InvalidConfigError
from eabf_cli.core.method_request import MethodRequest
from eabf_cli.core.patch_checkpoint import PatchConfig, patch_checkpoint
from eabf_cli.core.sources import find_model
from eabf_cli.core.summarize.fitting import fit_document, section_room
from eabf_cli.core.summarize.loading import FoundModel
from eabf_cli.core.summarize.prompts import document_ids, make_frame, summary_frame
from eabf_cli.core.summarize.sections import cut_middle, split_sections
from eabf_cli.core.summarize.settings import Sampling, SummarizeConfig
from eabf_cli.core.summarize.source import SourceText
from eabf_cli.core.summarize.window import PromptTooLongError, Window, choose_window
from tests.byte_tokenizer import EOS, UNMARKED_TEMPLATE, byte_tokenizer
from tests.tiny_llama import WINDOW, edit_config, write_tiny_llama

PLAIN = byte_tokenizer()
CHAT = byte_tokenizer(chat_template=UNMARKED_TEMPLATE)
SHORT = {"prompt": "{text}?", "max_new_tokens": 8}


def config(**fields: Any) -> SummarizeConfig:
    return SummarizeConfig(files=("a.txt",), **fields)


def found(folder: Path, tokenizer: Any = PLAIN) -> FoundModel:
    source = find_model(folder)
    return FoundModel(name="tiny", source=source, loaded=read_config(source), tokenizer=tokenizer)


def window(folder: Path, num_tokens: int, **request: Any) -> Window:
    return choose_window(found(folder).loaded, MethodRequest(**request), num_tokens)


# ---- Prompts -------------------------------------------------------------------------------------


def test_a_chat_model_gets_its_template_and_the_marks_of_its_template_in_the_text_stay_text() -> None:
    text = f"A text with {EOS} in it."
    frame = summary_frame(CHAT, config(prompt="Say it: {text} Now."))
    ids = frame.around(document_ids(CHAT, text))
    assert CHAT.decode(ids) == f"<s>[user]Say it: {text} Now.{EOS}[assistant]"
    # One end of a turn, the template's; the text's is spelled in bytes.
    assert ids.count(CHAT.eos_token_id) == 1


def test_a_base_model_gets_a_plain_prompt() -> None:
    ids = summary_frame(PLAIN, config(style="paragraph")).around(document_ids(PLAIN, "The text."))
    prompt = PLAIN.decode(ids)
    assert prompt.startswith("<s>Read this text.\n=====\nThe text.\n=====\n")
    assert prompt.endswith("Summary:")


@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT])
@pytest.mark.parametrize(
    ("style", "language", "start"),
    [
        ("bullets", None, "-"),
        ("paragraph", "German", ""),
        ("structured", None, "Problem:"),
        ("structured", "German", ""),
    ],
)
def test_style_and_language_are_asked_for(tokenizer: Any, style: Any, language: str | None, start: str) -> None:
    frame = summary_frame(tokenizer, config(style=style, language=language))
    tail = tokenizer.decode(frame.tail)
    assert ("German" in tail) == (language is not None)
    assert {"bullets": "bullet points", "paragraph": "one paragraph", "structured": "Limits"}[style] in tail
    assert frame.answer_start == start
    assert tail.endswith(start)


def test_a_template_that_swallows_the_words_is_refused() -> None:
    with pytest.raises(DataError, match="exactly once"):
        make_frame(byte_tokenizer(chat_template="nothing"), "{text}")
    with pytest.raises(DataError, match="refuses"):
        make_frame(byte_tokenizer(chat_template="{{ raise_exception('no') }}"), "{text}")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": "no field"}, "0 times"),
        ({"prompt": "{text} {text}"}, "2 times"),
        ({"style": "haiku"}, "bullets, paragraph, structured"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"language": " "}, "--language"),
        ({"files": ()}, "nothing to summarize"),
        ({"files": "a.txt"}, "a.txt"),
        ({"files": ("-", "-")}, "once"),
    ],
)
def test_nonsense_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidConfigError, match=said):
        SummarizeConfig(**({"files": ("a.txt",)} | fields))


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {"top_p": 1.5}, {"top_k": 0}])
def test_nonsense_sampling_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfigError):
        Sampling(**fields)


# ---- Windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_tokens", "size"),
    [(1, WINDOW), (WINDOW, WINDOW), (WINDOW + 1, 2 * WINDOW), (2 * WINDOW, 2 * WINDOW), (2 * WINDOW + 1, 4 * WINDOW),
     (4 * WINDOW, 4 * WINDOW), (1000 * WINDOW, 4 * WINDOW)],
)  # fmt: skip
def test_the_window_is_doubled_as_often_as_needed(tiny_llama_folder: Path, num_tokens: int, size: int) -> None:
    chosen = window(tiny_llama_folder, num_tokens)
    assert (chosen.original, chosen.size, chosen.factor) == (WINDOW, size, size / WINDOW)
    assert chosen.method == (None if size == WINDOW else "eabf")


def test_a_factor_or_length_that_is_given_counts_where_one_is_needed(tiny_llama_folder: Path) -> None:
    assert window(tiny_llama_folder, WINDOW, factor=8).size == WINDOW
    assert window(tiny_llama_folder, WINDOW + 1, factor=8, method="yarn").size == 8 * WINDOW
    assert window(tiny_llama_folder, WINDOW + 1, max_length=3 * WINDOW).size == 3 * WINDOW
    assert window(tiny_llama_folder, 20 * WINDOW, factor=16).size == 16 * WINDOW


def test_a_scaled_checkpoint_keeps_its_own(tiny_llama_folder: Path, tmp_path: Path) -> None:
    patch_checkpoint(
        PatchConfig(model=str(tiny_llama_folder), output=tmp_path / "out", request=MethodRequest(factor=2.0))
    )
    own = window(tmp_path / "out", 10 * WINDOW)
    assert (own.original, own.size, own.method, own.is_own, own.extension) == (WINDOW, 2 * WINDOW, "eabf", True, None)
    with pytest.raises(AlreadyScaledError, match="--rebase"):
        window(tmp_path / "out", 10 * WINDOW, factor=8)
    assert window(tmp_path / "out", 3 * WINDOW, rebase=True).size == 4 * WINDOW


@pytest.mark.parametrize(
    ("rope", "stated", "size"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 4 * WINDOW, 4 * WINDOW),
        ({"rope_type": "dynamic", "factor": 4.0}, WINDOW, 4 * WINDOW),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": WINDOW}, 4 * WINDOW, 4 * WINDOW),
    ],
)
def test_a_stock_scaled_model_keeps_its_own(llama_copy: Path, rope: dict[str, Any], stated: int, size: int) -> None:
    edit_config(llama_copy, max_position_embeddings=stated, rope_parameters=rope | {"rope_theta": 10_000.0})
    own = window(llama_copy, 10 * WINDOW)
    assert (own.size, own.method, own.is_own) == (size, rope["rope_type"], True)


# ---- What does not fit ---------------------------------------------------------------------------


@pytest.mark.parametrize("excess", [0, 1])
def test_a_document_is_refused_by_the_token(tiny_llama_folder: Path, excess: int) -> None:
    model, options = found(tiny_llama_folder), config(**SHORT)
    others = len(summary_frame(PLAIN, options)) + options.max_new_tokens
    source = SourceText(name="long.txt", text="x" * (4 * WINDOW - others + excess))
    if not excess:
        fitted = fit_document(source, model, options)
        assert (fitted.window.size, fitted.strategy, fitted.text) == (4 * WINDOW, None, source.text)
        assert len(fitted.prompt_ids(PLAIN)) + options.max_new_tokens == 4 * WINDOW
        return
    with pytest.raises(PromptTooLongError, match=r"long.txt .* 1 more than fit .*64 -> 256(?s:.*)--factor 8"):
        fit_document(source, model, options)


def test_the_refusal_of_a_scaled_model_names_rebase(llama_copy: Path) -> None:
    edit_config(llama_copy, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0})
    with pytest.raises(PromptTooLongError, match="--rebase --factor 16"):
        fit_document(SourceText(name="a", text="x" * 900), found(llama_copy), config(**SHORT))


def test_the_middle_is_left_out(tiny_llama_folder: Path) -> None:
    text = "BEGIN " + "word " * 400 + "END"
    fitted = fit_document(
        SourceText(name="a", text=text), found(tiny_llama_folder), config(**SHORT, too_long="truncate-middle")
    )
    assert fitted.strategy == "truncate-middle"
    assert fitted.text.startswith("BEGIN")
    assert fitted.text.endswith("END")
    assert "tokens left out here" in fitted.text
    used = len(fitted.prompt_ids(PLAIN)) + SHORT["max_new_tokens"]
    assert fitted.window.size - 4 <= used <= fitted.window.size


@pytest.mark.parametrize("max_tokens", [45, 46, 100, 333])
@pytest.mark.parametrize("text", ["word " * 200, "é漢🙂" * 100])
def test_a_cut_text_has_no_more_tokens_than_asked_for(text: str, max_tokens: int) -> None:
    cut = cut_middle(PLAIN, text, max_tokens)
    assert 0 < len(document_ids(PLAIN, cut)) <= max_tokens
    assert "\ufffd" not in cut
    first, last = cut.split("\n\n")[0], cut.split("\n\n")[2]
    assert text.startswith(first)
    assert text.endswith(last)
    assert abs(len(first.encode()) - len(last.encode())) <= 6


PARAGRAPHS = "\n\n".join(f"{number} A heading\n\n{'some words. ' * (3 + number % 9)}" for number in range(40))


@pytest.mark.parametrize("max_tokens", [64, 200, 1000])
@pytest.mark.parametrize("text", [PARAGRAPHS, "one long line of words " * 90, "x" * 900, "a. b. c.\n" * 120])
def test_sections_hold_the_whole_text_in_order(text: str, max_tokens: int) -> None:
    sections = split_sections(PLAIN, text, max_tokens)
    assert max(len(document_ids(PLAIN, section)) for section in sections) <= max_tokens
    assert "".join("".join(sections).split()) == "".join(text.split())
    # No more of them than it takes, by half at most.
    assert len(sections) <= 1.5 * len(document_ids(PLAIN, text)) / max_tokens + 2


def test_sections_begin_at_headings_where_they_can() -> None:
    sections = split_sections(PLAIN, PARAGRAPHS, 600)
    assert len(sections) > 3
    assert sum("A heading" in section[:14] for section in sections) >= len(sections) - 1


def test_sections_are_read_in_the_models_own_window(tiny_llama_folder: Path) -> None:
    options = config(**SHORT, too_long="map-reduce")
    fitted = fit_document(SourceText(name="a", text="some words. " * 90), found(tiny_llama_folder), options)
    assert (fitted.strategy, fitted.window.size) == ("map-reduce", WINDOW)
    room = section_room(fitted.window, fitted.frame, options)
    assert all(len(document_ids(PLAIN, section)) <= room for section in fitted.sections)
    # Unless that leaves little room, or the user wants another.
    tight = replace(options, max_new_tokens=40)
    assert (
        fit_document(SourceText(name="a", text="some words. " * 90), found(tiny_llama_folder), tight).window.size
        > WINDOW
    )
    asked = replace(options, request=MethodRequest(factor=2))
    assert fit_document(SourceText(name="a", text="x" * 900), found(tiny_llama_folder), asked).window.size == 2 * WINDOW


def test_no_room_for_text_is_refused(tiny_llama_folder: Path) -> None:
    for too_long in ("error", "truncate-middle", "map-reduce"):
        with pytest.raises(InvalidConfigError, match="--max-new-tokens"):
            fit_document(
                SourceText(name="a", text="x" * 900),
                found(tiny_llama_folder),
                config(prompt="{text}", max_new_tokens=4 * WINDOW, too_long=too_long),
            )


def test_a_model_that_cannot_be_extended_still_reads_what_fits(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "llama")
    edit_config(folder, model_type="gpt_neox")
    loaded = found(folder).loaded
    assert choose_window(loaded, MethodRequest(), WINDOW).size == WINDOW
    with pytest.raises(Exception, match="gpt_neox"):
        choose_window(loaded, MethodRequest(), WINDOW + 1)
