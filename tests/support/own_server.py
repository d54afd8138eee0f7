"""``racdeploy serve`` in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.commands import environment
from tests.support.waiting import PATIENCE_S

_MAIN = (
    "{before}import racdeploy.cli, racdeploy.serve.server as server; "
    "server.SHUTDOWN_GRACE_S = {grace_s}; server.RELOAD_EVERY_S = {reload_every_s}; "
    "racdeploy.cli.main()"
)


@dataclass(frozen=True)
class OwnServer:
    """A server that answers: the address of its API, its process, the lines that it printed."""

    url: str
    process: subprocess.Popen[str]
    lines: tuple[str, str]

    def engine_pid(self) -> int:
        """Return the child that runs the engine; another one reads texts (Linux)."""
        (engine,) = self.engine_pids()
        return engine

    def engine_pids(self) -> list[int]:
        """Return all children that run engines, in the order of their start (Linux)."""
        return sorted(
            child
            for child in children(self.process.pid)
            if b"racdeploy.engines.worker" in Path(f"/proc/{child}/cmdline").read_bytes()
        )

    def stop(self, number: signal.Signals) -> int:
        """Send a signal; return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)


@contextmanager
def serving_bundle(
    bundle: Path,
    *options: object,
    grace_s: float = 5,
    reload_every_s: float = 60,
    before: str = "",
    **variables: str,
) -> Iterator[OwnServer]:
    """Serve a bundle on a free port.

    Args:
        grace_s: how long it lets requests finish.
        reload_every_s: interval at least between two loads of a model that has died.
        before: Python code that it runs first.
    """
    main = _MAIN.format(grace_s=grace_s, reload_every_s=reload_every_s, before=before)
    command = [sys.executable, "-c", main]
    process = subprocess.Popen(
        [*command, "serve", str(bundle), "--port", "0", "--threads", "1", *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**variables),
    )

    with process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            url = line.strip().partition(" at ")[2]
            yield OwnServer(url, process, (line.rstrip(), process.stdout.readline().rstrip()))
        finally:
            process.kill()


def children(pid: int) -> list[int]:
    """Return the children of a process that run (Linux)."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[1]) == pid and fields[0] not in "ZX":
            found.append(int(name))

    return found
