"""The part of the hub's HTTP interface that huggingface_hub needs for one repository's files, on the loopback interface.

Files are kept as commits of whole trees. `.safetensors` files go through Git LFS, as on the hub, the others into the commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

TOKEN = "hf_test"
OWNER = "somebody"


class FakeHub(ThreadingHTTPServer):
    """Attributes: `repos`, by id a list of commits (hash, files); `private`, by id; `calls`, what was asked; `messages`, of commits."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.messages: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes] | None:
        commits = dict(self.repos.get(repo, []))
        if revision != "main":
            return commits.get(revision)
        return [{}, *commits.values()][-1] if repo in self.repos else None

    def commit(self, repo: str, changes: dict[str, bytes]) -> str:
        files = {**(self.files(repo) or {}), **changes}
        oid = hashlib.sha1(repr((len(self.repos[repo]), sorted(files.items()))).encode()).hexdigest()
        self.repos[repo].append((oid, files))
        return oid


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self._read()
        path = urlsplit(self.path).path
        if path == "/api/validate-yaml":
            return self._json({"warnings": [], "errors": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._error(401, "Invalid credentials in Authorization header")
        if path == "/api/repos/create":
            return self._create()
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path):
            repo, verb = found.groups()
            if repo not in self.server.repos:
                return self._error(404, "Repository not found", "RepoNotFound")
            return self._modes() if verb == "preupload" else self._commit(repo)
        if re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            return self._batch()
        return self._error(404, f"no such route: {path}")

    def do_PUT(self) -> None:
        self._read()
        oid = urlsplit(self.path).path.removeprefix("/large/")
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._error(400, "the content is not what was announced")
        self.server.large[oid] = self.body
        return self._send(200, b"")

    def do_GET(self) -> None:
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)", urlsplit(self.path).path):
            self._read()
            (repo,) = found.groups()
            if repo not in self.server.repos:
                return self._error(404, "Repository not found", "RepoNotFound")
            return self._json({"id": repo, "private": self.server.private[repo], "siblings": []})
        return self._resolve()

    def do_HEAD(self) -> None:
        self._resolve()

    def _create(self) -> None:
        asked = json.loads(self.body)
        repo = f"{asked.get('organization') or OWNER}/{asked['name']}"
        if repo in self.server.repos:
            return self._json({"url": f"{self.server.url}/{repo}", "error": "You already created this model repo"}, 409)
        if not repo.startswith(f"{OWNER}/"):
            return self._error(403, f"You don't have the rights to create a model under the namespace {repo}")
        self.server.repos[repo] = []
        self.server.private[repo] = asked.get("visibility") == "private" or asked.get("private") is True
        return self._json({"url": f"{self.server.url}/{repo}", "name": repo})

    def _modes(self) -> None:
        files = [
            {
                "path": one["path"],
                "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for one in json.loads(self.body)["files"]
        ]
        self._json({"files": files})

    def _batch(self) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.server.url}/large/{one['oid']}"}}}
            for one in json.loads(self.body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, repo: str) -> None:
        changes = {}
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                self.server.messages.append(value["summary"])
            elif item["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                changes[value["path"]] = self.server.large[value["oid"]]
        oid = self.server.commit(repo, changes)
        self._json({"commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True})

    def _resolve(self) -> None:
        self._read()
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", urlsplit(self.path).path)
        repo, revision, name = found.groups() if found else ("", "", "")
        own = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo not in self.server.repos or (self.server.private[repo] and not own):
            return self._error(404 if own else 401, "Repository not found", "RepoNotFound")
        files = self.server.files(repo, revision)
        if files is None:
            return self._error(404, "Invalid rev id", "RevisionNotFound")
        if name not in files:
            return self._error(404, "Entry not found", "EntryNotFound")
        commit = revision if revision != "main" else self.server.repos[repo][-1][0]
        etag = hashlib.sha256(files[name]).hexdigest()
        return self._send(200, files[name], {"X-Repo-Commit": commit, "ETag": f'"{etag}"'})

    def _read(self) -> None:
        self.server.calls.append(f"{self.command} {self.path}")
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            self.body = b"".join(chunks)
        else:
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _json(self, answer: Any, status: int = 200) -> None:
        self._send(status, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, message: str, code: str | None = None) -> None:
        headers = {"X-Error-Message": message, **({} if code is None else {"X-Error-Code": code})}
        self._send(status, json.dumps({"error": message}).encode(), {"Content-Type": "application/json", **headers})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


@contextmanager
def serve() -> Iterator[FakeHub]:
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
