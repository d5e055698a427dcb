"""`eabf export --to-hub` in processes of their own, against a Hub on loopback, and the model loaded back from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eabf_cli.core.checkpoint import load_model
from eabf_cli.core.export.published_record import without_local_paths
from eabf_cli.core.method_request import MethodRequest
from eabf_cli.core.patch_checkpoint import PatchConfig, patch_checkpoint
from tests.fork_server import ForkServer, Outcome
from tests.hub import OWNER, READ_TOKEN, WRITE_TOKEN, Fault, LoopbackHub, loopback_hub
from tests.tiny_llama import TARGET

REPO = f"{OWNER}/long-llama"
COMMIT = f"POST /api/models/{REPO}/commit/main"
AT_ONCE = {"Retry-After": "0"}
# Runs the command as `eabf` does, and notes every address that it connects to or looks up.
WATCHED_EABF = """
import os, sys

def note(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        with open(os.environ["ADDRESSES"], "a") as file:
            print(event, arguments[1] if event == "socket.connect" else arguments[:2], file=file)

sys.addaudithook(note)
from eabf_cli.cli import main
main()
"""
LOAD_BACK = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

repo, tokens = sys.argv[1], torch.arange(int(sys.argv[2]))[None]
model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=True)
print(type(model).__name__, len(tokenizer), "eabf_cli" in sys.modules)
with torch.no_grad():
    save_file({"logits": model(tokens).logits}, "logits.safetensors")
"""


@pytest.fixture(scope="module")
def source(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, extended: something to publish."""
    folder = tmp_path_factory.mktemp("patched") / "tiny-llama-x4"
    request = MethodRequest(method="eabf", factor=4.0)
    patch_checkpoint(PatchConfig(model=str(tiny_llama_folder), output=folder, request=request))
    return folder


@pytest.fixture(scope="module")
def module_hub() -> Iterator[LoopbackHub]:
    with loopback_hub() as hub:
        yield hub


@pytest.fixture
def hub(module_hub: LoopbackHub) -> LoopbackHub:
    module_hub.reset()
    return module_hub


def hub_environment(hub: LoopbackHub, home: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }


@pytest.fixture(scope="module")
def exports(module_hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Commands whose Hub is the one on loopback. The verification, which has its own tests, is left out."""
    environment = hub_environment(module_hub, tmp_path_factory.mktemp("home"))
    server = ForkServer(environment=environment, prepare="tests.unverified_export")
    yield server
    server.close()


def publish(exports: ForkServer, source: Path, cwd: Path, *options: str, token: str = WRITE_TOKEN) -> Outcome:
    arguments = ["export", source, "-o", "out", "--device", "cpu", "--to-hub", REPO, *options]
    return exports.run(arguments, cwd=cwd, environment={"HF_TOKEN": token})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def published(hub: LoopbackHub) -> dict[str, bytes]:
    files = hub.repos[REPO].files()
    return {name: file.content for name, file in sorted(files.items()) if name != ".gitattributes"}


def check_published(hub: LoopbackHub, folder: Path) -> None:
    """The folder is on the Hub as it is, but for the places of files in its record."""
    files, expected = published(hub), contents(folder)
    record, recorded = (json.loads(found.pop("eabf_run.json")) for found in (files, expected))
    assert files == expected
    assert record == without_local_paths(recorded) != recorded
    assert not any(b"/tmp" in content for name, content in published(hub).items() if name.endswith((".json", ".md")))


def check_no_token(outcome: Outcome | subprocess.CompletedProcess[str], *folders: Path) -> None:
    for token in (WRITE_TOKEN, READ_TOKEN):
        assert token not in outcome.stdout + outcome.stderr
        for folder in folders:
            holders = [path for path in folder.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
            assert holders == []


def titles_with(secret: str) -> list[str]:
    """Command lines of running processes that hold a secret."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            title = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if secret in title:
            found.append(title)
    return found


def test_published_through_a_bad_line_and_loaded_back_from_there(
    hub: LoopbackHub, source: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    environment = os.environ | hub_environment(hub, home) | {"ADDRESSES": str(tmp_path / "addresses")}
    environment.pop("HF_TOKEN", None)
    work = tmp_path / "work"
    work.mkdir()
    hub.faults += [
        Fault("/repos/create", status=429, headers=AT_ONCE),
        Fault("PUT /blobs", cut_after=100_000),
        Fault("objects/verify", status=500, headers=AT_ONCE),
        Fault(COMMIT, answer_lost=True),
    ]
    titles: list[str] = []
    hub.on_request = lambda _: titles.extend(titles_with(WRITE_TOKEN))
    done = subprocess.run(
        [
            *(sys.executable, "-c", WATCHED_EABF, "export", str(source), "-o", "out", "--device", "cpu"),
            *("--to-hub", REPO, "--private", "--token", WRITE_TOKEN, "--json"),
        ],
        capture_output=True,
        text=True,
        env=environment,
        cwd=work,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert all(fault.times == 0 for fault in hub.faults)
    check_published(hub, work / "out")
    assert hub.repos[REPO].private

    # One commit, the blobs before it.
    assert len(hub.repos[REPO].commits) == 2, "the repository's own first one and ours"
    assert result["repo_id"] == REPO
    assert result["commit_url"] == f"{hub.endpoint}/{REPO}/commit/{hub.repos[REPO].refs['main']}"
    last_blob = max(index for index, line in enumerate(hub.lines) if line.startswith("PUT") or "verify" in line)
    assert last_blob < hub.lines.index(COMMIT)

    # Nobody else was asked, and nobody saw the token.
    port = hub.endpoint.rpartition(":")[2]
    addresses = (tmp_path / "addresses").read_text().splitlines()
    assert addresses
    assert [line for line in addresses if "127.0.0.1" not in line or port not in line] == []
    assert titles == []
    check_no_token(done, work, home)
    assert {request.token for request in hub.requests if request.line.startswith("PUT")} == {None}

    # Anyone with transformers has the same model.
    hub.faults.clear()
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD_BACK, REPO, str(TARGET)],
        capture_output=True,
        text=True,
        env=environment | {"HF_TOKEN": READ_TOKEN, "HF_HOME": str(tmp_path / "another-home")},
        cwd=tmp_path,
        check=False,
    )
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.split() == ["EABFLlamaForCausalLM", "4096", "False"]
    with torch.no_grad():
        expected = load_model(source, dtype="float32", device="cpu")(torch.arange(TARGET)[None]).logits
    torch.testing.assert_close(load_file(tmp_path / "logits.safetensors")["logits"], expected, rtol=1e-4, atol=1e-4)


def test_published_again_sends_only_what_changed(
    hub: LoopbackHub, exports: ForkServer, source: Path, tmp_path: Path
) -> None:
    first = publish(exports, source, tmp_path)
    assert first.returncode == 0, first.stderr
    hub.requests.clear()
    again = publish(exports, source, tmp_path, "--overwrite", "--json")
    assert again.returncode == 0, again.stderr
    assert hub.asked("^PUT") == []
    sent = [file["name"] for file in json.loads(again.stdout)["upload"]["files"] if file["action"] == "send"]
    assert "model.safetensors" not in sent
    check_published(hub, tmp_path / "out")


@pytest.mark.parametrize(
    ("fault", "cure"),
    [
        (Fault("/repos/create", status=403), "write permission"),
        (Fault(COMMIT, status=404), "Check the spelling"),
        (Fault(COMMIT, status=409), "Something else is changing the repository"),
        (Fault("PUT /blobs", status=413), "--max-shard-size"),
        (Fault(COMMIT, status=429, headers=AT_ONCE), "Too many requests"),
        (Fault(COMMIT, status=500, headers=AT_ONCE), "a fault of its own"),
        (Fault("PUT /blobs", wrong_checksum=True), "did not arrive as it was sent"),
    ],
    ids=lambda value: f"{value.status or 'checksum'}" if isinstance(value, Fault) else "",
)
def test_a_failed_upload_names_the_cure_and_leaves_the_export(
    hub: LoopbackHub, exports: ForkServer, source: Path, tmp_path: Path, fault: Fault, cure: str
) -> None:
    fault.times, fault.message = (1 if fault.wrong_checksum else 99), f"refused, {WRITE_TOKEN}"
    hub.faults.append(fault)
    failed = publish(exports, source, tmp_path)
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert cure in failed.stderr
    assert "stays in out" in failed.stderr
    assert "Traceback" not in failed.stderr
    check_no_token(failed, tmp_path)
    assert {"config.json", "model.safetensors", "README.md", "eabf_run.json"} <= contents(tmp_path / "out").keys()
    assert REPO not in hub.repos or published(hub) == {}


@pytest.mark.parametrize(
    ("token", "cure"),
    [("hf_nobodys", "hf auth login"), (READ_TOKEN, "write permission"), ("", "no token for the Hub")],
    ids=["wrong", "read-only", "none"],
)
def test_a_token_that_will_not_do_is_refused_before_anything_is_written(
    hub: LoopbackHub, exports: ForkServer, source: Path, tmp_path: Path, token: str, cure: str
) -> None:
    failed = publish(exports, source, tmp_path, token=token)
    assert failed.returncode == 1
    assert cure in failed.stderr
    assert "Traceback" not in failed.stderr
    assert list(tmp_path.iterdir()) == []
    assert hub.repos == {}
    if token:
        assert token not in failed.stderr


def test_somebodys_other_model_is_refused_before_anything_is_written(
    hub: LoopbackHub, exports: ForkServer, source: Path, tmp_path: Path
) -> None:
    hub.add_repo(REPO, {"config.json": b"{}", "model.safetensors": b"theirs"})
    failed = publish(exports, source, tmp_path)
    assert failed.returncode == 1
    assert "something that eabf did not write" in failed.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_licence_with_conditions_needs_to_be_accepted(
    hub: LoopbackHub, exports: ForkServer, source: Path, tmp_path: Path
) -> None:
    card = "---\nlicense: llama2\n---\n# Llama\n"
    conditioned = tmp_path / "conditioned"
    conditioned.mkdir()
    for name, content in (contents(source) | {"README.md": card.encode()}).items():
        (conditioned / name).write_bytes(content)
    failed = publish(exports, conditioned, tmp_path)
    assert failed.returncode == 1
    assert "Llama 2 Community License" in failed.stderr
    assert "--accept-license" in failed.stderr
    assert not (tmp_path / "out").exists()
    accepted = publish(exports, conditioned, tmp_path, "--accept-license")
    assert accepted.returncode == 0, accepted.stderr
    assert b"license: llama2" in published(hub)["README.md"]


def test_a_dry_run_sends_nothing(hub: LoopbackHub, exports: ForkServer, source: Path, tmp_path: Path) -> None:
    planned = publish(exports, source, tmp_path, "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert REPO in planned.stdout
    assert hub.asked("^(POST|PUT)") == []
    assert list(tmp_path.iterdir()) == []


def test_a_pull_request_leaves_the_branch_alone(
    hub: LoopbackHub, exports: ForkServer, source: Path, tmp_path: Path
) -> None:
    hub.add_repo(REPO, {"config.json": b"{}", "model.safetensors": b"theirs"})
    done = publish(exports, source, tmp_path, "--create-pr", "--commit-message", "A longer window", "--json")
    assert done.returncode == 0, done.stderr
    assert published(hub)["model.safetensors"] == b"theirs"
    assert json.loads(done.stdout)["upload"]["pr_url"] == f"{hub.endpoint}/{REPO}/discussions/1"


def test_offline_mode_is_refused_before_anything_is_written(
    fork_server: ForkServer, source: Path, tmp_path: Path
) -> None:
    failed = publish(fork_server, source, tmp_path)
    assert failed.returncode == 1
    assert "HF_HUB_OFFLINE is set" in failed.stderr
    assert list(tmp_path.iterdir()) == []
