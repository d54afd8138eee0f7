"""Operations of a reading process that open what they must not."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path
from typing import Any

Answer = tuple[dict[str, Any], bytes]


def _file(header: dict[str, Any], payload: bytes) -> Answer:
    return {"text": Path("/etc/passwd").read_text()}, b""


def _socket(header: dict[str, Any], payload: bytes) -> Answer:
    socket.socket()
    return {}, b""


def _pipe(header: dict[str, Any], payload: bytes) -> Answer:
    os.pipe()
    return {}, b""


def _write(header: dict[str, Any], payload: bytes) -> Answer:
    Path(header["path"]).write_text("")
    return {}, b""


def _program(header: dict[str, Any], payload: bytes) -> Answer:
    subprocess.run(["true"], check=True)
    return {}, b""


def _connect(header: dict[str, Any], payload: bytes) -> Answer:
    socket.create_connection(("127.0.0.1", 9), 5.0)
    return {}, b""


def _remove(header: dict[str, Any], payload: bytes) -> Answer:
    Path(header["path"]).unlink()
    return {}, b""


OPERATIONS = {
    "file": _file,
    "socket": _socket,
    "pipe": _pipe,
    "write": _write,
    "program": _program,
    "connect": _connect,
    "remove": _remove,
}
