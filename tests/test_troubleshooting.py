"""docs/troubleshooting.md quotes what the tool really says.

A block that begins with a command is run in a folder as a user would have it, and must end as quoted. Any other must be
what a string of the package makes with some values. A part that is left out (`...`) stands for anything.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
from functools import cache
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, GPT2Config

from tests.architectures import build_tiny_model
from tests.conftest import Eabf
from tests.core.documents.pdf_builder import Page, build_pdf
from tests.tiny_llama import write_tiny_llama

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```text\n(.*?)\n```$", PAGE, flags=re.DOTALL | re.MULTILINE)
COMMANDS = [block for block in BLOCKS if block.startswith("$ ")]
MESSAGES = [block.removeprefix("Error: ") for block in BLOCKS if block.startswith("Error: ")]
FROM_TRANSFORMERS = [block for block in BLOCKS if block.startswith("ValueError: ")]
SENTENCE = "The sun was warm and the house by the sea stood open to a mild wind from the hills."


def as_pattern(quoted: str) -> re.Pattern[str]:
    return re.compile(".+".join(map(re.escape, quoted.split("..."))), re.DOTALL)


@cache
def source_strings() -> tuple[tuple[re.Pattern[str], int], ...]:
    """What every string of the package may look like with its values filled in, and how many characters are fixed."""
    found = []
    for path in sorted((REPOSITORY / "eabf_cli").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts = [node.value]
            else:
                continue
            pattern = "".join(".*?" if part is None else re.escape(part) for part in parts)
            num_fixed = sum(len(part) for part in parts if part is not None)
            found.append((re.compile(pattern, re.DOTALL), num_fixed))
    return tuple(found)


def is_from_source(message: str) -> bool:
    """Whether one string of the package makes this message, and a good part of it is fixed there."""
    return any(
        num_fixed >= 0.3 * len(message) and pattern.fullmatch(message) for pattern, num_fixed in source_strings()
    )


@pytest.fixture(scope="module")
def user_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files and folders that the page's commands name."""
    folder = tmp_path_factory.mktemp("user")
    write_tiny_llama(folder / "my-model")

    GPT2Config().save_pretrained(folder / "gpt2-model")
    shutil.copytree(folder / "my-model", folder / "old-model")
    (folder / "old-model" / "model.safetensors").rename(folder / "old-model" / "pytorch_model.bin")
    cut = Path(shutil.copytree(folder / "my-model", folder / "cut-model")) / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1000])
    build_tiny_model("phi").save_pretrained(folder / "phi-model")

    from eabf_cli import PatchConfig, patch_checkpoint

    patch_checkpoint(PatchConfig(model=str(folder / "my-model"), output=folder / "extended"))

    texts = [{"text": f"{number}. " + " ".join([SENTENCE] * 10)} for number in range(8)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "Who?", "response": "Nobody."}) + "\n")
    (folder / "broken.jsonl").write_text('{"text": "' + SENTENCE + '"\n')
    (folder / "paper.txt").write_text(" ".join([SENTENCE] * 20))
    (folder / "long.txt").write_text(" ".join([SENTENCE] * 300))
    (folder / "scan.pdf").write_bytes(build_pdf([Page(), Page()]))
    (folder / "locked.pdf").write_bytes(build_pdf([Page()], password="key"))

    (folder / "pictures").mkdir()
    (folder / "pictures" / "sea.png").touch()
    (folder / "letters").mkdir()
    (folder / "letters" / "to-a-friend.txt").write_text(SENTENCE)
    (folder / "stopped").mkdir()
    (folder / "stopped" / "eabf_settings.json").write_text("{}")
    return folder


def test_every_block_is_checked() -> None:
    assert len(COMMANDS) + len(MESSAGES) + len(FROM_TRANSFORMERS) == len(BLOCKS)
    assert PAGE.count("```text") == len(BLOCKS)
    assert min(map(len, (COMMANDS, MESSAGES, FROM_TRANSFORMERS))) > 0


@pytest.mark.parametrize("block", COMMANDS, ids=lambda block: block.split("\n")[0].removeprefix("$ "))
def test_a_command_ends_as_quoted(block: str, eabf: Eabf, user_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(user_folder)
    command, quoted = block.split("\n", 1)
    before = sorted(user_folder.rglob("*"))
    result = eabf(*shlex.split(command)[2:])
    assert result.exit_code in (1, 2), (result.stdout, result.exception)
    said = "Error: " + result.stderr.rpartition("Error: ")[2].rstrip("\n")
    assert as_pattern(quoted).fullmatch(said), said
    assert sorted(user_folder.rglob("*")) == before


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message[:40])
def test_a_message_is_one_of_the_package(message: str) -> None:
    assert is_from_source(message)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message[:40])
def test_a_word_that_is_missing_in_a_message_is_noticed(message: str) -> None:
    """Unless it is a value, which a message of another run has otherwise."""
    words = message.split(" ")
    noticed = [not is_from_source(" ".join(words[:index] + words[index + 1 :])) for index in range(len(words))]
    assert sum(noticed) >= 0.3 * len(words)


def test_transformers_refuses_the_checkpoint_as_quoted(user_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(user_folder)
    monkeypatch.setattr("builtins.input", lambda *_: "n")
    (quoted,) = FROM_TRANSFORMERS
    with pytest.raises(ValueError) as error:
        AutoModelForCausalLM.from_pretrained("extended")
    assert as_pattern(quoted.removeprefix("ValueError: ")).match(str(error.value)), str(error.value)
