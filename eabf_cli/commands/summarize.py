"""`eabf summarize`: a summary of a document that is read whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

import click
from click.core import ParameterSource

from eabf_cli import options, output
from eabf_cli.core.errors import EabfError, InvalidConfigError, OutputExistsError
from eabf_cli.core.summarize.default_model import MODEL_NAME
from eabf_cli.core.summarize.settings import References, Sampling, Style, SummarizeConfig, TooLong

document_options = options.bundle(
    click.option("--pages", metavar="LIST", help="Pages of a PDF, such as 1-8 or 1,3-5.  [default: all]"),
    click.option("--password", metavar="TEXT", help="Password of an encrypted PDF."),
    click.option(
        "--references",
        type=click.Choice(get_args(References)),
        default=SummarizeConfig.references,
        show_default=True,
        help="What to do with the list of references.",
    ),
    click.option("--text-only", is_flag=True, help="Print the cleaned text; no model is loaded."),
    click.option(
        "--too-long",
        type=click.Choice(get_args(TooLong)),
        default=SummarizeConfig.too_long,
        show_default=True,
        help="What to do with a document that the extended window does not hold.",
    ),
)
summary_options = options.bundle(
    click.option(
        "--style",
        type=click.Choice(get_args(Style)),
        default=SummarizeConfig.style,
        show_default=True,
        help="Shape of the summary; structured: problem, method, results, limits.",
    ),
    click.option("--language", metavar="NAME", help="Language to write in.  [default: the model's choice]"),
    click.option(
        "--prompt",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        metavar="FILE",
        help="An own request instead of --style and --language, with {text} where the document goes.",
    ),
    click.option(
        "--max-new-tokens",
        type=click.IntRange(min=1),
        default=SummarizeConfig.max_new_tokens,
        show_default=True,
        metavar="INTEGER",
        help="Length of the summary at most.",
    ),
    click.option("--temperature", type=float, help="Draw tokens, at this temperature.  [default: the likeliest]"),
    click.option("--top-p", type=float, help="Draw from the likeliest tokens with this share together."),
    click.option("--top-k", type=int, help="Draw from this many likeliest tokens."),
    click.option("--check", is_flag=True, help="Plant facts in the document, ask for them, and count the answers."),
    click.option("--load-in-4bit", is_flag=True, help="Load the weights in 4 bits (needs bitsandbytes)."),
    click.option("--compile", is_flag=True, help="Compile the step that writes a token; for many files on a GPU."),
)
file_options = options.bundle(
    click.option(
        "-o",
        "--output",
        "output_file",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="Write the summary to a file.  [default: standard output]",
    ),
    click.option("--overwrite", is_flag=True, help="Replace an output that exists."),
    click.option("--dry-run", is_flag=True, help="Count tokens and choose the window; load no weights."),
)


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@options.model_options_for(MODEL_NAME)
@document_options
@summary_options
@options.method_options_for(default_factor="2 or 4, as the document needs", default_theta="auto")
@options.compute_options
@file_options
@options.common_options
@click.pass_context
def summarize(
    ctx: click.Context, files: tuple[str, ...], as_json: bool, output_file: Path | None, **values: Any
) -> None:
    """Summarize documents: PDF, text, Markdown or HTML; - is standard input.

    The model is SmolLM2-135M-Instruct unless -m names another: a chat model, a base model, or the folder of a
    finetuned or exported checkpoint. Its window is extended as far as the document needs it. With --check, exit code 1
    if none of the planted facts is found.

    \b
    Examples:
      eabf summarize paper.pdf
      eabf summarize paper.pdf --style structured --check
      eabf summarize paper.pdf -m Qwen/Qwen2.5-7B-Instruct --max-length 65536
      eabf summarize book.pdf --pages 1-300 --too-long map-reduce -o book.txt
      eabf summarize notes.md page.html --json
    """
    values = _prompt_alone(ctx, values)
    if values.pop("text_only"):
        _print_texts(files, values, output_file, as_json=as_json)
        return
    overwrite = values.pop("overwrite")
    _check_output(output_file, overwrite, files)
    config = _config(files, values)
    # A bad document is refused before torch is imported and a model looked for.
    from eabf_cli.core.summarize.source import read_documents

    documents = read_documents(config)
    output.quiet_libraries()
    options.prepare_process(config.device)
    from eabf_cli.core.summarize.run import summarize_texts

    printer = _Printer(with_names=len(documents) > 1)
    shown = None if as_json or output_file is not None else printer.show
    try:
        result = summarize_texts(documents, config, on_text=shown)
    finally:
        printer.end_line()
    results = result.get("summaries", [result])
    for one in results:
        if one["check"] is not None:
            output.status(_check_text(one))
    if output_file is not None and not config.dry_run:
        text = _joined([(one["file"], one["summary"]) for one in results])
        try:
            _write(output_file, text)
        except EabfError:
            # The work of minutes is not to be lost with a full disk.
            output.result(result, text, as_json=as_json)
            raise
        output.status(f"Written to {output_file}")
    if as_json:
        output.result(result, "", as_json=True)
    unread = [one["file"] for one in results if one["check"] is not None and one["check"]["found"] == 0]
    for name in unread:
        output.warn(f"{name}: no planted fact was found: this model does not read this document at this length")
    if unread:
        ctx.exit(1)


class _Printer:
    """Prints summaries as their pieces come, under the document's name where there are several."""

    def __init__(self, *, with_names: bool) -> None:
        self.with_names = with_names
        self.num_begun = 0
        self.is_mid_line = False

    def show(self, name: str, piece: str) -> None:
        if not piece:
            self.end_line()
            return
        if self.with_names and not self.is_mid_line:
            output.piece(f"{chr(10) * (self.num_begun > 0)}== {name}\n")
        self.num_begun += not self.is_mid_line
        output.piece(piece)
        self.is_mid_line = True

    def end_line(self) -> None:
        """End a summary, so that a bar or a warning does not stand on its last line."""
        if self.is_mid_line:
            output.piece("\n")
        self.is_mid_line = False


def _config(files: tuple[str, ...], values: dict[str, Any]) -> SummarizeConfig:
    prompt: Path | None = values.pop("prompt")
    sampling = Sampling(**{name: values.pop(name) for name in ("temperature", "top_p", "top_k")})
    return SummarizeConfig(
        files=files,
        request=options.method_request(values),
        prompt=None if prompt is None else _read_prompt(prompt),
        sampling=sampling,
        show_progress=output.is_interactive(),
        **values,
    )


def _prompt_alone(ctx: click.Context, values: dict[str, Any]) -> dict[str, Any]:
    """The values without what --prompt takes the place of.

    Raises:
        click.UsageError: both are given, unless the prompt's flag goes over a configuration file's style.
    """
    if values["prompt"] is None:
        return values
    flag = ctx.get_parameter_source("prompt") is ParameterSource.COMMANDLINE
    weaker = (ParameterSource.DEFAULT, *[ParameterSource.DEFAULT_MAP] * flag)
    given = [f"--{name}" for name in ("style", "language") if ctx.get_parameter_source(name) not in weaker]
    if given:
        raise click.UsageError(
            f"--prompt takes the place of {' and '.join(given)}: say in the file what they would, and leave them out"
        )
    return values | {"style": SummarizeConfig.style, "language": None}


def _read_prompt(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{path} cannot be read as UTF-8 text: {error}", param_hint="--prompt") from error


def _print_texts(files: tuple[str, ...], values: dict[str, Any], output_file: Path | None, *, as_json: bool) -> None:
    from eabf_cli.core.summarize.source import read_texts

    _check_output(output_file, values["overwrite"], files)
    texts = read_texts(files, **{name: values[name] for name in ("pages", "password", "references")})
    for text in texts:
        for warning in text.warnings:
            output.warn(f"{text.name}: {warning}")
    joined = _joined([(text.name, text.text) for text in texts])
    if output_file is not None:
        _write(output_file, joined)
        output.status(f"Written to {output_file}")
    if as_json or output_file is None:
        found = [{"file": t.name, "text": t.text, "num_pages": t.num_pages, "warnings": t.warnings} for t in texts]
        output.result(found[0] if len(found) == 1 else {"texts": found}, joined, as_json=as_json)


def _joined(texts: list[tuple[str, str]]) -> str:
    """One text as it is, several under their names."""
    if len(texts) == 1:
        return texts[0][1]
    return "\n\n".join(f"== {name}\n{text}" for name, text in texts)


def _check_text(result: dict[str, Any]) -> str:
    check = result["check"]
    places = ", ".join(f"{entry['position']:,} {'found' if entry['found'] else 'MISSED'}" for entry in check["depths"])
    return f"{result['file']}: check: {check['found']} of {check['planted']} planted facts found (at token {places})"


def _check_output(path: Path | None, overwrite: bool, files: tuple[str, ...]) -> None:
    if path is None or _is_stream(path):
        return
    if path.exists() and not overwrite:
        raise OutputExistsError(f"output file {path} exists: choose another with -o, or give --overwrite")
    if any(os.path.realpath(name) == os.path.realpath(path) for name in files):
        raise OutputExistsError(f"output file {path} is a document that is read: choose another with -o")
    if not path.absolute().parent.is_dir():
        raise InvalidConfigError(f"the folder of the output file {path} does not exist: make it, or choose another -o")


def _write(path: Path, text: str) -> None:
    from eabf_cli.core.files import disk_errors_explained, write_text

    if _is_stream(path):
        with disk_errors_explained(path):
            path.write_text(text + "\n", encoding="utf-8")
    else:
        # A link stays, and leads to what is written.
        write_text(Path(os.path.realpath(path)), text + "\n")


def _is_stream(path: Path) -> bool:
    """Whether a path is a pipe or a device, which is written to and not replaced."""
    return path.exists() and not (path.is_file() or path.is_dir())
