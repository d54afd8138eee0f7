"""A stand-in for the Hub's HTTP API on loopback: repositories of models, their commits, and LFS.

It answers what huggingface_hub asks when it creates, lists, commits and downloads; the routes and
fields are those that its client reads (``hf_api.py``, ``_commit_api.py``, ``lfs.py`` of 0.36
and 2.4).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants, file_download

WRITES, READS = "hf_writes", "hf_reads"
"""Tokens of somebody who may write, and of somebody who may only read."""
_LFS_FROM = 1 << 20


@dataclass
class Repository:
    """Commits by their id, each all files by their path; branches by name."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit with exactly these files."""
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha

    def files(self, revision: str) -> dict[str, bytes]:
        """Return the files of a branch or commit."""
        return self.commits[self.branches.get(revision, revision)]


@dataclass
class Hub:
    """Everything that is stored, what was asked, and what answers with an error instead."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    failures: dict[str, tuple[int, str]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)  # what a listing says in place of the truth
    slow_s: float = 0.0  # before each answer
    address: str = ""


class Refused(Exception):
    """An answer with an error, in the Hub's words."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Serve an empty Hub on a free port."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def point_at(address: str, patch: pytest.MonkeyPatch) -> None:
    """Have the client of this process ask an address, as HF_ENDPOINT does before its import."""
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download):  # the second in versions before 1
        patch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    patch.setattr(constants, "ENDPOINT", address)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    # Xet needs a storage service of its own; without it the client uploads over HTTP.
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None: ...

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.state.asked.append(f"{self.command} {path}")
        time.sleep(self.state.slow_s)
        try:
            for part, (status, message) in self.state.failures.items():
                if part in f"{self.command} {path}":
                    raise Refused(status, "", message)

            for pattern, answer in _ROUTES:
                if found := re.fullmatch(pattern, f"{self.command} {path}"):
                    status, headers, data = answer(self, body, *found.groups())
                    self._send(status, headers, data)
                    return
            raise Refused(404, "EntryNotFound")
        except Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self._send(refused.status, headers, b"{}")

    def _send(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def writer(self) -> None:
        """Refuse who may not write."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token == READS:
            raise Refused(403, "", "You need write access to this resource")
        if token != WRITES:
            raise Refused(401, "", "Invalid credentials in Authorization header")

    def repository(self, name: str) -> Repository:
        """Return a repository that this user may see."""
        known = "Authorization" in self.headers
        found = self.state.repositories.get(name)
        if found is None or (found.private and not known):
            raise Refused(404 if known else 401, "RepoNotFound", "Repository not found")
        if found.gated:
            raise Refused(403, "GatedRepo", "Access to this model is restricted")
        return found

    def files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        """Return the commit of a revision, and its files."""
        repository = self.repository(name)
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repository.commits[sha]


Answer = tuple[int, dict[str, str], bytes]


def _json(value: Any, status: int = 200) -> Answer:
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


def git_id(content: bytes) -> str:
    """Return the id that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _is_large(path: str, size: int) -> bool:
    return path.endswith((".gguf", ".onnx", ".data")) or size >= _LFS_FROM


def _info(handler: _Handler, body: bytes, name: str, revision: str | None = None) -> Answer:
    sha, files = handler.files(name, revision or "main")
    siblings = []
    for path, content in files.items():
        size = handler.state.sizes.get(path, len(content))
        entry = {"rfilename": path, "size": size, "blobId": git_id(content)}
        if _is_large(path, len(content)):
            sha256 = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"sha256": sha256, "size": size, "pointerSize": 134}
        siblings.append(entry)
    return _json({"_id": "1", "id": name, "modelId": name, "sha": sha, "siblings": siblings})


def _tree(handler: _Handler, body: bytes, name: str, revision: str) -> Answer:
    entries = []
    for path, content in handler.files(name, revision)[1].items():
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content)}
        entry["oid"] = git_id(content)
        if _is_large(path, len(content)):
            oid = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
        entries.append(entry)
    return _json(entries)


def _create(handler: _Handler, body: bytes) -> Answer:
    handler.writer()
    asked = json.loads(body)
    name = f"{asked['organization']}/{asked['name']}"
    if name in handler.state.repositories:
        return _json({"error": "exists", "url": f"{handler.state.address}/{name}"}, 409)
    private = asked.get("private") is True or asked.get("visibility") == "private"
    repository = handler.state.repositories[name] = Repository(private)
    repository.commit({})
    return _json({"url": f"{handler.state.address}/{name}"})


def _branch(handler: _Handler, body: bytes, name: str, branch: str) -> Answer:
    handler.writer()
    branches = handler.repository(name).branches
    if branch in branches:
        return _json({"error": "exists"}, 409)
    branches[branch] = branches["main"]
    return _json({})


def _validate(handler: _Handler, body: bytes) -> Answer:
    content = json.loads(body)["content"]
    metadata = yaml.safe_load(content.split("---")[1])
    errors = []
    for model in metadata.get("base_model") or []:
        if isinstance(metadata["base_model"], list) and "/" not in model:
            errors.append({"message": '"base_model" must be a model id'})
    return _json({"errors": errors, "warnings": []}, 400 if errors else 200)


def _preupload(handler: _Handler, body: bytes, name: str, revision: str) -> Answer:
    handler.writer()
    _, there = handler.files(name, revision)
    found = []
    for file in json.loads(body)["files"]:
        path, size = file["path"], file["size"]
        mode = "lfs" if _is_large(path, size) else "regular"
        oid = git_id(there[path]) if path in there and mode == "regular" else None
        found.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return _json({"files": found})


def _batch(handler: _Handler, body: bytes, name: str) -> Answer:
    handler.writer()
    objects = []
    for wanted in json.loads(body)["objects"]:
        described = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in handler.state.large:
            href = f"{handler.state.address}/storage/{wanted['oid']}"
            described["actions"] = {"upload": {"href": href}}
        objects.append(described)
    return _json({"transfer": "basic", "objects": objects})


def _store(handler: _Handler, body: bytes, oid: str) -> Answer:
    assert hashlib.sha256(body).hexdigest() == oid
    handler.state.large[oid] = body
    return 200, {}, b""


def _commit(handler: _Handler, body: bytes, name: str, revision: str) -> Answer:
    handler.writer()
    repository = handler.repository(name)
    files = dict(repository.files(revision))
    for line in body.splitlines():
        match json.loads(line):
            case {"key": "header", "value": value}:
                repository.messages.append(value["summary"])
            case {"key": "file", "value": value}:
                files[value["path"]] = base64.b64decode(value["content"])
            case {"key": "lfsFile", "value": value}:
                files[value["path"]] = handler.state.large[value["oid"]]
            case {"key": "deletedFile", "value": value}:
                del files[value["path"]]

    sha = repository.commit(files, revision)
    url = f"{handler.state.address}/{name}/commit/{sha}"
    return _json({"success": True, "commitUrl": url, "commitOid": sha})


def _resolve(handler: _Handler, body: bytes, name: str, revision: str, path: str) -> Answer:
    sha, files = handler.files(name, revision)
    if path not in files:
        raise Refused(404, "EntryNotFound")
    content = files[path]
    large = _is_large(path, len(content))
    etag = hashlib.sha256(content).hexdigest() if large else git_id(content)
    headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}

    if wanted := re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", "")):
        start = int(wanted[1])
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return 206, headers, content[start:]
    return 200, headers, content


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, Any]] = [
    (rf"GET /api/models/{_NAME}", _info),
    (rf"GET /api/models/{_NAME}/revision/(.+)", _info),
    (rf"GET /api/models/{_NAME}/tree/(.+)", _tree),
    (r"POST /api/repos/create", _create),
    (rf"POST /api/models/{_NAME}/branch/(.+)", _branch),
    (r"POST /api/validate-yaml", _validate),
    (rf"POST /api/models/{_NAME}/preupload/(.+)", _preupload),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _batch),
    (r"PUT /storage/(\w+)", _store),
    (rf"POST /api/models/{_NAME}/commit/(.+)", _commit),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/([^/]+)/(.+)", _resolve),
]
