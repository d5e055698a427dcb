"""A small Hub on loopback that serves one folder as one model, for subprocesses that set HF_ENDPOINT to it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def local_hub(repo_id: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve `folder` as `repo_id`; yields the endpoint and the list of paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            path = unquote(urlparse(self.path).path)
            asked.append(f"{self.command} {path}")
            if path.startswith(f"/api/models/{repo_id}/tree/"):
                files = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _etag(file)}
                    for file in sorted(folder.iterdir())
                ]
                self._json(files, with_body)
            elif path.startswith(f"/api/models/{repo_id}"):
                siblings = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
                self._json({"id": repo_id, "sha": COMMIT, "siblings": siblings, "tags": []}, with_body)
            elif path.startswith(f"/{repo_id}/resolve/"):
                self._file(folder / path.rpartition("/")[2], with_body)
            else:
                self._refuse("RepoNotFound", "Repository not found")

        def _json(self, value: object, with_body: bool) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def _file(self, path: Path, with_body: bool) -> None:
            if not path.is_file():
                self._refuse("EntryNotFound", f"{path.name} not found")
                return
            self.send_response(200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{_etag(path)}"')
            self.send_header("Content-Length", str(path.stat().st_size))
            self.end_headers()
            if with_body:
                self.wfile.write(path.read_bytes())

        def _refuse(self, code: str, message: str) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", message)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
