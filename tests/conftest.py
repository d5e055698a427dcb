"""No network, no user's folders: what every test runs under, and the small models that many share."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before anything imports huggingface_hub, which reads them once. Subprocesses inherit them.
_HOME = tempfile.mkdtemp(prefix="eabf-tests-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ |= {
    "HF_HOME": _HOME,
    "EABF_CACHE_DIR": f"{_HOME}/eabf",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
for _name in ("HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_DATASETS_CACHE", "HF_TOKEN", "EABF_DEBUG"):
    os.environ.pop(_name, None)

import logging  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from click.testing import CliRunner, Result  # noqa: E402

from tests.fork_server import ForkServer  # noqa: E402
from tests.tiny_llama import write_tiny_llama  # noqa: E402

Eabf = Callable[..., Result]


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    """A command line reroutes the package's log and silences the libraries; the next test gets them back."""
    from eabf_cli import output

    package = logging.getLogger("eabf_cli")
    before = (package.handlers, package.level, package.propagate, output._verbosity)
    yield
    package.handlers, package.level, package.propagate, output._verbosity = before


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is also the current one."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def eabf(workdir: Path) -> Eabf:
    """Runs an `eabf` command line in this process, in `workdir`; stdout and stderr come apart."""
    from eabf_cli.cli import main

    def run(*arguments: Any, **options: Any) -> Result:
        return CliRunner().invoke(main, list(map(str, arguments)), **options)

    return run


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of three layers, window 64, with the demo tokenizer; not to be changed."""
    return write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def llama_copy(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(tiny_llama_folder, tmp_path / "tiny-llama"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For training a tiny model: several threads wait for each other, on a busy machine ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Runs command lines in processes of their own."""
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def texts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight texts of about 200 tokens each, longer than the tiny Llama's window and shorter than four of it."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    words = "the sun was warm and the house by the sea stood open to a mild wind from the hills"
    lines = []
    for number in range(8):
        turned = words.split()[number:] + words.split()[:number]
        lines.append(json.dumps({"text": " ".join(turned * 10)}))
    path.write_text("\n".join(lines) + "\n")
    return path
