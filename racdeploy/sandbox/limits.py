"""Limits that a sandboxed process sets on itself after its imports.

All of them hold on Linux. macOS does not limit memory.
"""

from __future__ import annotations

import resource
import signal
import time

from racdeploy.processes import landlock, privileges
from racdeploy.processes.landlock import ALL, WRITE, Access
from racdeploy.processes.memory import resident_bytes

_RENEW_AFTER_S = 1.0


def confine(memory_bytes: int, opens_files: bool) -> None:
    """Deny this process file writes, other processes, and more memory than ``memory_bytes``.

    The memory is counted from now. Unless it ``opens_files``, see :func:`close_files`.
    """
    limit_memory(memory_bytes)  # first, since it reads a file
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    if opens_files:
        landlock.restrict(WRITE | Access.EXECUTE, {})
    else:
        close_files()


def close_files() -> None:
    """Let this process open nothing more: no file, socket or pipe; open ones still work."""
    privileges.give_up("reader")
    landlock.restrict(ALL, {})
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))


def limit_memory(more_bytes: int) -> None:
    """Limit the private, writable memory of this process to ``more_bytes`` above the present.

    Files that are mapped for reading do not count.
    """
    if used := resident_bytes("VmData"):
        limit = used + more_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def limit_cpu_time(seconds: float) -> None:
    """End this process by SIGPROF after ``seconds`` more of processor time; 0 lifts the limit."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


class StepLimit:
    """Limit on the processor time of a step; a longer step ends this process.

    Setting the timer costs more than a short step, so it is set at most once a second. The limit is
    exact up to a second for each thread.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._renewed_at = float("-inf")

    def renew(self) -> None:
        """Start the time of a new step."""
        now = time.monotonic()
        if now - self._renewed_at > _RENEW_AFTER_S:
            limit_cpu_time(self._seconds)
            self._renewed_at = now
