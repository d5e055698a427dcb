"""A Hub on loopback: models to download, and the whole protocol of an upload, with faults on demand.

It speaks what huggingface_hub asks for with Xet off: whoami, create, validate-yaml, preupload, the LFS batch, the
blobs and their verification, the NDJSON commit, tree, model info, branches, resolve. Subprocesses find it by
HF_ENDPOINT.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

import yaml

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Tokens that the Hub knows, and who they stand for. No word of them may appear anywhere else.
WRITE_TOKEN = "hf_writesomethingnobodymaysee"
READ_TOKEN = "hf_readsomethingnobodymaysee"
OWNER = "somebody"
_LFS_FROM_BYTES = 1_000_000


@dataclass(frozen=True)
class StoredFile:
    """A file of a repository."""

    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        content = self.content
        if self.is_lfs:
            pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n"
            content = (pointer % (self.sha256, len(self.content))).encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.blob_id


Files = dict[str, StoredFile]


@dataclass
class Repo:
    """A model repository: commits (snapshots of all files), what points at them, and the LFS store."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)

    def commit(self, ref: str, files: Files, oid: str | None = None) -> str:
        listed = json.dumps([ref, len(self.commits), {name: file.etag for name, file in files.items()}])
        oid = oid or hashlib.sha1(listed.encode()).hexdigest()
        self.commits[oid] = files
        self.refs[ref] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> Files:
        oid = self.resolve(revision)
        assert oid is not None
        return self.commits[oid]


@dataclass(frozen=True)
class Request:
    """What was asked: "PUT /path", who by, and how many bytes came along."""

    line: str
    token: str | None
    num_bytes: int


@dataclass
class Fault:
    """Something that goes wrong the next `times` times that a request line (METHOD PATH) matches.

    Attributes:
        status: answer with this instead.
        cut_after: read only so many bytes of the request, then break the connection.
        answer_lost: carry the request out, then break the connection without an answer.
        wrong_checksum: store other bytes than those that came.
    """

    where: str
    status: int | None = None
    message: str = "injected"
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1
    cut_after: int | None = None
    answer_lost: bool = False
    wrong_checksum: bool = False


class LoopbackHub:
    """The Hub's state, and what was asked of it."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.on_request: Callable[[Request], object] = bool
        self.lock = threading.RLock()

    def reset(self) -> None:
        with self.lock:
            self.repos.clear()
            self.requests.clear()
            self.faults.clear()
            self.on_request = bool

    def add_repo(self, repo_id: str, files: dict[str, bytes] | None = None, *, private: bool = False) -> Repo:
        repo = Repo(private=private)
        contents = {".gitattributes": b"*.safetensors filter=lfs\n"} | (files or {})
        repo.commit("main", {name: stored(name, content) for name, content in contents.items()})
        self.repos[repo_id] = repo
        return repo

    @property
    def lines(self) -> list[str]:
        return [request.line for request in self.requests]

    def asked(self, pattern: str) -> list[str]:
        return [line for line in self.lines if re.search(pattern, line)]

    def take_fault(self, line: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.where, line):
                fault.times -= 1
                return fault
        return None


def stored(name: str, content: bytes) -> StoredFile:
    return StoredFile(content, name.endswith(".safetensors") or len(content) > _LFS_FROM_BYTES)


@contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    """Run a Hub without repositories."""
    hub = LoopbackHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def local_hub(repo_id: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve `folder` as `repo_id`; yields the endpoint and the list of what was asked for."""
    with loopback_hub() as hub:
        repo = hub.repos[repo_id] = Repo()
        files = {path.name: stored(path.name, path.read_bytes()) for path in sorted(folder.iterdir())}
        repo.commit("main", files, COMMIT)
        asked: list[str] = []
        hub.on_request = lambda request: asked.append(request.line)
        yield hub.endpoint, asked


class _Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        self.status, self.message, self.code = status, message, code


class _Cut(Exception):
    pass


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def do_PUT(self) -> None:
        self._handle()

    def log_message(self, *args: object) -> None:
        pass

    # A request, its fault, its answer.

    def _handle(self) -> None:
        url = urlparse(self.path)
        self.asked_path = unquote(url.path)
        self.query = parse_qs(url.query)
        line = f"{self.command} {self.asked_path}"
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        with self.hub.lock:
            self.fault = self.hub.take_fault(line)
        try:
            body = self._read_body()
            request = Request(line, token, len(body))
            with self.hub.lock:
                self.hub.requests.append(request)
                self.hub.on_request(request)
                if self.fault is not None and self.fault.cut_after is not None:
                    raise _Cut
                if self.fault is not None and self.fault.status is not None:
                    raise _Refusal(self.fault.status, self.fault.message)
                self._route(body, token)
        except _Refusal as refusal:
            self._refuse(refusal)
        except (_Cut, ConnectionError):
            self.close_connection = True

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
                self._cut_in_the_middle(sum(map(len, pieces)))
            self.rfile.readline()
            return b"".join(pieces)
        length = int(self.headers.get("Content-Length") or 0)
        cut_after = self.fault.cut_after if self.fault is not None else None
        if cut_after is not None and cut_after < length:
            self._cut_in_the_middle(len(self.rfile.read(cut_after)))
        return self.rfile.read(length)

    def _cut_in_the_middle(self, num_read: int) -> None:
        if self.fault is not None and self.fault.cut_after is not None and num_read >= self.fault.cut_after:
            line = f"{self.command} {self.asked_path}"
            self.hub.requests.append(Request(f"{line} (cut)", None, num_read))
            raise _Cut

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        if self.fault is not None and self.fault.answer_lost:
            raise _Cut
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, refusal: _Refusal) -> None:
        headers = {"Content-Type": "application/json", "X-Error-Message": refusal.message}
        if refusal.code is not None:
            headers["X-Error-Code"] = refusal.code
        if self.fault is not None:
            headers |= self.fault.headers
        self._send(refusal.status, json.dumps({"error": refusal.message}).encode(), headers)

    # Who may do what.

    def _user(self, token: str | None) -> str | None:
        if token is None:
            return None
        if token not in (WRITE_TOKEN, READ_TOKEN):
            raise _Refusal(401, f"Invalid credentials in Authorization header ({token})")
        return OWNER

    def _may_write(self, repo_id: str, token: str | None) -> None:
        if self._user(token) is None:
            raise _Refusal(401, "Authorization required")
        if token == READ_TOKEN or not repo_id.startswith(f"{OWNER}/"):
            raise _Refusal(403, f"you have no write access to {repo_id}")

    def _repo(self, repo_id: str, token: str | None) -> Repo:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and self._user(token) is None):
            raise _Refusal(404, "Repository not found", "RepoNotFound")
        return repo

    def _files(self, repo: Repo, revision: str) -> tuple[str, Files]:
        oid = repo.resolve(revision)
        if oid is None:
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, repo.commits[oid]

    # The protocol.

    def _route(self, body: bytes, token: str | None) -> None:
        line = f"{self.command.replace('HEAD', 'GET')} {self.asked_path}"
        routes: list[tuple[str, Callable[..., None]]] = [
            (r"GET /api/whoami-v2", self._whoami),
            (r"POST /api/repos/create", self._create),
            (r"POST /api/validate-yaml", self._validate_yaml),
            (r"GET /api/models/([^/]+/[^/]+)/tree/(refs/pr/\d+|[^/]+)(?:/(.+))?", self._tree),
            (r"GET /api/models/([^/]+/[^/]+)/refs", self._list_refs),
            (r"GET /api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self._model_info),
            (r"POST /api/models/([^/]+/[^/]+)/branch/(.+)", self._create_branch),
            (r"POST /api/models/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
            (r"POST /api/models/([^/]+/[^/]+)/commit/(.+)", self._commit),
            (r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._lfs_batch),
            (r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/verify", self._lfs_verify),
            (r"PUT /blobs/([^/]+/[^/]+)/([0-9a-f]+)", self._put_blob),
            (r"GET /([^/]+/[^/]+)/resolve/(refs/pr/\d+|[^/]+)/(.+)", self._download),
        ]
        for pattern, answer in routes:
            if match := re.fullmatch(pattern, line):
                answer(*match.groups(), body=body, token=token)
                return
        raise _Refusal(404, "no such page")

    def _whoami(self, *, body: bytes, token: str | None) -> None:
        if self._user(token) is None:
            raise _Refusal(401, "Invalid username or password.")
        role = "write" if token == WRITE_TOKEN else "read"
        self._json({"type": "user", "name": OWNER, "orgs": [], "auth": {"accessToken": {"role": role}}})

    def _create(self, *, body: bytes, token: str | None) -> None:
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or OWNER}/{asked['name']}"
        self._may_write(repo_id, token)
        url = f"{self.hub.endpoint}/{repo_id}"
        if repo_id in self.hub.repos:
            self._json({"error": "You already created this model repo", "url": url}, 409)
            return
        self.hub.add_repo(repo_id, private=asked.get("visibility") == "private" or asked.get("private") is True)
        self._json({"url": url})

    def _validate_yaml(self, *, body: bytes, token: str | None) -> None:
        content = json.loads(body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        if match is None or not isinstance(yaml.safe_load(match[1]), dict):
            self._json({"errors": [{"message": "no metadata block"}], "warnings": []}, 400)
            return
        self._json({"errors": [], "warnings": []})

    def _model_info(self, repo_id: str, revision: str | None, *, body: bytes, token: str | None) -> None:
        repo = self._repo(repo_id, token)
        oid, files = self._files(repo, revision or "main")
        card = re.match(rb"---\n(.*?)\n---\n", files["README.md"].content, re.DOTALL) if "README.md" in files else None
        info: dict[str, Any] = {"id": repo_id, "sha": oid, "private": repo.private, "tags": []}
        info["siblings"] = [{"rfilename": name} for name in sorted(files)]
        if card is not None:
            info["cardData"] = yaml.safe_load(card[1])
        self._json(info)

    def _tree(self, repo_id: str, revision: str, folder: str | None, *, body: bytes, token: str | None) -> None:
        _, files = self._files(self._repo(repo_id, token), revision)
        listed = []
        inside = {name: file for name, file in files.items() if folder is None or name.startswith(f"{folder}/")}
        if folder is not None and not inside:
            raise _Refusal(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        for name, file in sorted(inside.items()):
            entry: dict[str, Any] = {
                "type": "file",
                "path": name,
                "size": len(file.content),
                "oid": file.blob_id,
            }
            if file.is_lfs:
                entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 134}
            listed.append(entry)
        self._json(listed)

    def _list_refs(self, repo_id: str, *, body: bytes, token: str | None) -> None:
        refs = self._repo(repo_id, token).refs
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
            for name, oid in refs.items()
            if not name.startswith("refs/")
        ]
        self._json({"branches": branches, "converts": [], "tags": []})

    def _create_branch(self, repo_id: str, branch: str, *, body: bytes, token: str | None) -> None:
        self._may_write(repo_id, token)
        repo = self._repo(repo_id, token)
        if branch in repo.refs:
            raise _Refusal(409, f"Reference already exists: {branch}")
        repo.refs[branch] = repo.refs["main"]
        self._json({})

    def _preupload(self, repo_id: str, revision: str, *, body: bytes, token: str | None) -> None:
        repo = self._repo(repo_id, token)
        if "create_pr" not in self.query:
            self._may_write(repo_id, token)
        _, present = self._files(repo, revision)
        answers = []
        for asked in json.loads(body)["files"]:
            is_lfs = asked["path"].endswith(".safetensors") or asked["size"] > _LFS_FROM_BYTES
            answer = {
                "path": asked["path"],
                "uploadMode": "lfs" if is_lfs else "regular",
                "shouldIgnore": False,
            }
            if asked["path"] in present:
                answer["oid"] = present[asked["path"]].etag
            answers.append(answer)
        self._json({"files": answers})

    def _lfs_batch(self, repo_id: str, *, body: bytes, token: str | None) -> None:
        if self._user(token) is None:
            raise _Refusal(401, "Authorization required")
        repo = self._repo(repo_id, token)
        objects = []
        for asked in json.loads(body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in repo.lfs:
                store = f"{self.hub.endpoint}/blobs/{repo_id}/{asked['oid']}"
                verify = f"{self.hub.endpoint}/{repo_id}.git/info/lfs/objects/verify"
                answer["actions"] = {"upload": {"href": store}, "verify": {"href": verify}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def _put_blob(self, repo_id: str, oid: str, *, body: bytes, token: str | None) -> None:
        if token is not None:
            raise _Refusal(400, "a signed URL takes no Authorization header")
        if self.fault is not None and self.fault.wrong_checksum:
            body = body[::-1]
        elif hashlib.sha256(body).hexdigest() != oid:
            raise _Refusal(400, "BadDigest")
        self.hub.repos[repo_id].lfs[oid] = body
        self._send(200, b"", {"ETag": f'"{oid}"'})

    def _lfs_verify(self, repo_id: str, *, body: bytes, token: str | None) -> None:
        self._may_write(repo_id, token)
        asked = json.loads(body)
        repo = self._repo(repo_id, token)
        content = repo.lfs.get(asked["oid"])
        if content is None or hashlib.sha256(content).hexdigest() != asked["oid"] or len(content) != asked["size"]:
            # The object is thrown away, so that it is asked for again.
            repo.lfs.pop(asked["oid"], None)
            raise _Refusal(400, f"the checksum of object {asked['oid']} does not match")
        self._json({})

    def _commit(self, repo_id: str, revision: str, *, body: bytes, token: str | None) -> None:
        repo = self._repo(repo_id, token)
        is_pull_request = "create_pr" in self.query
        if self._user(token) is None:
            raise _Refusal(401, "Authorization required")
        if not is_pull_request:
            self._may_write(repo_id, token)
        head, present = self._files(repo, revision)
        lines = [json.loads(line) for line in body.splitlines()]
        parent = lines[0]["value"].get("parentCommit")
        if parent is not None and parent != head and not is_pull_request:
            raise _Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(present)
        for operation in lines[1:]:
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = StoredFile(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in repo.lfs:
                    raise _Refusal(400, f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = StoredFile(repo.lfs[value["oid"]], True)
            elif key == "deletedFile":
                del files[value["path"]]
        number = sum(ref.startswith("refs/pr/") for ref in repo.refs) + 1
        oid = repo.commit(f"refs/pr/{number}" if is_pull_request else revision, files)
        url = f"{self.hub.endpoint}/{repo_id}"
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{url}/commit/{oid}", "hookOutput": ""}
        if is_pull_request:
            answer["pullRequestUrl"] = f"{url}/discussions/{number}"
        self._json(answer)

    def _download(self, repo_id: str, revision: str, name: str, *, body: bytes, token: str | None) -> None:
        oid, files = self._files(self._repo(repo_id, token), revision)
        if name not in files:
            raise _Refusal(404, f"{name} not found", "EntryNotFound")
        self._send(200, files[name].content, {"X-Repo-Commit": oid, "ETag": f'"{files[name].etag}"'})
