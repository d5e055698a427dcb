"""`SummarizeConfig`: which documents, which model, how to read and how to write. No torch in here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from eabf_cli.core.errors import InvalidConfigError
from eabf_cli.core.method_request import MethodRequest

Style = Literal["bullets", "paragraph", "structured"]
TooLong = Literal["error", "truncate-middle", "map-reduce"]
References = Literal["drop", "keep"]

TEXT_FIELD = "{text}"
CHUNK_TOKENS = 2048


def check_standard_input(files: Iterable[str | Path]) -> None:
    """Refuse files that name standard input twice.

    Raises:
        InvalidConfigError: they do.
    """
    if [str(name) for name in files].count("-") > 1:
        raise InvalidConfigError("standard input (-) can be read once only")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; with all fields None the likeliest is taken."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.temperature is not None and not self.temperature > 0:
            raise InvalidConfigError(
                f"--temperature must be above 0, got {self.temperature:g}: leave it out for the likeliest token"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InvalidConfigError(f"--top-p must be above 0 and at most 1, got {self.top_p:g}")
        if self.top_k is not None and self.top_k < 1:
            raise InvalidConfigError(f"--top-k must be at least 1, got {self.top_k}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature is None and self.top_p is None and self.top_k is None

    def generate_options(self) -> dict[str, Any]:
        """The same for transformers' `generate`, which would otherwise take a checkpoint's own settings."""
        if self.is_greedy:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {
            "do_sample": True,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            # 0 leaves all tokens in; transformers' own default is 50.
            "top_k": 0 if self.top_k is None else self.top_k,
        }


@dataclass(frozen=True, kw_only=True)
class SummarizeConfig:
    """Arguments of `eabf summarize`.

    Attributes:
        files: paths of documents, or "-" for standard input.
        model: as for `load_model`; None takes SmolLM2-135M-Instruct (default_model.py).
        request: how to extend the window. Without a factor or a length the document decides: the smallest of
            2 and 4 that holds it.
        style: shape of the summary.
        language: language to write in; None leaves that to the model.
        prompt: an own request, with `{text}` where the document goes, instead of style and language.
        max_new_tokens: length of a summary at most.
        too_long: what to do with a document that the extended window does not hold.
        references: whether the list of references is read.
        pages: of a PDF, such as "1-8"; None: all.
        password: of an encrypted PDF.
        sampling: greedy unless told otherwise.
        check: plant facts in the document, ask for them and count the answers.
        load_in_4bit: weights in NF4 (needs bitsandbytes).
        compile: compile the step that writes a token, with a cache of fixed shape.
        chunk_tokens: tokens of the prompt in one forward pass.
        dry_run: count tokens and choose the window; load no weights.

    Raises:
        InvalidConfigError: a value that makes no sense.
    """

    files: tuple[str | Path, ...]
    model: str | None = None
    revision: str | None = None
    request: MethodRequest = field(default_factory=MethodRequest)
    style: Style = "bullets"
    language: str | None = None
    prompt: str | None = None
    max_new_tokens: int = 400
    too_long: TooLong = "error"
    references: References = "drop"
    pages: str | None = None
    password: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    check: bool = False
    load_in_4bit: bool = False
    compile: bool = False
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 42
    trust_remote_code: bool = False
    chunk_tokens: int = CHUNK_TOKENS
    dry_run: bool = False
    show_progress: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.files, str | Path):
            raise InvalidConfigError(f"files must be a list of documents, got one name: [{str(self.files)!r}]")
        object.__setattr__(self, "files", tuple(self.files))
        if not self.files:
            raise InvalidConfigError("there is nothing to summarize: name a file, or - for standard input")
        check_standard_input(self.files)
        for name, known in (("style", Style), ("too_long", TooLong), ("references", References)):
            if getattr(self, name) not in get_args(known):
                raise InvalidConfigError(
                    f"{name} must be one of {', '.join(get_args(known))}, got {getattr(self, name)!r}"
                )
        for name in ("max_new_tokens", "chunk_tokens"):
            if getattr(self, name) < 1:
                raise InvalidConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.language is not None and not self.language.strip():
            raise InvalidConfigError("--language needs a name, such as French; leave it out for the model's choice")
        if self.prompt is not None and self.prompt.count(TEXT_FIELD) != 1:
            raise InvalidConfigError(
                f"the prompt must contain {TEXT_FIELD} once, where the document goes; "
                f"it has it {self.prompt.count(TEXT_FIELD)} times"
            )
        if self.prompt is not None and (self.language is not None or self.style != type(self).style):
            raise InvalidConfigError("a prompt takes the place of style and language: leave them out, or the prompt")
