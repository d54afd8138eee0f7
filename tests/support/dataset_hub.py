"""A stand-in for the Hub on loopback: one dataset, in what ``datasets`` asks of its API."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@contextmanager
def serve_dataset(
    name: str, revision: str, files: Mapping[str, bytes], *, gated: bool = False
) -> Iterator[str]:
    """Serve one commit of a dataset; yield the address that HF_ENDPOINT takes."""

    class Handler(_Handler):
        dataset, commit, content, refuses = name, revision, files, gated

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    dataset: str
    commit: str
    content: Mapping[str, bytes]
    refuses: bool

    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        path = unquote(asked.path)
        api, files = f"/api/datasets/{self.dataset}", f"/datasets/{self.dataset}/resolve/"

        if self.refuses:
            self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        elif path == api or path == f"{api}/revision/{self.commit}":
            self._send_json(self._describe())
        elif path.startswith(f"{api}/tree/{self.commit}"):
            folder = path.removeprefix(f"{api}/tree/{self.commit}").strip("/")
            self._send_json(self._list(folder, inside="recursive=True" in asked.query))
        elif path.startswith(files):
            self._send_file(path.removeprefix(files).partition("/")[2])
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        asked = json.loads(self.rfile.read(length))
        wanted = asked.get("paths", [])
        self._send_json([entry for entry in self._list("") if entry["path"] in wanted])

    def _describe(self) -> dict[str, Any]:
        siblings = [{"rfilename": name} for name in self.content]
        about = {"id": self.dataset, "sha": self.commit, "siblings": siblings}
        return about | {"private": False, "gated": False, "disabled": False, "tags": []}

    def _list(self, folder: str, *, inside: bool = True) -> list[dict[str, Any]]:
        """Return the entries of a folder, with ``inside`` those of the folders in it as well."""
        start = f"{folder}/" if folder else ""
        found: dict[str, dict[str, Any]] = {}

        for name, data in self.content.items():
            if not name.startswith(start):
                continue

            parts = name.removeprefix(start).split("/")
            for depth in range(1, len(parts)):
                path = start + "/".join(parts[:depth])
                found[path] = {"type": "directory", "path": path, "size": 0, "oid": _oid(b"")}
            found[name] = {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}

        entries = list(found.values())
        if not inside:
            entries = [each for each in entries if "/" not in each["path"].removeprefix(start)]
        return entries

    def _send_file(self, name: str) -> None:
        if name not in self.content:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return

        data = self.content[name]
        headers = {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": self.commit}
        self._send(200, data, headers)

    def _send_json(self, found: object) -> None:
        self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
