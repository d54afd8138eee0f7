"""Operations of a reading process that open what they must not."""

from __future__ import annotations

import os
import socket
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


OPERATIONS = {"file": _file, "socket": _socket, "pipe": _pipe, "write": _write}
