"""Operations of a reading process that open what they must not."""

from __future__ import annotations

import mmap
import os
import resource
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from racdeploy.processes import privileges

Values = dict[str, Any]


def _file(request: Values) -> Values:
    return {"text": Path("/etc/passwd").read_text()}


def _socket(request: Values) -> Values:
    socket.socket()
    return {}


def _pipe(request: Values) -> Values:
    os.pipe()
    return {}


def _write(request: Values) -> Values:
    Path(request["path"]).write_text("")
    return {}


def _program(request: Values) -> Values:
    subprocess.run(["true"], check=True)
    return {}


def _connect(request: Values) -> Values:
    socket.create_connection(("127.0.0.1", 9), 5.0)
    return {}


def _remove(request: Values) -> Values:
    Path(request["path"]).unlink()
    return {}


def _try_all(request: Values) -> Values:
    """Say of each attempt whether it went."""
    if request["opens_files"]:
        privileges.give_up("reader")  # as a scorer does once it has imported its packages
    tried = {**attempts(request["path"]), "limit": _raise_limit}
    return {"went": [name for name, attempt in tried.items() if _goes(attempt)]}


def attempts(victim: str) -> dict[str, Callable[[], object]]:
    """Return attempts that need no descriptor of a file, and reach beyond this process."""
    return {
        "fork": _fork,
        "thread": lambda: threading.Thread(target=print).start(),
        "datagram": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close(),
        "unix socket": lambda: socket.socket(socket.AF_UNIX).close(),
        "mode": lambda: os.chmod(victim, 0o777),
        "time": lambda: os.utime(victim, (1, 1)),
        "attribute": lambda: os.setxattr(victim, "user.x", b"1"),
        "owner": lambda: os.chown(victim, os.getuid(), os.getgid()),
        "shared memory": lambda: mmap.mmap(-1, 600_000_000).close(),
        "memory file": lambda: os.close(os.memfd_create("x")),
        "parent": lambda: Path(f"/proc/{os.getppid()}/environ").read_bytes(),
    }


def _fork() -> None:
    if os.fork() == 0:
        os._exit(0)
    os.wait()


def _raise_limit() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**40, 2**40))


def _goes(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except (OSError, ValueError):
        return False
    return True


OPERATIONS = {
    "file": _file,
    "socket": _socket,
    "pipe": _pipe,
    "write": _write,
    "program": _program,
    "connect": _connect,
    "remove": _remove,
    "all": _try_all,
}
