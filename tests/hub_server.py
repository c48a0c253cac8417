"""A Hub on the loopback interface: as much of its protocol as huggingface_hub needs to push and to load models.

It keeps every body it receives, can be told to fail, and is the other end of the real client in the tests.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest


@dataclass
class Repository:
    """Branches of files, and the commits that made them."""

    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[str] = field(default_factory=lambda: [hashlib.sha1(b"init").hexdigest()])

    @property
    def files(self) -> dict[str, bytes]:
        return self.branches["main"]


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    body: bytes
    token: str | None


@dataclass(frozen=True)
class Failure:
    """Answers with a status, or drops the connection with status 0."""

    status: int
    message: str = ""


class Hub:
    """The state behind the server.

    Attributes:
        repositories: By their ids.
        requests: All requests, in order of arrival.
        fail: Asked for each request; a `Failure` is done instead of the answer.
        uses_lfs: Which files go by Git LFS instead of inside the commit; needs HF_HUB_DISABLE_XET.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.fail: Callable[[Request], Failure | None] = lambda _: None
        self.uses_lfs: Callable[[str], bool] = lambda _: False
        self.objects: dict[str, bytes] = {}
        self.url = ""

    def uploads(self) -> list[bytes]:
        """Every body received, and every file in one: commits carry theirs in base64."""
        found = [request.body for request in self.requests]
        branches = [files for repo in self.repositories.values() for files in repo.branches.values()]
        found += [content for files in branches for content in files.values()]
        found += self.objects.values()
        for request in self.requests:
            if "/commit/" in request.path:
                found += [base64.b64decode(v["content"]) for kind, v in lines(request.body) if kind == "file"]
            if "/preupload/" in request.path:
                found += [base64.b64decode(file["sample"]) for file in json.loads(request.body)["files"]]
        return found

    def commits_of(self, repo_id: str) -> int:
        return len(self.repositories[repo_id].commits) - 1

    # ---- The routes ----

    def answer(self, request: Request) -> tuple[int, dict[str, str], bytes]:
        for method, pattern, route in ROUTES:
            match = re.fullmatch(pattern, request.path)
            if match and request.method in method.split():
                return route(self, request, *(unquote(part) for part in match.groups() if part is not None))
        return as_json({"error": f"no route {request.method} {request.path}"}, 404)

    def create(self, request: Request) -> tuple[int, dict[str, str], bytes]:
        wanted = json.loads(request.body)
        repo_id = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        known = repo_id in self.repositories
        self.repositories.setdefault(repo_id, Repository(wanted.get("visibility") == "private"))
        return as_json({"url": f"{self.url}/{repo_id}", "name": repo_id}, 409 if known else 200)

    def who(self, request: Request) -> tuple[int, dict[str, str], bytes]:
        return as_json({"type": "user", "name": "me", "orgs": [], "auth": {}})

    def validate(self, request: Request) -> tuple[int, dict[str, str], bytes]:
        return as_json({"errors": [], "warnings": []})

    def branch(self, request: Request, repo_id: str, name: str) -> tuple[int, dict[str, str], bytes]:
        branches = self.repositories[repo_id].branches
        known = name in branches
        branches.setdefault(name, dict(branches["main"]))
        return as_json({}, 409 if known else 200)

    def preupload(self, request: Request, repo_id: str, revision: str) -> tuple[int, dict[str, str], bytes]:
        files = self.repositories[repo_id].branches[revision]

        def about(path: str) -> dict[str, Any]:
            lfs = self.uses_lfs(path)
            oid = None
            if path in files:
                content = files[path]
                oid = hashlib.sha256(content).hexdigest() if lfs else git_sha(content)
            return {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid}

        return as_json({"files": [about(file["path"]) for file in json.loads(request.body)["files"]]})

    def lfs_batch(self, request: Request, repo_id: str) -> tuple[int, dict[str, str], bytes]:
        objects = []
        for wanted in json.loads(request.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.objects:
                answer["actions"] = {"upload": {"href": f"{self.url}/objects/{wanted['oid']}"}}
            objects.append(answer)
        return as_json({"transfer": "basic", "objects": objects})

    def lfs_put(self, request: Request, oid: str) -> tuple[int, dict[str, str], bytes]:
        assert hashlib.sha256(request.body).hexdigest() == oid
        self.objects[oid] = request.body
        return 200, {}, b""

    def commit(self, request: Request, repo_id: str, revision: str) -> tuple[int, dict[str, str], bytes]:
        repo = self.repositories[repo_id]
        files = dict(repo.branches[revision])
        for kind, value in lines(request.body):
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif kind == "deletedFile":
                files.pop(value["path"], None)
        repo.branches[revision] = files
        repo.commits.append(hashlib.sha1(request.body).hexdigest())
        return as_json({"commitUrl": f"{self.url}/{repo_id}/commit/{repo.commits[-1]}", "commitOid": repo.commits[-1]})

    def info(self, request: Request, repo_id: str, revision: str = "main") -> tuple[int, dict[str, str], bytes]:
        if repo_id not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        repo = self.repositories[repo_id]
        siblings = [{"rfilename": path} for path in repo.files]
        facts = {"id": repo_id, "sha": repo.commits[-1], "private": repo.private, "tags": [], "siblings": siblings}
        return as_json(facts)

    def resolve(self, request: Request, repo_id: str, revision: str, path: str) -> tuple[int, dict[str, str], bytes]:
        if repo_id not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        repo = self.repositories[repo_id]
        files = repo.branches.get(revision, repo.files)
        commit = {"X-Repo-Commit": repo.commits[-1]}
        if path not in files:
            return 404, commit | {"X-Error-Code": "EntryNotFound"}, b""
        return 200, commit | {"ETag": f'"{git_sha(files[path])}"'}, files[path]


NAME = r"([^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., tuple[int, dict[str, str], bytes]]]] = [
    ("POST", r"/api/repos/create", Hub.create),
    ("GET", r"/api/whoami-v2", Hub.who),
    ("POST", r"/api/validate-yaml", Hub.validate),
    ("POST", rf"/api/models/{NAME}/branch/([^/]+)", Hub.branch),
    ("POST", rf"/api/models/{NAME}/preupload/([^/]+)", Hub.preupload),
    ("POST", rf"/api/models/{NAME}/commit/([^/]+)", Hub.commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Hub.lfs_batch),
    ("PUT", r"/objects/(\w+)", Hub.lfs_put),
    ("GET", rf"/api/models/{NAME}(?:/revision/([^/]+))?", Hub.info),
    ("GET HEAD", rf"/{NAME}/resolve/([^/]+)/(.+)", Hub.resolve),
]


def as_json(value: Any, status: int = 200) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


def lines(commit: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """The operations of a commit."""
    for line in commit.splitlines():
        entry = json.loads(line)
        yield entry["key"], entry["value"]


def git_sha(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self._chunk, b""))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        request = Request(self.command, urlsplit(self.path).path, body, token)
        self.hub.requests.append(request)
        failure = self.hub.fail(request)
        if failure is not None and failure.status == 0:
            self.close_connection = True
            return
        if failure is None:
            status, headers, content = self.hub.answer(request)
        else:
            status, headers, content = as_json({"error": failure.message}, failure.status)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _chunk(self) -> bytes:
        size = int(self.rfile.readline(), 16)
        content = self.rfile.read(size)
        self.rfile.readline()
        return content

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """A Hub, for as long as this lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def point_client_at(hub: Hub, monkeypatch: pytest.MonkeyPatch, cache: Any, token: str | None) -> None:
    """Makes the real client of this process talk to a server; it read HF_ENDPOINT long ago, when it was imported."""
    import huggingface_hub
    import transformers.utils.hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)  # older releases of transformers use this one
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    impatient = SimpleNamespace(**vars(time) | {"sleep": lambda _: None})
    monkeypatch.setattr(huggingface_hub.utils._http, "time", impatient)  # between its six attempts
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
