"""`eabf summarize` as a user runs it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from huggingface_hub.constants import HF_HUB_CACHE

from eabf_cli import SummarizeConfig, load_model, load_tokenizer, summarize
from eabf_cli.core.documents import layout, words
from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.patching import apply_eabf
from eabf_cli.core.summarize import check, loading
from eabf_cli.core.summarize.default_model import GGUF_FILE, HUB_MODEL, cached_model_path, default_model
from eabf_cli.core.summarize.generation import Generator, Written
from eabf_cli.core.summarize.window import choose_window
from tests.architectures import build_tiny_model
from tests.byte_tokenizer import byte_tokenizer
from tests.conftest import Eabf
from tests.core.documents.pdf_builder import Page, build_pdf, make_words
from tests.core.test_gguf import write_gguf
from tests.fork_server import ForkServer
from tests.tiny_llama import WINDOW, tiny_llama, write_tiny_llama

KEYS = {
    "file", "summary", "num_pages", "num_document_tokens", "num_prompt_tokens", "num_generated_tokens",
    "original_max_position_embeddings", "window", "factor", "method", "truncated", "too_long", "num_sections", "cut",
    "looping", "check", "warnings", "wall_s", "prefill_tokens_per_s", "decode_tokens_per_s", "peak_memory_gib", "model",
}  # fmt: skip
TEXT = "The sun was warm, and the house by the sea stood open to a mild wind from the hills. "
FEW = ("--max-new-tokens", "12")


@pytest.fixture
def notes(workdir: Path) -> Path:
    path = workdir / "notes.txt"
    path.write_text(TEXT * 3)
    return path


@pytest.fixture
def book(workdir: Path) -> Path:
    """Longer than four windows of the demo model."""
    path = workdir / "a long böok.txt"
    path.write_text("\n\n".join(f"{number} Chapter\n\n{TEXT * 5}" for number in range(40)))
    return path


def answer(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, (result.stderr, result.exception)
    value: dict[str, Any] = json.loads(result.stdout)
    return value


def refusal(result: Result) -> str:
    assert result.exit_code == 1, (result.stderr, result.exception)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    return result.stderr


def test_json_has_the_keys_of_the_contract(eabf: Eabf, notes: Path) -> None:
    value = answer(eabf("summarize", notes, "-m", "eabf-tiny", "--json", *FEW))
    assert value.keys() == KEYS
    assert value["file"] == str(notes)
    assert value["model"] == "eabf-tiny"
    assert value["original_max_position_embeddings"] == value["window"] == 512
    assert (value["method"], value["factor"], value["truncated"], value["too_long"]) == (None, 1.0, False, None)
    assert value["summary"].startswith("-")
    assert 0 < value["num_generated_tokens"] <= 12
    for name in ("wall_s", "prefill_tokens_per_s", "decode_tokens_per_s", "peak_memory_gib"):
        assert value[name] > 0, name


def test_the_summary_is_what_generate_writes_behind_the_same_prompt(notes: Path) -> None:
    """From Python, across the original window, against transformers' own generate on a patched model."""
    notes.write_text(TEXT * 30)
    result = summarize(
        SummarizeConfig(files=(notes,), model="eabf-tiny", prompt="{text} The sea", max_new_tokens=16, dtype="float32")
    )
    assert (result["method"], result["window"]) == ("eabf", 1024)
    model, tokenizer = load_model("eabf-tiny", dtype="float32"), load_tokenizer("eabf-tiny")
    apply_eabf(model, 2.0, rope_theta="auto")
    ids = [tokenizer.bos_token_id]
    for part in ((TEXT * 30).strip(), " The sea\n\nSummary:"):
        ids += tokenizer(part, add_special_tokens=False)["input_ids"]
    assert len(ids) == result["num_prompt_tokens"] > 512
    row = torch.tensor([ids])
    made = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=16, do_sample=False)
    written = tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True).strip()
    assert written.startswith(result["summary"])
    assert result["summary"]


def test_text_is_streamed_and_the_rest_goes_to_stderr(eabf: Eabf, notes: Path) -> None:
    notes.write_text(TEXT * 30)
    whole = answer(eabf("summarize", notes, "-m", "eabf-tiny", "--json", *FEW))["summary"]
    shown = eabf("summarize", notes, "-m", "eabf-tiny", *FEW)
    assert shown.exit_code == 0
    assert shown.stdout == whole + "\n"
    assert "512 -> 1,024, eabf" in shown.stderr


def test_several_files_give_several_summaries(eabf: Eabf, notes: Path, workdir: Path) -> None:
    (workdir / "other.txt").write_text("A boat lay in the harbour. " * 60)
    arguments = ("summarize", notes, "other.txt", "-m", "eabf-tiny", *FEW)
    value = answer(eabf(*arguments, "--json"))
    assert list(value) == ["summaries"]
    first, second = value["summaries"]
    assert first.keys() == second.keys() == KEYS
    # Each has the window that it needs, and the first one's does not stay on the model.
    assert (first["window"], second["window"]) == (512, 1024)
    swapped = answer(eabf("summarize", "other.txt", notes, "-m", "eabf-tiny", *FEW, "--json"))["summaries"]
    assert [one["summary"] for one in swapped] == [second["summary"], first["summary"]]
    text = eabf(*arguments).stdout
    assert text == f"== {notes}\n{first['summary']}\n\n== other.txt\n{second['summary']}\n"


def test_standard_input_is_read(eabf: Eabf, notes: Path) -> None:
    value = answer(eabf("summarize", "-", "-m", "eabf-tiny", "--json", *FEW, input=notes.read_text()))
    assert value["file"] == "standard input"
    assert value["summary"] == answer(eabf("summarize", notes, "-m", "eabf-tiny", "--json", *FEW))["summary"]


def test_an_output_file_is_written_whole_and_not_replaced(eabf: Eabf, notes: Path, workdir: Path) -> None:
    value = answer(eabf("summarize", notes, "-m", "eabf-tiny", "--json", "-o", "out.txt", *FEW))
    assert (workdir / "out.txt").read_text() == value["summary"] + "\n"
    assert "--overwrite" in refusal(eabf("summarize", notes, "-m", "eabf-tiny", "-o", "out.txt", *FEW))
    again = eabf("summarize", notes, "-m", "eabf-tiny", "-o", "out.txt", "--overwrite", *FEW)
    assert (again.exit_code, again.stdout) == (0, "")
    assert "nowhere" in refusal(eabf("summarize", notes, "-m", "eabf-tiny", "-o", "nowhere/out.txt", *FEW))
    assert sorted(path.name for path in workdir.iterdir()) == ["notes.txt", "out.txt"]


def test_a_summary_that_cannot_be_written_is_shown(
    eabf: Eabf, notes: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    expected = eabf("summarize", notes, "-m", "eabf-tiny", *FEW).stdout
    monkeypatch.setattr(os, "replace", fail)
    result = eabf("summarize", notes, "-m", "eabf-tiny", "-o", "out.txt", *FEW)
    assert (result.exit_code, result.stdout) == (1, expected)
    assert "no space left for" in result.stderr
    assert [path.name for path in workdir.iterdir()] == ["notes.txt"]


def test_an_output_that_is_a_pipe_is_written_to(eabf: Eabf, notes: Path, workdir: Path) -> None:
    pipe, received = workdir / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()))
    reader.start()
    assert eabf("summarize", notes, "--text-only", "-o", pipe).exit_code == 0
    reader.join()
    assert received == [TEXT * 2 + TEXT.rstrip() + "\n"]
    assert pipe.is_fifo()


def test_an_output_that_is_a_link_is_written_behind_it(eabf: Eabf, notes: Path, workdir: Path) -> None:
    (workdir / "link").symlink_to("target.txt")
    assert eabf("summarize", notes, "--text-only", "-o", "link").exit_code == 0
    assert (workdir / "link").is_symlink()
    assert (workdir / "target.txt").read_text().startswith(TEXT)


def test_a_document_is_not_replaced_by_its_summary(eabf: Eabf, notes: Path, workdir: Path) -> None:
    (workdir / "link").symlink_to(notes)
    for name in ("notes.txt", "./notes.txt", "link"):
        said = refusal(eabf("summarize", notes, "--text-only", "-o", name, "--overwrite"))
        assert "is a document that is read" in said
    assert notes.read_text() == TEXT * 3


def test_a_dry_run_loads_no_weights(eabf: Eabf, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_weights", None)
    notes.write_text(TEXT * 30)
    value = answer(eabf("summarize", notes, "-m", "eabf-tiny", "--json", "--dry-run", *FEW))
    assert value.keys() == KEYS
    assert (value["summary"], value["window"], value["method"]) == (None, 1024, "eabf")


@pytest.mark.parametrize("option", [("--factor", "4"), ("--max-length", "2048"), ("--rebase",)])
def test_a_document_that_fits_is_read_without_the_extension_asked_for(
    option: tuple[str, ...], eabf: Eabf, notes: Path
) -> None:
    result = eabf("summarize", notes, "-m", "eabf-tiny", "--json", "--dry-run", *option, *FEW)
    value = answer(result)
    assert (value["window"], value["method"]) == (512, None)
    assert "window 512, which is enough: nothing is extended" in result.stderr


# ---- Too long ------------------------------------------------------------------------------------


def test_a_document_that_does_not_fit_is_refused_before_the_weights(
    eabf: Eabf, book: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load_weights", None)
    said = refusal(eabf("summarize", book, "-m", "eabf-tiny", *FEW))
    assert "a long böok.txt" in said
    assert "--factor 16" in said
    assert "map-reduce" in said


def test_a_pdf_of_hundreds_of_pages_is_refused_by_a_sample(
    eabf: Eabf, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = []
    for number in range(210):
        page = Page()
        page.put_column(make_words(60, seed=number % 9), 72, 700, 400)
        pages.append(page)
    (workdir / "book.pdf").write_bytes(build_pdf(pages))
    read: list[int] = []
    original = words.read_words

    def read_words(document: Any, index: int) -> Any:
        read.append(index)
        return original(document, index)

    monkeypatch.setattr(words, "read_words", read_words)
    said = refusal(eabf("summarize", "book.pdf", "-m", "eabf-tiny", *FEW))
    assert "book.pdf has 210 pages with about 12,600 words" in said
    assert "2,048 tokens" in said
    assert "--factor" in said
    assert len(read) < 30
    # It is only too long for this window.
    assert answer(eabf("summarize", "book.pdf", "--text-only", "--json"))["num_pages"] == 210
    assert "12,600" not in refusal(eabf("summarize", "book.pdf", "-m", "eabf-tiny", "--pages", "1-190", *FEW))


@pytest.mark.usefixtures("hub_copy")
def test_such_a_pdf_is_refused_by_the_window_of_a_model_of_the_hub_too(
    eabf: Eabf, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, blank = Page(), Page()
    page.put_column(make_words(60, seed=1), 72, 700, 400)
    (workdir / "book.pdf").write_bytes(build_pdf([page] * 210))
    (workdir / "scan.pdf").write_bytes(build_pdf([blank] * 210))
    monkeypatch.setattr(layout, "lay_out", None)
    assert "which are more than the 2,048 tokens" in refusal(eabf("summarize", "book.pdf", "-m", HUB_MODEL))
    assert "no/model" in refusal(eabf("summarize", "book.pdf", "-m", "no/model"))
    # A bad document is refused before a model is looked for.
    assert "no text layer" in refusal(eabf("summarize", "scan.pdf", "-m", "no/model"))


def test_the_middle_is_left_out_on_request(eabf: Eabf, book: Path) -> None:
    result = eabf("summarize", book, "-m", "eabf-tiny", "--too-long", "truncate-middle", "--json", *FEW)
    value = answer(result)
    assert (value["too_long"], value["truncated"], value["window"]) == ("truncate-middle", True, 2048)
    assert value["num_prompt_tokens"] + 12 <= 2048 < value["num_document_tokens"]
    assert "middle is left out" in result.stderr


def test_sections_are_summarized_on_request(eabf: Eabf, book: Path) -> None:
    result = eabf("summarize", book, "-m", "eabf-tiny", "--too-long", "map-reduce", "--json", *FEW)
    value = answer(result)
    assert (value["too_long"], value["truncated"], value["window"], value["method"]) == ("map-reduce", False, 512, None)
    assert value["num_sections"] > 5
    assert f"section {value['num_sections']} of {value['num_sections']}" in result.stderr
    # The whole text was read.
    assert value["num_prompt_tokens"] > value["num_document_tokens"]


def written(text: str, *, is_cut: bool = False, is_looping: bool = False) -> Written:
    return Written(text=text, num_tokens=5, is_cut=is_cut, is_looping=is_looping)


@pytest.mark.usefixtures("notes")
def test_each_summary_ends_its_line_before_anything_else_is_said(eabf: Eabf, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*_: Any, on_text: Callable[[str], None], **__: Any) -> Written:
        on_text("- One.")
        on_text(" Two.")
        return written("- One. Two.", is_looping=True)

    monkeypatch.setattr(Generator, "write", write)
    shown = eabf("summarize", "notes.txt", "notes.txt", "-m", "eabf-tiny", *FEW).output
    warning = "warning: notes.txt: the summary went round in circles"
    assert [line.startswith(warning) or line for line in shown.splitlines()[2:]] == [
        *("== notes.txt", "- One. Two.", True),
        *("", "== notes.txt", "- One. Two.", True),
    ]


@pytest.mark.parametrize("as_json", [True, False])
def test_what_went_wrong_in_sections_is_told(
    as_json: bool, eabf: Eabf, book: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = [
        written("- Round.", is_looping=True),
        written("- Cut.", is_cut=True),
        written(""),
        written("", is_cut=True),
    ]
    sections = iter(kinds)

    def write(*_: Any, description: str = "", **__: Any) -> Written:
        return next(sections, written("- Sound.")) if description else written("- All.")

    monkeypatch.setattr(Generator, "write", write)
    result = eabf("summarize", book, "-m", "eabf-tiny", "--too-long", "map-reduce", *["--json"] * as_json, *FEW)
    said = "1 went round in circles (their repeats are left off), 2 reached their limit of tokens, 2 are empty"
    assert said in result.stderr
    if as_json:
        value = answer(result)
        assert (value["summary"], value["looping"], value["cut"]) == ("- All.", True, False)
        assert value["warnings"] == [f"of the summaries of {value['num_sections']} sections {said}"]
    else:
        assert result.stdout == ""


def test_of_sections_without_any_summary_none_is_made(eabf: Eabf, book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    descriptions: list[str] = []

    def write(*_: Any, description: str = "", **__: Any) -> Written:
        descriptions.append(description)
        return written("")

    monkeypatch.setattr(Generator, "write", write)
    result = eabf("summarize", book, "-m", "eabf-tiny", "--too-long", "map-reduce", "--json", *FEW)
    value = answer(result)
    assert value["summary"] == ""
    assert len(descriptions) == value["num_sections"]
    assert "the model wrote nothing" in result.stderr


# ---- Models --------------------------------------------------------------------------------------


@pytest.fixture
def no_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EABF_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.usefixtures("no_default")
def test_without_the_default_model_both_ways_to_it_are_told(eabf: Eabf, notes: Path) -> None:
    said = refusal(eabf("summarize", notes))
    assert default_model() == HUB_MODEL
    for word in (HUB_MODEL, str(cached_model_path()), "make summarize-model", "-m"):
        assert word in said
    assert len(said.splitlines()) <= 3


@pytest.mark.usefixtures("no_default")
def test_the_default_model_comes_from_the_cache(eabf: Eabf, notes: Path) -> None:
    cached_model_path().parent.mkdir(parents=True)
    write_gguf(tiny_llama(tie_word_embeddings=False, max_position_embeddings=512), cached_model_path())
    result = eabf("summarize", notes, "--json", *FEW)
    assert answer(result)["model"] == GGUF_FILE
    assert str(cached_model_path()) in result.stderr


@pytest.fixture
def hub_copy() -> Iterator[None]:
    """The default model, as a download from the Hub leaves it."""
    folder = Path(HF_HUB_CACHE) / f"models--{HUB_MODEL.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots").mkdir()
    write_tiny_llama(folder / "snapshots" / commit, max_position_embeddings=512)
    yield
    shutil.rmtree(folder)


@pytest.mark.usefixtures("no_default", "hub_copy")
def test_the_default_model_comes_from_the_hub(eabf: Eabf, notes: Path) -> None:
    assert answer(eabf("summarize", notes, "--json", *FEW))["model"] == HUB_MODEL


def test_a_scaled_checkpoint_is_run_as_it_was_made(eabf: Eabf, notes: Path, workdir: Path) -> None:
    notes.write_text(TEXT * 30)
    # What a plain model is extended with where nothing is trained: the smallest base that reaches the window.
    assert eabf("patch", "--factor", "2", "--rope-theta", "auto", "-o", "scaled").exit_code == 0
    value = answer(eabf("summarize", notes, "-m", "scaled", "--json", *FEW))
    assert (value["method"], value["window"], value["factor"]) == ("eabf", 1024, 2.0)
    assert value["summary"] == answer(eabf("summarize", notes, "-m", "eabf-tiny", "--json", *FEW))["summary"]
    assert "--rebase" in refusal(eabf("summarize", notes, "-m", "scaled", "--method", "yarn", *FEW))


def test_the_check_counts_facts_beyond_the_original_window(eabf: Eabf, notes: Path) -> None:
    notes.write_text(TEXT * 60)
    result = eabf("summarize", notes, "-m", "eabf-tiny", "--check", "--json", *FEW)
    found = answer(result)["check"]
    assert found["planted"] == len(found["depths"]) == 5
    assert found["found"] == sum(entry["found"] for entry in found["depths"])
    assert max(entry["position"] for entry in found["depths"]) > 512
    assert f"check: {found['found']} of 5" in result.stderr


@pytest.mark.parametrize("as_json", [True, False])
def test_a_check_that_finds_nothing_fails_with_its_result(
    as_json: bool, eabf: Eabf, notes: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "_answer", lambda *_: "none")
    result = eabf("summarize", notes, "-m", "eabf-tiny", "--check", "-o", "out.txt", *["--json"] * as_json, *FEW)
    assert result.exit_code == 1
    assert "0 of 5 planted facts" in result.stderr
    assert "does not read this document" in result.stderr
    summary = (workdir / "out.txt").read_text().rstrip("\n")
    if as_json:
        value = json.loads(result.stdout)
        assert (value["summary"], value["check"]["found"]) == (summary, 0)


def test_a_check_of_a_document_read_in_sections_is_refused_before_the_weights(
    eabf: Eabf, book: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load_weights", None)
    said = refusal(eabf("summarize", book, "-m", "eabf-tiny", "--too-long", "map-reduce", "--check", *FEW))
    assert "a long böok.txt" in said
    assert "leave out --check" in said


def test_an_own_prompt_replaces_the_request(eabf: Eabf, notes: Path, workdir: Path) -> None:
    (workdir / "prompt.txt").write_text("Text: {text}\nTitle:")
    plain = answer(eabf("summarize", notes, "-m", "eabf-tiny", "--json", *FEW))
    own = answer(eabf("summarize", notes, "-m", "eabf-tiny", "--json", "--prompt", "prompt.txt", *FEW))
    assert own["num_prompt_tokens"] < plain["num_prompt_tokens"]
    (workdir / "prompt.txt").write_text("no field")
    assert "{text}" in refusal(eabf("summarize", notes, "-m", "eabf-tiny", "--prompt", "prompt.txt"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--style", "bullets"], "--style"),
        (["--language", "German"], "--language"),
        (["--style", "paragraph", "--language", "German"], "--style and --language"),
    ],
)
def test_a_prompt_beside_style_or_language_is_wrong_usage(
    arguments: list[str], named: str, eabf: Eabf, notes: Path, workdir: Path
) -> None:
    (workdir / "prompt.txt").write_text("Text: {text}\nTitle:")
    result = eabf("summarize", notes, "-m", "eabf-tiny", "--prompt", "prompt.txt", *arguments)
    assert result.exit_code == 2
    assert f"--prompt takes the place of {named}" in " ".join(result.stderr.split())
    with pytest.raises(InvalidConfigError, match="prompt"):
        SummarizeConfig(files=(notes,), prompt="{text}", style="paragraph")


def test_a_prompt_on_the_command_line_goes_over_a_style_in_a_file(eabf: Eabf, notes: Path, workdir: Path) -> None:
    (workdir / "prompt.txt").write_text("Text: {text}\nTitle:")
    (workdir / "c.toml").write_text('style = "paragraph"\n')
    own = ("--dry-run", "--json", "-m", "eabf-tiny", "--prompt", "prompt.txt")
    assert answer(eabf("summarize", notes, "--config", "c.toml", *own)) == answer(eabf("summarize", notes, *own))
    (workdir / "c.toml").write_text('style = "paragraph"\nprompt = "prompt.txt"\n')
    assert eabf("summarize", notes, "-m", "eabf-tiny", "--config", "c.toml").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.txt", "-m", "eabf-tiny"], "missing.txt"),
        (["notes.txt", "-m", "nothing-here"], "nothing-here"),
        (["notes.txt", "-m", "./nothing-here"], "leave out -m for the command's default"),
        (["notes.txt", "-m", "eabf-tiny", "--factor", "1"], "factor must be greater than 1"),
        (["notes.txt", "-m", "eabf-tiny", "--max-length", "300"], "does not extend"),
        (["--text-only", "-", "-"], "read once only"),
        (["notes.txt", "-m", "eabf-tiny", "--temperature", "0"], "temperature"),
        (["notes.txt", "-m", "eabf-tiny", "--max-new-tokens", "5000"], "--max-new-tokens"),
        (["notes.txt", "-m", "eabf-tiny", "--device", "cuda:99"], "cuda:99"),
    ],
)
def test_bad_input_is_one_message(arguments: list[str], said: str, eabf: Eabf, notes: Path, workdir: Path) -> None:
    message = refusal(eabf("summarize", *arguments))
    assert said in message
    assert len([line for line in message.splitlines() if line]) <= 3
    assert [path.name for path in workdir.iterdir()] == ["notes.txt"]


def test_4_bits_need_a_checkpoint_in_safetensors(eabf: Eabf, notes: Path, workdir: Path) -> None:
    write_gguf(tiny_llama(tie_word_embeddings=False), workdir / "tiny.gguf")
    assert "GGUF" in refusal(eabf("summarize", notes, "-m", "tiny.gguf", "--load-in-4bit"))


def test_a_model_with_a_sliding_window_is_not_compiled(eabf: Eabf, notes: Path, workdir: Path) -> None:
    model = build_tiny_model("mistral_sliding")
    model.save_pretrained("sliding")
    byte_tokenizer().save_pretrained("sliding")
    message = refusal(eabf("summarize", notes, "-m", "sliding", "--compile"))
    assert "--compile" in message
    assert "sliding" in message


def test_4_bits_need_bitsandbytes(eabf: Eabf, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.importlib.util, "find_spec", {}.get)
    assert "pip install bitsandbytes" in refusal(eabf("summarize", notes, "-m", "eabf-tiny", "--load-in-4bit"))


def test_4_bits_work_where_bitsandbytes_cannot_pack_the_weights_for_a_cpu(notes: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    # The demo model's MLP has 688 rows: no multiple of 64.
    config = SummarizeConfig(files=(notes,), model="eabf-tiny", load_in_4bit=True, device="cpu", dtype="float32")
    found = loading.find_summarizer(config)
    window = choose_window(found.loaded, config.request, 100)
    ids = torch.tensor([found.tokenizer(TEXT)["input_ids"]])
    plain = load_model("eabf-tiny", dtype="float32", device="cpu")
    with torch.no_grad():
        unquantized = plain(ids).logits
        logits = loading.load_summarizer(found, config, window)(ids).logits
        for name, module in loading.load_summarizer(found, config, window).named_modules():
            if isinstance(module, Linear4bit):
                weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
                plain.get_submodule(name).weight.copy_(weight)
        expected = plain(ids).logits
    # Packed layers compute in bfloat16.
    assert (logits - expected).abs().max() < 0.05 * (unquantized - expected).abs().max()


# ---- Text only, and interrupts -------------------------------------------------------------------


def test_text_only_prints_the_text_and_imports_nothing_heavy(notes: Path, workdir: Path) -> None:
    script = """
import sys
from eabf_cli.cli import main
main(sys.argv[1:], standalone_mode=False)
print(sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""
    run = subprocess.run(
        [sys.executable, "-c", script, "summarize", "notes.txt", "--text-only"],
        cwd=workdir,
        env=None,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == (TEXT * 3).strip() + "\n"
    assert "'click'" in run.stderr
    assert "'torch'" not in run.stderr
    assert "'transformers'" not in run.stderr


def test_text_only_as_json(eabf: Eabf, notes: Path) -> None:
    value = answer(eabf("summarize", notes, "--text-only", "--json"))
    assert value == {"file": str(notes), "text": (TEXT * 3).strip(), "num_pages": None, "warnings": []}


def test_a_bad_document_is_refused_before_torch_is_imported(workdir: Path) -> None:
    script = """
import sys
from eabf_cli.cli import main
try:
    main(sys.argv[1:])
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""
    arguments = ["summarize", "missing.pdf"]
    run = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=workdir, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == "False"


def test_an_interrupt_while_the_command_is_imported_leaves_cleanly() -> None:
    script = """
import sys
from importlib.abc import MetaPathFinder
class Interrupted(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "eabf_cli.commands.summarize":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
from eabf_cli.__main__ import run
run()
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "Interrupted.\n")


def test_an_interrupt_leaves_cleanly(fork_server: ForkServer, notes: Path, workdir: Path) -> None:
    """Ctrl-C while the summary is written to its file."""
    outcome = fork_server.run(
        ["summarize", "notes.txt", "-m", "eabf-tiny", "-o", "out.txt", *FEW],
        cwd=workdir,
        kill_at=1,
        kill_where=r"out\.txt",
        signal_number=2,
    )
    assert outcome.returncode == 130
    assert "Interrupted" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert [path.name for path in workdir.iterdir()] == ["notes.txt"]


def test_small_windows_are_extended_for_any_architecture(eabf: Eabf, workdir: Path, llama_copy: Path) -> None:
    (workdir / "a.txt").write_text("The sun was warm. " * 12)
    (workdir / "p.txt").write_text("{text}?")
    arguments = ("a.txt", "-m", llama_copy, "--prompt", "p.txt", "--max-new-tokens", "8", "--json")
    value = answer(eabf("summarize", *arguments))
    assert (value["original_max_position_embeddings"], value["window"]) == (WINDOW, 2 * WINDOW)
