"""A model that, while it loads in its engine's process, tries to do what it must not."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from racdeploy.errors import EngineError
from tests.support import opening


def load(request: dict[str, Any], settings: object) -> NoReturn:
    """Say of each attempt whether it went."""
    victim, kept = Path(request["victim"]), Path(request["kept"])
    attempts: dict[str, Callable[[], object]] = {
        "program": lambda: subprocess.run(["true"], check=True),
        "overwrite": lambda: victim.write_text("pwned"),
        "truncate": lambda: os.truncate(victim, 0),
        "new file": lambda: victim.with_name("new").write_text(""),
        "link": lambda: victim.with_name("link").symlink_to(victim),
        "remove": victim.unlink,
        "rename": lambda: victim.rename(kept / "moved"),
        "connect": lambda: socket.create_connection(("127.0.0.1", request["port"]), 5.0),
        "listen": lambda: socket.create_server(("127.0.0.1", 0)),
        "signal": lambda: os.kill(os.getppid(), 0),
        "thread": lambda: _in_thread(lambda: victim.write_text("pwned")),
        "read": victim.read_text,
        "keep": lambda: (kept / "model.packed").write_text("rows"),
        "device": lambda: Path("/dev/null").write_text("x"),
        **opening.attempts(str(victim)),
        "end": lambda: os.kill(os.getpid(), signal.SIGCONT),
    }

    went = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except OSError:
            went[name] = False
        else:
            went[name] = True
    raise EngineError("escapes-tried", json.dumps(went))


def _in_thread(work: Callable[[], object]) -> None:
    failures: list[OSError] = []

    def run() -> None:
        try:
            work()
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
