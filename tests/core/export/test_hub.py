"""Publishing: one commit with the blobs before it, whatever the Hub does, and never over somebody's other model."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import are_progress_bars_disabled, close_session, enable_progress_bars

from eabf_cli.core.errors import HubError, InvalidConfigError
from eabf_cli.core.export.hub import check_hub, push_folder
from eabf_cli.core.export.hub_target import HubTarget
from eabf_cli.core.export.hub_token import hide_token_argument
from tests.core.export.hub_folder import write_folder
from tests.hub import OWNER, READ_TOKEN, WRITE_TOKEN, Fault, LoopbackHub, loopback_hub

REPO = f"{OWNER}/long-model"
TARGET = HubTarget(repo_id=REPO)
CHANGES = r"^(PUT|POST) (?!/api/validate-yaml)"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A Hub that this process takes for the Hub, with a token that may write."""
    with loopback_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
        yield hub
        close_session()


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited between tries, without waiting them."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "export")


def push(folder: Path, target: HubTarget = TARGET, **options: bool) -> dict:
    return push_folder(folder, target, show_progress=False, **options)


def contents_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def published(hub: LoopbackHub, revision: str = "main") -> dict[str, bytes]:
    files = hub.repos[REPO].files(revision)
    return {name: file.content for name, file in sorted(files.items()) if name != ".gitattributes"}


def actions(result: dict) -> dict[str, list[str]]:
    by_action: dict[str, list[str]] = {}
    for file in result["files"]:
        by_action.setdefault(file["action"], []).append(file["name"])
    return by_action


# One commit.


def test_a_new_repository_gets_one_commit_after_its_blobs(hub: LoopbackHub, folder: Path) -> None:
    result = push(folder)
    assert published(hub) == contents_of(folder)
    assert len(hub.asked("/commit/")) == 1
    assert len(hub.asked("^PUT /blobs/")) == 2
    last_blob = max(index for index, line in enumerate(hub.lines) if "PUT" in line or "verify" in line)
    assert last_blob < hub.lines.index(f"POST /api/models/{REPO}/commit/main")
    assert result["commit_oid"] == hub.repos[REPO].refs["main"]
    assert result["commit_url"] == f"{hub.endpoint}/{REPO}/commit/{result['commit_oid']}"
    assert {file["name"]: file["bytes"] for file in result["files"]} == {
        name: len(content) for name, content in contents_of(folder).items()
    }
    assert actions(result).keys() == {"send"}


def test_blobs_travel_without_the_token(hub: LoopbackHub, folder: Path) -> None:
    push(folder)
    assert {request.token for request in hub.requests if request.line.startswith("PUT")} == {None}


def test_private_is_asked_for_when_the_repository_is_made(hub: LoopbackHub, folder: Path) -> None:
    push(folder, HubTarget(repo_id=REPO, private=True))
    assert hub.repos[REPO].private


def test_the_same_folder_again_sends_nothing(hub: LoopbackHub, folder: Path) -> None:
    first = push(folder)
    hub.requests.clear()
    second = push(folder)
    assert hub.asked(CHANGES) == []
    assert second["commit_oid"] == first["commit_oid"]
    assert second["commit_url"] == first["commit_url"]
    assert actions(second).keys() == {"there"}


def test_only_what_changed_is_sent(hub: LoopbackHub, folder: Path) -> None:
    push(folder)
    hub.requests.clear()
    (folder / "config.json").write_text('{"model_type": "eabf_llama", "seed": 2}')
    result = push(folder)
    assert actions(result)["send"] == ["config.json"]
    assert hub.asked("^PUT|objects/batch") == []
    assert published(hub) == contents_of(folder)


def test_an_upload_that_broke_off_goes_on_where_it_stopped(hub: LoopbackHub, folder: Path) -> None:
    shards = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))]
    hub.faults.append(Fault(f"PUT /blobs/.*{shards[1]}", cut_after=200_000, times=99))
    with pytest.raises(HubError, match="not sent again"):
        push(folder)
    assert list(hub.repos[REPO].lfs) == [shards[0]]
    hub.faults.clear()
    hub.requests.clear()
    push(folder)
    assert hub.asked("^PUT") == [f"PUT /blobs/{REPO}/{shards[1]}"]
    assert published(hub) == contents_of(folder)


def test_blobs_are_kept_when_the_commit_fails(hub: LoopbackHub, folder: Path) -> None:
    hub.faults.append(Fault("/commit/", status=403))
    with pytest.raises(HubError):
        push(folder)
    hub.requests.clear()
    push(folder)
    assert hub.asked("^PUT") == []
    assert published(hub) == contents_of(folder)


def test_shards_of_an_earlier_export_go_in_the_same_commit(hub: LoopbackHub, folder: Path, tmp_path: Path) -> None:
    push(write_folder(tmp_path / "earlier", shards=3, seed=1))
    hub.repos[REPO].commit("main", hub.repos[REPO].files() | {"figure.png": hub.repos[REPO].files()["config.json"]})
    hub.requests.clear()
    result = push(folder)
    assert actions(result)["delete"] == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert published(hub).keys() == contents_of(folder).keys() | {"figure.png"}
    assert len(hub.asked("/commit/")) == 1


def test_a_dry_run_lists_and_changes_nothing(hub: LoopbackHub, folder: Path) -> None:
    result = push(folder, dry_run=True)
    assert hub.asked(CHANGES) == []
    assert hub.repos == {}
    assert actions(result) == {"send": sorted(contents_of(folder))}
    assert result["commit_url"] is None


def test_hidden_files_stay_here(hub: LoopbackHub, folder: Path) -> None:
    (folder / ".secrets").write_text("mine")
    push(folder)
    assert ".secrets" not in published(hub)


@pytest.mark.parametrize("show", [True, False])
def test_bars_are_shown_on_request_only(hub: LoopbackHub, folder: Path, show: bool) -> None:
    enable_progress_bars()
    hidden: list[bool] = []
    hub.on_request = lambda request: hidden.append(are_progress_bars_disabled()) if "PUT" in request.line else None
    push_folder(folder, TARGET, show_progress=show)
    assert hidden == [not show] * 2
    assert not are_progress_bars_disabled()


# Branches and pull requests.


def test_a_new_branch_leaves_the_default_one_alone(hub: LoopbackHub, folder: Path) -> None:
    hub.add_repo(REPO)
    before = hub.repos[REPO].refs["main"]
    push(folder, HubTarget(repo_id=REPO, revision="16k"))
    assert published(hub, "16k") == contents_of(folder)
    assert hub.repos[REPO].refs["main"] == before


def test_a_pull_request_changes_no_branch(hub: LoopbackHub, folder: Path) -> None:
    hub.add_repo(REPO, {"config.json": b"{}", "model.safetensors": b"theirs"})
    before = hub.repos[REPO].refs["main"]
    result = push(folder, HubTarget(repo_id=REPO, create_pr=True))
    assert hub.repos[REPO].refs["main"] == before
    assert result["pr_url"] == f"{hub.endpoint}/{REPO}/discussions/1"
    # Loaders would take the old file before the new shards.
    assert published(hub, "refs/pr/1") == contents_of(folder)


def test_a_pull_request_whose_answer_was_lost_is_not_opened_twice(hub: LoopbackHub, folder: Path) -> None:
    hub.add_repo(REPO)
    hub.faults.append(Fault("/commit/", answer_lost=True))
    with pytest.raises(HubError, match="connection broke"):
        push(folder, HubTarget(repo_id=REPO, create_pr=True))
    assert [ref for ref in hub.repos[REPO].refs if ref.startswith("refs/pr")] == ["refs/pr/1"]


def test_a_change_by_somebody_else_in_the_meantime_is_not_overwritten(hub: LoopbackHub, folder: Path) -> None:
    repo = hub.add_repo(REPO)

    def interfere(request: object) -> None:
        if "objects/batch" in str(request) and len(repo.commits) == 1:
            repo.commit("main", repo.files() | {"theirs.txt": repo.files()[".gitattributes"]})

    hub.on_request = interfere
    with pytest.raises(HubError, match="changed in the meantime"):
        push(folder)
    assert published(hub).keys() == {"theirs.txt"}


# Faults that pass.


@pytest.mark.parametrize(
    "fault",
    [
        Fault(f"GET /api/models/{REPO}", status=503),
        Fault("/repos/create", status=429, headers={"Retry-After": "7"}),
        Fault("/repos/create", status=500),
        Fault("validate-yaml", status=502),
        Fault("preupload", status=500),
        Fault("objects/batch", status=504),
        Fault("PUT /blobs", status=500),
        Fault("PUT /blobs", cut_after=200_000),
        Fault("objects/verify", status=503),
        Fault("/commit/", status=429),
        Fault("/commit/", status=500, times=3),
        Fault("/commit/", cut_after=100),
        Fault("/commit/", answer_lost=True),
        Fault("/tree/", status=500),
    ],
    ids=lambda fault: f"{fault.where}-{fault.status or 'connection'}",
)
def test_a_passing_fault_is_waited_out(hub: LoopbackHub, folder: Path, waits: list[float], fault: Fault) -> None:
    hub.faults.append(fault)
    result = push(folder)
    assert fault.times == 0
    assert published(hub) == contents_of(folder)
    assert len(hub.repos[REPO].commits) == 2, "the repository's own first commit and ours"
    assert result["commit_oid"] == hub.repos[REPO].refs["main"]
    assert waits or fault.answer_lost


def test_waits_grow_and_a_server_that_names_one_is_obeyed(hub: LoopbackHub, folder: Path, waits: list[float]) -> None:
    hub.faults += [
        Fault("/repos/create", status=500, times=3),
        Fault("/commit/", status=429, headers={"Retry-After": "7"}),
        Fault("/commit/", status=429, headers={"ratelimit": '"api";r=0;t=55'}),
    ]
    push(folder)
    assert waits == [1, 2, 4, 7, 55]


def test_a_server_that_asks_for_too_much_patience_is_given_up_on(
    hub: LoopbackHub, folder: Path, waits: list[float]
) -> None:
    hub.faults.append(Fault("/repos/create", status=429, headers={"Retry-After": "3600"}, times=9))
    with pytest.raises(HubError, match="Too many requests"):
        push(folder)
    assert waits == []


# Faults that stay.


@pytest.mark.parametrize(
    ("where", "status", "cure"),
    [
        ("/repos/create", 401, "HF_TOKEN"),
        ("/repos/create", 402, "billing"),
        ("/repos/create", 403, "write permission for somebody"),
        ("/commit/", 404, "Check the spelling"),
        ("/commit/", 409, "Something else is changing the repository"),
        ("/commit/", 413, "--max-shard-size"),
        ("PUT /blobs", 413, "--max-shard-size"),
        ("PUT /blobs", 403, "write permission"),
        ("objects/batch", 429, "Too many requests"),
        ("/commit/", 429, "Too many requests"),
        ("PUT /blobs", 500, "a fault of its own"),
        ("/commit/", 500, "a fault of its own"),
        ("preupload", 403, "--create-pr"),
    ],
)
def test_a_lasting_fault_names_the_cure(hub: LoopbackHub, folder: Path, where: str, status: int, cure: str) -> None:
    before = contents_of(folder)
    hub.faults.append(Fault(where, status=status, message=f"no, {WRITE_TOKEN}", times=99))
    with pytest.raises(HubError) as caught:
        push(folder)
    message = str(caught.value)
    assert cure in message
    assert REPO in message
    assert str(status) in message or status == 404
    assert len(message.splitlines()) <= 2
    assert contents_of(folder) == before
    assert REPO not in hub.repos or published(hub) == {}


def test_a_token_that_the_server_repeats_is_not_passed_on(
    hub: LoopbackHub, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.faults.append(Fault("/commit/", status=403, message=f"token {WRITE_TOKEN} may not", times=99))
    with caplog.at_level("INFO"), pytest.raises(HubError) as caught:
        push(folder)
    assert "token *** may not" in str(caught.value)
    assert WRITE_TOKEN not in "".join(traceback.format_exception(caught.value))
    assert WRITE_TOKEN not in caplog.text


def test_a_connection_that_keeps_breaking_says_where(hub: LoopbackHub, folder: Path) -> None:
    hub.faults.append(Fault("PUT /blobs", cut_after=100_000, times=99))
    with pytest.raises(HubError, match="the connection broke") as caught:
        push(folder)
    assert hub.endpoint in str(caught.value)
    assert published(hub) == {}


def test_a_hub_that_is_not_there(hub: LoopbackHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="Check the network and HF_ENDPOINT"):
        push(folder)


def test_a_blob_that_arrives_damaged_is_refused_by_its_checksum(hub: LoopbackHub, folder: Path) -> None:
    hub.faults.append(Fault("PUT /blobs", wrong_checksum=True))
    with pytest.raises(HubError, match="did not arrive as it was sent"):
        push(folder)
    assert published(hub) == {}
    push(folder)
    assert published(hub) == contents_of(folder)


def test_damage_that_the_hub_itself_missed_is_found_after_the_commit(hub: LoopbackHub, folder: Path) -> None:
    hub.faults += [Fault("PUT /blobs", wrong_checksum=True), Fault("verify", status=200, times=2)]
    with pytest.raises(HubError, match=r"does not hold what was sent: model-0000\d-of-00002.safetensors differ"):
        push(folder)


# What is in the way.


@pytest.mark.parametrize(
    ("files", "warning"),
    [
        ({}, None),
        ({"README.md": b"# Soon\n", "LICENSE": b"mine"}, "the card"),
        ({"README.md": b"---\nbase_model: somebody/base\n---\n", "eabf_run.json": b"{}", "config.json": b"{}"}, None),
        # A card that names no base says nothing against it; nor does a base that is a folder.
        ({"eabf_run.json": b"{}", "config.json": b"{}"}, None),
    ],
    ids=["empty", "card and licence", "same base", "base unknown"],
)
def test_a_repository_without_another_model_is_taken(
    hub: LoopbackHub, folder: Path, files: dict[str, bytes], warning: str | None
) -> None:
    hub.add_repo(REPO, files)
    warnings = check_hub(TARGET, licence="mit", base_model="somebody/base")
    assert [warning in said for said in warnings if warning] == ([True] if warning else [])
    push(folder)
    assert contents_of(folder).items() <= published(hub).items()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": b"{}", "model.safetensors": b"theirs"}, "something that eabf did not write"),
        ({"notes.txt": b"theirs"}, "something that eabf did not write"),
        (
            {"eabf_run.json": b"{}", "README.md": b"---\nbase_model: other/base\n---\n"},
            "an export of other/base, this one is of somebody/base",
        ),
    ],
    ids=["model", "notes", "other base"],
)
def test_another_model_is_not_replaced(hub: LoopbackHub, folder: Path, files: dict[str, bytes], message: str) -> None:
    hub.add_repo(REPO, files)
    before = published(hub)
    with pytest.raises(HubError, match=message) as caught:
        check_hub(TARGET, licence="mit", base_model="somebody/base")
    assert "--create-pr" in str(caught.value)
    with pytest.raises(HubError, match=message):
        push(folder)
    assert published(hub) == before
    assert hub.asked(CHANGES) == []


def test_a_public_repository_does_not_get_a_private_model(hub: LoopbackHub, folder: Path) -> None:
    hub.add_repo(REPO)
    with pytest.raises(HubError, match="is public, but --private was given"):
        push(folder, HubTarget(repo_id=REPO, private=True))


def test_a_pull_request_needs_a_repository(hub: LoopbackHub) -> None:
    with pytest.raises(HubError, match="leave out --create-pr"):
        check_hub(HubTarget(repo_id=REPO, create_pr=True), licence="mit", base_model=None)


# Before any work.


def test_offline_mode_is_named(hub: LoopbackHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        check_hub(TARGET, licence="mit", base_model=None)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        push(folder)
    assert hub.requests == []


def test_no_token_is_named(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"hf auth login.*HF_TOKEN"):
        check_hub(TARGET, licence="mit", base_model=None)


@pytest.mark.parametrize("token", ["hf_in two", "hf_new\nline", "hf_ünlikely"])
def test_what_cannot_be_a_token_is_refused_unseen(hub: LoopbackHub, token: str) -> None:
    with pytest.raises(HubError, match="copy it again") as caught:
        check_hub(HubTarget(repo_id=REPO, token=token), licence="mit", base_model=None)
    assert token not in str(caught.value)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("target", "cure"),
    [
        (HubTarget(repo_id=REPO, token="hf_wrong"), "hf auth login"),
        (HubTarget(repo_id=REPO, token=READ_TOKEN), "write permission"),
        (HubTarget(repo_id="else/long-model"), f"name {OWNER}/long-model"),
    ],
    ids=["wrong", "read-only", "other owner"],
)
def test_a_token_that_cannot_write_there_is_refused_at_once(hub: LoopbackHub, target: HubTarget, cure: str) -> None:
    with pytest.raises(HubError, match=cure) as caught:
        check_hub(target, licence="mit", base_model=None)
    assert target.token is None or target.token not in str(caught.value)
    assert hub.asked(CHANGES) == []


@pytest.mark.parametrize(
    "options",
    [
        {"repo_id": "no-owner"},
        {"repo_id": "one/two/three"},
        {"repo_id": "some body/name"},
        {"repo_id": REPO, "create_pr": True, "revision": "16k"},
    ],
)
def test_nonsense_is_refused(options: dict) -> None:
    with pytest.raises(InvalidConfigError):
        HubTarget(**options)


# The token.


def test_the_token_is_not_shown() -> None:
    assert WRITE_TOKEN not in repr(HubTarget(repo_id=REPO, token=WRITE_TOKEN))


def test_a_file_that_holds_the_token_is_not_published(hub: LoopbackHub, folder: Path) -> None:
    (folder / "eabf_run.json").write_text(f'{{"argv": ["--token", "{WRITE_TOKEN}"]}}')
    with pytest.raises(HubError, match=r"eabf_run\.json holds your Hub token") as caught:
        push(folder)
    assert WRITE_TOKEN not in str(caught.value)
    assert hub.asked(CHANGES) == []


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not let a process change its title")
def test_a_token_given_as_an_argument_leaves_the_process_title() -> None:
    program = (
        "import sys; from eabf_cli.core.export.hub_token import hide_token_argument\n"
        "hide_token_argument(sys.argv[2]); print(sys.argv[1:], open('/proc/self/cmdline').read().split(chr(0)))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program, "--token", "hf_geheim", "--also=hf_geheim", "end"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "hf_geheim" not in shown
    assert shown.startswith("['--token', '***', '--also=***', 'end'] [")
    assert "'--token', '*********', '--also=*********', 'end'" in shown


def test_hiding_what_is_not_there_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["eabf", "export"])
    hide_token_argument("hf_not_given")
    assert sys.argv == ["eabf", "export"]


# A Hub without Xet.


def test_a_hub_without_xet_storage_names_the_setting(
    hub: LoopbackHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(HubError, match=r"no Xet storage\n.*HF_HUB_DISABLE_XET=1"):
        push(folder)
    assert hub.asked("xet-write-token")
    assert published(hub) == {}


def test_a_fault_of_the_xet_storage_is_told_apart(
    hub: LoopbackHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.faults.append(Fault("xet-write-token", status=403, times=99))
    with pytest.raises(HubError, match="on its way to Xet storage") as caught:
        push(folder)
    assert "403" in str(caught.value)
